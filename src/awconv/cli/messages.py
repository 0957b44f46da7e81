"""What a user is told: in one line, where the parser or an exception says it in many."""

import ast
import difflib
import errno
import inspect
import os
import re
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser

import awconv.data
import awconv.tasks
from awconv import config_text
from awconv.checkpoint import heirs
from awconv.cli.arguments import LINKED, SUBCOMMANDS
from awconv.cli.checks import has_foreign_frames
from awconv.errors import InputError, printable

# a full disk, a quota, a limit on the size of files, a file system that cannot be written to
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_NO_WAY = {
    errno.EACCES: "change its permissions, or name another",
    errno.EPERM: "change its permissions, or name another",
    errno.ELOOP: "it is a link that leads back to itself; name what it should lead to",
    errno.ENOTDIR: "a part of the path is a file and no folder; name another",
    errno.EIO: "the disk fails, or the server that it is mounted from; copy the file elsewhere, and name the copy",
    errno.ESTALE: "the server that it is mounted from has lost it; mount it again, then start or --resume the run",
}
# what torch and NumPy say where there is too little memory
_NO_MEMORY = re.compile("not enough memory|can't allocate memory|CUDA error: out of memory|STATUS_ALLOC_FAILED")
# of sizes that cannot be counted: wrong options, or wrong code
_NO_SIZE = re.compile("Storage size calculation overflowed|array is too big|Maximum allowed (dimension|size) exceeded")
# what gloo and the rendezvous say when the process at the other end is gone
PEER_IS_GONE = re.compile(r"Connection (closed|reset) by peer|failed to recv, got 0 bytes")


def one_line(message: str, parser: LightningArgumentParser) -> str:
    """Rewrites a message of jsonargparse as one line that ends in the remedy."""
    text = " ".join(message.split())
    if unknown := re.search(r"(?:[Oo]ption '|unrecognized arguments: -*)([\w.]+)", text):
        return f"unknown option {unknown[1]!r}{_nearest_option(unknown[1], parser)}"
    if "subcommand" in text and not text.startswith("Parser"):
        return f"{text.split(' (')[0].rstrip('.')}; choose one of {', '.join(SUBCOMMANDS)}"
    if missing := re.search(r"required: (.+)", text):
        names = [name.rsplit(".", 1)[-1] for name in missing[1].split(", ")]
        return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} required{_HOW_TO_GIVE.get(names[0], '')}"
    if "expected one argument" in text:
        return f"{text.split()[1].rstrip(':')} or one of its options has no value; give it one after a space or ="
    key = re.search(r'Parser key "([\w.]+)"', text)
    value = re.search(r".*(?:Given value|Got value): ?(.*?)$", text)  # the last: nested types say theirs before
    if key and (given := re.search(r"Unable to load config '(.*?)' - (.*)", text)):
        why = "" if "Unable" in given[2] else f" ({given[2]})"
        return (
            f"{key[1]}={given[1]!r} is neither options nor a file that holds them{why}; give {key[1]}.NAME one by one"
        )
    if not key or not value:
        return re.sub(r'Parser key "([\w.]+)": ', r"\1: ", text)
    if broken := _fault_of_file(value[1]):
        return f"{key[1]}: {broken}"
    shown = _shown(value[1])
    if key[1] in ("model", "data"):
        if "." in shown:
            return f"{key[1]}={shown!r} cannot be imported; check the module's name and the class's"
        choices = [cls.__name__ for cls in _classes_for(key[1])]
        return f"{key[1]}={shown!r} is no known class; choose one of {', '.join(choices)}, or a dotted import path"
    # each type of a union is told once in "Subtypes" and once in "Errors"
    choices = list(dict.fromkeys(", ".join(re.findall(r"Literal\[(.*?)\]", text)).split(", ")))
    if choices != [""]:
        near = difflib.get_close_matches(value[1], [choice.strip("'") for choice in choices], n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{key[1]}={shown!r} is unknown; choose one of {', '.join(choices)}{hint}"
    expected = re.search(r"Subtypes: \[(.*?)\] Errors", text) or re.search(r"Expected a (.*?)\.? Got value", text)
    if not expected:
        return text
    types = re.sub(r"<class '([\w.]+)'>", r"\1", expected[1])
    types = re.sub(r"(?:\w+\.)+(?=\w)", "", types).replace("NoneType", "null")
    types = re.sub(r", (?![^\[]*\])", " or ", types)
    return f"{key[1]}={shown!r} is not valid; expected {types}{_spelled(value[1], types)}"


def _fault_of_file(value: str) -> str:
    """What is wrong with a config that was given as the value of an option."""
    try:
        if Path(value).is_file():
            config_text.load_file(Path(value))
    except InputError as error:
        return str(error)
    except (OSError, ValueError):  # a value that is no path
        pass
    return ""


def _shown(value: str) -> str:
    """Shows a mapping by its class or its keys alone: it may be the content of a file that was named by mistake."""
    with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
        read = ast.literal_eval(value)
        return _without_values(read) if isinstance(read, dict | list) else value
    return value


def _without_values(value: Any) -> str:
    if isinstance(value, dict):
        kind = value.get("class_path")
        return kind if isinstance(kind, str) else f"{{{', '.join(map(str, value))}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_without_values, value))}]"
    return repr(value)


def _spelled(value: str, types: str) -> str:
    """How a value is written here that other tools write otherwise."""
    text = value.strip()
    if "null" in types and text.lower() in ("none", "null", "nil", ""):
        return "; give null"
    if re.search(r"(?<!\[)int", types):
        with suppress(ValueError, OverflowError):
            return f"; give {_whole(text)}"
    if "bool" in types and text.lower() in ("1", "0", "y", "n", "t", "f", "1.0", "0.0"):
        return f"; give {'true' if text.lower() in ('1', 'y', 't', '1.0') else 'false'}"
    for kind, read in (("list[int]", _whole), ("list[float]", float)):
        if kind in types:
            with suppress(ValueError, OverflowError):
                return f"; give {[read(item) for item in text.strip('()[]').split(',')]}"
    if re.search(r"float(?! or int)", types) and re.fullmatch(r"[-+]?\d+,\d+", text):
        return f"; give {text.replace(',', '.')}"
    if "str" in types:
        return "; in a file, texts that read like numbers, dates or switches stand between quotes"
    return ""


def _whole(text: str) -> int:
    number = float(text)
    if not number.is_integer():
        raise ValueError(text)
    return int(number)


_BASES = (awconv.tasks.BaseTask, awconv.data.BaseDataModule, awconv.data.ClassificationDataModule)
_HOW_TO_GIVE = {
    "backbone": ": add a model, such as -c configs/models/aw_resnet20.yaml or --model.backbone resnet50",
    "model": ": add a model, such as -c configs/models/aw_resnet20.yaml",
    "head": ": add a detector, such as -c configs/models/aw_faster_rcnn_resnet18_fpn.yaml or --model.head faster_rcnn",
    "data": ": add a recipe, such as -c configs/recipes/cifar10.yaml",
}


def _classes_for(section: str) -> list[type]:
    """Lists the task or data module classes that can be named, this project's and those of imported forks."""
    found = set(heirs(L.LightningModule if section == "model" else L.LightningDataModule))
    found = {cls for cls in found - set(_BASES) if not cls.__module__.startswith(("lightning.", "torchmetrics."))}
    return sorted(found, key=lambda cls: cls.__name__)


def _nearest_option(name: str, parser: LightningArgumentParser) -> str:
    section, _, option = name.partition(".")
    if section == "checkpoint" and option in inspect.signature(ModelCheckpoint).parameters:
        if option == "save_last":
            return "; last.ckpt is kept anyway, --last_checkpoint.every_n_steps says how often"
        follow = (
            "--trainer.callbacks.monitor=METRIC --trainer.callbacks.mode=max|min " if option == "save_top_k" else ""
        )
        return (
            ": best.ckpt is always the best alone; for more checkpoints add --trainer.callbacks+=ModelCheckpoint "
            f"{follow}--trainer.callbacks.{option}=..."
        )
    subparsers = [a.choices.values() for a in parser._actions if isinstance(a.choices, dict)]
    options = {action.dest for one in [parser, *(p for group in subparsers for p in group)] for action in one._actions}
    for section in ("model", "data"):
        for cls in _classes_for(section):
            for ancestor in cls.__mro__:
                if not ancestor.__module__.startswith(("lightning.", "torch", "builtins")):
                    options |= {f"{section}.{name}" for name in inspect.signature(ancestor).parameters}
    # which the data decide
    options = {option for option in options if option.startswith("data.") or option.rsplit(".", 1)[-1] not in LINKED}
    tail = name.rsplit(".", 1)[-1]
    by_tail = {option.rsplit(".", 1)[-1]: option for option in sorted(options)}
    near = difflib.get_close_matches(tail, by_tail, n=1)
    if near and near[0] == tail:
        return f": {by_tail[tail]} is an option of some classes, but not of the one chosen"
    return f"; did you mean {by_tail[near[0]]}?" if near else "; --help lists the options"


def bad_input(error: BaseException) -> str | None:
    """Finds what the user did wrong behind an exception; the parser wraps those of constructors in its own."""
    said = str(error)
    if "Original Traceback" in said:  # of a worker, which raised what the last line says
        said = said.rstrip().rpartition("\n")[2].partition(": ")[2]
    text = " ".join(said.split())
    if isinstance(error, InputError):
        return text
    if exhausted := _exhausted(error, text):
        return exhausted
    if isinstance(error, MisconfigurationException):
        return None if has_foreign_frames(error) else text
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError | ValueError)
        and (_NO_MEMORY.search(text) or (_NO_SIZE.search(text) and not has_foreign_frames(error)))
    ):
        return f"out of memory ({text[:200]}); give a smaller --data.batch_size, image size or network"
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        name = str(error.filename)
        return f"{name[:40]!r}... ({len(name)} characters) is too long for a path; give a shorter one"
    if type(error).__module__.startswith("wandb.") and type(error).__name__ == "UsageError":
        return f"{text} (log in with `wandb login`, or set WANDB_MODE=offline)"
    # code that takes a file for a folder has a bug; which paths lead to a folder is checked where they are given
    is_bug = isinstance(error, NotADirectoryError) and has_foreign_frames(error)
    if isinstance(error, OSError) and error.errno in _NO_WAY and error.filename and not is_bug:
        return f"{error.filename} cannot be opened ({error.strerror}); {_NO_WAY[error.errno]}"
    if isinstance(error, ValueError) and text.startswith("embedded null"):
        return "a path or an option holds a NUL character; take it out"
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return (
            f"{error.filename or 'a file of the run'} could not be written ({error.strerror}); checkpoints written "
            "before are untouched: make room, or give another folder with --trainer.default_root_dir, then go on by "
            "--resume"
        )
    if isinstance(error, ValueError) and text.startswith("Expected more than 1 value per channel"):
        return (
            f"{text}: a normalisation sees one value a channel in a batch of one image; give --data.batch_size of at "
            "least 2, or for a detector --model.norm group"
        )
    if error.__cause__ is not None:
        return bad_input(error.__cause__)
    if error.__context__ is not None and "Does not validate against any of the Union subtypes" in text:
        return bad_input(error.__context__)
    return None


# as the operating system, torch and its workers say it; what a worker raised stands at the end of a long text
_EXHAUSTED = {
    r"Too many open files|received \d+ items of ancdata": (
        "the limit on open files is reached",
        "raise it with `ulimit -n 65536`, or give fewer --data.num_workers",
    ),
    r"shared memory ?\(shm\)|</torch_\w+>|out of shared memory|signal: Bus error": (
        "shared memory (/dev/shm) is full",
        "make it larger (docker run --shm-size 8g, or --ipc host), or give fewer --data.num_workers, 0 for none",
    ),
    r"DataLoader worker .*signal: (Killed|Terminated)": (
        "a process that loads data was killed, as the system does where memory runs out",
        "give fewer --data.num_workers, 0 for none, or a smaller --data.batch_size, or ask for more memory",
    ),
}


def _exhausted(error: BaseException, text: str) -> str | None:
    """What the machine or the job has too little of."""
    if not isinstance(error, OSError | RuntimeError | EOFError):
        return None
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    # "(pid(s) 12) exited unexpectedly" is said of workers that were killed, and of those that ended by themselves
    if any(worker.exitcode in (-9, -15) for frame in frames for worker in frame.f_locals.get("failed_workers", ())):
        text += " (signal: Killed)"
    if any(frame.f_globals.get("__name__") == "torch.multiprocessing.reductions" for frame in frames):
        # a tensor that the worker had sent is fetched from it, and it may have gone before the loader noticed
        for loader in (frame.f_locals.get("self") for frame in frames):
            for worker in getattr(loader, "_workers", ()):
                with suppress(RuntimeError):  # torch says it as well, wherever the process is when it hears of it
                    worker.join(1)
                if worker.exitcode in (-9, -15):
                    text = f"DataLoader worker (pid {worker.pid}) is killed by signal: Killed"
    if getattr(error, "errno", None) == errno.ENOSPC:
        # the semaphores of the queues to workers lie there too, and have no name that the error could give
        modules = [frame.f_globals.get("__name__", "") for frame in frames]
        text += " in shared memory (shm)" if any(name.startswith("multiprocessing.") for name in modules) else ""
    for pattern, (what, remedy) in _EXHAUSTED.items():
        if found := re.search(pattern, text):
            said = text[max(0, found.start() - 80) : found.end() + 80] if len(text) > 300 else text
            return f"{what} ({said}); {remedy}; checkpoints written before are untouched: go on by --resume"
    return None


def fail(message: str) -> NoReturn:
    """Says what the user did wrong, and ends the process with exit code 2."""
    rank, message = os.environ.get("LOCAL_RANK", "0"), printable(_shortened(message))
    print(f"error: {message}" if rank == "0" else f"error in process {rank}: {message}", file=sys.stderr)
    sys.exit(2)


def _shortened(message: str) -> str:
    """Cuts what nobody reads: long words, and the middle of a long message, whose end is the remedy."""
    message = re.sub(r"\S{400,}", lambda word: f"{word[0][:60]}... ({len(word[0])} characters)", message)
    return message if len(message) <= 1500 else f"{message[:1000]} ... {message[-400:]}"
