"""What `make` installs: pinned files of known content, and nothing else."""

import re
import tomllib

import pytest

from conftest import PROJECT

NAME = re.compile(r"[A-Za-z0-9._-]+")


def pinned(path: str) -> dict[str, list[str]]:
    """The lines of each requirement in a file that uv has written."""
    text = re.sub(r"^#.*\n", "", (PROJECT / path).read_text(encoding="utf-8"), flags=re.MULTILINE)
    entries = [entry.split() for entry in text.replace("\\\n", " ").splitlines()]
    return {entry[0]: entry[1:] for entry in entries}


@pytest.mark.parametrize("path", ["constraints.txt", "uv.txt"])
def test_every_requirement_has_a_version_and_hashes(path):
    entries = pinned(path)
    assert entries
    for name, rest in entries.items():
        assert re.fullmatch(r"[a-z0-9._-]+(\[\w+\])?==[\w.+!]+", name)
        assert any(re.fullmatch("--hash=sha256:[0-9a-f]{64}", word) for word in rest), name
    assert "://" not in (PROJECT / path).read_text(encoding="utf-8")


def test_all_that_the_package_needs_is_pinned():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]["dev"]
    needed = [*project["project"]["dependencies"], *extras, *project["build-system"]["requires"]]
    names = {str(NAME.match(entry)[0]).lower() for entry in pinned("constraints.txt")}
    assert {str(NAME.match(entry)[0]).lower() for entry in needed} <= names
