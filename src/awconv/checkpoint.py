"""Checkpoint files: read as weights only, checked whole, and what in them may be believed.

A checkpoint may be anyone's, and is data until the user says otherwise. Whatever reads a file of ``torch.save`` as
weights only comes here; this module imports nothing of the project but ``errors`` and ``files``.
"""

import ast
import inspect
import math
import os
import re
import sys
import sysconfig
import unicodedata
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from io import BytesIO
from mmap import ACCESS_READ, mmap
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Self, get_args, get_origin

import torch
from jsonargparse import ArgumentError
from jsonargparse._parameter_resolvers import get_signature_parameters
from torch import Tensor

from awconv.errors import InputError
from awconv.files import MAX_IMAGE_PIXELS

BEST, LAST, PREVIOUS = "best.ckpt", "last.ckpt", "previous.ckpt"

HPARAMS, DATA_HPARAMS = "hyper_parameters", "datamodule_hyper_parameters"
_VERSION = "pytorch-lightning_version"
# what a run's checkpoint may hold, and of what kind it is
_KINDS: dict[str, type | tuple[type, ...]] = {
    "state_dict": dict,
    HPARAMS: dict,
    DATA_HPARAMS: dict,
    "callbacks": dict,
    "loops": dict,
    "position": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "epoch": int,
    "global_step": int,
}
_MOST_ENTRIES = 100_000
_MOST_VALUES, _DEEPEST = 200_000, 50
_PRIMITIVES = (str, int, float, bool, type(None))


def read_tensors(path: Path, argument: str) -> Any:
    """Reads a file of ``torch.save`` as weights only, on the CPU; its tensors stay on the disk until they are used.

    Nothing in the file is run, and not much more memory is taken than the file has bytes. Compressed entries are
    refused (``torch.save`` compresses nothing), and so are entries whose checksum does not fit, tensors that are larger
    than what was saved of them, and values that are nested without end.

    Args:
        path: The file.
        argument: What named it, for messages.

    Returns:
        What was saved: tensors in mappings and lists, with numbers and texts beside them.

    Raises:
        InputError: If the file is missing, damaged or of another kind, or carries code.
    """
    named = f"{argument}={str(path)!r}"
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "is no regular file" if path.exists() else "does not exist"
        raise InputError(f"{named} {found}; give a file")
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"  # files from before torch 1.6 are none, and have no checksums
            reason = "" if is_zip else _carried(mmap(file.fileno(), 0, access=ACCESS_READ))
        reason = _what_is_wrong(path) if is_zip else reason
        # torch believes a zip file's entries to be as large as its pickle says, unless they are mapped
        content = None if reason else torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        reason = reason or _what_is_too_much(content)
        content = None if reason else _rebuilt(content)
    except Exception as error:  # the unpickler, the zip reader and the file system each raise their own kinds
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise InputError(
                f"{named} is not a checkpoint that can be loaded: it carries code or objects ({code[1]}), which are "
                "never run; only weights-only files are loaded: where you trust the file, convert it with "
                "torch.save(model.state_dict(), 'weights.pth')"
            ) from None
        reason = type(error).__name__
    if reason:
        raise InputError(
            f"{named} is not a checkpoint that can be loaded as weights only ({reason}): it is damaged, or another "
            "kind of file; give another"
        )
    return content


def _what_is_wrong(path: Path) -> str:
    with zipfile.ZipFile(path) as file:
        entries = file.infolist()
        if len(entries) > _MOST_ENTRIES:
            return f"{len(entries)} entries"
        with path.open("rb") as end:
            end.seek(-22, os.SEEK_END)
            whole = end.read(4) == b"PK\x05\x06" and entries[0].header_offset == 0
        if not whole or len(set(file.namelist())) < len(entries):
            return "something stands before, behind or twice among its entries"
        if packed := [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]:
            return f"entry {packed[0]!r} is compressed, as torch.save never does"
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            return "its entries overlap"
        if broken := file.testzip():
            return f"entry {broken!r} does not fit its checksum, or was saved without"
        pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
        return next(filter(None, (_carried(file.read(entry)) for entry in pickles)), "")


# which "weights only" allows: memory without bytes in the file, and attributes that hide a tensor's own
_NOT_FOR_WEIGHTS = re.compile(
    rb"c(?:builtins|__builtin__)\n(bytearray)\n|ctorch\._tensor\n(_rebuild_from_type_v2)\n"
    rb"|ctorch\._utils\n(_rebuild_parameter_with_state)\n"
)


def _carried(pickled: bytes | mmap) -> str:
    found = _NOT_FOR_WEIGHTS.search(pickled)
    return f"it carries {next(filter(None, found.groups())).decode()}" if found else ""


def _rebuilt(value: Any) -> Any:
    """Plain containers in place of those that may hold attributes of their own, as ``OrderedDict`` does."""
    if isinstance(value, dict):
        rebuilt = OrderedDict((key, _rebuilt(inner)) for key, inner in dict.items(value))
        metadata = getattr(value, "__dict__", {}).get("_metadata")  # versions of modules, in a state dictionary
        if isinstance(metadata, dict):
            rebuilt._metadata = _rebuilt(metadata)  # type: ignore[attr-defined]
            return rebuilt
        return dict(rebuilt)
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(map(_rebuilt, value))
    return value


def _what_is_too_much(content: Any) -> str:
    """Says what would take more memory than there is in the file; empty if nothing would."""
    beyond = 0
    for value in _leaves(content):
        if value is _TOO_MUCH:
            return "it is nested too deeply, or holds too many values"
        if isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu":
            # a few bytes may stand for a large tensor, by strides of zero
            beyond += max(0, value.numel() * value.element_size() - value.untyped_storage().nbytes())
    return f"its tensors are {beyond / 2**20:.0f} MiB larger than what was saved of them" if beyond > 2**26 else ""


def read_checkpoint(path: Path, argument: str) -> dict[str, Any]:
    """Reads the checkpoint of a run, as :func:`read_tensors` does, and checks its shape.

    ``state_dict`` holds tensors by name; hyperparameters hold numbers, texts, lists and mappings alone; states of the
    run are what they are called, where there are any. A ``config`` that no run can have written is left out.

    Args:
        path: The file.
        argument: What named it, for messages.

    Raises:
        InputError: If it is damaged or no checkpoint of a run; the message names the one before it if that is whole.
    """
    try:
        content = read_tensors(path, argument)
        if not isinstance(content, dict) or "state_dict" not in content:
            raise InputError(
                f"{argument}={str(path)!r} is no checkpoint of a run; bare weights go into --model.initial_weights"
            )
        if wrong := what_no_run_writes(content):
            raise InputError(f"{argument}={str(path)!r} is damaged, or no checkpoint of a run: {wrong}")
    except InputError as error:
        raise InputError(f"{error}{_the_one_before(path)}") from error.__cause__
    if not _is_config(content.get("config")):
        content.pop("config", None)
    for name in ("epoch", "global_step"):
        content.setdefault(name, 0)
    if not re.fullmatch(r"\d{1,9}(\.\d{1,9}){1,3}((a|b|rc|\.dev|\.post)\d{1,9})?", str(content.get(_VERSION))):
        content[_VERSION] = version("lightning")
    return content


def begins_afresh(content: Mapping[str, Any]) -> list[str]:
    """Lists the parts of a run's state that a checkpoint lacks, and a resumed run would begin anew."""
    lacking = {name for name in _STATES if name not in content}
    if "loops" in lacking:  # where the run was: without it the schedule begins anew as well
        lacking.add("lr_schedulers")
    return sorted(lacking)


_STATES = ("loops", "optimizer_states", "lr_schedulers", "callbacks")


def what_no_run_writes(content: dict[Any, Any]) -> str:
    """Says what in a checkpoint is of another kind than a run writes; empty if nothing is."""
    for name, kind in _KINDS.items():
        if name in content and (not isinstance(content[name], kind) or isinstance(content[name], bool)):
            return f"{name} is a {type(content[name]).__name__}"
    for name in ("epoch", "global_step"):
        if not 0 <= content.get(name, 0) < 2**63:
            return f"{name} is {str(content[name])[:40]}"
    for key, value in content["state_dict"].items():
        if not isinstance(key, str) or not (isinstance(value, Tensor) or key.endswith("_extra_state")):
            return f"state_dict[{str(key)[:80]!r}] is a {type(value).__name__}, and no tensor"
    for name in ("state_dict", "optimizer_states", "callbacks"):
        if any(isinstance(value, Tensor) and not is_plain(value) for value in _leaves(content.get(name))):
            return f"{name} holds a tensor without plain values"
    for name in (HPARAMS, DATA_HPARAMS, "position"):
        if not _is_primitive(content.get(name)) or not _is_by_name(content.get(name, {})):
            return f"{name} holds something else than numbers and texts by name"
    for name in ("callbacks", "loops"):
        for key, value in content.get(name, {}).items():
            if not isinstance(key, str) or not isinstance(value, dict):
                return f"{name}[{str(key)[:80]!r}] is a {type(value).__name__}"
    for name in ("optimizer_states", "lr_schedulers"):
        for value in content.get(name, []):
            if not isinstance(value, dict):
                return f"{name} holds a {type(value).__name__}"
    for state in content.get("optimizer_states", []):
        groups = state.get("param_groups")
        whole = isinstance(groups, list) and all(
            isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups
        )
        if not whole or not isinstance(state.get("state"), dict):
            return "optimizer_states holds no state of an optimiser"
    position = content.get("position", {})
    numbers = [position.get(name) for name in ("epochs", "batches", "accumulated")]
    # only the number of batches may be infinite
    if position and (not all(isinstance(n, int | float) and n >= 0 for n in numbers) or math.inf in numbers[::2]):
        return "position is not that of a run"
    for name in ("current_model_state", "averaging_state"):
        averaged = content.get(name, {})
        if not isinstance(averaged, dict) or not all(isinstance(value, Tensor) for value in averaged.values()):
            return f"{name} holds something else than tensors"
    return ""


def is_plain(value: Any) -> bool:
    """Whether it is a tensor whose values lie in memory, one by one: not a sparse one, nor one without values."""
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type != "meta"


_TOO_MUCH = object()


def _leaves(value: Any) -> Iterator[Any]:
    """Yields what a nest of mappings and lists holds, keys too.

    One list may stand in many places, by which a few bytes hold more than any memory: :data:`_TOO_MUCH` ends it.
    """
    stack = [(value, 0)]
    for _ in range(_MOST_VALUES):
        if not stack:
            return
        value, depth = stack.pop()
        if isinstance(value, dict | list | tuple | set | frozenset):
            if depth == _DEEPEST or len(value) + len(stack) > _MOST_VALUES:
                break
            inner = [*value, *dict.values(value)] if isinstance(value, dict) else value
            stack += [(item, depth + 1) for item in inner]
        else:
            yield value
    if stack:
        yield _TOO_MUCH


def _is_primitive(value: Any) -> bool:
    return all(isinstance(leaf, _PRIMITIVES) for leaf in _leaves(value))


def _is_by_name(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _is_config(value: Any) -> bool:
    """Whether it is a config of this project: sections, with a class of data and one of a model."""
    if not _is_by_name(value) or not _is_primitive(value):
        return False
    for section in (value.get("data"), value.get("model")):
        # the parser would take a name with dots for a path into the section
        if not _is_by_name(section) or not section.keys() <= {"class_path", "init_args", "dict_kwargs"}:
            return False
        if not isinstance(section.get("class_path"), str):
            return False
        if not all(_is_by_name(section.get(name) or {}) for name in ("init_args", "dict_kwargs")):
            return False
    others = [value.get(name) or {} for name in ("trainer", "checkpoint", "last_checkpoint")]
    return all(_is_by_name(section) and all(map(str.isidentifier, section)) for section in others)


def _the_one_before(path: Path) -> str:
    before = path.with_name(PREVIOUS)
    if path.name != LAST or not before.is_file():
        return ""
    try:
        step = read_checkpoint(before, "previous")["global_step"]
    except (InputError, KeyError):  # damaged as well
        return ""
    return f"; the one before it, of step {step}, is whole: give {before}"


if TYPE_CHECKING:
    _of_the_class = classmethod
else:

    class _of_the_class(classmethod):
        """A class method that may not be called on an instance, whose weights would stay as they are."""

        def __get__(self, instance: Any, owner: Any = None) -> Any:
            if instance is None:
                return super().__get__(instance, owner)

            def refuse(*args: Any, **kwargs: Any) -> None:
                raise TypeError(f"load_from_checkpoint makes a new object: call {type(instance).__name__}'s own")

            return refuse


class ChecksCheckpoint:
    """Lets ``load_from_checkpoint`` of a Lightning module or data module take files that may be anyone's."""

    CHECKPOINT_HYPER_PARAMS_KEY: str

    @_of_the_class
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        *args: Any,
        weights_only: bool | None = None,
        trust_config: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Makes the object that a checkpoint is of, as Lightning does, from a file that may be anyone's.

        Args:
            checkpoint_path: Path or URL of the file, or an open file.
            *args: Lightning's further arguments: ``map_location``, ``hparams_file``, ...
            weights_only: False unpickles whatever is in the file, and so runs any code in it.
            trust_config: Take its hyperparameters as they are, and import the classes and functions that they name,
                wherever they are.
            **kwargs: Lightning's further arguments, and hyperparameters that win over those of the file.

        Raises:
            InputError: If the file is damaged or no checkpoint, or names code that is neither this project's nor beside
                the script that runs.
        """
        load: Any = super()
        named = "checkpoint_path" if hasattr(checkpoint_path, "read") else f"checkpoint_path={str(checkpoint_path)!r}"
        if weights_only is not False:
            checkpoint_path = _checked(checkpoint_path, cls, trust_config)
        try:
            loaded: Self = load.load_from_checkpoint(
                checkpoint_path, *args, weights_only=weights_only is not False, **kwargs
            )
        except (ArgumentError, ValueError) as error:
            # the parser says what it is for the class, and that there being none will not do either
            said = re.search(
                r"Errors:\s+- (?:Problem with given class_path '[^']*':)?(.*)- Expected a <class 'NoneType'>\n",
                str(error),
                re.DOTALL,
            )
            if said is None:
                raise
            cause = " ".join(said[1].split())[:300]
            raise InputError(f"{named} cannot be rebuilt from its hyperparameters ({cause})") from error
        return loaded


def _checked(source: Any, cls: type[ChecksCheckpoint], believed: bool) -> BytesIO:
    """Reads a checkpoint and gives it as an open file, with what an object of that class is made from."""
    if hasattr(source, "read"):
        with TemporaryDirectory() as folder:
            copy = Path(folder, "given.ckpt")
            copy.write_bytes(source.read())
            return _checked(copy, cls, believed)
    if "://" in str(source):
        from lightning.fabric.utilities.cloud_io import get_filesystem

        with get_filesystem(source).open(str(source), "rb") as file:
            return _checked(file, cls, believed)
    named = f"checkpoint_path={str(source)!r}"
    content = read_checkpoint(Path(source), "checkpoint_path")
    hparams = content.setdefault(cls.CHECKPOINT_HYPER_PARAMS_KEY, {})
    path = hparams.get("_class_path")
    if path is not None:
        module, _, name = str(path).rpartition(".")
        kind = getattr(sys.modules.get(module), name, None)
        if not (isinstance(kind, type) and issubclass(kind, cls)):
            raise InputError(
                f"{named} is of {str(path)[:200]}, which is no {cls.__name__} that has been imported; if it is your "
                "own, import its module first"
            )
        hparams["_instantiator"] = "lightning.pytorch.cli.instantiate_module"
    elif "_instantiator" in hparams:
        del hparams["_instantiator"]
    if not believed:
        make_harmless(cls if path is None else str(path), hparams, named, "trust_config=True", [str(path)])
    # what Lightning took for hyperparameters once, and what it would make of them
    left_out = {"optimizer_states", "hparams", "module_arguments", "hparams_type", "datamodule_hparams_type"}
    if cls.CHECKPOINT_HYPER_PARAMS_KEY == DATA_HPARAMS:
        left_out.add("state_dict")
    buffer = BytesIO()
    torch.save({key: value for key, value in content.items() if key not in left_out}, buffer)
    buffer.seek(0)
    return buffer


# ---- what may be believed -------------------------------------------------------------------------------------------


# texts of the user's data, which may read like anything, and a name that Lightning compares with its own
_NEVER_IMPORTED = ("class_names", "category_ids", "_instantiator")


def make_harmless(
    kind: type | str,
    arguments: dict[str, Any],
    named: str,
    how_to_trust: str,
    typed: Collection[str] = (),
    instead: Collection[str] = (),
) -> None:
    """Takes out of a task's or data module's arguments what a file that may be anyone's must not decide.

    It imports nothing but this project and modules beside the script that runs, fetches nothing, looks on no other
    machine, and raises no limit.

    Args:
        kind: The class that takes them, or its dotted path.
        arguments: Its arguments by name; changed in place.
        named: What named the file, for messages.
        how_to_trust: What the user gives to trust the file.
        typed: Texts that the user has given.
        instead: Names of classes that the user has given, which may take the arguments over.

    Raises:
        InputError: If they name code from elsewhere, or a folder of another machine.
    """
    remedy = f"where you trust the file, give {how_to_trust}"
    # on Windows, to look there hands over the user's name and the hash of the password
    remote = ("\\\\", "//", "\\/", "/\\") if sys.platform == "win32" else ("\\\\",)
    for text in _texts({name: value for name, value in arguments.items() if name not in _NEVER_IMPORTED}):
        if text.startswith(remote) and text not in typed:
            raise InputError(f"{named} names {text[:200]}, a folder of another machine; {remedy}")
    if foreign := foreign_code(kind, arguments, typed, instead):
        raise InputError(
            f"{named} names {foreign[:200]}, which is neither of awconv nor beside the script that runs, and is not "
            f"imported; {remedy}"
        )
    for options in (arguments, *_arguments_within(arguments)):
        if "download" in options:
            options["download"] = False  # into a folder that the file names
        if "initial_weights" in options:
            options["initial_weights"] = None  # they are in the checkpoint, and would be fetched
        for name, most in (("num_workers", os.cpu_count() or 1), ("max_image_pixels", MAX_IMAGE_PIXELS)):
            number = options.get(name)
            if isinstance(number, int | float) and not number <= most:
                options[name] = most
            elif isinstance(number, str):  # of which the parser makes a number
                del options[name]


def _arguments_within(value: Any) -> Iterator[dict[str, Any]]:
    """Yields the arguments of the classes that are named within."""
    if isinstance(value, Mapping):
        if "class_path" in value:
            yield from (value[name] for name in ("init_args", "dict_kwargs") if isinstance(value.get(name), dict))
        value = list(value.values())
    if isinstance(value, list | tuple):
        for inner in value:
            yield from _arguments_within(inner)


def foreign_code(
    kind: type | str, arguments: Mapping[str, Any], typed: Collection[str] = (), instead: Collection[str] = ()
) -> str | None:
    """Finds what would be imported for a class and its arguments that is neither this project's nor beside the script.

    Args:
        kind: The class, or its dotted path.
        arguments: Its arguments by name.
        typed: Texts that the user has given.
        instead: Names of classes that the user has given, which may take the arguments over.

    Returns:
        The dotted path of a class or function from elsewhere, or the text that may name one; None if there is none.
    """
    if isinstance(kind, str) and kind not in typed and not _is_believed(kind):
        return kind
    # what the class itself does not know may be anything; what another one does not know it is not given
    judges: list[tuple[dict[str, Any], Any]] = [(_hints(_resolve(kind) if isinstance(kind, str) else kind), type)]
    judges += [(_hints(cls), Any) for cls in _classes(instead)]
    for hints, unknown in judges:
        for name, value in arguments.items():
            if name in (*_NEVER_IMPORTED, "_class_path"):
                continue
            if foreign := _foreign(value, hints.get(name, unknown), typed, instead):
                return foreign
    return None


def _foreign(value: Any, hint: Any, typed: Collection[str], instead: Collection[str]) -> str | None:
    """Finds in the value of an argument of that type what would be imported and is from elsewhere."""
    if isinstance(value, Mapping) and isinstance(path := value.get("class_path"), str):
        given = [value.get("init_args") or {}, value.get("dict_kwargs") or {}]
        if not all(map(_is_by_name, given)) or (path not in typed and not _is_believed(path)):
            return path
        if _takes_code(hint):
            return next((found for part in given if (found := foreign_code(path, part, typed, instead))), None)
        value, hint = given, type  # data, unless the user gives another class there
    if isinstance(value, Mapping | list | tuple):
        inner = value.values() if isinstance(value, Mapping) else value
        return next((found for item in inner if (found := _foreign(item, hint, typed, instead))), None)
    if isinstance(value, str) and _takes_code(hint) and value not in typed and not _is_harmless(value, hint):
        return value
    return None


def _classes(names: Collection[str]) -> list[type]:
    """The classes of those names, which may be dotted paths or, of what has been imported, names alone."""
    known = {name for name in names if "." not in name}
    found = [_resolve(name) for name in names if name not in known]
    return [cls for cls in found if isinstance(cls, type)] + [c for c in heirs(object) if c.__name__ in known]


def heirs(cls: type) -> Iterator[type]:
    """Yields the classes that have been made of a class, and of those, some of them more than once."""
    heir: type
    for heir in type.__subclasses__(cls):
        yield heir
        if heir is not type:
            yield from heirs(heir)


# neither a mapping nor a list in YAML, whose parsers differ in what they let pass, nor an address, nor a home folder
_WORDS = re.compile(r"(?!\s*-)[\w .,/\\()+=<>%-]*")


def _is_harmless(text: str, hint: Any) -> bool:
    """Whether a text names nothing that would be imported or read from a file or an address, or what is ours.

    Args:
        text: The text.
        hint: The type of the argument, which may take a class or a function.
    """
    try:
        if not _WORDS.fullmatch(text) or (text.strip() and Path(text).exists()):
            return False
    except (OSError, ValueError):
        return False
    kinds = list(_parts(hint))
    # where types are expressions, spaces around dots mean nothing, and letters are taken for those that look alike
    text = re.sub(r"\s*\.\s*", ".", f"{text} {unicodedata.normalize('NFKC', text)}")
    for word in re.findall(r"\w+(?:\.\w+)*", text):
        root = word.partition(".")[0]
        if "." in word or ModuleType in kinds:
            is_there = _spec(root) is not None
            if is_there and not (_is_ours(root) and _has(word) and _is_defined_by_us(_resolve(word, root == "awconv"))):
                return False
        elif any(cls.__name__ == word and not _is_defined_by_us(cls) for cls in _classes_of(kinds)):
            return False
    return True


def _classes_of(kinds: list[Any]) -> Iterator[type]:
    """The classes that a word may stand for, where an argument takes one of those kinds."""
    for kind in kinds:
        if isinstance(kind, type) and kind is not type and kind not in _PLAIN:
            yield kind
            yield from heirs(kind)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)
    elif isinstance(value, str):
        yield value


def _hints(cls: Any) -> dict[str, Any]:
    """The types of the arguments of a class as the parser finds them, those that it passes on among them."""
    hints: dict[str, Any] = {}
    with suppress(Exception):  # what is not found may be anything
        for found in get_signature_parameters(cls, logger=False):
            hint = found.annotation
            if hint is inspect.Parameter.empty:  # then it is of the type of its default
                is_plain = isinstance(found.default, _PRIMITIVES) or found.default in ([], {}, (), hint)
                hint = Any if is_plain else type(found.default)
            hints |= dict.fromkeys((found.name, *(found.aliases or ())), hint)
    return hints


_PLAIN = (str, int, float, bool, bytes, type(None), Any, object, Path, PathLike, dict, list, tuple, set)


def _parts(hint: Any) -> Iterator[Any]:
    """Yields the types that a type is made of. A literal is made of none."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return
    if not inner or origin is type or origin is Callable:
        yield hint
    for part in inner:
        if part is not ... and not isinstance(part, list):
            yield from _parts(part)


def _takes_code(hint: Any) -> bool:
    """Whether an argument of that type may be a class, a function, or an object that a class is named for."""
    return any(part not in _PLAIN for part in _parts(hint))


def _is_believed(name: str) -> bool:
    """Whether the dotted path of a class leads to what this project, or a module beside the script, defines itself."""
    return "." in name and _is_ours(name.partition(".")[0]) and _has(name) and _is_defined_by_us(_resolve(name))


def _is_defined_by_us(found: Any) -> bool:
    if found is None:  # there is nothing to import: whoever parses it will say so
        return True
    # a module of ours also has what it imports itself
    home = getattr(found, "__module__", None) or getattr(found, "__name__", None)
    return isinstance(home, str) and _is_ours(home.partition(".")[0])


def _has(name: str) -> bool:
    """Whether a single file has what is named in it, as far as can be seen without running it: it may be a script."""
    root, *others = name.split(".")
    if "__main__" in others:  # which runs a program
        return False
    spec = _spec(root)
    if root in sys.modules or spec is None or spec.submodule_search_locations is not None:
        return True
    try:
        body = ast.parse(Path(spec.origin).read_bytes()).body
    except (OSError, ValueError, SyntaxError):
        return False
    names = {node.name for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    names |= {alias.asname or alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names}
    return bool(others) and others[0] in names


def _resolve(name: str, load: bool = True) -> Any:
    """What a dotted path leads to, or None; without `load` only in what has been imported."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:length])
        try:
            found: Any = import_module(module) if load else sys.modules[module]
            for part in parts[length:]:
                found = getattr(found, part)
        except (Exception, SystemExit):  # modules raise what they like
            continue
        return found
    return None


def _is_ours(root: str) -> bool:
    if root == "awconv":
        return True
    spec = _spec(root)
    if spec is None or spec.origin is None or not spec.has_location:  # a folder without __init__.py is no package here
        return False
    places = spec.submodule_search_locations or [spec.origin]
    return any(Path(place).resolve().parent == _folder_of_script() for place in places)


def _spec(root: str) -> Any:
    try:
        return find_spec(root)  # of a name without dots nothing is imported
    except (ImportError, ValueError):  # __main__, or a module that has none
        return None


def _folder_of_script() -> Path:
    script = Path(sys.argv[0]).resolve()
    # those of notebooks, consoles and python -m are no scripts of the user's, and import from the working directory
    installed = {Path(__file__).parent, *(Path(path).resolve() for path in sysconfig.get_paths().values())}
    is_own = script.suffix == ".py" and installed.isdisjoint(script.parents)
    return script.parent if is_own else Path.cwd()
