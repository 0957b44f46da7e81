"""Files as this project writes and reads them; imports nothing of it but the errors."""

import csv
import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

MAX_IMAGE_PIXELS = 178_956_970
"""How many pixels an image may have, unless a data module is told otherwise; Pillow's own limit."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Gives a temporary path, which takes the place of ``path`` when all went well, and leaves nothing otherwise.

    A file or folder at ``path`` is replaced; whoever reads it meanwhile sees the one before.
    """
    # Hidden, and in the same folder: os.replace is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if path.is_dir():  # over which os.replace would not go
            shutil.rmtree(path)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a full disk has no name
            error.filename = str(path)
        raise
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Opens a regular file for reading, or a link to one.

    Raises:
        OSError: It cannot be opened; or it is something else, such as a named pipe, which would be waited for, or a
            device without an end.
    """
    try:
        file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
        file.close()
    except OSError as error:
        if error.errno != errno.ENXIO:  # of a socket
            raise
    raise OSError(errno.EINVAL, "a pipe, a socket or a device, and no regular file", os.fspath(path))


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


# As what starts a cell, spreadsheets take them for a formula; the broad ones are of East Asian keyboards.
_FORMULA = "=+-@\t\r\n\uff1d\uff0b\uff0d\uff20"
# with the infinities and NaN as Python and NumPy write them
_NUMBER = re.compile(r"[-+]?((\d+\.?\d*|\.\d+)(e[-+]?\d+)?|inf|nan)", re.ASCII | re.IGNORECASE)


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Writes a CSV file for people, who open it in a spreadsheet; :func:`read_csv` reads it.

    Undecodable file names come out as they went in. Text that a spreadsheet would take for a formula gets an apostrophe
    in front: what begins with ``=``, ``+``, ``-``, ``@``, a tab or a line break and is no number, and so that this can
    be undone, what begins with an apostrophe itself.
    """
    # surrogateescape: file names on Linux are bytes
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        csv.writer(file).writerows([_neutral(cell) for cell in row] for row in (header, *rows))


def read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    """Reads the header and the rows of a file of :func:`write_csv`, all cells as the text that they were."""
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        header, *rows = [[_original(cell) for cell in row] for row in csv.reader(file)] or [[]]
    return header, rows


def _neutral(cell: object) -> object:
    is_text = isinstance(cell, str) and cell.startswith(("'", *_FORMULA)) and not _NUMBER.fullmatch(cell)
    return f"'{cell}" if is_text else cell


def _original(cell: str) -> str:
    # files of earlier versions hold names that begin with an apostrophe as they were
    return cell[1:] if cell.startswith(tuple(f"'{sign}" for sign in ("'", *_FORMULA))) else cell
