"""The command line as a user meets it: runs, checkpoints, and one clear line for whatever is wrong."""

import csv
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from awconv.tasks import BaseTask

PROJECT = Path(__file__).parents[1]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
# a few steps on a few digits
SHORT = [
    "--trainer.max_epochs=2",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
    "--trainer.limit_test_batches=1",
    "--trainer.log_every_n_steps=1",
    *QUIET,
    "--data.image_size=8",
    "--data.batch_size=16",
]


class StopAfter(L.Callback):
    """Ends a run early without its schedule knowing, as a crash would."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.should_stop or trainer.global_step >= self.steps


def short(tmp_path: Path) -> list[str]:
    return [*SHORT, f"--trainer.default_root_dir={tmp_path / 'runs'}"]


def only_run(tmp_path: Path, suffix: str = "") -> Path:
    (folder,) = (f for f in (tmp_path / "runs").glob(f"*/*{suffix}") if suffix or f.name.count("-") == 2)
    return folder


@pytest.fixture
def trained(cli, tmp_path):
    """A run of two epochs on digits: its folder."""
    code, _, err = cli("fit", *short(tmp_path), "--model.lr", "0.002", "--model.label_smoothing=0.05")
    assert code == 0, err
    return only_run(tmp_path)


# ---- what a run leaves behind -----------------------------------------------------------------------


def test_fit_with_no_config_trains_the_embedded_default(cli, tmp_path):
    code, out, err = cli("fit", *short(tmp_path), "--test_after_fit=true")
    assert code == 0, err
    run = only_run(tmp_path)
    assert run.parent.name == "digits-aw_resnet20"
    assert out.count(f"run folder: {run}") == 1
    assert re.search(r"^test/loss: \d\.\d{4}, test/acc1: [01]\.\d{4}, test/acc5: [01]\.\d{4}$", out, re.MULTILINE)
    assert f"confusion matrix: {run / 'confusion_matrix.png'}" in out
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt", "previous.ckpt"}
    with Image.open(run / "confusion_matrix.png") as picture:
        assert min(picture.size) > 400
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"train/loss", "val/loss", "val/acc1", "val/acc5", "test/acc1", "test/acc5"} <= set(rows[0])
    assert sum(bool(row["val/acc1"]) for row in rows) == 2
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["init_args"]["aw"] is True
    assert config["trainer"]["max_epochs"] == 2


def test_a_saved_config_runs_again_in_a_folder_of_its_own(cli, tmp_path, trained):
    before = (trained / "config.yaml").read_bytes()
    weights = torch.load(trained / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    code, _, err = cli("fit", "-c", trained / "config.yaml")
    assert code == 0, err
    again = next(folder for folder in trained.parent.iterdir() if folder != trained)
    assert (trained / "config.yaml").read_bytes() == before
    repeated = torch.load(again / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(weights[key], repeated[key]) for key in weights)


def test_fast_dev_run_leaves_nothing(cli, tmp_path):
    code, _, err = cli("fit", *short(tmp_path), "--trainer.fast_dev_run=true", "--test_after_fit=true")
    assert code == 0, err
    assert not (tmp_path / "runs").exists()


def test_without_logger_and_bar(cli, tmp_path):
    code, _, err = cli("fit", *short(tmp_path), "--trainer.logger=false")
    assert code == 0, err
    assert (only_run(tmp_path) / "config.yaml").is_file()
    assert (only_run(tmp_path) / "checkpoints/last.ckpt").is_file()


def test_an_overlay_alone_goes_on_top_of_the_default(cli):
    code, out, err = cli("fit", "-c", "configs/overlays/debug.yaml", "--print_config")
    assert code == 0, err
    printed = yaml.safe_load(out)
    assert printed["model"]["init_args"]["backbone"] == "resnet20"
    assert printed["trainer"]["limit_train_batches"] == 4


NUMBERS_IN_ANOTHER_ORDER = """
import inspect
from functools import reduce
from operator import or_
from typing import Union
import lightning as L
from awconv.cli import main
# as they are where a library that was imported before had the union in this order
annotations = inspect.unwrap(L.Trainer.__init__).__annotations__
for name in ("limit_train_batches", "limit_val_batches", "val_check_interval"):
    hint = annotations[name]
    assert {int, float} < set(hint.__args__)
    kinds = tuple(sorted(hint.__args__, key=lambda kind: kind is not float))
    # typing itself would look it up among those that it has made
    new = reduce(or_, kinds) if isinstance(hint, type(int | float)) else type(hint)(Union, kinds)
    annotations[name] = new
    assert new.__args__[0] is float
main()
"""


def test_one_batch_is_one_batch_whatever_was_imported_before():
    """And not 1.0, which means all of them."""
    options = ["--trainer.limit_train_batches=1", "--trainer.limit_val_batches=0.5", "--trainer.val_check_interval=3"]
    words = [sys.executable, "-c", NUMBERS_IN_ANOTHER_ORDER, "fit", *options, "--print_config"]
    done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, check=True)
    found = yaml.safe_load(done.stdout)["trainer"]
    numbers = [found[name] for name in ("limit_train_batches", "limit_val_batches", "val_check_interval")]
    assert numbers == [1, 0.5, 3]
    assert list(map(type, numbers)) == [int, float, int]


def test_print_config_is_a_config(cli, tmp_path):
    code, out, _ = cli("fit", "--print_config")
    assert code == 0
    (tmp_path / "printed.yaml").write_text(out)
    code, again, _ = cli("fit", "-c", tmp_path / "printed.yaml", "--print_config")
    assert code == 0
    assert yaml.safe_load(again) == yaml.safe_load(out)


def test_the_embedded_default_is_the_digits_recipe_with_aw_resnet20(cli):
    _, default, _ = cli("fit", "--print_config")
    _, composed, _ = cli(
        "fit", "-c", "configs/recipes/digits.yaml", "-c", "configs/models/aw_resnet20.yaml", "--print_config"
    )
    assert yaml.safe_load(default) == yaml.safe_load(composed)


# ---- checkpoints -----------------------------------------------------------------------------------


def test_evaluation_rebuilds_network_and_data_from_the_checkpoint(cli, tmp_path, trained):
    checkpoint = trained / "checkpoints/last.ckpt"
    for command, split in (("validate", "val"), ("test", "test")):
        code, out, err = cli(
            command, f"--ckpt_path={checkpoint}", *QUIET, f"--trainer.default_root_dir={tmp_path / 'runs'}"
        )
        assert code == 0, err
        assert f"{split}/acc1" in out
        config = yaml.safe_load((only_run(tmp_path, f"-{command}") / "config.yaml").read_text())
        assert config["model"]["init_args"]["label_smoothing"] == 0.05
        assert config["data"]["init_args"]["image_size"] == 8
        assert config["trainer"]["limit_test_batches"] is None  # the trainer's settings belong to the training run


def test_what_is_typed_wins_over_the_checkpoint(cli, tmp_path, trained):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("data: {init_args: {batch_size: 5}}\n")
    code, _, err = cli(
        "test",
        "-c",
        overlay,
        f"--ckpt_path={trained / 'checkpoints/last.ckpt'}",
        "--model.label_smoothing=0.2",
        "--trainer.limit_test_batches=1",
        *QUIET,
        f"--trainer.default_root_dir={tmp_path / 'runs'}",
    )
    assert code == 0, err
    config = yaml.safe_load((only_run(tmp_path, "-test") / "config.yaml").read_text())
    assert config["model"]["init_args"]["label_smoothing"] == 0.2
    assert config["data"]["init_args"]["batch_size"] == 5
    assert config["model"]["init_args"]["lr"] == 0.002


def test_resume_takes_the_whole_config_and_reaches_the_same_weights(cli, tmp_path):
    options = [*short(tmp_path), "--trainer.max_epochs=4", "--data.mixup_alpha=0.2", "--model.ema_decay=0.9"]
    code, _, err = cli("fit", *options)
    assert code == 0, err
    whole = only_run(tmp_path)

    (tmp_path / "cut").mkdir()
    stop = ["--trainer.callbacks+=test_cli.StopAfter", "--trainer.callbacks.steps=4"]
    code, _, err = cli("fit", *options, *stop, f"--trainer.default_root_dir={tmp_path / 'cut/runs'}")
    assert code == 0, err
    cut = only_run(tmp_path / "cut")
    root = f"--trainer.default_root_dir={tmp_path / 'cut/runs'}"
    code, _, err = cli("fit", f"--ckpt_path={cut / 'checkpoints/last.ckpt'}", root)
    assert code == 0, err
    assert "left out of the config of" in err
    assert "trainer.callbacks;" in err
    resumed = next(folder for folder in cut.parent.iterdir() if folder != cut)
    one, two = (torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (whole, resumed))
    assert one["global_step"] == two["global_step"] == 8
    assert all(torch.equal(one["state_dict"][key], two["state_dict"][key]) for key in one["state_dict"])
    assert one["lr_schedulers"] == two["lr_schedulers"]


def test_configs_come_before_flags_wherever_they_stand(cli, tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("trainer: {max_epochs: 7}\nmodel: {init_args: {lr: 0.5}}\n")
    for config in (["-c", overlay], [f"-c{overlay}"], [f"--config={overlay}"]):
        digits = ["-c", "configs/recipes/digits.yaml", "--config", "configs/models/resnet20.yaml"]
        code, out, err = cli("fit", "--model.lr=0.25", *digits, *config, "--print_config")
        assert code == 0, err
        printed = yaml.safe_load(out)
        assert printed["model"]["init_args"]["lr"] == 0.25
        assert printed["trainer"]["max_epochs"] == 7


def test_a_checkpoint_named_in_a_config_or_twice(cli, tmp_path, trained):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(f"ckpt_path: last\ntrainer: {{default_root_dir: {tmp_path / 'runs'}}}\n")
    code, _, err = cli("fit", "-c", overlay, "--trainer.max_epochs=3")
    assert code == 0, err
    newest = max((tmp_path / "runs").glob("*/*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
    assert newest.parents[1] != trained
    assert torch.load(newest, weights_only=True)["global_step"] == 6
    code, _, err = cli("test", "--ckpt_path=nowhere.ckpt", f"--ckpt_path={newest}", *QUIET)
    assert code == 0, err


def test_the_config_of_a_run_serves_every_command(cli, tmp_path, trained):
    checkpoint = f"--ckpt_path={trained / 'checkpoints/best.ckpt'}"
    assert "ckpt_path" not in yaml.safe_load((trained / "config.yaml").read_text())
    code, _, err = cli("test", "-c", trained / "config.yaml", checkpoint)
    assert code == 0, err
    code, _, err = cli("fit", "-c", only_run(tmp_path, "-test") / "config.yaml", "--trainer.max_epochs=1")
    assert code == 0, err


def test_a_resumed_run_keeps_the_best_so_far(cli, tmp_path, trained):
    best = torch.load(trained / "checkpoints/best.ckpt", weights_only=True)
    options = ["--trainer.max_epochs=4", "--model.lr=30", f"--trainer.default_root_dir={tmp_path / 'runs'}"]
    code, _, err = cli("fit", f"--ckpt_path={trained / 'checkpoints/last.ckpt'}", *options)
    assert code == 0, err
    assert "left out" not in err
    resumed = next(folder for folder in trained.parent.iterdir() if folder != trained)
    after = torch.load(resumed / "checkpoints/best.ckpt", weights_only=True)
    with (resumed / "metrics.csv").open() as file:
        later = [float(row["val/acc1"]) for row in csv.DictReader(file) if row["val/acc1"]]
    (score,) = (state["best_model_score"] for key, state in best["callbacks"].items() if "BestCheckpoint" in key)
    if max(later) <= score:
        assert after["global_step"] == best["global_step"]
        assert all(torch.equal(after["state_dict"][k], best["state_dict"][k]) for k in best["state_dict"])
    else:
        assert after["global_step"] > 4
    assert torch.load(resumed / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 8


def test_test_after_fit_without_a_best(cli, tmp_path):
    code, out, err = cli("fit", *short(tmp_path), "--trainer.limit_val_batches=0", "--test_after_fit=true")
    assert code == 0, err
    assert "testing the last weights" in err
    assert "test/acc1: " in out


@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.logger=null"],
        ["--trainer.logger=true"],
        ["--trainer.logger.save_dir={tmp}/logs"],
        ["--trainer.callbacks+=TQDMProgressBar", "--trainer.enable_progress_bar=true"],
        ["--trainer.callbacks+=ModelCheckpoint"],
        ["--trainer.callbacks+=BatchSizeFinder", "--trainer.callbacks.max_trials=1", "--trainer.callbacks.init_val=8"],
        ["--trainer.callbacks+=LearningRateFinder", "--trainer.callbacks.num_training_steps=4"],
        ["--trainer.callbacks+=awconv.callbacks.ClassificationReport", "--trainer.callbacks.max_pictures=3"],
        ["--trainer.enable_checkpointing=false"],
        ["--trainer.enable_progress_bar=true"],
        ["--trainer.barebones=true", "--trainer.logger=false", "--trainer.log_every_n_steps=0"],
    ],
    ids=lambda value: value[0].removeprefix("--trainer."),
)
def test_loggers_and_callbacks_of_ones_own(cli, tmp_path, options):
    for _ in range(2):  # the second run must not trip over the first
        code, _, err = cli("fit", *short(tmp_path), *(option.format(tmp=tmp_path) for option in options))
        assert code == 0, err
    assert len(list((tmp_path / "runs").glob("*/*/config.yaml"))) == 2


def test_a_folder_with_checkpoints_of_another_run_is_left_alone(cli, tmp_path, trained):
    before = (trained / "checkpoints/best.ckpt").read_bytes()
    result = cli("fit", *short(tmp_path), f"--checkpoint.dirpath={trained / 'checkpoints'}")
    assert_one_clear_line(result, "best.ckpt of another run", f"--resume {trained}")
    assert (trained / "checkpoints/best.ckpt").read_bytes() == before


# ---- modules of a fork ------------------------------------------------------------------------------


class PlainModule(L.LightningModule):
    """Knows nothing of this project: no hyperparameters, no class names, another metric."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/acc1", (self.layer(batch[0].flatten(1)).argmax(1) == batch[1]).float().mean())

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class OtherTask(BaseTask):
    """A task with arguments of other types than ClassificationTask's."""

    def __init__(self, attention: bool = True, **kwargs) -> None:
        super().__init__(**kwargs)
        self.set_network(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)))

    def training_step(self, batch, batch_idx):
        return self.check_loss(torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def validation_step(self, batch, batch_idx):
        self.log("val/acc1", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    test_step = validation_step


class PlainData(L.LightningDataModule):
    """Loaders and nothing else."""

    def train_dataloader(self):
        images = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, torch.arange(32) % 10), 8)

    val_dataloader = test_dataloader = train_dataloader


@pytest.mark.parametrize("data", ["PlainData", "awconv.data.DigitsDataModule"])
@pytest.mark.parametrize("model", ["PlainModule", "OtherTask"])
def test_modules_of_a_fork(cli, tmp_path, monkeypatch, model, data):
    monkeypatch.setattr(sys, "argv", [str(Path(__file__).with_name("lightning_cli.py"))])
    digits = ["--data.image_size=8"] if "Digits" in data else []
    data = data if "." in data else f"test_cli.{data}"
    options = [*SHORT[:7], f"--trainer.default_root_dir={tmp_path / 'runs'}"]
    (tmp_path / "own.yaml").write_text(f"model: {{class_path: test_cli.{model}}}\ndata: {{class_path: {data}}}\n")
    code, _, err = cli("fit", "-c", tmp_path / "own.yaml", *options, *digits)
    assert code == 0, err
    checkpoint = f"--ckpt_path={only_run(tmp_path) / 'checkpoints/last.ckpt'}"
    code, out, err = cli("test", checkpoint, *options)
    assert code == 0, err
    assert "val/acc1" in out
    code, _, err = cli("fit", checkpoint, "--trainer.max_epochs=3")
    assert code == 0, err


def test_last_and_best_mean_the_newest_run(cli, tmp_path, trained):
    root = f"--trainer.default_root_dir={tmp_path / 'runs'}"
    for name in ("last", "best"):
        code, _, err = cli("validate", "--ckpt_path", name, *QUIET, root)
        assert code == 0, err
        assert f"ckpt_path={name}: {trained / 'checkpoints' / name}.ckpt" in err


def test_initial_weights_are_not_a_resume(cli, tmp_path, trained):
    code, _, err = cli(
        "fit",
        *short(tmp_path),
        f"--model.initial_weights={trained / 'checkpoints/best.ckpt'}",
        "--model.lr=0.0",
        f"--trainer.default_root_dir={tmp_path / 'second'}",
        "--model.lr_schedule=constant",
        "--model.weight_decay=0",
    )
    assert code == 0, err
    (run,) = (tmp_path / "second").glob("*/*")
    before, after = (torch.load(f / "checkpoints/best.ckpt", weights_only=True) for f in (trained, run))
    with (run / "metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file) if row["train/loss"]] == ["0", "1", "2", "3"]
    learned = [key for key in before["state_dict"] if key.endswith("weight")]
    assert learned
    assert all(torch.equal(before["state_dict"][key], after["state_dict"][key]) for key in learned)


# ---- predicting one's own pictures -----------------------------------------------------------------


def test_predict_a_folder(cli, tmp_path, trained, picture_folder):
    code, out, err = cli(
        "predict",
        f"--ckpt_path={trained / 'checkpoints/best.ckpt'}",
        f"--data.predict_dir={picture_folder}",
        f"--trainer.default_root_dir={tmp_path / 'runs'}",
        "--trainer.enable_progress_bar=false",
    )
    assert code == 0, err
    run = only_run(tmp_path, "-predict")
    with (run / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    pictures = sorted(str(p) for p in picture_folder.rglob("*") if p.is_file() and p.suffix != ".txt")
    assert [Path(row["path"]).name for row in rows] == [Path(p).name for p in pictures]
    for row in rows:
        assert row["class"] in set("0123456789")
        top = [float(row[f"probability_{k}"]) for k in range(1, 6)]
        assert top == sorted(top, reverse=True)
        assert 0 < sum(top) <= 1.0 + 1e-5
    with Image.open(run / "predictions.png") as picture:
        assert min(picture.size) > 200
    assert str(run / "predictions.csv") in out
    assert str(run / "predictions.png") in out


# ---- bad input: one line, exit code 2, no traceback, nothing written -------------------------------------


def assert_one_clear_line(result, *says):
    code, out, err = result
    assert code == 2, (out, err)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert "Traceback" not in out + err
    # what the machine's libraries say while they start is not part of the answer
    extra = [
        line for line in err.splitlines() if line.strip() and not line.startswith(("error: ", "GPU ", "TPU ", "Seed "))
    ]
    assert extra == [], err
    assert [part for part in says if part not in errors[0]] == [], errors[0]


BAD_ARGUMENTS = [
    (["fit", "--model.lrr", "0.1"], ["'lrr'", "did you mean model.lr?"]),
    (["fit", "--model.init_args.bakbone", "x"], ["'bakbone'", "model.backbone"]),
    (["fit", "--data.batchsize", "3"], ["'batchsize'", "data.batch_size"]),
    (["fit", "--optimizer", "sgd"], ["'optimizer'", "model.optimizer"]),
    (["fit", "--trainer.max_epochz", "3"], ["trainer.max_epochz", "did you mean trainer.max_epochs?"]),
    (["fit", "--trainer.max_epochs", "many"], ["trainer.max_epochs='many'", "int"]),
    (["fit", "--model.lr", "fast"], ["lr='fast'", "float"]),
    (["fit", "--data.augment", "flip"], ["augment='flip'", "randaugment"]),
    (["fit", "--data.image_sise", "8"], ["'image_sise'", "did you mean data.image_size?"]),
    (["fit", "--seed_everything=-5"], ["seed_everything=-5", "0 to 4294967295"]),
    (["fit", "--model.attention", "sse"], ["attention='sse'", "did you mean 'se'?"]),
    (["fit", "--model.aw", "5"], ["aw='5'", "bool"]),
    (["fit", "--model", "ClassificationTsk"], ["'ClassificationTsk'", "ClassificationTask"]),
    (["fit", "--data", "CIFAR11DataModule"], ["'CIFAR11DataModule'", "CIFAR10DataModule"]),
    (["fit", "-c", "configs/recipes/cifar11.yaml"], ["cifar11.yaml", "does not exist", "configs/recipes/cifar10"]),
    (["fit", "-c", "configs/recipes/cifar10.yaml"], ["backbone is required", "configs/models/"]),
    (["fit", "-c", "configs/models/resnet20.yaml"], ["data is required", "configs/recipes/"]),
    (["train"], ["'train'", "fit, validate, test, predict"]),
    ([], ["fit, validate, test, predict"]),
    (["fit", "--model.backbone", "resnet21"], ["'resnet21'", "resnet20"]),
    (["fit", "--model.aw", "{backend: fussed}"], ["backend", "'fussed'", "grouped"]),
    (["fit", "--model.aw", "{share: 7}"], ["share=7", "must divide"]),
    (["fit", "--model.aw", "{shar: 7}"], ["'shar'", "share"]),
    (["fit", "--model.aw", "{include: ['layer9*']}"], ["layer9*", "layer1.0.conv1"]),
    (["fit", "--model.optimizer", "adamm"], ["'adamm'", "adam"]),
    (["fit", "--data.batch_size", "0"], ["batch_size=0"]),
    (["fit", "--trainer.accelerator", "gpu"], ["gpu", "--trainer.accelerator cpu"]),
    (["fit", "--model.initial_weights", "nowhere.pth"], ["nowhere.pth", "does not exist"]),
    (["test", "--ckpt_path", "nowhere.ckpt"], ["nowhere.ckpt", "does not exist", "last or best"]),
    (["predict"], ["predict needs trained weights", "--ckpt_path best"]),
    (["test"], ["test needs trained weights", "--ckpt_path FILE"]),
    (["fit", "--ckpt=last"], ["'ckpt'", "ckpt_path"]),
    (["fit", "--seed=3"], ["'seed'"]),
    (["fit", "--trainer.max_epoch", "3"], ["trainer.max_epoch", "did you mean trainer.max_epochs?"]),
    (["fit", "--model", "nowhere.Task"], ["model='nowhere.Task'", "cannot be imported"]),
    (["fit", "--data.eval_image_size", "288"], ["'eval_image_size'", "data.eval_image_size", "not of the one chosen"]),
    (["fit", "--data.batch_size=16.0"], ["expected int; give 16"]),
    (["fit", "--seed_everything=1.0"], ["give 1"]),
    (["fit", "--model.aw=1"], ["give true"]),
    (["fit", "--model.channels_last=0"], ["expected bool; give false"]),
    (["fit", "--model.ema_decay=none"], ["expected float or null; give null"]),
    (["fit", "--model.milestones=(1.0, 2)"], ["give [1, 2]"]),
    (["fit", "--model.milestones=3"], ["list[int] or null; give [3]"]),
    (["fit", "--data.mean=0.5"], ["list[float] or null; give [0.5]"]),
    (["fit", "--model.lr=0,1"], ["expected float; give 0.1"]),
    (["fit", "--model.milestones=[a]"], ["milestones=\"['a']\"", "list[int] or null"]),
    (["fit", "--trainer.precision=17"], ["trainer.precision='17'", "'bf16-mixed'"]),
    (["fit", "--model.lr"], ["has no value"]),
    (["fit", "--ckpt_path="], ["--ckpt_path has no value"]),
    (["fit", "-c", "configs"], ["'configs'", "is a folder"]),
    (["fit", "--model.num_classes=5"], ["model.num_classes is taken from the data"]),
    (["fit", "--trainer.strategy=ddpp"], ["the trainer refuses its settings", "ddpp"]),
    (["fit", "--trainer.accelerator=abacus"], ["the trainer refuses its settings", "abacus"]),
]


@pytest.mark.parametrize(("args", "says"), BAD_ARGUMENTS, ids=lambda value: " ".join(value)[:60])
def test_bad_arguments(cli, tmp_path, args, says):
    if len(args) > 1:
        args = [*args, f"--trainer.default_root_dir={tmp_path / 'runs'}", *QUIET]
    assert_one_clear_line(cli(*args), *says)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("trainer: {max_epochz: 2}", ["max_epochz", "trainer.max_epochs"]),
        ("model: {init_args: {backbne: resnet20}}", ["backbne", "backbone"]),
        ("model: {init_args: {lr: [1, 2}}", ["not valid YAML"]),
        ("- a\n- b", ["holds list"]),
        ("model: {init_args: {backbone: 1e5}}", ["backbone='100000.0'", "stand between quotes"]),
        ("\x00", ["not valid YAML"]),
    ],
)
def test_bad_configs(cli, tmp_path, content, says):
    path = tmp_path / "my.yaml"
    path.write_text(content)
    digits = ["-c", "configs/recipes/digits.yaml", "-c", "configs/models/aw_resnet20.yaml"]
    assert_one_clear_line(cli("fit", *digits, "-c", path, f"--trainer.default_root_dir={tmp_path / 'runs'}"), *says)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["last", "best"])
@pytest.mark.parametrize("command", ["fit", "test"])
def test_last_with_none(cli, tmp_path, command, name):
    result = cli(command, "--ckpt_path", name, f"--trainer.default_root_dir={tmp_path / 'runs'}")
    assert_one_clear_line(result, f"ckpt_path={name!r}", str(tmp_path / "runs"), "train one")


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed-code",)


def test_files_that_are_no_checkpoints(cli, tmp_path, trained):
    whole = (trained / "checkpoints/last.ckpt").read_bytes()
    bad = {
        "text.ckpt": b"hello",
        "cut.ckpt": whole[: len(whole) // 2],
        "empty.ckpt": b"",
        "code.ckpt": None,
        "code.pkl": pickle.dumps(Evil()),
    }
    for name, content in bad.items():
        path = tmp_path / name
        if content is None:
            torch.save({"state_dict": {}, "evil": Evil()}, path)
        else:
            path.write_bytes(content)
        assert_one_clear_line(cli("test", "--ckpt_path", path), name, "not a checkpoint")
        assert_one_clear_line(cli("fit", "--model.initial_weights", path), name)
    assert not (PROJECT / "executed-code").exists()

    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "bare.ckpt")
    assert_one_clear_line(cli("test", "--ckpt_path", tmp_path / "bare.ckpt"), "bare.ckpt", "initial_weights")


def test_a_checkpoint_of_another_architecture(cli, tmp_path, trained):
    result = cli(
        "test",
        f"--ckpt_path={trained / 'checkpoints/last.ckpt'}",
        "--model.backbone=resnet32",
        *QUIET,
        f"--trainer.default_root_dir={tmp_path / 'runs'}",
    )
    assert_one_clear_line(result, "another network", "missing", "another architecture")
    result = cli(
        "test",
        f"--ckpt_path={trained / 'checkpoints/last.ckpt'}",
        "--model.aw=false",
        *QUIET,
        f"--trainer.default_root_dir={tmp_path / 'runs'}",
    )
    assert_one_clear_line(result, "AW network")


def test_a_loss_that_is_no_number(cli, tmp_path):
    result = cli("fit", *short(tmp_path), "--model.lr=1e30", "--model.optimizer=sgd", "--model.lr_schedule=constant")
    assert_one_clear_line(result, "not finite at step 1", "model.lr (now 1e+30)")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda root: None, ["does not exist"]),
        (lambda root: (root / "train").mkdir(parents=True), ["no class folders"]),
    ],
)
def test_imagenet_roots_that_are_none(cli, tmp_path, spoil, says):
    root = tmp_path / "imagenet"
    spoil(root)
    imagenet = ["-c", "configs/recipes/imagenet.yaml", "-c", "configs/models/resnet18.yaml"]
    result = cli("fit", *imagenet, f"--data.root={root}", f"--trainer.default_root_dir={tmp_path / 'runs'}")
    assert_one_clear_line(result, str(root))
    assert not (tmp_path / "runs").exists()


def test_imagenet_folders_gone_wrong(cli, tmp_path, imagenet_root):
    imagenet = [
        "-c",
        "configs/recipes/imagenet.yaml",
        "-c",
        "configs/models/resnet18.yaml",
        "--data.num_workers=0",
        "--data.batch_size=4",
        "--data.image_size=32",
        *SHORT[:5],
        *QUIET,
    ]
    runs = f"--trainer.default_root_dir={tmp_path / 'runs'}"
    picture = next((imagenet_root / "train/cat").iterdir())
    whole = picture.read_bytes()
    picture.write_bytes(whole[:40])
    options = [*imagenet, f"--data.root={imagenet_root}", runs, "--trainer.limit_train_batches=1.0"]
    assert_one_clear_line(cli("fit", *options), picture.name)
    with pytest.warns(UserWarning, match=picture.name):
        code, _, err = cli("fit", *options, "--data.on_bad_image=skip")
    assert code == 0, err
    picture.write_bytes(whole)

    (imagenet_root / "val/owl").rename(imagenet_root / "val/zebra")
    assert_one_clear_line(cli("fit", *options), "zebra", "owl")
    for folder in list((imagenet_root / "val").iterdir()):
        for file in folder.iterdir():
            file.rename(imagenet_root / "val" / f"{folder.name}-{file.name}")
        folder.rmdir()
    assert_one_clear_line(cli("fit", *options), "val/CLASS", "flat folder", "move each")


def test_cifar_that_is_not_there(cli, tmp_path):
    result = cli(
        "fit",
        "-c",
        "configs/recipes/cifar10.yaml",
        "-c",
        "configs/models/resnet20.yaml",
        f"--data.root={tmp_path / 'cifar'}",
        f"--trainer.default_root_dir={tmp_path / 'runs'}",
        *QUIET,
    )
    assert_one_clear_line(result, "cifar", "--data.download true")


def test_a_folder_that_cannot_be_made(cli):
    assert_one_clear_line(cli("fit", "--trainer.default_root_dir=/proc/runs"), "'/proc/runs'", "cannot be written to")


def test_a_run_that_is_longer_already_than_it_is_to_become(cli, tmp_path, trained):
    before = set(trained.parent.iterdir())
    checkpoint = trained / "checkpoints/last.ckpt"
    options = [f"--ckpt_path={checkpoint}", "--trainer.max_epochs=0", f"--trainer.default_root_dir={tmp_path / 'runs'}"]
    assert_one_clear_line(cli("fit", *options), "trainer.max_epochs=0", str(checkpoint), "give more")
    assert set(trained.parent.iterdir()) == before


def test_predicting_what_is_no_picture(cli, tmp_path, trained):
    folder = tmp_path / "mine"
    folder.mkdir()
    common = [
        "predict",
        f"--ckpt_path={trained / 'checkpoints/best.ckpt'}",
        f"--data.predict_dir={folder}",
        f"--trainer.default_root_dir={tmp_path / 'runs'}",
        *QUIET,
    ]
    assert_one_clear_line(cli(*common), str(folder))
    assert not list((tmp_path / "runs").glob("*/*-predict")), "a folder of a run that never was"
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(folder / "good.png")
    (folder / "bad.png").write_bytes(b"no picture")
    code, out, err = cli(*common, f"--run_dir={tmp_path / 'skipped'}")
    assert code == 0, err
    assert f"1 of 2 images skipped, such as {folder / 'bad.png'}: this file is not a picture" in out
    names = {path.name for path in (tmp_path / "skipped").iterdir()}
    assert names >= {"predictions.csv", "predictions.png", "skipped.csv"}
    assert not any("partial" in name for name in names)
    assert len((tmp_path / "skipped/predictions.csv").read_text().splitlines()) == 2

    (folder / "bad.png").rename(folder / "zz.png")
    stopping = ("--data.on_bad_image=stop", "--data.batch_size=1", f"--run_dir={tmp_path / 'stopped'}")
    code, _, err = cli(*common, *stopping)
    assert code == 2
    assert "zz.png: this file is not a picture" in err
    # what came before it is kept
    assert len((tmp_path / "stopped/predictions.partial.jsonl").read_text().splitlines()) == 1

    (folder / "good.png").unlink()
    assert cli(*common)[0] == 2


# ---- real processes -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_ctrl_c_says_where_the_last_checkpoint_is(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "lightning_cli.py", "fit", *short(tmp_path), "--trainer.max_epochs=1000"],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("runs/*/*/checkpoints/last.ckpt")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    last = only_run(tmp_path) / "checkpoints/last.ckpt"
    assert f"interrupted: the last checkpoint is {last}" in err
    assert "Traceback" not in err
    files = {p.name for p in last.parent.iterdir()}
    assert files == {"best.ckpt", "last.ckpt"}
    for name in files:
        assert torch.load(last.parent / name, weights_only=True)["global_step"] > 0


def test_sync_batchnorm_keeps_the_activation_that_timm_puts_into_a_norm():
    """torch's own conversion replaces timm's BatchNormAct2d by a bare SyncBatchNorm."""
    from awconv.cli import _SyncBatchNorm
    from awconv.models import create_backbone

    network = create_backbone("mobilenetv2_100", num_classes=3).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = network(images)
        plugin = _SyncBatchNorm()
        synchronised = plugin.apply(network)
        kinds = {type(module) for module in synchronised.modules()}
        assert any(issubclass(kind, torch.nn.SyncBatchNorm) for kind in kinds)
        assert torch.equal(plugin.revert(synchronised)(images), before)
