"""Runs that are killed, preempted, or out of room: what is on the disk is whole, and a resumed run ends as if nothing
had happened.

Run as a script, this file is what the kill tests do: everything is imported once, and each run is a forked process.
"""

import csv
import errno
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch

from awconv.cli import main
from awconv.files import atomic_write
from refusals import refused

PROJECT = Path(__file__).parents[1]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
# everything that draws random numbers or has a state of its own
CLASSIFICATION = [
    *QUIET,
    "--trainer.max_epochs=3",
    "--trainer.limit_train_batches=11",
    "--trainer.limit_val_batches=2",
    "--trainer.val_check_interval=0.5",
    "--trainer.log_every_n_steps=1",
    "--trainer.deterministic=true",
    "--trainer.accumulate_grad_batches=2",
    "--data.image_size=8",
    "--data.batch_size=8",
    "--data.augment=trivialaugment",
    "--data.mixup_alpha=0.2",
    "--model.ema_decay=0.9",
    "--last_checkpoint.every_n_steps=2",
]
DETECTION = [
    "-c",
    "configs/recipes/digit_scenes.yaml",
    "-c",
    "configs/models/aw_faster_rcnn_resnet18_small.yaml",
    *QUIET,
    "--trainer.max_epochs=2",
    "--trainer.log_every_n_steps=1",
    "--trainer.deterministic=true",
    "--data.train_scenes=12",
    "--data.val_scenes=2",
    "--data.test_scenes=2",
    "--data.batch_size=2",
    "--data.num_workers=0",
    "--data.image_size=64",
    "--data.max_size=96",
    "--last_checkpoint.every_n_steps=2",
]
PREEMPTED = 75


def metrics(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


# ---- killed at a moment of chance -------------------------------------------------------------------------------


def run_in_a_fork(args: list[str], log: Path, run: Path, kill_after: float | None = None, number: int = 0) -> int:
    """Runs the command line in a process of its own and gives its exit code, or minus the signal that ended it.

    The signal is sent some seconds after the run's folder has got its config, which it gets when training begins.
    """
    child = os.fork()
    if child == 0:
        with log.open("ab") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        code = 1
        try:
            sys.argv = ["lightning_cli.py"]
            main(args)
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    if kill_after is not None:
        while not (run / "config.yaml").is_file():
            time.sleep(0.01)
        time.sleep(kill_after)
        os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_and_resume(folder: Path, options: list[str], kills: int, seed: int) -> None:
    """Kills a run time and again; writes what came of it as JSON for the test to judge."""
    chance = random.Random(seed)
    log, whole = folder / "log", folder / "whole"
    assert run_in_a_fork(["fit", *options, f"--run_dir={whole}"], log, whole) == 0, log.read_text()
    duration = (whole / "checkpoints/last.ckpt").stat().st_mtime - (whole / "config.yaml").stat().st_mtime
    outcomes = []
    for k in range(kills):
        run = folder / f"run{k}"
        number = (signal.SIGKILL, signal.SIGTERM)[k % 2]
        # evenly over the run, each at a moment of chance
        delay = (k + chance.random()) / kills * duration
        codes = [run_in_a_fork(["fit", *options, f"--run_dir={run}"], log, run, delay, number)]
        torn = [str(path) for path in run.glob("checkpoints/*.ckpt") if not readable(path)]
        begun = (run / "checkpoints/last.ckpt").is_file()
        step = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] if begun else 0
        codes.append(run_in_a_fork(["fit", "--resume", str(run)], log, run))
        outcomes.append({"run": str(run), "signal": int(number), "codes": codes, "torn": torn, "step": step})
    (folder / "outcomes.json").write_text(json.dumps(outcomes))


def readable(path: Path) -> bool:
    try:
        torch.load(path, weights_only=True)
    except Exception:
        return False
    return True


KILLED = {
    "classification": (CLASSIFICATION, 20, 1),
    "detection": (DETECTION, 4, 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KILLED)
def test_a_killed_run_ends_as_the_uninterrupted_one(tmp_path, kind):
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path), kind], cwd=PROJECT, capture_output=True, text=True, timeout=550
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads((tmp_path / "outcomes.json").read_text())
    whole = torch.load(tmp_path / "whole/checkpoints/last.ckpt", weights_only=True)
    assert len(outcomes) == KILLED[kind][1]
    for outcome in outcomes:
        run = Path(outcome["run"])
        first, second = outcome["codes"]
        # a run that was faster than the signal has simply ended; Python is not yet listening in its first moments
        allowed = {-signal.SIGKILL, 0} if outcome["signal"] == signal.SIGKILL else {PREEMPTED, 0, -signal.SIGTERM}
        assert first in allowed, outcome
        assert second == 0, (outcome, (tmp_path / "log").read_text()[-3000:])
        assert outcome["torn"] == []
        assert {path.suffix for path in (run / "checkpoints").iterdir()} == {".ckpt"}, "nothing half written"
        ended = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
        assert_equal(ended, whole, ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"))
        assert_equal(ended["callbacks"], whole["callbacks"], [k for k in whole["callbacks"] if "WeightAverage" in k])
        # Lightning logs a step after its checkpoint is written: a process killed between the two takes it along
        lost = outcome["step"] - 1 if first == -signal.SIGKILL else None
        rows, expected = ([row for row in measured(r) if row["step"] != str(lost)] for r in (run, tmp_path / "whole"))
        assert rows == expected, outcome
    # the signals must have hit something, before and after a checkpoint
    steps = {outcome["step"] for outcome in outcomes}
    assert len(steps) > len(outcomes) / 4, steps
    assert any(outcome["codes"][0] == PREEMPTED for outcome in outcomes)
    assert any(outcome["codes"][0] == -signal.SIGKILL and outcome["step"] for outcome in outcomes)


def measured(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without what a clock says, which differs from run to run."""
    clocks = ("train/samples_per_second", "train/data_wait")
    return [{name: value for name, value in row.items() if name not in clocks} for row in metrics(run)]


def assert_equal(one: Any, two: Any, keys: Any) -> None:
    for key in keys:
        a, b = torch.utils._pytree.tree_flatten(one[key])[0], torch.utils._pytree.tree_flatten(two[key])[0]
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, key


# ---- preempted --------------------------------------------------------------------------------------------------


class StopAfterAnEpoch(L.Callback):
    """Ends a run early without its schedule knowing, as a crash would."""

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = True


class SignalAt(L.Callback):
    """Sends its own process a signal after some steps."""

    def __init__(self, step: int, number: int, only_rank: int = 0, group: bool = False) -> None:
        self.step, self.number, self.only_rank, self.group = step, number, only_rank, group

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step and trainer.global_rank == self.only_rank:
            if self.group:
                # from another process, which it ends too
                subprocess.run(["kill", f"-{self.number}", "--", f"-{os.getpgid(0)}"], check=False)
            else:
                signal.raise_signal(self.number)


class SignalInValidation(SignalAt):
    def on_train_batch_start(self, trainer, *args):
        pass

    def on_validation_batch_start(self, trainer, *args):
        if trainer.global_step == self.step and not trainer.sanity_checking:
            signal.raise_signal(self.number)


@pytest.fixture
def fit(cli, tmp_path):
    """Starts a run in tmp_path/run, or with ``resume`` lets it go on there."""

    def run(*args: object, resume: object = None) -> tuple[int, str, str]:
        how = [f"--resume={resume}"] if resume else [*CLASSIFICATION, f"--run_dir={tmp_path / 'run'}"]
        return cli("fit", *how, *args)

    return run


def callback(name: str, **options: object) -> list[str]:
    words = [f"--trainer.callbacks+=test_survival.{name}"]
    return words + [f"--trainer.callbacks.{key}={value}" for key, value in options.items()]


@pytest.mark.parametrize(
    ("name", "number", "step", "saved_at"),
    [
        ("SignalAt", signal.SIGTERM, 3, 4),
        ("SignalAt", signal.SIGUSR1, 7, 8),
        # the fifth of an epoch's 6 steps is followed by a validation, of which Lightning would forget the beginning
        ("SignalInValidation", signal.SIGUSR1, 5, 6),
        ("SignalAt", signal.SIGTERM, 4, 6),
    ],
)
def test_a_preempted_run_saves_and_says_how_to_go_on(fit, tmp_path, name, number, step, saved_at):
    run = tmp_path / "run"
    code, out, err = fit(*callback(name, step=step, number=int(number)), "--last_checkpoint.every_n_steps=null")
    assert code == PREEMPTED
    assert f"preempted ({number.name}): saved {run}/checkpoints/last.ckpt at step {saved_at}" in err
    assert f"to go on: python lightning_cli.py fit --resume {run}" in err
    assert "Traceback" not in err
    assert f"run folder: {run}" in out
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == saved_at
    assert max(int(row["step"]) for row in metrics(run) if row["train/loss"]) == saved_at - 1
    # the handlers of the process are back
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    code, _, err = fit("--trainer.callbacks=null", resume=run)
    assert code == 0, err
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 18
    assert [int(row["step"]) for row in metrics(run) if row["train/loss"]] == sorted(set(range(18)))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_all_processes_leaves_the_workers_alone(tmp_path, number):
    """SLURM signals every process of a step, and so does a shell those of a job."""
    options = [*CLASSIFICATION, "--data.num_workers=2", *callback("SignalAt", step=3, number=int(number))]
    done = subprocess.run(
        [sys.executable, "lightning_cli.py", "fit", *options, "--trainer.callbacks.group=true",
         f"--run_dir={tmp_path / 'run'}"],
        cwd=PROJECT, env={**os.environ, "PYTHONPATH": str(PROJECT / "tests")}, capture_output=True, text=True,
        timeout=300, start_new_session=True,
    )  # fmt: skip
    assert done.returncode == PREEMPTED, done.stderr
    assert "Traceback" not in done.stderr
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 4


def test_a_signal_in_the_last_epoch_lets_the_run_end(fit, tmp_path):
    code, _, err = fit(*callback("SignalInValidation", step=17, number=int(signal.SIGTERM)))
    assert code == 0, err


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_when_one_is_told(tmp_path):
    """A scheduler may signal the first process alone; the second must not wait for it for ever."""
    options = [*CLASSIFICATION, *callback("SignalAt", step=3, number=int(signal.SIGTERM))]
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu"]
    two += [f"--run_dir={tmp_path / 'run'}", "--trainer.callbacks.only_rank=1", "--trainer.accumulate_grad_batches=1"]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT / "tests")}
    done = subprocess.run(
        [sys.executable, "lightning_cli.py", "fit", *options, *two],
        cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == PREEMPTED, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("preempted") == 1
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 4


# ---- inside an epoch --------------------------------------------------------------------------------------------


def test_checkpoints_by_time(fit, tmp_path):
    code, _, err = fit(
        "--last_checkpoint.every_n_steps=null", "--last_checkpoint.every_minutes=0", *callback("Watch"),
        "--trainer.max_epochs=1",
    )  # fmt: skip
    assert code == 0, err
    # at each step but the fifth, which a validation follows, and at the end of the epoch
    assert Watch.saved == [1, 2, 3, 4, 6]


class Watch(L.Callback):
    """Notes at which steps a checkpoint is written."""

    saved: ClassVar[list[int]] = []

    def setup(self, trainer, pl_module, stage):
        self.saved.clear()

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        # the best is written after a validation
        if not trainer.validating:
            self.saved.append(trainer.global_step)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("every_n_steps=0", "every_n_steps=0: expected a whole number of at least 1"),
        ("every_minutes=-1", "every_minutes=-1"),
    ],
)
def test_numbers_out_of_range(fit, option, says):
    code, _, err = fit(f"--last_checkpoint.{option}")
    assert code == 2
    assert says in err
    assert "Traceback" not in err


# ---- out of room, damaged, or nothing to do ----------------------------------------------------------------------


def test_a_full_disk_leaves_the_checkpoint_before(fit, tmp_path, monkeypatch):
    """A limit on the size of files is as real as a full disk, and needs no disk to be filled."""
    run = tmp_path / "run"
    assert fit("--trainer.max_epochs=1")[0] == 0
    before = (run / "checkpoints/last.ckpt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        result = fit("--trainer.max_epochs=2", resume=run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    refused(result, str(run / "checkpoints/last.ckpt"), "could not be written (File too large)", "untouched")
    assert (run / "checkpoints/last.ckpt").read_bytes() == before
    assert {path.suffix for path in (run / "checkpoints").iterdir()} == {".ckpt"}
    code, _, err = fit("--trainer.max_epochs=2", resume=run)
    assert code == 0, err


def test_a_disk_that_is_full_for_metrics(fit, tmp_path, monkeypatch):
    def full(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/metrics.csv")

    monkeypatch.setattr("lightning.pytorch.loggers.csv_logs.ExperimentWriter.save", full)
    refused(fit(), "runs/metrics.csv could not be written (No space left on device)")


@pytest.mark.parametrize("name", ["config.yaml", "val_confusion_matrix.png", "best.ckpt", "previous.ckpt"])
def test_a_disk_that_is_full_for_any_other_file(fit, tmp_path, monkeypatch, name):
    replace = os.replace

    def full(source, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr("awconv.files.os.replace", full)
    refused(fit("--trainer.max_epochs=1"), name, "could not be written", "No space left on device", "make room")
    assert list(tmp_path.rglob("*.tmp")) == []


def test_the_name_of_a_file_does_not_replace_what_is_said_of_it(tmp_path):
    with pytest.raises(OSError, match=r"^cannot write mode F$"), atomic_write(tmp_path / "a.png"):
        raise OSError("cannot write mode F")


class Loses(L.Callback):
    """Moves files of its run away, one a step from the fourth on, and then the whole folder."""

    names = ("checkpoints/last.ckpt", "metrics.csv", "checkpoints/best.ckpt", "media", "checkpoints/previous.ckpt",
             "config.yaml", "checkpoints", ".")  # fmt: skip

    def on_train_batch_start(self, trainer, *args):
        step = trainer.global_step - 4
        if 0 <= step < len(self.names):
            path = Path(trainer.default_root_dir, self.names[step])
            there = Path(trainer.default_root_dir).parent / f"moved-{step}"
            if path.exists() and not there.exists():
                path.rename(there)


def test_what_is_moved_away_does_not_end_a_run(fit, tmp_path, recwarn):
    code, _, err = fit(*callback("Loses"), "--trainer.max_epochs=2", "--trainer.val_check_interval=1.0")
    assert code == 0, err
    assert len(list(tmp_path.glob("moved-*"))) == len(Loses.names)
    (warned,) = (str(w.message) for w in recwarn if "made anew" in str(w.message))
    assert str(tmp_path / "run") in warned
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 12
    assert max(int(row["step"]) for row in metrics(tmp_path / "run")) == 11


class LosesItsBest(L.Callback):
    def on_train_end(self, trainer, pl_module):
        Path(trainer.default_root_dir, "checkpoints/best.ckpt").unlink()


def test_without_the_best_the_last_weights_are_tested(fit, tmp_path):
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.val_check_interval=1.0"]
    code, out, err = fit(*callback("LosesItsBest"), "--test_after_fit=true", *short)
    assert code == 0, err
    assert "best.ckpt is not there any more: testing the last weights" in err
    assert "test/acc1" in out


class KillsWorkers(L.Callback):
    """As the system does where memory runs out."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3:
            # the one that loads what is trained on; of the other torch would tell at some later moment of this process
            os.kill(max(worker.pid for worker in multiprocessing.active_children()), signal.SIGKILL)


def test_workers_that_are_killed_cost_a_line(fit, tmp_path):
    result = fit(*callback("KillsWorkers"), "--data.num_workers=1", "--trainer.val_check_interval=1.0")
    refused(result, "was killed", "--data.num_workers", "more memory", "--resume")
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


class LosesPictures(L.Callback):
    def on_train_start(self, trainer, pl_module):
        for picture in Path(trainer.datamodule.root).glob("train/*/*"):
            picture.unlink()


@pytest.mark.parametrize("on_bad_image", ["stop", "skip"])
def test_data_that_are_gone_are_named(cli, tmp_path, imagenet_root, on_bad_image):
    data = ["--data=ImageNetDataModule", f"--data.root={imagenet_root}"]
    data += [f"--data.on_bad_image={on_bad_image}", "--data.image_size=8", "--data.batch_size=2"]
    data += ["--data.num_workers=1", "--model=ClassificationTask", "--model.backbone=resnet20"]
    one = ["--trainer.max_epochs=1", "--trainer.num_sanity_val_steps=0", *callback("LosesPictures")]
    result = cli("fit", *QUIET, *data, *one, f"--run_dir={tmp_path / 'run'}")
    refused(result, str(imagenet_root / "train"), "cannot be read" if on_bad_image == "stop" else "nor any other")


def test_a_truncated_checkpoint_is_refused_and_the_one_before_offered(fit, tmp_path):
    run = tmp_path / "run"
    assert fit("--trainer.max_epochs=2")[0] == 0
    last, previous = run / "checkpoints/last.ckpt", run / "checkpoints/previous.ckpt"
    last.write_bytes(last.read_bytes()[:-1000])
    step = torch.load(previous, weights_only=True)["global_step"]
    refused(fit(resume=run), str(last), "damaged", f"the one before it, of step {step}, is whole: give {previous}")
    refused(fit(f"--ckpt_path={last}"), "damaged", f"give {previous}")
    code, _, err = fit("--trainer.max_epochs=2", resume=previous)
    assert code == 0, err
    assert torch.load(last, weights_only=True)["global_step"] == 12
    # both are damaged
    for path in (last, previous):
        path.write_bytes(path.read_bytes()[:-1000])
    code, _, err = fit(resume=run)
    assert code == 2
    assert "whole" not in err


def test_a_run_that_is_over(fit, tmp_path):
    run = tmp_path / "run"
    assert fit("--trainer.max_epochs=1")[0] == 0
    before = metrics(run)
    code, _, err = fit(resume=run)
    assert code == 0
    assert f"nothing was trained: {run / 'checkpoints/last.ckpt'} is at the end of its run already" in err
    assert metrics(run) == before


def test_a_resumed_run_keeps_its_folder_and_its_metrics(fit, tmp_path):
    run = tmp_path / "run"
    assert fit("--trainer.max_epochs=1")[0] == 0
    before = metrics(run)
    code, out, err = fit("--trainer.max_epochs=2", resume=run)
    assert code == 0, err
    assert f"run folder: {run}" in out
    assert metrics(run)[: len(before)] == before
    assert [int(row["step"]) for row in metrics(run) if row["train/loss"]] == list(range(12))
    columns = list(metrics(run)[0])
    assert columns[:2] == ["epoch", "step"]
    assert columns.index("val/acc1") < min(k for k, column in enumerate(columns) if column.startswith("attention/"))
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_what_cannot_be_resumed(cli, fit, tmp_path):
    refused(fit(resume=tmp_path / "none"), "none' does not exist")
    (tmp_path / "empty").mkdir()
    refused(fit(resume=tmp_path / "empty"), "holds no checkpoint, and is not of a fit")
    assert fit("--trainer.max_epochs=1")[0] == 0
    run = tmp_path / "run"
    refused(cli("test", f"--resume={run}"), "by fit")
    refused(fit(f"--ckpt_path={run / 'checkpoints/last.ckpt'}", resume=run), "without ckpt_path")
    refused(cli("fit", *CLASSIFICATION, f"--run_dir={run}"), "is not empty", "--resume")


# ---- folders ----------------------------------------------------------------------------------------------------


def test_a_folder_that_was_moved_goes_on(fit, tmp_path):
    assert fit("--trainer.max_epochs=1")[0] == 0
    moved = tmp_path / "elsewhere"
    (tmp_path / "run").rename(moved)
    code, _, err = fit("--trainer.max_epochs=2", resume=moved)
    assert code == 0, err
    state = torch.load(moved / "checkpoints/last.ckpt", weights_only=True)
    (best,) = [state for name, state in state["callbacks"].items() if "BestCheckpoint" in name]
    assert Path(best["best_model_path"]) == moved / "checkpoints/best.ckpt"
    accuracies = [float(row["val/acc1"]) for row in metrics(moved) if row["val/acc1"]]
    assert float(best["best_model_score"]) == pytest.approx(max(accuracies))


def test_checkpoints_that_lie_elsewhere_are_found(fit, tmp_path):
    there = tmp_path / "there"
    assert fit("--trainer.max_epochs=1", f"--checkpoint.dirpath={there}")[0] == 0
    code, _, err = fit("--trainer.max_epochs=2", resume=tmp_path / "run")
    assert code == 0, err
    assert torch.load(there / "last.ckpt", weights_only=True)["global_step"] == 12
    assert [int(row["step"]) for row in metrics(tmp_path / "run") if row["train/loss"]] == list(range(12))


def test_what_is_refused_leaves_the_run_as_it_is(cli, fit, tmp_path):
    run = tmp_path / "run"
    assert fit("--trainer.max_epochs=1")[0] == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    refused(cli("fit", *CLASSIFICATION, f"--checkpoint.dirpath={run / 'checkpoints'}",
                 f"--run_dir={tmp_path / 'other'}"), "of another run")  # fmt: skip
    refused(fit("--model.optimizer=sgd", "--trainer.max_epochs=2", resume=run), "optimizer")
    assert {path: path.read_bytes() for path in before if path.name != "config.yaml"} == {
        path: content for path, content in before.items() if path.name != "config.yaml"
    }


def test_resume_in_a_config_is_the_same_as_on_the_command_line(cli, fit, tmp_path):
    run = tmp_path / "run"
    assert fit("--trainer.max_epochs=1")[0] == 0
    (tmp_path / "again.yaml").write_text(f"resume: {run}\ntrainer: {{max_epochs: 2}}\n")
    code, _, err = cli("fit", "-c", tmp_path / "again.yaml")
    assert code == 0, err
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 12


def test_a_run_that_never_began_keeps_its_config_when_resuming_is_refused(fit, tmp_path):
    run = tmp_path / "run"
    assert fit("--trainer.max_epochs=1")[0] == 0
    for path in [path for path in run.rglob("*") if path.is_file() and path.name != "config.yaml"]:
        path.unlink()
    refused(fit("--checkpoint.monitor=val/nothing", resume=run), "val/nothing")
    assert (run / "config.yaml").is_file()
    code, _, err = fit("--checkpoint.monitor=val/acc1", resume=run)
    assert code == 0, err


def test_only_a_fit_begins_again(cli, fit, tmp_path):
    assert fit("--trainer.max_epochs=1")[0] == 0
    tested = tmp_path / "tested"
    checkpoint = tmp_path / "run/checkpoints/last.ckpt"
    code, _, err = cli("test", f"--ckpt_path={checkpoint}", f"--run_dir={tested}", *QUIET)
    assert code == 0, err
    refused(fit(resume=tested), "holds no checkpoint, and is not of a fit")
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": torch.load(checkpoint, weights_only=True)["state_dict"]}, foreign)
    refused(fit(resume=foreign), "lies in no run's folder")
    configs = ["-c", "configs/recipes/digits.yaml", "-c", "configs/models/aw_resnet20.yaml"]
    result = cli("fit", *configs, *CLASSIFICATION, f"--ckpt_path={foreign}", f"--run_dir={tmp_path / 'new'}")
    refused(result, "not the state of a run", "--model.initial_weights")


@pytest.mark.parametrize("content", ["", "epoch,step,train/loss\n0,0,1.5\n0,1,1.25\n0,1"], ids=["empty", "torn"])
def test_a_damaged_metrics_file(fit, tmp_path, content):
    run = tmp_path / "run"
    assert fit("--trainer.max_epochs=1")[0] == 0
    (run / "metrics.csv").write_text(content)
    code, _, err = fit("--trainer.max_epochs=2", resume=run)
    assert code == 0, err
    steps = [int(row["step"]) for row in metrics(run) if row["train/loss"]]
    assert steps == [*([0, 1] if content else []), *range(6, 12)]


if __name__ == "__main__":
    chosen, count, seed = KILLED[sys.argv[2]]
    torch.set_num_threads(1)
    where = Path(sys.argv[1])
    kill_and_resume(where, [*chosen, f"--data.root={where / 'data'}"] if chosen is DETECTION else chosen, count, seed)
