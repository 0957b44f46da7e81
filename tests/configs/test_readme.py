"""The README's commands and examples, run as they stand, on miniature data."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from test_configs import MINIATURE, ON_A_CPU, ONE_STEP

PROJECT = Path(__file__).parents[2]
README = (PROJECT / "README.md").read_text()
COMMANDS = re.findall(r"^`?(?:python lightning_cli\.py) ((?:fit|test|predict|validate).*?)`?$", README, re.MULTILINE)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_readme_names_every_config():
    for path in (PROJECT / "configs").glob("*/*.yaml"):
        assert f"`{path.stem.removeprefix('aw_')}`" in README, path


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with the README's `my_project.py`, importable."""
    parts = [block for block in PYTHON if block.startswith("# my_project.py")]
    (tmp_path / "my_project.py").write_text("\n".join(parts))
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_project", None)


def test_there_are_commands_and_examples():
    assert len(COMMANDS) >= 10
    assert len(PYTHON) == 4


@pytest.mark.parametrize("command", COMMANDS)
def test_command(cli, tmp_path, command, project, cifar10_root, cifar100_root, imagenet_root, picture_folder):
    words = shlex.split(command)
    runs = f"--trainer.default_root_dir={tmp_path / 'runs'}"
    digits = [*ONE_STEP, *MINIATURE["digits"], runs]
    if "--ckpt_path" in words or "--model.initial_weights" in words:
        code, _, err = cli("fit", *digits)
        assert code == 0, err
        (checkpoint,) = (tmp_path / "runs").glob("*/*/checkpoints/best.ckpt")
        words = [str(checkpoint) if word == "weights.ckpt" else word for word in words]
    words = [str(picture_folder) if word == "my_pictures" else word for word in words]
    words = [word for word in words if word != "my_pictures_by_class"]
    words = [word for word in words if word != "--data.root"]
    recipe = next((Path(w).stem for w in words if "recipes/" in w), "digits")
    roots = {"cifar10": cifar10_root, "cifar100": cifar100_root, "imagenet": imagenet_root}
    options = [*ONE_STEP, *(MINIATURE[recipe] if "my_project.MyData" not in words else [])]
    options += [f"--data.root={roots[recipe]}"] if recipe in roots else []
    for word in words:
        options += ON_A_CPU.get(Path(word).stem, []) if "overlays/" in word else []
    if command == "fit --ckpt_path last":
        options = ["--trainer.max_epochs=2"]
    code, _, err = cli(*words, *options, runs)
    assert code == 0, err


def test_the_layer_example():
    torch.manual_seed(0)
    exec(compile(PYTHON[0], "README.md", "exec"), {})
