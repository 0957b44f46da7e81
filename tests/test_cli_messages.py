"""Options that cannot work: one line before training, and no folder of a run that never was."""

import errno
import multiprocessing
import os
from multiprocessing import synchronize
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from awconv.cli.messages import bad_input
from refusals import refused

SHORT = [
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--data.image_size=8",
    "--data.batch_size=16",
]


def callback(name: str, **options: object) -> list[str]:
    return [f"--trainer.callbacks+={name}", *(f"--trainer.callbacks.{key}={value}" for key, value in options.items())]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--trainer.accumulate_grad_batches=0"], ["trainer.accumulate_grad_batches=0", "at least 1"]),
        (["--trainer.check_val_every_n_epoch=0"], ["trainer.check_val_every_n_epoch=0", "at least 1"]),
        (["--trainer.gradient_clip_val=-1"], ["trainer.gradient_clip_val=-1", "at least 0"]),
        (["--trainer.val_check_interval=0"], ["trainer.val_check_interval=0", "limit_val_batches 0"]),
        (["--trainer.val_check_interval=100"], ["`val_check_interval` (100)", "(2)"]),
        (["--trainer.limit_train_batches=0"], ["trainer.limit_train_batches=0", "validate or test"]),
        (["--trainer.devices=100000000000000000000"], ["the trainer refuses its settings"]),
        (["--trainer.profiler=foo"], ["the trainer refuses its settings", "'simple'"]),
        ([f"--data.batch_size={10**22}"], [f"data.batch_size={10**22}", "2**63"]),
        ([f"--data.num_workers={10**21}"], [f"data.num_workers={10**21}", "2**63"]),
        ([f"--ckpt_path={'a' * 5000}"], ["(5000 characters)", "too long"]),
        ([f"--run_dir={'a' * 5000}"], ["(5000 characters)", "too long"]),
        (callback("EarlyStopping", monitor="val/acc1", mode="mx"), ["EarlyStopping(mode='mx')", "min, max"]),
        (callback("EarlyStopping", monitor="nope"), ["EarlyStopping.monitor='nope'", "val/acc1"]),
        (callback("ModelCheckpoint", mode="mx"), ["ModelCheckpoint(mode='mx')", "min, max"]),
        (callback("ModelCheckpoint", save_top_k=-2), ["ModelCheckpoint(save_top_k=-2)", ">= -1"]),
        (callback("ModelCheckpoint", save_top_k=3), ["ModelCheckpoint(", "save_top_k=3", "No quantity"]),
        (callback("ModelCheckpoint", every_n_train_steps=3, every_n_epochs=2), ["every_n_epochs=2", "exclusive"]),
        (callback("StochasticWeightAveraging", swa_lrs=-1), ["StochasticWeightAveraging(swa_lrs=-1.0)"]),
        (callback("LearningRateFinder", mode="foo"), ["LearningRateFinder(mode='foo')", "linear"]),
        (callback("LearningRateFinder", attr_name="nope"), ["LearningRateFinder(attr_name='nope')"]),
        (callback("BatchSizeFinder", batch_arg_name="nope"), ["BatchSizeFinder(batch_arg_name='nope')"]),
        (callback("BackboneFinetuning"), ["BackboneFinetuning", "'backbone'"]),
        ([*callback("DeviceStatsMonitor"), "--trainer.logger=false"], ["DeviceStatsMonitor", "logger"]),
        (["--trainer.profiler=XLAProfiler"], ["XLAProfiler needs a package", "torch_xla"]),
        *(
            ([f"--trainer.precision={precision}", "--model.ema_decay=0.9"], [precision, "model.ema_decay=0.9"])
            for precision in ("bf16-true", "16-true", "64-true")
        ),
        *(
            ([*callback(name, **options), "--model.ema_decay=0.9"], [name, "model.ema_decay=0.9", "one of the two"])
            for name, options in (("StochasticWeightAveraging", {"swa_lrs": 0.1}), ("EMAWeightAveraging", {}))
        ),
        (["--checkpoint.save_top_k=3"], ["best.ckpt is always the best alone", "--trainer.callbacks.save_top_k="]),
        (["--checkpoint.filename=x"], ["best.ckpt is always the best alone", "--trainer.callbacks.filename="]),
        (["--checkpoint.save_last=true"], ["last.ckpt is kept anyway"]),
    ],
    ids=lambda value: " ".join(value)[:60],
)
def test_options_that_cannot_work(cli, tmp_path, options, says):
    refused(cli("fit", *SHORT, f"--trainer.default_root_dir={tmp_path / 'runs'}", *options), *says)
    assert not [path for path in tmp_path.glob("runs/**/*") if path.is_file()]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("checkpoint: {save_top_k: 3}", ["checkpoint.save_top_k", "--trainer.callbacks+=ModelCheckpoint"]),
        ("checkpoint: {every_n_train_steps: 3}", ["checkpoint.every_n_train_steps", "ModelCheckpoint"]),
        (
            "trainer: {accumulate_grad_batches: 2, callbacks: [{class_path: GradientAccumulationScheduler, init_args: "
            "{scheduling: {0: 2}}}]}",
            ["accumulate_grad_batches=2", "GradientAccumulationScheduler"],
        ),
        # one callback that is no list
        (
            "trainer: {callbacks: {class_path: GradientAccumulationScheduler, init_args: {scheduling: {-1: 2}}}}",
            ["GradientAccumulationScheduler", "-1"],
        ),
        (
            "trainer: {callbacks: {class_path: awconv.callbacks.LastCheckpoint, init_args: {every_n_steps: -2}}}",
            ["every_n_steps=-2"],
        ),
    ],
)
def test_the_same_in_a_config(cli, tmp_path, config, says):
    (tmp_path / "my.yaml").write_text(config, encoding="utf-8")
    refused(cli("fit", *SHORT, "-c", tmp_path / "my.yaml", f"--trainer.default_root_dir={tmp_path / 'runs'}"), *says)
    assert not [path for path in tmp_path.glob("runs/**/*") if path.is_file()]


@pytest.mark.parametrize(
    ("logger", "flags"),
    [
        ("MLFlowLogger", ["pytorch.loggers.mlflow._MLFLOW_AVAILABLE"]),
        ("CometLogger", ["pytorch.loggers.comet._COMET_AVAILABLE"]),
        (
            "TensorBoardLogger",
            [
                "pytorch.loggers.tensorboard._TENSORBOARD_AVAILABLE",
                "fabric.loggers.tensorboard._TENSORBOARD_AVAILABLE",
                "fabric.loggers.tensorboard._TENSORBOARDX_AVAILABLE",
            ],
        ),
    ],
)
def test_a_logger_whose_package_is_missing(cli, tmp_path, monkeypatch, logger, flags):
    for flag in flags:
        monkeypatch.setattr(f"lightning.{flag}", False)
    result = cli("fit", *SHORT, f"--trainer.default_root_dir={tmp_path / 'runs'}", f"--trainer.logger={logger}")
    refused(result, f"{logger} needs a package that is not installed")


def test_a_metric_of_training_that_does_not_exist(cli, tmp_path):
    options = callback("EarlyStopping", monitor="train/nope", mode="max")
    result = cli("fit", *SHORT, f"--trainer.default_root_dir={tmp_path / 'runs'}", *options)
    refused(result, "EarlyStopping(monitor='train/nope')", "train/loss")


def test_no_memory_for_what_is_asked(cli, tmp_path, monkeypatch):
    def allocate(*args: object, **kwargs: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4000000000000 bytes.")

    monkeypatch.setattr(L.LightningModule, "on_after_backward", allocate)
    result = cli("fit", *SHORT, f"--trainer.default_root_dir={tmp_path / 'runs'}")
    refused(result, "out of memory", "4000000000000 bytes", "--data.batch_size")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "), "num_workers"),
        (RuntimeError("DataLoader worker (pid(s) 12, 13) exited unexpectedly"), "num_workers"),
        (
            RuntimeError(
                "DataLoader worker (pid 12) is killed by signal: Bus error. It is possible that dataloader's workers "
                "are out of shared memory. Please try to raise your shared memory limit."
            ),
            "--shm-size",
        ),
        (
            RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"),
            "--shm-size",
        ),
        (RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)"), "--shm-size"),
        (RuntimeError("unable to mmap 8 bytes from file </torch_1_2_3>: Cannot allocate memory (12)"), "--shm-size"),
        (
            RuntimeError("unable to open shared memory object </torch_1> in read-only mode: Too many open files (24)"),
            "ulimit -n",
        ),
        (RuntimeError("Too many open files. Communication with the workers is no longer possible."), "ulimit -n"),
        (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE), "a.png"), "ulimit -n"),
        (
            OSError(
                "Caught OSError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
                + 99 * "  File x\n"
                + "OSError: [Errno 24] Too many open files: 'a.png'\n"
            ),
            "ulimit -n",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_the_machine_has_too_little_of(error, says):
    said = bad_input(error)
    assert says in said
    assert "--resume" in said
    assert "\n" not in said
    assert len(said) < 600


@pytest.mark.parametrize(
    "end",
    [
        "is killed by signal: Segmentation fault.",
        "is killed by signal: Aborted.",
        "exited unexpectedly with exit code 3. Details are lost due to multiprocessing.",
    ],
)
def test_a_worker_that_crashes_keeps_its_traceback(end):
    assert bad_input(RuntimeError(f"DataLoader worker (pid 12) {end}")) is None


def test_semaphores_lie_in_shared_memory_too(monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(synchronize._multiprocessing, "SemLock", full)
    with pytest.raises(OSError, match="No space") as caught:
        multiprocessing.get_context("fork").Queue()
    assert "--shm-size" in bad_input(caught.value)


class Faulty(L.Callback):
    """A fork's callback with a bug."""

    def __init__(self) -> None:
        raise ValueError("a bug of a fork")


def test_a_bug_of_a_fork_keeps_its_traceback(cli, tmp_path):
    with pytest.raises(ValueError, match="a bug of a fork"):
        cli("fit", *SHORT, f"--trainer.default_root_dir={tmp_path / 'runs'}", *callback("test_cli_messages.Faulty"))


class LogsTooLate(L.Callback):
    """A fork's callback with a bug that Lightning calls a misconfiguration."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log("late", 1.0)


def test_so_does_one_that_lightning_calls_a_misconfiguration(cli, tmp_path):
    late = callback("test_cli_messages.LogsTooLate")
    with pytest.raises(MisconfigurationException, match="on_train_end"):
        cli("fit", *SHORT, f"--trainer.default_root_dir={tmp_path / 'runs'}", *late)


@pytest.mark.parametrize(
    "options",
    [
        {"monitor": "val/loss", "mode": "min", "save_top_k": 2},
        {"every_n_train_steps": 1, "filename": "mine-{step}"},
    ],
    ids=lambda options: "-".join(options),
)
def test_what_is_offered_in_place_of_more_options_for_best(cli, tmp_path, options):
    run = tmp_path / "run"
    code, _, err = cli("fit", *SHORT, f"--run_dir={run}", *callback("ModelCheckpoint", **options))
    assert code == 0, err
    names = {path.name for path in Path(run, "checkpoints").iterdir()}
    assert {"best.ckpt", "last.ckpt"} < names
    assert torch.load(run / "checkpoints/best.ckpt", weights_only=True)["global_step"] == 2
