"""How configs are written and read back: one dialect of YAML for files, flags, checkpoints and printed configs.

It is PyYAML's, which follows YAML 1.1, with three differences: ``1e-3`` is a number, as in YAML 1.2; ``None`` is null,
as sweeps and Python print it; and dates, times and numbers with leading zeros are texts. What is written is quoted
wherever this dialect or YAML 1.1 would read something else than a text.

A config may come from anyone. It holds mappings, lists, texts, numbers, booleans and null, and no other tags; its
size, its depth and what its aliases expand to are bounded; a key given twice is refused. No message quotes the file,
which may be a file of secrets named by mistake: it says where the fault is, and of which kind.
"""

import re
from copy import deepcopy
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import jsonargparse._typehints
import yaml
from jsonargparse import set_dumper, set_loader

from awconv.errors import InputError

MODE = "awconv"
"""What jsonargparse calls this dialect."""

# The class names of ImageNet-21k take up to 1 MB; what is at these limits is parsed in about 20 seconds.
_MAX_BYTES = 2 * 2**20
_MAX_VALUES = 30_000
_MAX_DEPTH = 100
_MAX_DIGITS = 1000
_TOO_DEEP = f"more than {_MAX_DEPTH} levels of nesting"
_TOO_LARGE = f"more than {_MAX_BYTES // 2**20} MiB, which is too much for a config"

_TAG = "tag:yaml.org,2002:"
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F][0-9a-fA-F_]*|0b[01][01_]*)$")
_NONE = re.compile(r"None$")


class _Problem(yaml.MarkedYAMLError):
    """What this dialect refuses and PyYAML does not."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own name and form
        first: [rule for rule in rules if rule[0] not in {_TAG + kind for kind in ("float", "int", "timestamp")}]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {  # noqa: RUF012
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag not in {_TAG + kind for kind in ("binary", "timestamp", "omap", "pairs", "set")}
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._values = self._depth = self._deepest = 0
        self._extents: dict[int, tuple[int, int]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        is_alias, values, deepest = self.check_event(yaml.AliasEvent), self._values, self._deepest
        self._depth += 1
        self._deepest = self._depth
        if self._depth > _MAX_DEPTH:
            raise _Problem(None, None, _TOO_DEEP, mark)
        node = super().compose_node(parent, index)
        if is_alias:
            if id(node) not in self._extents:
                raise _Problem(None, None, "an alias of what it is part of", mark)
            # what it expands to wherever the config is copied or written
            size, height = self._extents[id(node)]
            self._values += size
            self._deepest += height
        else:
            self._values += 1
            self._extents[id(node)] = self._values - values, self._deepest - self._depth
        self._depth -= 1
        self._deepest = max(deepest, self._deepest)
        if self._values > _MAX_VALUES or self._deepest > _MAX_DEPTH:
            problem = _TOO_DEEP if self._deepest > _MAX_DEPTH else f"more than {_MAX_VALUES} values"
            raise _Problem(None, None, f"{problem} with what aliases stand for", mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: dict[Any, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag not in (_TAG + "merge", _TAG + "value"):
                value, line = self.construct_object(key), key.start_mark.line + 1
                if value in seen:
                    problem = f"{str(value)[:80]!r} is given twice, first in line {seen[value]}"
                    raise _Problem(None, None, problem, key.start_mark)
                seen[value] = line
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > _MAX_DIGITS:  # Python does not print them
            raise _Problem(None, None, "a number of too many digits", node.start_mark)
        number: int = super().construct_yaml_int(node)
        return number

    def construct_undefined(self, node: yaml.Node) -> NoReturn:
        raise _Problem(None, None, "a tag that configs do not have", node.start_mark)


_Loader.add_constructor(_TAG + "int", _Loader.construct_yaml_int)
_Loader.add_constructor(None, _Loader.construct_undefined)


class _Dumper(yaml.SafeDumper):
    """PyYAML's own resolvers stay, so that whoever reads with PyYAML finds the same."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # only between double quotes are line breaks other than \n written as they can be read
        return self.represent_scalar(_TAG + "str", data, style=None if data.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)
# members of enumerations, and NumPy's numbers
_Dumper.add_multi_representer(str, lambda dumper, data: dumper.represent_str(str.__str__(data)))
_Dumper.add_multi_representer(int, lambda dumper, data: dumper.represent_int(int(data)))
_Dumper.add_multi_representer(float, lambda dumper, data: dumper.represent_float(float(data)))
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+0123456789."))
    _kind.add_implicit_resolver(_TAG + "int", _INT, list("-+0123456789"))
    _kind.add_implicit_resolver(_TAG + "null", _NONE, ["N"])


def load(text: str) -> Any:
    """Reads a text.

    Raises:
        yaml.YAMLError: If it is not valid; the message is one line, and does not quote the text.
    """
    if len(text) > _MAX_BYTES:
        raise yaml.YAMLError(_TOO_LARGE)
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "somewhere"
        problem = error.problem or ""
        if not isinstance(error, _Problem):
            # between quotes stand texts of the file, single characters, and PyYAML's own names for what it expects
            problem = re.sub(r" '(?!<)[^']{2,}'", "", ": ".join(filter(None, (error.context, problem))))
        raise yaml.YAMLError(f"{place}: {problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise yaml.YAMLError(f"line {line}: the character U+{ord(text[error.position]):04X}") from None
    except (ValueError, TypeError, LookupError, AttributeError):  # of what a tag such as !!int claims
        raise yaml.YAMLError("a value is not what its tag says") from None


def load_file(path: Path) -> dict[str, Any]:
    """Reads the config in a file.

    Raises:
        InputError: If it is none; the message does not quote it.
    """
    try:
        content = load(read(path))
    except yaml.YAMLError as error:
        raise InputError(f"config {str(path)!r} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        kind = "nothing" if content is None else type(content).__name__
        raise InputError(f"config {str(path)!r} holds {kind}, not sections such as model: and data:")
    for key in content:
        if not isinstance(key, str):
            raise InputError(f"config {str(path)!r}: {key!r} names no section; expected one such as model or data")
    return content


def read(path: Path) -> str:
    """Reads the text of a config file.

    Raises:
        InputError: If it is no regular file, too large or no text.
    """
    if not path.is_file():  # a pipe would be waited for, a device never ends
        raise InputError(f"config {str(path)!r} is no regular file; give a YAML file")
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise InputError(f"config {str(path)!r} has {_TOO_LARGE}")
    try:
        return _FileText(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"config {str(path)!r} is not UTF-8 (byte {error.start}); save it as UTF-8") from None


class _FileText(str):
    """A text that comes out of a file."""


def _load_value(text: str) -> Any:
    value = load(text)
    if isinstance(text, _FileText) and not isinstance(value, dict | list):
        # jsonargparse takes whatever file an option names for its value, and would quote it
        raise yaml.YAMLError("neither a mapping nor a list")
    return value


_Path: Any = jsonargparse.Path  # type: ignore[attr-defined]
_read_any_text = _Path.read_text


def _read_text(path: Any) -> str:
    # what is not there is standard input or an address
    return read(Path(path.absolute)) if Path(path.absolute).exists() else _read_any_text(path)


def dump(config: Any) -> str:
    """Writes what :func:`load` reads back as it was: mappings, lists, texts, numbers, booleans and None."""
    text: str = yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


def _copied(value: Any) -> Any:
    # With each item of a list jsonargparse copies the whole list: a thousand class names would take 15 seconds.
    given = [value.get(name) for name in ("orig_val", "prev_val")] if isinstance(value, dict) else []
    return deepcopy(value, {id(items): items for items in given if type(items) is list and len(items) > 100})


jsonargparse._typehints.deepcopy = _copied  # type: ignore[assignment, attr-defined]
_Path.read_text = _read_text
set_loader(MODE, _load_value, exceptions=(yaml.YAMLError,))
set_dumper(MODE, dump)
