"""A run's folder is its own while it runs, and is not left behind when nothing ran."""

import os
import platform
import shutil
import signal
import time
from pathlib import Path

import lightning as L
import pytest
import torch

from awconv.cli.folder_lock import FolderLock
from awconv.cli.run_folder import RunFolder
from awconv.data import DigitsDataModule
from awconv.errors import InputError
from refusals import refused

SHORT = [
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=1",
    "--trainer.limit_val_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--data.image_size=8",
    "--data.batch_size=8",
]
ME = f"process {os.getpid()} on {platform.node()}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a run that has ended."""
    from awconv.cli import main

    run = tmp_path_factory.mktemp("trained") / "run"
    main(["fit", *SHORT, f"--run_dir={run}"])
    return run


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- one run, one folder ------------------------------------------------------------------------------------------


def test_a_folder_in_which_a_run_is_writing_is_refused(cli, tmp_path, trained):
    last = trained / "checkpoints/last.ckpt"
    lock = FolderLock(tmp_path / "run", "run_dir")
    for command in (["fit"], ["test", f"--ckpt_path={last}"], ["validate", f"--ckpt_path={last}"]):
        refused(cli(*command, *SHORT, f"--run_dir={tmp_path / 'run'}"), f"run_dir='{tmp_path / 'run'}'", ME)
    lock.release()
    assert not (tmp_path / "run").exists()
    assert list(trained.rglob(".lock")) == []


def test_a_run_that_goes_on_is_not_resumed(cli, trained):
    before = content(trained)
    lock = FolderLock(trained, "resume")
    for given in (trained, trained / "checkpoints/last.ckpt"):
        refused(cli("fit", f"--resume={given}", "--trainer.max_epochs=2"), f"resume='{trained}", ME)
    lock.release()
    assert content(trained) == before


@pytest.mark.parametrize("section", ["checkpoint", "last_checkpoint"])
def test_nor_do_two_runs_write_their_checkpoints_to_one_place(cli, tmp_path, section):
    lock = FolderLock(tmp_path / "there", "dirpath")
    run = tmp_path / "runs/run"
    refused(cli("fit", *SHORT, f"--run_dir={run}", f"--{section}.dirpath={tmp_path / 'there'}"), "there'", ME)
    assert not (tmp_path / "runs").exists()
    lock.release()


class LooksAtTheLock(L.Callback):
    """Tries to enter the folders of its own run at every moment."""

    def setup(self, trainer, pl_module, stage):
        for folder in (trainer.default_root_dir, Path(trainer.default_root_dir, "checkpoints")):
            with pytest.raises(InputError, match=f"another run is writing there .{ME}"):
                FolderLock(folder, "run_dir")

    on_exception = on_fit_end = lambda self, trainer, pl_module, *args: self.setup(trainer, pl_module, "fit")


def test_the_lock_is_held_to_the_end_and_leaves_nothing(cli, tmp_path):
    run = tmp_path / "run"
    code, _, err = cli("fit", *SHORT, f"--run_dir={run}", "--trainer.callbacks=test_run_folder.LooksAtTheLock")
    assert code == 0, err
    assert list(tmp_path.rglob(".lock")) == []


def test_the_lock_of_a_killed_run_is_free_though_its_workers_live(tmp_path):
    reading, writing = os.pipe()
    run = os.fork()
    if run == 0:
        FolderLock(tmp_path / "run", "run_dir")
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
        os.write(writing, str(worker).encode())
        time.sleep(60)
        os._exit(0)
    worker = int(os.read(reading, 100))
    with pytest.raises(InputError, match=f"process {run} on"):
        FolderLock(tmp_path / "run", "run_dir")
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    os.kill(worker, 0)
    lock = FolderLock(tmp_path / "run", "run_dir")
    assert lock.is_empty, "what the killed run left does not count"
    lock.release()
    os.kill(worker, signal.SIGKILL)


def test_of_many_that_come_and_go_at_once_one_at_a_time_has_the_folder(tmp_path):
    """Each makes the folder, locks it, removes it; a file that only its holder makes must never be there twice."""
    children = []
    for _ in range(3):
        child = os.fork()
        children.append(child)
        if child == 0:
            status, until = 0, time.monotonic() + 1
            while time.monotonic() < until:
                try:
                    lock = FolderLock(tmp_path / "a/b", "run_dir")
                except InputError:
                    continue
                try:
                    os.close(os.open(tmp_path / "mine", os.O_CREAT | os.O_EXCL))
                    os.unlink(tmp_path / "mine")
                    lock.release()
                except OSError:
                    status = 1
                    break
            os._exit(status)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]


def test_a_fork_does_not_release_the_lock(tmp_path):
    lock = FolderLock(tmp_path / "run", "run_dir")
    child = os.fork()
    if child == 0:
        lock.release()
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(InputError, match="another run"):
        FolderLock(tmp_path / "run", "run_dir")
    lock.release()


def test_a_file_system_without_locks_lets_every_run_in(tmp_path, monkeypatch):
    def lacking(descriptor: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("awconv.cli.folder_lock._lock", lacking)
    locks = [FolderLock(tmp_path / "run", "run_dir") for _ in range(2)]
    assert list((tmp_path / "run").iterdir()) == []
    for lock in locks:
        lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_removed_meanwhile_is_another_run_s(tmp_path):
    first = FolderLock(tmp_path / "run", "run_dir")
    (tmp_path / "run/.lock").unlink()
    second = FolderLock(tmp_path / "run", "run_dir")
    first.release()
    with pytest.raises(InputError, match="another run"):
        FolderLock(tmp_path / "run", "run_dir")
    second.release()


@pytest.mark.parametrize("name", ["NODE_RANK", "OMPI_COMM_WORLD_RANK"])
def test_only_the_first_process_takes_the_lock(tmp_path, monkeypatch, name):
    from jsonargparse import Namespace

    config = Namespace(resume=None, run_dir=str(tmp_path / "run"))
    first = RunFolder(config, "fit")
    monkeypatch.setenv(name, "1")
    RunFolder(config, "fit").release()
    monkeypatch.delenv(name)
    with pytest.raises(InputError, match="another run"):
        RunFolder(config, "fit")
    first.release()


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_place_for_checkpoints_that_cannot_be_made(cli, tmp_path, kind):
    there = tmp_path / "there"
    there.touch() if kind == "file" else there.symlink_to(tmp_path / "nowhere")
    result = cli("fit", *SHORT, f"--run_dir={tmp_path / 'run'}", f"--checkpoint.dirpath={there}")
    refused(result, f"checkpoint.dirpath='{there}'", "give another")
    assert not (tmp_path / "run").exists()


# ---- what is left behind ------------------------------------------------------------------------------------------


class Ends(L.Callback):
    """Ends a run at some moment, each in its own way."""

    def __init__(self, moment: str, how: str) -> None:
        self.how = how
        setattr(self, moment, self.end)

    def end(self, *args: object, **kwargs: object) -> None:
        if self.how == "interrupt":
            raise KeyboardInterrupt
        raise InputError("no") if self.how == "refuse" else RuntimeError("a bug")


MOMENTS = ["setup", "on_sanity_check_start", "on_train_batch_start"]


@pytest.mark.parametrize(("moment", "how"), [*((m, "refuse") for m in MOMENTS), (MOMENTS[2], "interrupt")])
def test_a_run_that_never_was_leaves_neither_folder_nor_parents(cli, tmp_path, moment, how):
    options = ["--trainer.callbacks=test_run_folder.Ends", f"--trainer.callbacks.moment={moment}"]
    options.append(f"--trainer.callbacks.how={how}")
    given = ["fit", *SHORT, *options, f"--trainer.default_root_dir={tmp_path / 'a/runs'}"]
    code, out, _ = cli(*given)
    assert code == (130 if how == "interrupt" else 2)
    assert "run folder" not in out
    assert list(tmp_path.iterdir()) == []


def test_a_bug_leaves_the_config_for_its_report(cli, tmp_path):
    options = ["--trainer.callbacks=test_run_folder.Ends", "--trainer.callbacks.moment=on_sanity_check_start"]
    with pytest.raises(RuntimeError, match="a bug"):
        cli("fit", *SHORT, *options, "--trainer.callbacks.how=fail", f"--run_dir={tmp_path / 'run'}")
    assert (tmp_path / "run/config.yaml").is_file()
    assert list(tmp_path.rglob(".lock")) == []


def test_parents_that_were_there_or_hold_something_stay(cli, tmp_path):
    (tmp_path / "runs/digits-aw_resnet20/other").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for folder in (f"--trainer.default_root_dir={tmp_path / 'runs'}", f"--run_dir={tmp_path / 'empty'}"):
        refused(cli("fit", *SHORT, folder, "--trainer.val_check_interval=100"), "val_check_interval")
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert left == {"runs", "runs/digits-aw_resnet20", "runs/digits-aw_resnet20/other", "empty"}


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_nor_does_a_measurement_that_failed(cli, tmp_path, trained, command, monkeypatch):
    def missing(self: object, stage: str) -> None:
        raise InputError("no data")

    monkeypatch.setattr(DigitsDataModule, "setup", missing)
    last = trained / "checkpoints/last.ckpt"
    result = cli(command, *SHORT, f"--ckpt_path={last}", f"--trainer.default_root_dir={tmp_path / 'runs'}")
    refused(result, "no data")
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_leaves_nothing(cli, tmp_path):
    code, out, err = cli("fit", *SHORT, "--trainer.fast_dev_run=1", f"--trainer.default_root_dir={tmp_path / 'runs'}")
    assert code == 0, err
    assert "run folder" not in out
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_half_written_goes_when_it_is_resumed(cli, tmp_path, trained):
    run, elsewhere = tmp_path / "run", tmp_path / "there"
    shutil.copytree(trained, run)
    stale = [
        *(run / name for name in (".metrics.csv.123.tmp", ".config.yaml.7.tmp", "media/.val_loss.png.12.tmp")),
        *(run / name for name in (".lr_find_1b-2c.ckpt", ".scale_batch_size_1b.ckpt", "..lr_find_1b.ckpt.9.tmp")),
        run / "checkpoints/.best.ckpt.12.tmp",
        elsewhere / ".last.ckpt.123.tmp",
    ]
    kept = [
        *(run / name for name in ("predictions.partial.jsonl", "notes.123.tmp", ".notes.tmp", "wandb/.x.12.tmp")),
        # of a run that is going on inside
        *(run / name for name in ("inner/.lock", "inner/.last.ckpt.8.tmp")),
    ]
    for path in (*stale, *kept):
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    (run / ".predictions.12.tmp").mkdir()
    (run / ".predictions.12.tmp/1.png").touch()
    code, _, err = cli("fit", f"--resume={run}", "--trainer.max_epochs=2", f"--checkpoint.dirpath={elsewhere}")
    assert code == 0, err
    assert [path for path in (*stale, run / ".predictions.12.tmp") if path.exists()] == []
    assert [path for path in kept if not path.exists()] == []
    assert torch.load(elsewhere / "last.ckpt", weights_only=True)["global_step"] == 2
