"""Machines that lack something: characters, signals, a home folder that can be written to."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from awconv.cli import surroundings

SHORT = ["--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
SHORT += ["--trainer.limit_val_batches=1", "--data.image_size=8", "--data.batch_size=16"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_what_an_encoding_lacks_is_escaped(monkeypatch, encoding):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    surroundings.replace_what_cannot_be_shown()
    for stream in (sys.stdout, sys.stderr):
        print("classes: 犬, ñandú", file=stream, flush=True)
        text = stream.buffer.getvalue().decode(encoding)
        assert ("犬" if encoding == "utf-8" else "\\u72ac") in text
    bar = surroundings.progress_bar()
    assert isinstance(bar, RichProgressBar if encoding == "utf-8" else TQDMProgressBar)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_run_on_such_a_terminal(cli, monkeypatch, tmp_path, encoding):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    code, _, _ = cli("fit", *SHORT, f"--run_dir={tmp_path / 'lauf-犬'}", "--test_after_fit=true")
    out.flush(), err.flush()
    assert code == 0, err.buffer.getvalue().decode(encoding)
    assert "lauf-\\u72ac" in out.buffer.getvalue().decode(encoding)


@pytest.mark.slow
def test_without_the_signals_that_windows_lacks():
    code = (
        "import signal\n"
        "for name in ('SIGUSR1', 'SIGUSR2', 'sigwaitinfo', 'pthread_sigmask'):\n    delattr(signal, name)\n"
        "import awconv.cli\nfrom awconv.callbacks import checkpoints\nfrom awconv.data import base\n"
        "base._begin_worker(10**6, 0)\nassert checkpoints._PREEMPTIONS == [signal.SIGTERM]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_signals_of_this_machine():
    from awconv.callbacks import checkpoints

    assert checkpoints._PREEMPTIONS == [signal.SIGTERM, signal.SIGUSR1]


@pytest.mark.slow
def test_without_a_home_that_can_be_written_to(tmp_path):
    """matplotlib, wandb and what else keeps files there: nothing is said, and the run ends well."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "XDG_", "MPL"))}
    environment |= {"HOME": "/dev/null/nowhere", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    words = [sys.executable, "lightning_cli.py", "fit", *SHORT, "-c", "configs/overlays/wandb.yaml"]
    words += [f"--run_dir={tmp_path / 'run'}", "--test_after_fit=true", "--trainer.log_every_n_steps=1"]
    project = Path(__file__).parents[1]
    done = subprocess.run(words, cwd=project, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "atplotlib" not in done.stderr
    assert (tmp_path / "run/confusion_matrix.png").is_file()


def test_without_any_home(monkeypatch, tmp_path):
    def nobody(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", classmethod(nobody))
    monkeypatch.setenv("HOME", "")
    surroundings.keep_wandb_files_in(str(tmp_path))
    assert os.access(os.environ["HOME"], os.W_OK)
