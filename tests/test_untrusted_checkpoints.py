"""Checkpoints of strangers: they run no code, choose no addresses, and whatever is wrong with them is one line."""

import contextlib
import copy
import csv
import io
import math
import os
import random
import subprocess
import sys
import sysconfig
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import jsonargparse
import pytest
import torch
from torch import nn

from awconv.callbacks import CheckpointFiles, MetricsFile
from awconv.checkpoint import foreign_code, make_harmless, read_checkpoint, read_tensors
from awconv.cli.arguments import complete
from awconv.config_text import MODE
from awconv.data import CIFAR10DataModule, DigitsDataModule
from awconv.errors import InputError
from awconv.models.weights import read_state
from awconv.tasks import ClassificationTask
from refusals import refused

SHORT = [
    "--trainer.accelerator=cpu",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
    "--trainer.limit_test_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--data.image_size=8",
    "--data.batch_size=16",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> bytes:
    """A checkpoint of the embedded default, as ``fit`` writes it."""
    from awconv.cli import main

    run = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parents[1])
        patch.setattr(sys, "argv", ["lightning_cli.py"])
        main(["fit", *SHORT, "--trainer.max_epochs=1", f"--run_dir={run}"])
    return (run / "checkpoints/last.ckpt").read_bytes()


@pytest.fixture
def content(trained) -> dict[str, Any]:
    return torch.load(io.BytesIO(trained), weights_only=True)


@pytest.fixture
def save(tmp_path):
    def write(content: Any, name: str = "theirs.ckpt") -> Path:
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return write


class Tool:
    """What a stranger's file would like to be called."""

    calls: ClassVar[list[Any]] = []

    def __init__(self, **options: Any) -> None:
        self.calls.append(options)


TOOL = {"class_path": f"{__name__}.Tool", "init_args": {}}
POPEN = {"class_path": "subprocess.Popen", "init_args": {"args": "touch it_ran", "shell": True}}


@pytest.fixture(autouse=True)
def nothing_is_called(monkeypatch, tmp_path):
    monkeypatch.setattr(Tool, "calls", [])
    run = subprocess.Popen.__init__

    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        if "it_ran" in str((args, kwargs)):
            Tool(args=args)
        else:  # libraries ask other programs when they are first used
            run(self, *args, **kwargs)

    monkeypatch.setattr(subprocess.Popen, "__init__", watched)
    yield
    assert Tool.calls == []


# ---- code ----------------------------------------------------------------------------------------------------------


FREE = {
    "a mapping": lambda spec: ("model", "optimizer_options", {"x": spec}),
    "itself": lambda spec: ("model", "optimizer_options", spec),
    "a list": lambda spec: ("model", "aw", {"include": [spec]}),
    "the data": lambda spec: ("data", "invert", {"x": [spec]}),
    "what is called names": lambda spec: ("model", "optimizer_options", {"class_names": spec}),
}


@pytest.mark.parametrize("spec", [TOOL, POPEN], ids=["beside", "foreign"])
@pytest.mark.parametrize("place", FREE)
def test_a_class_in_a_free_form_argument(cli, content, save, tmp_path, spec, place):
    section, name, value = FREE[place](spec)
    content["config"][section]["init_args"][name] = value
    hparams = {"model": "hyper_parameters", "data": "datamodule_hyper_parameters"}[section]
    content[hparams][name] = value
    path = save(content)
    for command in ("test", "fit"):
        result = cli(command, "--ckpt_path", path, *SHORT, f"--run_dir={tmp_path / command}")
        refused(result, "its config names", "--trust_checkpoint_config")
    cls = ClassificationTask if section == "model" else DigitsDataModule
    with pytest.raises(InputError, match="names"):
        cls.load_from_checkpoint(path)
    # nor where the file is believed: what an argument holds that takes anything are data
    trust = ["--trust_checkpoint_config=true", f"--run_dir={tmp_path / 'trusted'}"]
    code, _, err = cli("test", "--ckpt_path", path, *SHORT, *trust)
    assert code in (0, 2), err
    with contextlib.suppress(ValueError, jsonargparse.ArgumentError):
        cls.load_from_checkpoint(path, trust_config=True)
    assert not (tmp_path / "fit").exists()


@pytest.mark.parametrize("section", ["model", "data"])
@pytest.mark.parametrize(
    "name", ["subprocess.Popen", "awconv.cli.os.system", "torch.nn.Identity", "lightning.pytorch.demos.BoringModel"]
)
def test_classes_of_strangers_are_not_imported(cli, content, save, tmp_path, monkeypatch, section, name):
    content["config"][section]["class_path"] = name
    hparams = {"model": "hyper_parameters", "data": "datamodule_hyper_parameters"}[section]
    content[hparams]["_class_path"] = name
    path = save(content)
    result = cli("test", "--ckpt_path", path, *SHORT, f"--run_dir={tmp_path / 'run'}")
    refused(result, f"names {name}", "--trust_checkpoint_config true")
    with pytest.raises(InputError, match="which is no"):
        (ClassificationTask if section == "model" else DigitsDataModule).load_from_checkpoint(path)


class Fork(ClassificationTask):
    """A task of a fork, which takes classes, functions and words."""

    def __init__(
        self,
        backbone: str,
        loss: nn.Module | None = None,
        activation: Callable[[torch.Tensor], torch.Tensor] | None = None,
        kinds: list[type[nn.Module]] | None = None,
        kind: Literal["a", "b"] = "a",
        note=None,
        paths: dict[str, Path] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, **kwargs)


@pytest.fixture
def beside(monkeypatch):
    """Lets the script that runs lie beside this file."""
    monkeypatch.setattr(sys, "argv", [str(Path(__file__).with_name("train.py"))])


def theirs(**options: Any) -> str | None:
    return foreign_code(f"{__name__}.Fork", options)


@pytest.mark.parametrize("name", ["loss", "activation", "kinds", "unknown"])
def test_a_text_where_the_argument_takes_code(beside, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loss.yaml").write_text("class_path: shutil.rmtree")
    for text in (
        *("shutil.rmtree", "torch.nn.functional.relu", f"{__name__}.subprocess.Popen", "awconv.cli.os.system"),
        *("{class_path: shutil.rmtree}", "class_path: shutil.rmtree", "http://127.0.0.1/a", "loss.yaml", "/etc/passwd"),
    ):
        assert theirs(**{name: text}) == text
        assert theirs(**{name: [{"a": text}]}) == text
        assert foreign_code(Fork, {name: text}) == text
    for text in ("relu", "", "two words, and more", "50% (half)", "resnet50.a1_in1k"):
        assert theirs(**{name: text}) is None
    assert theirs(**{name: f"{__name__}.Fork"}) is None
    assert foreign_code(Fork, {name: "os.abc"}, ["os.abc"]) is None


def test_a_text_where_the_argument_takes_a_text(beside, tmp_path, monkeypatch):
    # names of files, folders and classes that are names of modules too
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "train.py").write_text("raise SystemExit('it ran')")
    for text in ("test.json", "train.json", "os.path", "resnet50.a1_in1k", "data/x.v2"):
        assert (
            theirs(backbone=text, optimizer=text, kind=text, paths={"a": text}, optimizer_options={"x": text}) is None
        )
        data = {"root": text, "val_annotations": text, "class_names": [text]}
        assert foreign_code("awconv.data.COCODataModule", data) is None


CARRIER = {"class_path": "awconv.data.coco.COCODataset", "init_args": {"transform": "evil.X"}}
IMPORTS = [
    "evil.X",
    "{class_path: evil.X}",
    "class_path: evil.X",
    "class_path: evil.X\ninit_args:\n  a: 1",
    '{"class_path":"evil.X"}',
    r'{"class\x5fpath": evil.X}',
    "{&a class_path: evil.X}",
    "{? class_path : evil.X}",
    "--- {class_path: evil.X}",
    "[{class_path: evil.X}]",
    "{a: [{class_path: evil.X}]}",
    "{a: '{class_path: evil.X}'}",
    "{class_path: evil.X, dict_kwargs: {date: 2001-99-99}}",
    "!!map {class_path: evil.X}",
    "{class_path: !!str evil.X}",
    "{a: &b {class_path: evil.X}, c: *b}",
    "!!str evil.X",
    "&a evil.X",
    "- evil.X",
    "[evil.X]",
    # which libyaml reads, and PyYAML does not
    "{class_path:\tevil.X}",
    "class_path:\tevil.X",
    "class_path: evil.X\t# c",
    "{class_path: evil.X, a?b: c}",
    "~/evil.yaml",
    "evil.yaml",
    {"class_path": "evil.X"},
    CARRIER,
    [CARRIER],
    str(CARRIER),
]


@pytest.mark.parametrize("value", IMPORTS, ids=lambda value: str(value)[:30])
def test_nothing_is_imported_that_was_not_seen(beside, tmp_path, monkeypatch, value):
    """The parsers are the oracle: where an argument takes anything they import nothing, else it must be refused."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("class X: pass\n")
    (tmp_path / "evil.yaml").write_text("class_path: evil.X")
    free = [(Any, value), (dict[str, Any], {"a": value}), (dict[str, Any], {"class_names": {"a": [value]}})]
    free += [(hint, value) for hint in (dict[str, Any] | None, bool | dict, list[str] | None, str, float | list[int])]
    code = [
        nn.Module | None,
        Callable[..., Any] | None,
        type[nn.Module] | None,
        list[nn.Module] | None,
        nn.Module | str,
    ]
    for hint, given in [*free, *((hint, value) for hint in code)]:

        class Taker:
            def __init__(self, value: hint = None) -> None: ...

        for mode in ("yaml", MODE):
            parser = jsonargparse.ArgumentParser(parser_mode=mode, exit_on_error=False)
            parser.add_class_arguments(Taker, "model")
            sys.modules.pop("evil", None)
            with contextlib.suppress(jsonargparse.ArgumentError):
                parser.parse_object(copy.deepcopy({"model": {"value": given}}))
            if sys.modules.pop("evil", None):
                assert hint in code, hint
                assert foreign_code(Taker, {"value": given}), hint


def takes(optimizer: Callable[..., Any] | None = None) -> None:
    """Takes what the task's own argument of that name does not."""


class PassesOn(ClassificationTask):
    def __init__(self, **kwargs: Any) -> None:
        takes(**kwargs)


IDENTITY, PART = nn.Identity(), partial(int)


class Untyped(ClassificationTask):
    def __init__(self, *, act=nn.ReLU, fn=nn.functional.relu, made=IDENTITY, part=PART, size=3, **kwargs):
        super().__init__("tiny", **kwargs)


def test_types_are_those_that_the_parser_finds():
    assert foreign_code(PassesOn, {"optimizer": "shutil.rmtree"}) == "shutil.rmtree"
    for name in ("act", "fn", "made", "part"):
        assert foreign_code(Untyped, {name: "shutil.rmtree"}) == "shutil.rmtree"
    assert foreign_code(Untyped, {"size": "shutil.rmtree", "optimizer": "shutil.rmtree"}) is None


def test_a_class_that_the_user_gives_takes_the_arguments_over(cli, content, save, tmp_path, beside):
    assert foreign_code(ClassificationTask, {"optimizer": "shutil.rmtree"}) is None
    for name in (f"{__name__}.PassesOn", "PassesOn"):
        assert foreign_code(ClassificationTask, {"optimizer": "shutil.rmtree"}, [], [name]) == "shutil.rmtree"
    content["config"]["model"]["init_args"]["optimizer"] = "shutil.rmtree"
    path, config = save(content), tmp_path / "mine.yaml"
    for model in ("PassesOn", "{class_path: PassesOn}"):
        config.write_text(f"model: {model}")
        for typed in ([f"--model={model}"], ["--model", model], ["-c", config]):
            result = cli("test", "--ckpt_path", path, *typed, f"--run_dir={tmp_path / 'run'}")
            refused(result, "names shutil.rmtree", "--trust_checkpoint_config")
    refused(cli("test", "--ckpt_path", path, "--model.class_path=PassesOn"), "names shutil.rmtree")


def test_names_of_what_was_imported(beside):
    for name in ("ReLU", "Identity"):
        assert theirs(loss=name) == theirs(loss={"class_path": name}) == name
        assert theirs(unknown={"class_path": name}) == theirs(optimizer_options={"class_path": name}) == name
    assert theirs(loss="relu", activation="ReLU", unknown="ReLU", optimizer_options={"x": "ReLU"}) is None
    assert theirs(loss={"class_path": f"{__name__}.Fork", "init_args": {"loss": "ReLU"}}) == "ReLU"
    assert theirs(loss={"class_path": f"{__name__}.Fork", "init_args": {"backbone": "os.path", "kind": "a"}}) is None
    assert theirs(note={"class_path": f"{__name__}.Fork", "init_args": {"note": "os.path"}}) == "os.path"
    for text in ("(shutil.rmtree)", "int, shutil.rmtree", "list(\uff53hutil.rmtree)", "shutil . rmtree"):
        assert theirs(kinds=text) == text


def test_limits_hold_for_what_is_within(beside):
    inner = {"download": True, "num_workers": 5000, "max_image_pixels": 10**12, "root": str(Path(__file__).parent)}
    options = {"loss": [{"class_path": f"{__name__}.Fork", "init_args": {"backbone": "a"}, "dict_kwargs": inner}]}
    with pytest.raises(InputError, match="names"):  # it does not know such arguments, one of which is a folder
        make_harmless(Fork, options, "it", "trust")
    inner["root"] = "elsewhere"
    make_harmless(Fork, options, "it", "trust")
    assert inner == {
        "download": False,
        "num_workers": os.cpu_count(),
        "max_image_pixels": 178_956_970,
        "root": "elsewhere",
    }


def test_a_type_that_cannot_be_looked_up():
    class Later(ClassificationTask):
        def __init__(self, backbone: "only_there.when.checked", optimizer: str = "", **kwargs: Any) -> None:  # noqa: F821
            super().__init__("tiny", **kwargs)

    assert foreign_code(ClassificationTask, {"backbone": "shutil.rmtree"}) is None
    assert foreign_code(Later, {"backbone": "shutil.rmtree"}) == "shutil.rmtree"
    assert foreign_code(Later, {"initial_weights": "shutil.rmtree"}) is None


def test_programs_of_packages_are_not_run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "train.py")])
    package = tmp_path / "package_of_a_fork"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for name in ("__main__", "train"):
        (package / f"{name}.py").write_text("raise SystemExit('it ran')")
    for name in ("package_of_a_fork.__main__.main", "awconv.cli.__main__.main"):
        assert foreign_code(name, {}) == name
        assert foreign_code(Fork, {"loss": name}) == name
    foreign_code("package_of_a_fork.train.Task", {})  # beside the script, and may be imported


def test_a_class_that_was_typed_is_known_by_its_arguments():
    name = "torchvision.datasets.ImageFolder"
    options = {"root": str(Path(__file__).parent)}
    assert foreign_code(name, options) == name
    assert foreign_code(name, options, [name]) is None
    assert foreign_code(name, {**options, "loader": "shutil.rmtree"}, [name]) == "shutil.rmtree"


def test_what_lies_beside_the_script(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "train.py")])
    run = "raise SystemExit('it ran')"
    (tmp_path / "tasks_of_a_fork.py").write_text("import shutil\nfrom json import loads\nclass Task: pass\n")
    (tmp_path / "a_script.py").write_text(run)
    (tmp_path / "their_data/flowers").mkdir(parents=True)
    (tmp_path / "their_data/flowers/evil.py").write_text(run)
    assert foreign_code("tasks_of_a_fork.Task", {}) is None
    for name in (
        *("tasks_of_a_fork.shutil.rmtree", "tasks_of_a_fork.loads"),
        *("a_script.Task", "their_data.flowers.evil.X"),
    ):
        assert foreign_code(name, {}) == name
        assert foreign_code("tasks_of_a_fork.Task", {"x": name}) == name
    monkeypatch.setattr(sys, "argv", ["elsewhere/train.py"])
    assert foreign_code("tasks_of_a_fork.Task", {}) == "tasks_of_a_fork.Task"
    # a notebook's script lies among the packages, and is not the user's
    monkeypatch.setattr(sys, "argv", [str(Path(sysconfig.get_path("purelib"), "ipykernel_launcher.py"))])
    assert foreign_code("yaml.YAMLObject", {}) == "yaml.YAMLObject"
    monkeypatch.chdir(tmp_path)
    assert foreign_code("tasks_of_a_fork.Task", {}) is None


def test_legacy_names_of_hyperparameters(content, save, beside):
    task = {"_class_path": f"{__name__}.Fork", "_instantiator": "lightning.pytorch.cli.instantiate_module"}
    for name in ("hparams", "module_arguments"):
        path = save({**content, name: {**task, "loss": TOOL}})
        assert "loss" not in ClassificationTask.load_from_checkpoint(path).hparams
        path = save({**content, "hyper_parameters": {**content["hyper_parameters"], **task}, name: {"loss": TOOL}})
        assert ClassificationTask.load_from_checkpoint(path).hparams.get("loss") is None


def test_loading_is_of_the_class_and_closes_nothing(trained):
    file = io.BytesIO(trained)
    task = ClassificationTask.load_from_checkpoint(file, "cpu")
    assert not file.closed
    with pytest.raises(TypeError, match="makes a new object"):
        task.load_from_checkpoint(io.BytesIO(trained))


def test_no_instantiator_but_lightnings_own(content, save, monkeypatch):
    monkeypatch.setitem(sys.modules, "theirs", types.SimpleNamespace(make=lambda *args: Tool()))
    content["hyper_parameters"]["_instantiator"] = "theirs.make"
    task = ClassificationTask.load_from_checkpoint(save(content))
    assert torch.equal(task.state_dict()["network.conv1.weight"], content["state_dict"]["network.conv1.weight"])


def test_what_was_typed_is_believed(cli, content, save, tmp_path):
    content["config"]["data"]["class_path"] = "sklearn.NoData"
    path = save(content)
    result = cli("test", "--ckpt_path", path, "--data=sklearn.NoData", *SHORT, f"--run_dir={tmp_path / 'run'}")
    refused(result, "sklearn.NoData", "cannot be imported")


# ---- addresses -----------------------------------------------------------------------------------------------------


def test_what_acts_is_left_out(cli, content, save, tmp_path):
    theirs = content["config"]
    theirs["trainer"] |= {
        "logger": {"class_path": "awconv.callbacks.WandbRun", "dict_kwargs": {"settings": {"base_url": "http://x"}}},
        "callbacks": [TOOL],
        "plugins": [TOOL],
        "strategy": TOOL,
        "profiler": TOOL,
        "accelerator": "{class_path: " + TOOL["class_path"] + "}",
        "precision": "http://127.0.0.1:9/a.yaml",
        "model_registry": "theirs",
        "default_root_dir": str(tmp_path / "theirs"),
    }
    theirs["checkpoint"]["dirpath"] = theirs["last_checkpoint"]["dirpath"] = str(tmp_path / "theirs")
    theirs["weights_only"] = False
    theirs["trust_checkpoint_config"] = True
    theirs["run_dir"] = theirs["resume"] = str(tmp_path / "theirs")
    run = tmp_path / "run"
    path = save(content)
    code, _, err = cli("fit", "--ckpt_path", path, *SHORT, "--trainer.max_epochs=2", f"--run_dir={run}")
    assert code == 0, err
    (line,) = (line for line in err.splitlines() if line.startswith("left out of the config of"))
    names = ["logger", "callbacks", "plugins", "strategy", "profiler", "model_registry", "default_root_dir"]
    assert all(f"trainer.{name}" in line for name in names)
    assert "checkpoint.dirpath, last_checkpoint.dirpath" in line
    assert "--trust_checkpoint_config true" in line
    assert not (tmp_path / "theirs").exists()
    assert (run / "metrics.csv").is_file()
    after = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert after["config"]["trainer"]["logger"]["class_path"] == f"awconv.callbacks.{MetricsFile.__name__}"
    assert after["global_step"] == 4
    assert "trust_checkpoint_config" not in after["config"]


def test_the_numbers_of_the_trainer_are_taken(cli, content, save, tmp_path):
    content["config"]["trainer"] |= {"max_epochs": 3, "gradient_clip_val": 0.5, "precision": "bf16-mixed"}
    content["config"]["seed_everything"] = 7
    path = save(content)
    code, _, err = cli("fit", "--ckpt_path", path, *SHORT, f"--run_dir={tmp_path / 'run'}")
    assert code == 0, err
    assert "left out" not in err
    config = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["config"]
    assert [config["trainer"][name] for name in ("max_epochs", "gradient_clip_val", "precision")] == [
        3,
        0.5,
        "bf16-mixed",
    ]
    assert config["seed_everything"] == 7


def test_what_a_finder_found_and_how_many_processes(cli, content, save, tmp_path):
    finder = {"class_path": "x.LearningRateFinder", "init_args": {"attr_name": "lr\x1b]0;owned\x07"}}
    content["config"]["trainer"] |= {"callbacks": [finder], "devices": "5000", "num_nodes": 5000}
    content["hyper_parameters"]["lr\x1b]0;owned\x07"] = 0.5
    options = [*SHORT, "--trainer.max_epochs=2", f"--run_dir={tmp_path / 'run'}"]
    code, _, err = cli("fit", "--ckpt_path", save(content), *options)
    assert code == 0, err
    assert "\x1b" not in err
    assert "trainer.devices, trainer.num_nodes" in err


@pytest.mark.parametrize("state", [{"n_averaged": torch.zeros(3)}, {"other": torch.zeros(())}])
def test_an_average_of_something_else(cli, content, save, tmp_path, state):
    content |= {"current_model_state": dict(content["state_dict"]), "averaging_state": state}
    content["config"]["model"]["init_args"]["ema_decay"] = 0.9
    result = cli("fit", "--ckpt_path", save(content), *SHORT, "--trainer.max_epochs=2", f"--run_dir={tmp_path / 'run'}")
    refused(result, "averaged weights", "initial_weights")


@pytest.mark.parametrize("how", ["flag", "config"])
def test_a_file_that_is_trusted(cli, content, save, tmp_path, how):
    content["config"]["trainer"]["callbacks"] = [
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"filename": "mine"}}
    ]
    path = save(content)
    trust = ["--trust_checkpoint_config=true"]
    if how == "config":
        (tmp_path / "trust.yaml").write_text("trust_checkpoint_config: true\n")
        trust = ["-c", str(tmp_path / "trust.yaml")]
    options = [*SHORT, "--trainer.max_epochs=2", *trust]
    code, _, err = cli("fit", "--ckpt_path", path, *options, f"--run_dir={tmp_path / 'run'}")
    assert code == 0, err
    assert (tmp_path / "run/checkpoints/mine.ckpt").is_file()


def test_nothing_is_fetched_or_looked_for_elsewhere_because_a_checkpoint_says_so(cli, content, save, tmp_path):
    content["config"]["data"] = {
        "class_path": "awconv.data.CIFAR10DataModule",
        "init_args": {"root": str(tmp_path / "theirs"), "download": True},
    }
    result = cli("test", "--ckpt_path", save(content), f"--run_dir={tmp_path / 'run'}")
    refused(result, "--data.download true")
    with pytest.raises(InputError, match="download"):
        make_and_load(content, save, CIFAR10DataModule, {"root": str(tmp_path / "theirs"), "download": True})
    theirs = content["config"]["data"]["init_args"]
    for arguments in (theirs, {"root": str(tmp_path / "theirs"), "download": "true"}):
        content["config"]["data"] |= {"init_args": {}, "dict_kwargs": arguments}
        refused(cli("test", "--ckpt_path", save(content), f"--run_dir={tmp_path / 'run'}"), "--data.download true")
    content["config"]["data"]["init_args"] = theirs
    address = r"\\host\share"
    content["config"]["data"]["init_args"]["root"] = address
    refused(cli("test", "--ckpt_path", save(content), f"--run_dir={tmp_path / 'run'}"), "another machine")
    with pytest.raises(InputError, match="another machine"):
        make_and_load(content, save, CIFAR10DataModule, {"root": address})
    assert not (tmp_path / "theirs").exists()


def test_initial_weights_are_those_of_the_checkpoint(cli, content, save, tmp_path):
    # there are none of this network to be fetched, which asking for them would say
    content["hyper_parameters"]["initial_weights"] = "pretrained"
    task = ClassificationTask.load_from_checkpoint(save(content))
    assert torch.equal(task.state_dict()["network.conv1.weight"], content["state_dict"]["network.conv1.weight"])
    del content["config"]["model"]["init_args"]["initial_weights"]
    content["config"]["model"]["dict_kwargs"] = {"initial_weights": "pretrained"}
    code, _, err = cli("test", "--ckpt_path", save(content), *SHORT, f"--run_dir={tmp_path / 'run'}")
    assert code == 0, err


def test_arguments_of_another_type(cli, content, save, tmp_path):
    hparams = content["hyper_parameters"]
    for name, value, said in (
        ("milestones", 5, r'key "milestones"'),
        ("lr", "high", "Got value: high"),
        ("lr", -1.0, "lr=-1.0 must be a number of at least 0"),
        ("unknown", 1, "unexpected keyword argument 'unknown'"),
        ("aw", {"share": ["x"]}, r"share=\['x'\] must be an integer, or None"),
    ):
        path = save({**content, "hyper_parameters": {**hparams, name: value}})
        with pytest.raises(InputError, match=rf"theirs\.ckpt' cannot be rebuilt from .*\(.*{said}.*\)$") as caught:
            ClassificationTask.load_from_checkpoint(path)
        assert "\n" not in str(caught.value)
    content["config"]["data"] = {"class_path": "awconv.data.ClassificationDataModule", "init_args": {}}
    result = cli("test", "--ckpt_path", save(content), f"--run_dir={tmp_path / 'run'}")
    refused(result, "ClassificationDataModule is a base for data modules of your own")


def make_and_load(content: dict[str, Any], save: Any, cls: Any, hparams: dict[str, Any]) -> None:
    """What a user does with the data module of a checkpoint in Python."""
    content["datamodule_hyper_parameters"] = {"_class_path": f"{cls.__module__}.{cls.__name__}", **hparams}
    data = cls.load_from_checkpoint(save(content))
    data.prepare_data()
    data.setup("test")


def test_no_limit_is_raised_by_a_checkpoint(content, save):
    content["datamodule_hyper_parameters"] |= {"max_image_pixels": 10**15, "num_workers": 10**7}
    data = DigitsDataModule.load_from_checkpoint(save(content))
    assert (data.max_image_pixels, data.num_workers) == (178_956_970, os.cpu_count())
    for number, workers in (("1000000000000000", 0), ("99", 0), (math.inf, os.cpu_count()), (math.nan, os.cpu_count())):
        content["datamodule_hyper_parameters"] |= {"max_image_pixels": number, "num_workers": number}
        data = DigitsDataModule.load_from_checkpoint(save(content))
        assert (data.max_image_pixels, data.num_workers) == (178_956_970, workers)
    content["datamodule_hyper_parameters"] |= {"max_image_pixels": 1000, "num_workers": 0}
    data = DigitsDataModule.load_from_checkpoint(save(content))
    assert (data.max_image_pixels, data.num_workers) == (1000, 0)


def test_what_is_said_moves_no_cursor(cli, content, save, tmp_path):
    content["config"]["\x1b]0;owned\x07\nerror: a lie"] = 1
    run = tmp_path / "run"
    code, _, err = cli("fit", "--ckpt_path", save(content), *SHORT, "--trainer.max_epochs=2", f"--run_dir={run}")
    assert code == 0
    assert "\\x1b]0;owned\\x07" in err
    assert "\x1b" not in err
    assert "\nerror: a lie" not in err


# ---- shape ---------------------------------------------------------------------------------------------------------


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def bomb(levels: int) -> list[Any]:
    value: list[Any] = ["x"] * 10
    for _ in range(levels):
        value = [value] * 10
    return value


MISSHAPEN = {
    "state_dict of integers": ({"state_dict": {"a": 1}}, "state_dict['a'] is a int"),
    "state_dict is a list": ({"state_dict": [1]}, "state_dict is a list"),
    "a key that is no text": ({"state_dict": {3: torch.ones(1)}}, "state_dict['3']"),
    "without values": ({"state_dict": {"a": torch.ones(1, device="meta")}}, "without plain values"),
    "sparse": ({"state_dict": {"a": torch.ones(2, 2).to_sparse()}}, "without plain values"),
    "tensors among hyperparameters": ({"hyper_parameters": {"lr": torch.ones(1)}}, "hyper_parameters holds"),
    "hyperparameters by number": ({"hyper_parameters": {5: "x"}}, "hyper_parameters holds"),
    "hyperparameters are a text": ({"hyper_parameters": "lr"}, "hyper_parameters is a str"),
    "epoch is a text": ({"epoch": "three"}, "epoch is a str"),
    "epoch is a truth": ({"epoch": True}, "epoch is a bool"),
    "negative step": ({"global_step": -1}, "global_step is -1"),
    "endless step": ({"global_step": 10**30}, "global_step is 1000"),
    "loops are a number": ({"loops": 3}, "loops is a int"),
    "a callback's state is a list": ({"callbacks": {"EarlyStopping": []}}, "callbacks['EarlyStopping'] is a list"),
    "optimizer_states of texts": ({"optimizer_states": ["adam"]}, "optimizer_states holds a str"),
    "optimizer_states of nothing": ({"optimizer_states": [{}]}, "no state of an optimiser"),
    "a position without epochs": ({"position": {"batches": 1}}, "position is not"),
    "a position nowhere": ({"position": {"epochs": math.nan, "batches": 1, "accumulated": 1}}, "position is not"),
    "a position at the end of time": (
        {"position": {"epochs": math.inf, "batches": 1, "accumulated": 1}},
        "position is not",
    ),
    "averages of nothing": ({"current_model_state": 3}, "current_model_state"),
    "averages that are no numbers": ({"averaging_state": {"n_averaged": 3}}, "averaging_state"),
    "averages that are a text": ({"averaging_state": "q"}, "averaging_state"),
    "averages of numbers": ({"current_model_state": {"a": 3}}, "current_model_state"),
}


@pytest.mark.parametrize("case", MISSHAPEN)
def test_what_no_run_writes(save, case):
    changes, says = MISSHAPEN[case]
    path = save({"state_dict": {}, **changes})
    with pytest.raises(InputError) as caught:
        read_checkpoint(path, "ckpt_path")
    assert f"ckpt_path={str(path)!r} is damaged, or no checkpoint of a run" in str(caught.value)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (torch.ones(1).expand(2**38), "1048576 MiB larger than what was saved"),
        (torch.ones(2**18).expand(99, 2**18), "98 MiB larger"),
        (nested(300), "nested too deeply"),
        (bomb(30), "nested too deeply"),
    ],
    ids=["a terabyte", "many times", "deep", "bomb"],
)
@pytest.mark.parametrize("place", ["state_dict", "optimizer_states", "config", "other"])
def test_what_takes_more_memory_than_there_are_bytes(save, value, says, place):
    path = save({"state_dict": {}, place: {"a": value}})
    for read in (read_checkpoint, read_tensors):
        with pytest.raises(InputError, match=says):
            read(path, "ckpt_path")
    with pytest.raises(InputError, match=says):
        read_state(save({"a": value}))


def test_what_a_run_may_hold_is_written_and_read(tmp_path):
    weight = torch.ones(2**20)
    state = {
        "complex": torch.ones(2, dtype=torch.complex64),
        "short": torch.ones(2, dtype=torch.uint16),
        "quantised": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "expanded": torch.ones(1).expand(100),
        **{f"tied{k}": weight for k in range(20)},
        "norm._extra_state": {"a": 1},
    }
    CheckpointFiles().save_checkpoint({"state_dict": state}, tmp_path / "a.ckpt")
    found = CheckpointFiles().load_checkpoint(tmp_path / "a.ckpt")["state_dict"]
    assert found.keys() == state.keys()
    assert torch.equal(found["tied7"], weight)
    # what could not be read back is not written either
    for changes in ({"hyper_parameters": {"lr": torch.ones(1)}}, {"callbacks": {"Mine": [1]}}):
        with pytest.raises(InputError, match="was not written"):
            CheckpointFiles().save_checkpoint({"state_dict": {}, **changes}, tmp_path / "b.ckpt")
    assert not (tmp_path / "b.ckpt").exists()


def set_at(content: dict[str, Any], path: str, value: Any) -> None:
    *above, last = (int(key) if key.isdigit() else key for key in path.split("/"))
    for key in above:
        content = content[key]
    content[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("config/trainer", None),
        ("config/trainer/callbacks", ["x"]),
        ("config/trainer/callbacks", [{}]),
        ("config/trainer/callbacks", True),
        ("config/trainer/callbacks", {"class_path": "LearningRateFinder", "init_args": 3}),
        ("config/trainer/callbacks", [{"class_path": "a.LearningRateFinder", "init_args": {"attr_name": "backbone"}}]),
        ("config/trainer/callbacks", [{"class_path": "a.LearningRateFinder", "init_args": {"attr_name": ["lr"]}}]),
        ("config/model/init_args", None),
        ("optimizer_states/0/param_groups/0/betas", "x"),
        ("optimizer_states/0/param_groups/0/betas", 0.9),
        ("optimizer_states/0/param_groups/0/lr", [1]),
        ("optimizer_states/0/state/0/exp_avg", torch.ones(7)),
        ("optimizer_states/0/state/0", 3),
        ("optimizer_states/0/state", {999: {}}),
        ("callbacks/BestCheckpoint/best_model_path", "/"),
        ("callbacks/BestCheckpoint/best_model_path", "no\x1b[31m.ckpt"),
        ("DigitsDataModule", [3]),
        ("DigitsDataModule", {"parts": [[0, 0, 0]]}),
        ("state_dict/network.conv1._extra_state", "x"),
        ("pytorch-lightning_version", "1." + 5000 * "9"),
        ("lr_schedulers/0/_step_count", "x"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_parts_that_no_run_writes(cli, content, save, tmp_path, path, value):
    content = copy.deepcopy(content)
    if isinstance(content.get("callbacks"), dict):
        content["callbacks"]["BestCheckpoint"]["best_model_score"] = torch.tensor(0.5)
    set_at(content, path, value)
    run = tmp_path / "run"
    code, out, err = cli("fit", "--ckpt_path", save(content), *SHORT, "--trainer.max_epochs=2", f"--run_dir={run}")
    assert "\x1b" not in out + err
    if code:
        refused((code, out, err))
        assert not run.exists()
    else:
        assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 4


@pytest.mark.parametrize(
    "config",
    [
        "a text",
        {},
        [],
        {"model": {"class_path": "awconv.tasks.ClassificationTask", "init_args": {}}},
        {"model": None, "data": None},
        {"model": {"class_path": 3}, "data": {"class_path": 4}},
        {"model": {"class_path": "a", "init_args": 3}, "data": {"class_path": "b"}},
        {"model": {"class_path": "a"}, "data": {"class_path": "b"}, "trainer": [1]},
        {"model": {"class_path": "a", "init_args": {5: "x"}}, "data": {"class_path": "b"}},
        {"model": {"class_path": "a"}, "data": {"class_path": "b", "dict_kwargs": "x"}},
        {"model": {"class_path": "a", "init_args.lr": 1}, "data": {"class_path": "b"}},
        {"model": {"class_path": "a"}, "data": {"class_path": "b"}, "trainer": {"logger.class_path": "WandbLogger"}},
    ],
    ids=[
        *("text", "empty", "list", "no_data", "nulls", "numbers", "init_args", "trainer"),
        *("number", "kwargs", "dots", "dots_of_the_trainer"),
    ],
)
def test_a_config_that_is_none(cli, content, save, config):
    content["config"] = config
    path = save(content)
    for command in ("test", "fit"):
        refused(cli(command, "--ckpt_path", path), "carries no config", "give with -c")
    assert read_checkpoint(path, "ckpt_path")["state_dict"].keys() == content["state_dict"].keys()


@pytest.mark.parametrize("version", [None, "", "odd", "2..1", 3, [], "999.0.0"])
def test_versions(cli, content, save, tmp_path, version):
    content["pytorch-lightning_version"] = version
    if version is None:
        del content["pytorch-lightning_version"]
    path = save(content)
    code, _, err = cli("test", "--ckpt_path", path, *SHORT, f"--run_dir={tmp_path / 'run'}")
    assert code == 0, err
    assert ClassificationTask.load_from_checkpoint(path).hparams["lr"] == content["hyper_parameters"]["lr"]


def test_what_is_missing_begins_afresh(cli, content, save, tmp_path):
    whole = content
    for k, names in enumerate((["callbacks"], ["lr_schedulers"], ["optimizer_states"], ["loops", "position"])):
        content = copy.copy(whole)
        for name in names:
            del content[name]
        run = tmp_path / f"run{k}"
        code, _, err = cli("fit", "--ckpt_path", save(content), *SHORT, "--trainer.max_epochs=2", f"--run_dir={run}")
        assert code == 0, err
        assert f"lacks {names[0]}" in err
        assert "begin afresh" in err
        step = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"]
        # two epochs of two steps, of which the checkpoint had trained one, unless nobody knows
        assert step == 4
        with (run / "metrics.csv").open() as file:
            epochs = {row["epoch"] for row in csv.DictReader(file)}
        assert ("0" in epochs) == (names[0] == "loops")
    for name in ("loops", "optimizer_states"):
        whole.pop(name)
    refused(cli("fit", "--ckpt_path", save(whole), f"--run_dir={tmp_path / 'no'}"), "--model.initial_weights")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("value", [torch.ones(1, device="meta"), torch.ones(2, 2).to_sparse(), 3])
def test_initial_weights_that_hold_no_numbers(save, value):
    path = save({"conv1.weight": value})
    with pytest.raises(InputError, match="holds no state dictionary"):
        read_state(path)


# ---- bytes ---------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_refused_wherever_it_lies(trained, content, tmp_path):
    chance = random.Random(0)
    path = tmp_path / "flipped.ckpt"
    told = 0
    for _ in range(60):
        place = chance.randrange(len(trained))
        flipped = bytearray(trained)
        flipped[place] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        try:
            found = read_checkpoint(path, "ckpt_path")
        except InputError as error:
            told += "is not a checkpoint that can be loaded" in str(error)
            continue
        # it lies between the entries
        assert same(found, content)
    assert told > 40
    # in the middle of the weights, for the reader of initial weights too
    data = bytearray(trained)
    weights = content["state_dict"]["network.conv1.weight"].numpy().tobytes()
    data[data.find(weights) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="does not fit its checksum"):
        read_tensors(path, "initial_weights")
    with pytest.raises(InputError, match="does not fit its checksum"):
        ClassificationTask.load_from_checkpoint(path)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_an_entry_that_decompresses(tmp_path):
    path, packed = tmp_path / "a.ckpt", tmp_path / "packed.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(1000)}}, path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, bytes(10**8) if entry.filename.endswith("data/0") else source.read(entry))
    assert packed.stat().st_size < 10**6
    for read in (read_checkpoint, read_tensors):
        with pytest.raises(InputError, match=r"is compressed, as torch\.save never does"):
            read(packed, "ckpt_path")


def test_what_stands_behind_the_entries(trained, content, tmp_path):
    """A reader that finds no directory at the end would take the file for one from before torch 1.6, without checks."""
    path = tmp_path / "a.ckpt"
    for suffix in (b"PK\x05\x06", b"x", bytes(30)):
        path.write_bytes(trained + suffix)
        with pytest.raises(InputError, match="can be loaded as weights only"):
            read_tensors(path, "ckpt_path")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"")
        file.comment = b"more"
    with pytest.raises(InputError, match="stands before, behind or twice"):
        read_tensors(path, "ckpt_path")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"")
        with pytest.warns(UserWarning, match="Duplicate name"):
            file.writestr("archive/data.pkl", b"")
    with pytest.raises(InputError, match="stands before, behind or twice"):
        read_tensors(path, "ckpt_path")


@pytest.mark.parametrize("zipped", [True, False])
def test_memory_without_bytes(tmp_path, zipped):
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {}, "x": bytearray(3)}, path, _use_new_zipfile_serialization=zipped)
    for read in (read_checkpoint, read_tensors):
        with pytest.raises(InputError, match="it carries bytearray"):
            read(path, "ckpt_path")


def test_attributes_that_hide_those_of_a_tensor(tmp_path):
    value = torch.ones(1)
    value.numel = 3
    torch.save({"state_dict": {"a": value}}, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="it carries _rebuild_from_type_v2"):
        read_checkpoint(tmp_path / "a.ckpt", "ckpt_path")
    state = OrderedDict(a=torch.ones(1))
    state.keys = 3
    state._metadata = {"": {"version": 1}}
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    found = read_checkpoint(tmp_path / "a.ckpt", "ckpt_path")["state_dict"]
    assert list(found.keys()) == ["a"]
    assert found._metadata == {"": {"version": 1}}


def test_files_from_before_torch_1_6(content, tmp_path):
    torch.save(content["state_dict"], tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(read_state(tmp_path / "old.pth"), content["state_dict"])


def test_entries_that_overlap(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(1000)}}, path)
    with zipfile.ZipFile(path, "a") as file:
        (weights,) = (entry for entry in file.infolist() if entry.filename.endswith("data/0"))
        for k in range(3):
            again = copy.copy(weights)
            again.filename = f"{k}/data/0"
            file.filelist.append(again)
        file._didModify = True
    with pytest.raises(InputError, match="its entries overlap"):
        read_checkpoint(path, "ckpt_path")


def test_what_is_no_regular_file(cli, tmp_path):
    os.mkfifo(tmp_path / "pipe.ckpt")
    for option in ("--ckpt_path", "--model.initial_weights"):
        refused(cli("test", option, tmp_path / "pipe.ckpt"), "pipe.ckpt")
        refused(cli("test", option, "/dev/zero"), "/dev/zero")


# ---- by chance -----------------------------------------------------------------------------------------------------

JUNK: list[Any] = [None, True, -1, 10**30, float("nan"), "", "text", [], {}, [1], {"a": 1}, torch.ones(3), nn.Parameter]


def mutated(content: dict[str, Any], chance: random.Random) -> tuple[dict[str, Any], str]:
    """A copy in which one part, at any depth, is gone or is something else; and where."""
    content = copy.deepcopy(content)
    value: Any = content
    path = []
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = chance.choice(keys)
        path.append(str(key))
        inner = value[key]
        if not isinstance(inner, dict | list) or not inner or chance.random() < 0.3:
            break
        value = inner
    if isinstance(value, dict) and chance.random() < 0.3:
        del value[key]
        path.append("gone")
    else:
        value[key] = chance.choice(JUNK[:-1])
        path.append(repr(value[key])[:20])
    return content, "/".join(path)


@pytest.mark.parametrize("seed", range(60))
def test_any_mutation(cli, content, save, tmp_path, seed):
    chance = random.Random(seed)
    changed, where = mutated(content, chance)
    if seed % 3:  # the parts that decide what the parser gets
        changed, where = mutated({"config": content["config"], "hyper_parameters": content["hyper_parameters"]}, chance)
        with contextlib.suppress(InputError):
            complete(["fit", f"--ckpt_path={save({**content, **changed})}"])
            complete(["test", f"--ckpt_path={save({**content, **changed})}"])
        return
    command = chance.choice(["fit", "fit", "test"])
    run = tmp_path / "run"
    code, out, err = cli(command, "--ckpt_path", save(changed), *SHORT, "--trainer.max_epochs=2", f"--run_dir={run}")
    assert code in (0, 2), where
    if code == 2:
        refused((code, out, err))
        assert not run.exists(), where
        return
    if command == "fit":
        assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] >= 4, where
    # what was taken of the weights is what was there
    for key, value in changed["state_dict"].items():
        assert torch.equal(value, content["state_dict"][key]), where
