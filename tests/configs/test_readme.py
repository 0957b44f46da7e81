"""The README's commands and examples, run as they stand, on miniature data."""

import json
import re
import shlex
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch
from test_configs import MINIATURE, ON_A_CPU, ONE_STEP, classifier_weights  # noqa: F401 (a fixture)

PROJECT = Path(__file__).parents[2]
README = (PROJECT / "README.md").read_text()
JSON = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
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


@pytest.fixture
def my_boxes(tmp_path, picture_folder):
    """A folder with the README's annotation file, for one picture."""
    (content,) = JSON
    (tmp_path / "my_boxes/pictures").mkdir(parents=True)
    (tmp_path / "my_boxes/boxes.json").write_text(content)
    (name,) = (image["file_name"] for image in json.loads(content)["images"])
    PIL.Image.new("RGB", (120, 90), "white").save(tmp_path / "my_boxes/pictures" / name)
    return tmp_path / "my_boxes"


def test_there_are_commands_and_examples():
    assert len(COMMANDS) >= 14
    assert len(PYTHON) == 5
    assert len(JSON) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_command(
    cli,
    tmp_path,
    command,
    project,
    cifar10_root,
    cifar100_root,
    imagenet_root,
    coco_root,
    picture_folder,
    my_boxes,
    classifier_weights,  # noqa: F811
):
    words = shlex.split(command)
    runs = f"--trainer.default_root_dir={tmp_path / 'runs'}"
    digits = [*ONE_STEP, *MINIATURE["digits"], runs]
    if {"--ckpt_path", "--resume", "--model.initial_weights"} & set(words):
        code, _, err = cli("fit", *digits)
        assert code == 0, err
        (checkpoint,) = (tmp_path / "runs").glob("*/*/checkpoints/best.ckpt")
        words = [str(checkpoint) if word == "weights.ckpt" else word for word in words]
        words = [str(checkpoint.parents[1]) if word.startswith("runs/") else word for word in words]
    words = [str(picture_folder) if word == "my_pictures" else word for word in words]
    words = [word for word in words if word != "my_pictures_by_class"]
    words = [re.sub("^my_boxes", str(my_boxes), word) for word in words]
    own_boxes = str(my_boxes) in words
    if not own_boxes:
        words = [word for word in words if word != "--data.root"]
    recipe = next((Path(w).stem for w in words if "recipes/" in w), "digits")
    roots = {
        "cifar10": cifar10_root,
        "cifar100": cifar100_root,
        "imagenet": imagenet_root,
        "coco_1x": coco_root,
        "digit_scenes": tmp_path / "digit_scenes",
    }
    options = [*ONE_STEP, *(MINIATURE[recipe] if "my_project.MyData" not in words and not own_boxes else [])]
    if recipe in roots and not own_boxes:
        options.append(f"--data.root={roots[recipe]}")
    if recipe == "coco_1x":
        options.append(f"--model.initial_weights={classifier_weights('resnet101')}")
    for word in words:
        options += ON_A_CPU.get(Path(word).stem, []) if "overlays/" in word else []
    if command.startswith(("fit --ckpt_path", "fit --resume")):
        options = ["--trainer.max_epochs=2"]
    code, _, err = cli(*words, *options, *([] if "--resume" in words else [runs]))
    assert code == 0, err


@pytest.mark.parametrize("example", [e for e in PYTHON if not e.startswith("# my_project.py")], ids=["look", "layer"])
def test_example(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(example, "README.md", "exec"), {})


def test_the_messages_that_it_explains_are_those_of_the_code():
    code = " ".join(path.read_text() for path in (PROJECT / "src").glob("**/*.py"))
    code = re.sub(r'"\s*\n?\s*f?"', "", code)  # strings that go on in the next line
    table = README.partition("| it says | do |")[2].partition("\n\n")[0]
    cited = re.findall(r"^\| `(.*?)` \|", table, re.MULTILINE)
    assert len(cited) > 6
    for message in cited:
        for part in message.split("..."):
            # a value of an example stands where the code has an expression
            words = [re.escape(word) for word in part.strip().split(" ")]
            assert re.search(r"\s+".join(words).replace("train/loss", r"\{names\}"), code), part
