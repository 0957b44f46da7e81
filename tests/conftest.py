"""Fixtures that every room's tests share: miniature data sets on disk (see miniature.py)."""

import os
import signal
import sys
from pathlib import Path

# Before torch is imported: more threads than one slow these small computations down, and fight with those of the
# processes that some tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import wandb
from torchvision import datasets

import miniature

PROJECT = Path(__file__).parents[1]


@pytest.fixture
def cifar10_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Root of a miniature CIFAR-10, 60 pictures to train and 23 to test, which torchvision's class accepts."""
    root = miniature.make_cifar10(tmp_path / "cifar10")
    for attribute, value in miniature.cifar_checksums(datasets.CIFAR10, root).items():
        monkeypatch.setattr(datasets.CIFAR10, attribute, value)
    return root


@pytest.fixture
def cifar100_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Root of a miniature CIFAR-100, 200 pictures to train and 101 to test, which torchvision's class accepts."""
    root = miniature.make_cifar100(tmp_path / "cifar100")
    for attribute, value in miniature.cifar_checksums(datasets.CIFAR100, root).items():
        monkeypatch.setattr(datasets.CIFAR100, attribute, value)
    return root


@pytest.fixture
def imagenet_root(tmp_path: Path) -> Path:
    """Root of class folders cat, dog and owl: 4 pictures each in train/, 3 each in val/."""
    return miniature.make_class_folders(tmp_path / "imagenet")


@pytest.fixture
def coco_root(tmp_path: Path) -> Path:
    """Root of a miniature COCO 2017: 12 pictures to train, 7 to validate, 3 to test without annotations."""
    return miniature.make_coco(tmp_path / "coco")


@pytest.fixture
def picture_folder(tmp_path: Path) -> Path:
    """Folder of 5 pictures of several formats, modes and sizes, two of them in a subfolder."""
    return miniature.make_picture_folder(tmp_path / "pictures")


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Runs the command line in this process and gives (exit code, standard output, standard error).

    The working directory is the project's, so that `configs/...` means what it means to a user.
    """
    from awconv.cli import main

    monkeypatch.chdir(PROJECT)
    monkeypatch.setattr(sys, "argv", ["lightning_cli.py"])

    def run(*args: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = 0
        try:
            main([str(arg) for arg in args])
        except SystemExit as error:
            code = int(error.code or 0)
        out, err = capfd.readouterr()
        return code, out, err

    environment = dict(os.environ)
    yield run
    # what a process of its own would take with it
    finish_wandb()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def away_from_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """W&B without settings: it keeps what tables hold in a folder of its own, and keys in the home folder."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    finish_wandb()
    wandb.teardown()  # what it read from the environment before
    yield
    finish_wandb()
    wandb.teardown()


def finish_wandb() -> None:
    """Ends the run in progress; one that outlives the service behind it would make all that follow fail."""
    if wandb.run is not None:
        wandb.finish()


@pytest.fixture
def resumes_inside_an_epoch(cli, tmp_path: Path):
    """Fits with some options, whole, and told to end after 9 steps and resumed: both must end in the same weights."""

    def check(*options: str) -> None:
        options = (*options, "--trainer.enable_progress_bar=false")
        code, _, err = cli("fit", *options, f"--run_dir={tmp_path / 'whole'}")
        assert code == 0, err
        preempted = ["--trainer.callbacks+=test_survival.SignalAt", "--trainer.callbacks.step=9"]
        preempted.append(f"--trainer.callbacks.number={int(signal.SIGTERM)}")
        code, _, err = cli("fit", *options, *preempted, f"--run_dir={tmp_path / 'run'}")
        assert code == 75, err
        code, _, err = cli("fit", f"--resume={tmp_path / 'run'}", "--trainer.callbacks=null")
        assert code == 0, err
        whole, resumed = (
            torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
            for name in ("whole", "run")
        )
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)

    return check
