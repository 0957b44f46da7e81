"""Options that cannot work, found before anything runs."""

import errno
import inspect
import math
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from pkgutil import resolve_name
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import lightning as L
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers import Logger

from awconv.cli.arguments import LINKED
from awconv.errors import InputError, is_number
from awconv.tasks.schedule import accumulation_scheduler

# where an exception comes from the options and not from a bug of this project or of a fork
_LIBRARIES = {
    *("lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "jsonargparse"),
    *("torch", "torchvision", "torchmetrics", "timm", "numpy", "matplotlib", "rich", "tqdm"),
    *("wandb", "mlflow", "comet_ml", "tensorboard", "tensorboardX", "neptune", "litlogger"),
    *sys.stdlib_module_names,
}
_MINIMA: dict[str, dict[str, float]] = {
    "Trainer": {
        "accumulate_grad_batches": 1,
        "check_val_every_n_epoch": 1,
        "log_every_n_steps": 0,
        "num_sanity_val_steps": -1,
        "gradient_clip_val": 0,
        "min_epochs": 0,
        "min_steps": 0,
    },
    "EarlyStopping": {"patience": 0},
    "LearningRateFinder": {"min_lr": 1e-12, "max_lr": 1e-12, "num_training_steps": 1},
    "BatchSizeFinder": {"steps_per_trial": 1, "init_val": 1, "max_trials": 1},
}


def require_sensible_options(config: Any, command: str) -> None:
    """Refuses options that the parser lets through and that cannot work.

    These are numbers on which Lightning divides by zero or that no machine can count to, nulls and names that a
    constructor does not take, and folders in which a callback of ``fit`` could write no checkpoint.

    Args:
        config: The parsed config of the command.
        command: ``fit``, ``validate``, ``test`` or ``predict``.

    Raises:
        InputError: If there is one.
    """
    for name, value in _numbers(config, ""):
        if isinstance(value, int) and abs(value) >= 2**63:
            # Python refuses to print more digits than some thousands
            said = value if value.bit_length() < 1000 else f"{hex(value)[:40]}..."
            raise InputError(f"{name}={said}: expected a whole number below 2**63; give a smaller one")
    trainer = config.trainer
    _require_minima("trainer.", "Trainer", trainer)
    every = trainer.get("val_check_interval")
    if is_number(every) and every <= 0:
        raise InputError(
            f"trainer.val_check_interval={every}: expected a part of an epoch above 0, or a number of batches from 1; "
            "to validate never give --trainer.limit_val_batches 0"
        )
    if command == "fit" and trainer.get("limit_train_batches") == 0:
        raise InputError(
            "trainer.limit_train_batches=0: expected at least one batch to train on; to measure without training use "
            "the command validate or test"
        )
    for name in ("max_epochs", "max_steps"):
        if command == "fit" and trainer.get(name) == 0 and not config.get("ckpt_path"):
            raise InputError(
                f"trainer.{name}=0 trains nothing; give at least 1, or to measure without training the command "
                "validate or test"
            )
    for name, spec in _objects(config, ""):
        _require_sensible_object(name, spec)
    if command == "fit":
        for name, spec in _objects(config, ""):
            folder = (spec.get("init_args") or {}).get("dirpath", None)
            if isinstance(folder, str) and "://" not in folder:
                _require_writable(f"{name}.dirpath", folder)


def _require_writable(argument: str, folder: str) -> None:
    """Refuses a folder for checkpoints in which none could be written, before an epoch is lost on it."""
    # Lightning makes the folder that a link leads to
    there = Path(os.path.realpath(Path(folder).expanduser()))
    while not there.exists() and not there.is_symlink():
        there = there.parent
    why = "the folder is not named" if not folder else f"{there} is no folder" if not there.is_dir() else ""
    if not why:
        try:  # what a file system says of its permissions need not be so
            with TemporaryDirectory(dir=there):
                pass
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # a resumed run may find room before it writes
                why = f"{there} cannot be written to ({error.strerror})"
    if why:
        raise InputError(f"{argument}={folder!r}: {why}; give another")


def _require_sensible_object(name: str, spec: Namespace) -> None:
    """Refuses what the parser lets through to a constructor that cannot do with it."""
    kind, options = resolve_name(spec.class_path), vars(spec.init_args) if spec.get("init_args") else {}
    if not isinstance(kind, type):  # a function that makes the object
        return
    _require_minima(f"{kind.__name__}.", kind.__name__, options)
    if _root(kind.__module__) == "awconv" and spec.get("dict_kwargs"):
        raise InputError(f"{name}: {kind.__name__} has no option {min(spec.dict_kwargs)!r}; leave it out")
    for option, value in options.items():
        if isinstance(value, float) and math.isnan(value) and _root(kind.__module__) in ("awconv", "lightning"):
            raise InputError(f"{name}.{option}={value}: expected a number")
    for option in [option for option, value in options.items() if value is None and option not in LINKED]:
        constructors = (vars(cls)["__init__"] for cls in kind.__mro__ if "__init__" in vars(cls))
        found = (inspect.signature(one).parameters.get(option) for one in constructors)
        parameter = next(filter(None, found), None)
        if parameter and parameter.annotation in (bool, int, float, str) and parameter.default is not None:
            expected = parameter.annotation.__name__
            raise InputError(f"{name}.{option}=null: expected {expected}; give one, or leave it out for the default")


def _objects(value: Any, name: str) -> Iterator[tuple[str, Namespace]]:
    if isinstance(value, Namespace):
        if isinstance(value.get("class_path"), str):
            yield name, value
        for key, inner in vars(value).items():
            yield from _objects(inner, f"{name}.{key}" if name and key != "init_args" else name or key)
    elif isinstance(value, list):
        for inner in value:
            yield from _objects(inner, name)


def _require_minima(prefix: str, kind: str, options: Any) -> None:
    for name, low in _MINIMA.get(kind, {}).items():
        value = options.get(name)
        if value is not None and not (is_number(value) and value >= low):
            raise InputError(f"{prefix}{name}={value}: expected a number of at least {low}, or null for the default")


def _numbers(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (dict, Namespace)):
        for key, inner in (vars(value) if isinstance(value, Namespace) else value).items():
            yield from _numbers(inner, f"{name}.{key}" if name and key != "init_args" else name or str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, name)
    else:
        yield name, value


def require_sensible_trainer(trainer: L.Trainer) -> None:
    """Refuses two answers to how many batches make a step, and no time to make one."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        left = callback.time_remaining() if isinstance(callback, Timer) else None
        if left is not None and left <= 0:
            raise InputError("trainer.max_time, or the duration of Timer, leaves no time to train; give more, or null")
    given = trainer.accumulate_grad_batches
    scheduler = accumulation_scheduler(trainer)
    if given != 1 and scheduler is not None and scheduler.going_to_accumulate_grad_batches():
        raise InputError(
            f"trainer.accumulate_grad_batches={given}: GradientAccumulationScheduler sets it from epoch to epoch; "
            "leave one of the two out"
        )


def construct(cls: type, *args: Any, **kwargs: Any) -> Any:
    """Makes an object of a class that the config names.

    Args:
        cls: The class.
        args: Its arguments.
        kwargs: Its arguments by name.

    Raises:
        InputError: If a library's constructor refuses the arguments, or needs a package that is not installed.
    """
    try:
        return cls(*args, **kwargs)
    except InputError:
        raise
    except Exception as error:
        frames = _frames(error)[1:]
        # without a frame the arguments do not fit the constructor
        at_fault = all(map(_is_library, frames)) if frames else _root(cls.__module__) in _LIBRARIES
        if at_fault or isinstance(error, MisconfigurationException):
            raise InputError(_refusal(cls, error, kwargs)) from error
        raise


def refused_by_library(error: Exception) -> str | None:
    """Finds the callback or logger of a library that cannot do what it was asked for, behind an exception of a run.

    Args:
        error: The exception.

    Returns:
        What it says in one line; None where code of this project or of a fork had a part in it.
    """
    frames = [frame for frame in _frames(error) if not _module(frame).startswith("awconv.cli")]
    if frames and isinstance(error, ValueError) and _module(frames[-1]).startswith("lightning.pytorch.loops."):
        return f"the trainer refuses its settings: {' '.join(str(error).split())}"  # whoever called the loop
    if not all(map(_is_library, frames)):
        return None
    if any(
        # saving goes through the same module
        _module(frame).endswith(".checkpoint_connector") and re.match("_?(restore|resume)", frame.f_code.co_name)
        for frame in frames
    ):
        return (
            f"the state of the run in the checkpoint cannot be restored ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); start from its weights with --model.initial_weights"
        )
    for frame in reversed(frames):
        owner = frame.f_locals.get("self")
        if isinstance(owner, L.Callback | Logger):
            return _refusal(type(owner), error, vars(owner))
    return None


def has_foreign_frames(error: BaseException) -> bool:
    """Whether code of a fork had a part in an exception: neither a library's nor this project's."""
    # of a worker there is only the text
    files = re.findall(r'File "([^<].*?)", line \d', str(error)) if "Original Traceback" in str(error) else []
    roots = {_root(_module(frame)) for frame in _frames(error)} | {_root_of_file(file) for file in files}
    return not roots <= {*_LIBRARIES, "awconv"}


def _root_of_file(file: str) -> str:
    folder = max((path for path in sys.path if path and file.startswith(path + os.sep)), key=len, default="")
    return file.removeprefix(folder + os.sep).split(os.sep)[0].removesuffix(".py")


def _frames(error: BaseException) -> list[FrameType]:
    return [frame for frame, _ in traceback.walk_tb(error.__traceback__)]


def _is_library(frame: FrameType) -> bool:
    return _root(_module(frame)) in _LIBRARIES


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _root(module: str) -> str:
    return module.partition(".")[0]


def _refusal(cls: type, error: Exception, options: Mapping[str, Any]) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, ImportError):
        return f"{cls.__name__} needs a package that is not installed: {text}"
    named = {name.strip("_"): value for name, value in options.items()}
    given = ", ".join(
        f"{name}={value!r}"
        for name, value in named.items()
        if re.search(rf"\b{name}\b", text) or (isinstance(value, str) and len(value) > 3 and value in text)
    )
    kind = "" if isinstance(error, ValueError | MisconfigurationException) else f"{type(error).__name__}: "
    return f"{cls.__name__}{f'({given})' if given else ''} is refused: {kind}{text}"
