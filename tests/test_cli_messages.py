"""Options that cannot work: one line before training, and no folder of a run that never was."""

import errno
import multiprocessing
import os
import signal
import time
from multiprocessing import synchronize
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

import awconv.data
from awconv.cli.checks import refused_by_library
from awconv.cli.messages import bad_input
from awconv.errors import InputError
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
        (["--trainer.max_epochs=0"], ["trainer.max_epochs=0", "validate or test"]),
        (["--trainer.max_steps=0"], ["trainer.max_steps=0", "validate or test"]),
        (["--trainer.min_steps=-1"], ["trainer.min_steps=-1", "at least 0"]),
        (["--trainer.max_time=00:00:00:00"], ["trainer.max_time", "no time to train"]),
        (callback("Timer", duration="{days: -1}"), ["duration of Timer", "no time to train"]),
        (["--trainer.max_epochs=0x" + "f" * 4000], ["trainer.max_epochs=", "2**63"]),
        ([f"--data.image_size={10**15}"], ["out of memory", "image size"]),
        (["--model.lr=null"], ["model.lr=null", "expected float"]),
        (["--data.num_workers=null"], ["data.num_workers=null", "expected int"]),
        (["--model.gamma=.nan"], ["model.gamma=nan", "expected a number"]),
        (callback("EarlyStopping", monitor="val/acc1", min_delta=".nan"), ["min_delta=nan", "expected a number"]),
        (callback("EarlyStopping", monitor="val/acc1", patience=-1), ["EarlyStopping.patience=-1", "at least 0"]),
        (callback("LearningRateFinder", num_training_steps=0), ["LearningRateFinder.num_training_steps=0"]),
        (callback("LearningRateFinder", max_lr=-1), ["LearningRateFinder.max_lr=-1"]),
        (callback("BatchSizeFinder", steps_per_trial=0), ["BatchSizeFinder.steps_per_trial=0", "at least 1"]),
        (callback("ModelCheckpoint", filename="../../x"), ["ModelCheckpoint.filename='../../x'", "dirpath"]),
        (callback("ModelCheckpoint", filename="/tmp/x"), ["ModelCheckpoint.filename='/tmp/x'", "dirpath"]),
        (callback("ModelCheckpoint", dirpath="/dev/null/x"), ["trainer.callbacks.dirpath=", "/dev/null is no folder"]),
        # each of several is looked at
        (
            [*callback("ModelCheckpoint", dirpath="/dev/null/x"), *callback("OnExceptionCheckpoint", dirpath="/tmp")],
            ["trainer.callbacks.dirpath=", "/dev/null is no folder"],
        ),
        (["--checkpoint.dirpath=/dev/null/x"], ["checkpoint.dirpath=", "/dev/null is no folder"]),
        (["--checkpoint.dirpath="], ["checkpoint.dirpath=''", "not named"]),
        (["--last_checkpoint.dirpath=/dev/null"], ["last_checkpoint.dirpath=", "/dev/null is no folder"]),
        (["--checkpoint.mode="], ["checkpoint.mode=''", "'min', 'max'"]),
        (["--model="], ["model=''", "ClassificationTask"]),
        (["--trainer=[1]"], ["trainer='[1]'", "give trainer.NAME"]),
        (["--trainer.callbacks=[1]"], ["trainer.callbacks='[1]'", "expected list[Callback] or Callback or null"]),
        (["--model.backbone=" + "x" * 5000], ["backbone=", "characters)"]),
        (["--trainer.max_epochs=" + "x y" * 2000], ["trainer.max_epochs=", "expected int or null"]),
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
    result = cli("fit", *SHORT, f"--trainer.default_root_dir={tmp_path / 'runs'}", *options)
    refused(result, *says)
    assert len(result[2]) < 4000
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
        *(
            (f"{name}: {value}", [f"{name} holds", "not options"])
            for name, value in [
                ("trainer", "[1]"),
                ("trainer", "7"),
                ("trainer", ""),
                ("checkpoint", "true"),
                ("last_checkpoint", "[]"),
                ("checkpoint", "1.5"),
            ]
        ),
        ("trainer: hello", ["trainer='hello'", "neither options nor a file"]),
        ("trainer: {1: 2}", ["must be a string"]),
        ("1: 2", ["1 names no section"]),
        ("config: [x.yaml]", ["config is no path", "-c"]),
        ("model: {init_args: 7}", ["model="]),
        ("model: {dict_kwargs: {a: 1}}", ["ClassificationTask has no option 'a'"]),
        ('run_dir: "a\\0b"', ["NUL character"]),
        ('trainer: "a\\0b"', ["NUL character"]),
        ("trainer: {max_epochs: 1}\ntrainer: {max_steps: 3}", ["line 2", "'trainer' is given twice", "line 1"]),
    ],
)
def test_the_same_in_a_config(cli, tmp_path, config, says):
    (tmp_path / "my.yaml").write_text(config, encoding="utf-8")
    refused(cli("fit", *SHORT, "-c", tmp_path / "my.yaml", f"--trainer.default_root_dir={tmp_path / 'runs'}"), *says)
    assert not [path for path in tmp_path.glob("runs/**/*") if path.is_file()]


SECRET = "hunter2"
FILES = {
    "alias": "&a [*a]",
    "deep": "[" * 3000,
    "twice": "trainer: {}\ntrainer: {}",
    "latin-1": "café: 1".encode("latin-1"),
    "utf-16": "a: 1".encode("utf-16"),
    "large": "#" * 3_000_000,
    "broken": f"password: {SECRET}\n  x: [{SECRET}\n",
    "alias of nothing": f"*{SECRET}",
    "tag": f"!{SECRET} 1",
    "text": SECRET,
    "mapping": f"password: {SECRET}",
}
# as jsonargparse reads it when an option names a file
ITSELF = {
    "config": "config: itself",
    "model": "model: itself",
    "trainer": "trainer: itself",
    "trainer.callbacks": "trainer: {callbacks: itself}",
}


@pytest.mark.parametrize(
    ("option", "name"),
    [
        *(("config", name) for name in [*FILES, "pipe", "loop", "itself"]),
        *((o, n) for o in [*ITSELF][1:] for n in ("broken", "text", "mapping", "utf-16", "pipe", "itself")),
    ],
)
def test_files_that_are_no_configs(cli, tmp_path, monkeypatch, option, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    if name == "pipe":
        os.mkfifo(path)
    elif name == "loop":
        path.symlink_to(path)
    else:
        content = ITSELF[option] if name == "itself" else FILES[name]
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    result = cli("fit", *SHORT, "-c" if name == "itself" or option == "config" else f"--{option}", path)
    refused(result)
    assert SECRET not in result[1] + result[2]
    assert [there.name for there in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["deep", "latin-1", "text", "pipe", "sections"])
def test_the_config_of_a_run_that_is_to_go_on(cli, tmp_path, name):
    config = tmp_path / "run/config.yaml"
    config.parent.mkdir()
    if name == "pipe":
        os.mkfifo(config)
    else:
        content = FILES.get(name, "last_checkpoint: [1]\ncheckpoint: {dirpath: 3}")
        config.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(cli("fit", f"--resume={config.parent}"), "run")
    refused(cli("fit", "--ckpt_path=last", f"--trainer.default_root_dir={tmp_path}"), "no run under")


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


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4000000000000 bytes."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4000000000000 bytes."),
    ],
    ids=["cpu", "cuda"],
)
def test_no_memory_for_what_is_asked(cli, tmp_path, monkeypatch, error):
    def allocate(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(L.LightningModule, "on_after_backward", allocate)
    result = cli("fit", *SHORT, f"--trainer.default_root_dir={tmp_path / 'runs'}")
    refused(result, "out of memory", "4000000000000 bytes", "--data.batch_size")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "), "num_workers"),
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
        "exited unexpectedly",
    ],
)
def test_a_worker_that_crashes_keeps_its_traceback(end):
    assert bad_input(RuntimeError(f"DataLoader worker (pid 12) {end}")) is None


@pytest.mark.parametrize(("exitcode", "is_told"), [(-9, True), (-15, True), (-11, False), (1, False)])
def test_how_a_worker_ended_that_only_its_process_tells(exitcode, is_told):
    def data_of_dead_workers(failed_workers):  # torch's name
        raise RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly")

    with pytest.raises(RuntimeError) as caught:
        data_of_dead_workers([SimpleNamespace(exitcode=exitcode)])
    assert ("num_workers" in (bad_input(caught.value) or "")) == is_told


class Loader:
    """Fetches a batch, as a data loader does that has not noticed yet how its worker ended."""

    def __init__(self, end: int) -> None:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        worker = multiprocessing.get_context("fork").Process(target=self.work, args=(sender,))
        worker.start()
        self._workers = [worker]
        self.message = receiver.recv_bytes()
        os.kill(worker.pid, end)
        worker.join()

    def work(self, sender: Any) -> None:
        sender.send_bytes(ForkingPickler.dumps(torch.ones(9)))
        time.sleep(60)

    def fetch(self) -> Any:
        return ForkingPickler.loads(self.message)


@pytest.mark.parametrize(("end", "is_told"), [(signal.SIGKILL, True), (signal.SIGTERM, True), (signal.SIGSEGV, False)])
def test_a_batch_of_a_worker_that_is_gone(end, is_told):
    loader = Loader(end)
    with pytest.raises((OSError, EOFError)) as caught:
        loader.fetch()
    assert ("a process that loads data was killed" in (bad_input(caught.value) or "")) == is_told


@pytest.mark.parametrize("ask", [lambda: np.arange(0, 1e30), lambda: torch.empty(2**62, 4)], ids=["numpy", "torch"])
def test_sizes_that_cannot_be_counted_are_a_bug_of_a_fork(ask):
    with pytest.raises((ValueError, RuntimeError)) as caught:
        ask()
    error = caught.value
    assert bad_input(error) is None
    # as a worker tells of it
    lines = ["Caught it in DataLoader worker process 0.", "Original Traceback (most recent call last):"]
    ours = f'  File "{awconv.data.__file__}", line 1, in f'
    for line, is_told in ((ours, True), (f'  File "{__file__}", line 1, in f', False)):
        said = bad_input(type(error)("\n".join([*lines, ours, line, f"{type(error).__name__}: {error}"])))
        assert ("out of memory" in (said or "")) == is_told


def test_semaphores_lie_in_shared_memory_too(monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(synchronize._multiprocessing, "SemLock", full)
    with pytest.raises(OSError, match="No space") as caught:
        multiprocessing.get_context("fork").Queue()
    assert "--shm-size" in bad_input(caught.value)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "give a smaller --data.batch_size"),
        (RuntimeError("CUDA error: out of memory"), "give a smaller --data.batch_size"),
        (np.exceptions.AxisError("a bug"), None),
        (RuntimeError("a bug"), None),
        (KeyError("config"), None),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a bug"), None),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "/a"), "/a cannot be opened (Too many"),
        (OSError(errno.ENOTDIR, "Not a directory", "/a"), "/a cannot be opened (Not a directory)"),
        (OSError(errno.EISDIR, "Is a directory", "/a"), None),
        (OSError(errno.EIO, "Input/output error", "/a"), "/a cannot be opened (Input/output error); the disk"),
        (OSError(errno.ESTALE, "Stale file handle", "/a"), "mount it again"),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), "/a cannot be opened (Permission denied)"),
        (OSError(errno.ENOSPC, "No space left on device", "/a"), "make room"),
        (
            InputError(
                "Caught InputError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
                '  File "x.py", line 1, in f\nawconv.errors.InputError: a.png: it is damaged\n'
            ),
            "a.png: it is damaged",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_bad_input_and_what_is_a_bug(error, says):
    said = bad_input(error)
    assert (said is None) == (says is None)
    assert said is None or (says in said and "Traceback" not in said)


def test_a_fork_that_takes_a_file_for_a_folder_has_a_bug(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError) as caught:
        (tmp_path / "file/x").open()
    assert bad_input(caught.value) is None


def test_only_what_restores_a_run_cannot_be_restored():
    def error_of(function: str) -> Exception:
        code = f"def {function}(): raise KeyError('x')\n{function}()"
        with pytest.raises(KeyError) as caught:
            exec(code, {"__name__": "lightning.pytorch.trainer.connectors.checkpoint_connector"})
        error = caught.value
        return error.with_traceback(error.__traceback__.tb_next)  # without this test's frame

    for function in ("restore_loops", "_restore_modules_and_callbacks", "resume_end"):
        assert "cannot be restored" in refused_by_library(error_of(function))
    assert refused_by_library(error_of("dump_checkpoint")) is None


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
