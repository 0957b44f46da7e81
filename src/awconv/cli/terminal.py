"""Output on terminals, logs and pipes that cannot show every character."""

import codecs
import io
import sys

from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar


def replace_what_cannot_be_shown() -> None:
    """Lets standard output and error escape characters that their encoding lacks; otherwise printing one raises."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not _is_utf8(stream):
            stream.reconfigure(errors="backslashreplace")


def progress_bar() -> ProgressBar:
    """Rich's bar, or where standard output lacks its characters tqdm's, which has a form in ASCII."""
    return RichProgressBar() if _is_utf8(sys.stdout) else TQDMProgressBar()


def _is_utf8(stream: object) -> bool:
    # pytest and notebooks replace the streams by objects that may have no encoding, and take any character
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return codecs.lookup(encoding).name.startswith("utf")
