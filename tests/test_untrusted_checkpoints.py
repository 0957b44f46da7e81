"""Checkpoints of strangers: they run no code, choose no addresses, and whatever is wrong with them is one line."""

import contextlib
import copy
import csv
import io
import os
import random
import struct
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import jsonargparse
import pytest
import torch
from torch import nn

from awconv.callbacks import MetricsFile
from awconv.checkpoint import foreign_code, read_checkpoint, read_tensors
from awconv.data import DigitsDataModule
from awconv.errors import InputError
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
    monkeypatch.setattr(subprocess.Popen, "__init__", lambda *args, **kwargs: Tool(args=args))
    yield
    assert Tool.calls == []


# ---- code ----------------------------------------------------------------------------------------------------------


FREE = {
    "a mapping": lambda spec: ("model", "optimizer_options", {"x": spec}),
    "itself": lambda spec: ("model", "optimizer_options", spec),
    "a list": lambda spec: ("model", "aw", {"include": [spec]}),
    "the data": lambda spec: ("data", "invert", {"x": [spec]}),
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


def test_a_text_that_is_imported_where_the_argument_takes_a_function(tmp_path, monkeypatch):
    assert foreign_code({"activation": "shutil.rmtree"}) == "shutil.rmtree"
    assert foreign_code({"x": [{"y": ("torch.nn.functional.relu",)}]}) == "torch.nn.functional.relu"
    assert foreign_code({"a": "awconv.data.DigitsDataModule", "b": "resnet50.a1_in1k", "c": "data/x.v2"}) is None
    # names of classes are the user's own
    assert foreign_code({"class_names": ["os.path", "json.tool"], "root": "os.path/x"}) is None
    assert foreign_code({"class_path": "os.path"}, believed=["os.path"]) is None
    (tmp_path / "tasks_of_a_fork.py").write_text("import shutil\nclass Task: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "train.py")])
    assert foreign_code({"class_path": "tasks_of_a_fork.Task"}) is None
    assert foreign_code({"class_path": "tasks_of_a_fork.shutil.rmtree"}) == "tasks_of_a_fork.shutil.rmtree"
    monkeypatch.setattr(sys, "argv", ["elsewhere/train.py"])
    assert foreign_code({"class_path": "tasks_of_a_fork.Task"}) == "tasks_of_a_fork.Task"


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
        "accelerator": TOOL,
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
    for address in (r"\\host\share", "//host/share"):
        content["config"]["data"]["init_args"]["root"] = address
        refused(cli("test", "--ckpt_path", save(content), f"--run_dir={tmp_path / 'run'}"), "another machine")
    assert not (tmp_path / "theirs").exists()


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
    "without values": ({"state_dict": {"a": torch.ones(1, device="meta")}}, "without its values"),
    "sparse": ({"state_dict": {"a": torch.ones(2, 2).to_sparse()}}, "without its values"),
    "one number for a terabyte": ({"state_dict": {"a": torch.ones(1).expand(2**38)}}, "claim 1048576 MiB"),
    "the same in a state": ({"optimizer_states": [{"s": torch.ones(1).expand(2**38)}]}, "claim 1048576 MiB"),
    "tensors among hyperparameters": ({"hyper_parameters": {"lr": torch.ones(1)}}, "hyper_parameters holds"),
    "hyperparameters are a text": ({"hyper_parameters": "lr"}, "hyper_parameters is a str"),
    "a deep one": ({"callbacks": {"a": {"b": nested(300)}}}, "callbacks is nested too deeply"),
    "a bomb": ({"callbacks": {"a": {"b": bomb(30)}}}, "callbacks is nested too deeply"),
    "a bomb in something else": ({"other": bomb(30)}, "other is nested too deeply"),
    "epoch is a text": ({"epoch": "three"}, "epoch is a str"),
    "epoch is a truth": ({"epoch": True}, "epoch is a bool"),
    "negative step": ({"global_step": -1}, "global_step is -1"),
    "endless step": ({"global_step": 10**30}, "global_step is 1000"),
    "loops are a number": ({"loops": 3}, "loops is a int"),
    "a callback's state is a list": ({"callbacks": {"EarlyStopping": []}}, "callbacks['EarlyStopping'] is a list"),
    "optimizer_states of texts": ({"optimizer_states": ["adam"]}, "optimizer_states holds a str"),
    "optimizer_states of nothing": ({"optimizer_states": [{}]}, "no state of an optimiser"),
    "a position without epochs": ({"position": {"batches": 1}}, "position is not"),
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
        {"model": {"class_path": "a"}, "data": {"class_path": "b"}, "x": bomb(30)},
        {"model": {"class_path": "a"}, "data": {"class_path": "b"}, "x": nested(300)},
    ],
    ids=["text", "empty", "list", "no_data", "nulls", "numbers", "init_args", "trainer", "bomb", "deep"],
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


def test_entries_that_overlap(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(1000)}}, path)
    data = bytearray(path.read_bytes())
    # the directory at the end tells of one entry twice as much as there is
    place = data.rfind(b"PK\x01\x02")
    while struct.unpack_from("<I", data, place + 24)[0] != 4000:
        place = data.rfind(b"PK\x01\x02", 0, place)
    struct.pack_into("<II", data, place + 20, 8000, 8000)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"entries overlap|can be loaded"):
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


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_any_mutation(cli, content, save, tmp_path, seed):
    chance = random.Random(seed)
    changed, where = mutated(content, chance)
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
