"""What a machine may lack: a terminal that shows every character, a home folder that can be written to."""

import codecs
import io
import os
import sys
import tempfile
from pathlib import Path

from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar


def replace_what_cannot_be_shown() -> None:
    """Lets standard output and error escape what their encoding lacks; otherwise printing it raises.

    Those are letters, and in UTF-8 the bytes of file names that are no text.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def progress_bar() -> ProgressBar:
    """Rich's bar, or where standard output lacks its characters tqdm's, which has a form in ASCII."""
    return RichProgressBar() if _is_utf8(sys.stdout) else TQDMProgressBar()


def _is_utf8(stream: object) -> bool:
    # pytest and notebooks replace the streams by objects that may have no encoding, and take any character
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return codecs.lookup(encoding).name.startswith("utf")


def keep_wandb_files_in(run_dir: str) -> None:
    """Gives W&B a place for its files in the run's folder where the home folder cannot take them.

    Args:
        run_dir: The run's folder.
    """
    try:
        there = Path.home()
    except RuntimeError:  # neither HOME nor a user of that number, as in some containers
        there = Path(tempfile.gettempdir())
        os.environ["HOME"] = str(there)
    try:
        while not there.exists():
            there = there.parent
        writable = there.is_dir() and os.access(there, os.W_OK)
    except OSError:  # below a folder that may not be entered
        writable = False
    if not writable:
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
            os.environ.setdefault(name, str(Path(run_dir, "wandb")))
