"""How configs are written and read back: one dialect of YAML for files, flags, checkpoints and printed configs.

It is PyYAML's, which follows YAML 1.1, with three differences: ``1e-3`` is a number, as in YAML 1.2; ``None`` is null,
as sweeps and Python print it; and dates, times and numbers with leading zeros are texts. What is written is quoted
wherever this dialect or YAML 1.1 would read something else than a text.
"""

import re
from typing import Any

import yaml
from jsonargparse import set_dumper, set_loader

MODE = "awconv"
"""What jsonargparse calls this dialect."""

_TAG = "tag:yaml.org,2002:"
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F][0-9a-fA-F_]*|0b[01][01_]*)$")
_NONE = re.compile(r"None$")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own name and form
        first: [rule for rule in rules if rule[0] not in {_TAG + kind for kind in ("float", "int", "timestamp")}]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


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
        yaml.YAMLError: If it is not valid.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (ValueError, AttributeError) as error:  # what a tag such as !!int claims
        raise yaml.YAMLError(str(error)) from error


def dump(config: Any) -> str:
    """Writes what :func:`load` reads back as it was: mappings, lists, texts, numbers, booleans and None."""
    text: str = yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


set_loader(MODE, load, exceptions=(yaml.YAMLError,))
set_dumper(MODE, dump)
