"""Checkpoint files: read as weights only, checked whole, and what in them may be believed.

A checkpoint is a stranger's until somebody says otherwise, and a stranger's file is data. Everything that reads one
comes here; this module imports nothing of the project but the errors.
"""

import re
import sys
import zipfile
from collections.abc import Container, Iterator, Mapping
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from awconv.errors import InputError

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

    Nothing in the file is run, and no more memory is taken than it has bytes: an entry that is compressed is refused
    (``torch.save`` compresses nothing), and so is one whose checksum does not fit.

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
        is_zip = zipfile.is_zipfile(path)  # files from before torch 1.6 are none, and have no checksums
        reason = _what_is_wrong(path) if is_zip else ""
        # torch believes a zip file's entries to be as large as its pickle says, unless they are mapped
        content = None if reason else torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
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
        if packed := [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]:
            return f"entry {packed[0]!r} is compressed, as torch.save never does"
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            return "its entries overlap"
        broken = file.testzip()
        return f"entry {broken!r} does not fit its checksum" if broken else ""


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
        if wrong := _misshapen(content, path.stat().st_size):
            raise InputError(f"{argument}={str(path)!r} is damaged, or no checkpoint of a run: {wrong}")
    except InputError as error:
        raise InputError(f"{error}{_the_one_before(path)}") from error.__cause__
    if not _is_config(content.get("config")):
        content.pop("config", None)
    for name in ("epoch", "global_step"):
        content.setdefault(name, 0)
    if not re.fullmatch(r"\d+(\.\d+)+((a|b|rc|\.dev|\.post)\d+)?", str(content.get(_VERSION))):
        content[_VERSION] = version("lightning")
    return content


def begins_afresh(content: Mapping[str, Any]) -> list[str]:
    """Lists the parts of a run's state that a checkpoint lacks, and a resumed run would begin anew."""
    lacking = {name for name in _STATES if name not in content}
    if "loops" in lacking:  # where the run was: without it the schedule begins anew as well
        lacking.add("lr_schedulers")
    return sorted(lacking)


_STATES = ("loops", "optimizer_states", "lr_schedulers", "callbacks")


def _misshapen(content: dict[Any, Any], size: int) -> str:
    """Says what in a checkpoint of so many bytes is of another kind than a run writes; empty if nothing is."""
    for name, kind in _KINDS.items():
        if name in content and (not isinstance(content[name], kind) or isinstance(content[name], bool)):
            return f"{name} is a {type(content[name]).__name__}"
    for name in ("epoch", "global_step"):
        if not 0 <= content.get(name, 0) < 2**63:
            return f"{name} is {str(content[name])[:40]}"
    for key, value in content["state_dict"].items():
        if not isinstance(key, str) or not (isinstance(value, Tensor) or key.endswith("_extra_state")):
            return f"state_dict[{str(key)[:80]!r}] is a {type(value).__name__}, and no tensor"
    claimed = 0
    for name in set(content) - {"config"}:
        for value in _leaves(content[name]):
            if value is _TOO_MUCH:
                return f"{str(name)[:80]} is nested too deeply, or holds too much"
            if isinstance(value, Tensor):
                if value.layout != torch.strided or value.device.type != "cpu":
                    return f"{str(name)[:80]} holds a tensor without its values"
                claimed += value.numel() * value.element_size()
    # a few bytes may be told to stand for a large tensor; some parameters do share theirs
    if claimed > 4 * size + 2**26:
        return f"its tensors claim {claimed / 2**20:.0f} MiB, and the file has {size / 2**20:.1f}"
    for name in (HPARAMS, DATA_HPARAMS, "position"):
        if not _is_primitive(content.get(name)):
            return f"{name} holds something else than numbers and texts"
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
    if position and not all(
        isinstance(position.get(name), int | float) for name in ("epochs", "batches", "accumulated")
    ):
        return "position is not that of a run"
    return ""


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
        if isinstance(value, Mapping | list | tuple | set | frozenset):
            if depth == _DEEPEST or len(value) + len(stack) > _MOST_VALUES:
                break
            inner = [*value, *value.values()] if isinstance(value, Mapping) else value
            stack += [(item, depth + 1) for item in inner]
        else:
            yield value
    if stack:
        yield _TOO_MUCH


def _is_primitive(value: Any) -> bool:
    return all(isinstance(leaf, _PRIMITIVES) for leaf in _leaves(value))


def _is_config(value: Any) -> bool:
    """Whether it is a config of this project: sections, with a class of data and one of a model."""
    sections = [value.get(name) for name in ("data", "model")] if isinstance(value, dict) else [None]
    return (
        all(isinstance(s, dict) and isinstance(s.get("class_path"), str) for s in sections)
        and all(isinstance(s.get("init_args") or {}, dict) for s in sections if s)
        and all(isinstance(value.get(name) or {}, dict) for name in ("trainer", "checkpoint", "last_checkpoint"))
        and _is_primitive(value)
    )


def _the_one_before(path: Path) -> str:
    before = path.with_name(PREVIOUS)
    if path.name != LAST or not before.is_file():
        return ""
    try:
        step = read_checkpoint(before, "previous")["global_step"]
    except (InputError, KeyError):  # damaged as well
        return ""
    return f"; the one before it, of step {step}, is whole: give {before}"


class ChecksCheckpoint:
    """Lets ``load_from_checkpoint`` of a Lightning module or data module take any file for a stranger's."""

    CHECKPOINT_HYPER_PARAMS_KEY: str

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        *args: Any,
        weights_only: bool | None = None,
        trust_config: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Makes the object that a checkpoint is of, as Lightning does, from a file that may be anyone's.

        Args:
            checkpoint_path: Path or URL of the file, or an open file.
            *args: Lightning's further arguments: ``map_location``, ``hparams_file``, ...
            weights_only: False unpickles whatever is in the file, and so runs any code in it.
            trust_config: Import classes and functions that its hyperparameters name, wherever they are.
            **kwargs: Lightning's further arguments, and hyperparameters that win over those of the file.

        Raises:
            InputError: If the file is damaged or no checkpoint, or names code that is neither this project's nor beside
                the script that runs.
        """
        load: Any = super()
        if weights_only is not False:
            checkpoint_path = _checked(checkpoint_path, cls, trust_config)
        return load.load_from_checkpoint(checkpoint_path, *args, weights_only=weights_only is not False, **kwargs)


def _checked(source: Any, cls: type[ChecksCheckpoint], believed: bool) -> BytesIO:
    """Reads a checkpoint and gives it as an open file, without the optimiser's state."""
    if hasattr(source, "read") or "://" in str(source):
        from lightning.fabric.utilities.cloud_io import get_filesystem

        with (
            TemporaryDirectory() as folder,
            source if hasattr(source, "read") else get_filesystem(source).open(str(source), "rb") as file,
        ):
            copy = Path(folder, "downloaded.ckpt")
            copy.write_bytes(file.read())
            return _checked(copy, cls, believed)
    named = f"checkpoint_path={str(source)!r}"
    content = read_checkpoint(Path(source), "checkpoint_path")
    hparams = content.setdefault(cls.CHECKPOINT_HYPER_PARAMS_KEY, {})
    path = hparams.get("_class_path")
    if path is not None:
        module, _, name = str(path).rpartition(".")
        kind = getattr(sys.modules.get(module), name, None)
        if not (isinstance(kind, type) and issubclass(kind, cls)):
            raise InputError(f"{named} is of {str(path)[:200]}, which is no {cls.__name__} that has been imported")
        hparams["_instantiator"] = "lightning.pytorch.cli.instantiate_module"
    elif "_instantiator" in hparams:
        del hparams["_instantiator"]
    foreign = None if believed else foreign_code(hparams, [path])
    if foreign:
        raise InputError(
            f"{named} names {foreign[:200]}, which is neither of awconv nor beside the script that runs; where you "
            "trust the file, give trust_config=True"
        )
    buffer = BytesIO()
    torch.save({key: value for key, value in content.items() if key != "optimizer_states"}, buffer)
    buffer.seek(0)
    return buffer


# ---- what may be believed -------------------------------------------------------------------------------------------


def foreign_code(value: Any, believed: Container[str] = ()) -> str | None:
    """Finds what a config or hyperparameters would import that is neither this project's nor beside its script.

    Args:
        value: Mappings and lists of texts and numbers, out of a file that anyone may have made.
        believed: Dotted paths that the user has given.

    Returns:
        The first dotted path of a class or function that is a stranger's; None if there is none.
    """
    stack: list[tuple[Any, Any]] = [("", value)]
    while stack:
        key, value = stack.pop()
        if isinstance(value, Mapping):
            stack += [(k, v) for k, v in value.items() if k not in _NEVER_IMPORTED]
        elif isinstance(value, list | tuple):
            stack += [("", item) for item in value]
        # a text names a class or a function wherever the argument takes one
        elif (
            isinstance(value, str)
            and "." in value
            and value not in believed
            and (key in ("class_path", "_class_path") or _might_be_imported(value))
            and not _is_believed(value)
        ):
            return value
    return None


# texts of the user's data, which may read like anything, and a name that Lightning compares with its own
_NEVER_IMPORTED = ("class_names", "category_ids", "_instantiator")


def _might_be_imported(name: str) -> bool:
    parts = name.split(".")
    return all(map(str.isidentifier, parts)) and _spec(parts[0]) is not None


def _is_believed(name: str) -> bool:
    """Whether a dotted path leads to what this project, or a module beside the script that runs, defines itself."""
    if not _is_ours(name.partition(".")[0]):
        return False
    found = _resolve(name)
    if found is None:  # there is nothing to import: whoever parses it will say so
        return True
    # a module of ours also has what it imports itself
    home = getattr(found, "__module__", None) or getattr(found, "__name__", None)
    return isinstance(home, str) and _is_ours(home.partition(".")[0])


def _resolve(name: str) -> Any:
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            found: Any = import_module(".".join(parts[:length]))
            for part in parts[length:]:
                found = getattr(found, part)
        except Exception:  # modules raise what they like
            continue
        return found
    return None


def _is_ours(root: str) -> bool:
    if root == "awconv":
        return True
    spec = _spec(root)
    places = list(spec.submodule_search_locations or [spec.origin] * spec.has_location) if spec else []
    return any(Path(place).resolve().parent == _folder_of_script() for place in places)


def _spec(root: str) -> Any:
    try:
        return find_spec(root)  # of a name without dots nothing is imported
    except (ImportError, ValueError):  # __main__, or a module that has none
        return None


def _folder_of_script() -> Path:
    script = Path(sys.argv[0]).resolve()
    own = Path(__file__).parent in script.parents  # python -m awconv...., which imports from the working directory
    return script.parent if script.suffix == ".py" and not own else Path.cwd()
