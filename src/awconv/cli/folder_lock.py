"""A lock on a folder: one run writes into it, and a second one is told whose it is."""

import errno
import os
import platform
import re
import stat
import sys
import time
from contextlib import suppress
from pathlib import Path

from awconv.errors import InputError

LOCK = ".lock"
# what a folder from elsewhere may hold under that name is not followed, nor waited for
_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
# descriptors of the locks that this process holds
_held: set[int] = set()


class FolderLock:
    """Makes a folder where it is missing, and keeps other processes out of it until :meth:`release`.

    The operating system lets go of the lock when the process dies, of whatever. A file system without locks, as some
    network file systems are, lets every run in.

    Args:
        folder: The folder.
        given: What named it, for messages: ``run_dir='runs/first'``.

    Raises:
        InputError: If another run holds the lock, or nothing can be written there.
    """

    def __init__(self, folder: str | Path, given: str) -> None:
        if not str(folder):
            raise InputError(f"{given}: the folder is not named; give another")
        self.folder = Path(os.path.abspath(folder))
        self._file = self.folder / LOCK
        self._made: list[Path] = []
        self._owner = os.getpid()
        self._descriptor: int | None = None
        try:
            self._acquire(given)
        except OSError as error:
            self.release()
            if error.errno == errno.ENAMETOOLONG:
                raise OSError(error.errno, error.strerror, str(folder)) from error
            there = self.folder
            while not there.exists():
                there = there.parent
            fault = f"cannot be written to ({error.strerror})" if there.is_dir() else "is no folder"
            raise InputError(f"{given}: {there} {fault}; give another") from error
        except BaseException:
            self.release()
            raise

    def _acquire(self, given: str) -> None:
        for _ in range(100):
            self._make_folder()
            try:
                descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | _NO_LINK, 0o666)
            except FileNotFoundError:  # a run that ended just now has taken its empty folder along
                continue
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):  # a resumed run may find room before it writes
                    return
                raise
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1:  # another file by a second name
                os.close(descriptor)
                raise OSError(errno.EEXIST, f"its {LOCK} is no file of a run")
            try:
                _lock(descriptor)
            except (BlockingIOError, PermissionError) as error:
                holder = _holder(descriptor)
                os.close(descriptor)
                raise InputError(
                    f"{given}: another run is writing there ({holder}); let it end or stop it first, or give another "
                    "folder"
                ) from error
            except OSError:  # a file system without locks
                os.close(descriptor)
                self._file.unlink(missing_ok=True)
                return
            if self._is_mine(descriptor):
                break
            os.close(descriptor)  # a run that ended just now has removed the file
        else:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._file))
        self._descriptor = descriptor
        _held.add(descriptor)
        with suppress(OSError):  # on a full disk the lock holds without a name
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {platform.node() or 'an unnamed host'}\n".encode())

    def _make_folder(self) -> None:
        missing = []
        there = self.folder
        while not there.exists():
            missing.append(there)
            there = there.parent
        for folder in reversed(missing):
            with suppress(FileExistsError, FileNotFoundError):  # another run makes or removes it at the same moment
                folder.mkdir()
                self._made.append(folder)

    def _is_mine(self, descriptor: int) -> bool:
        """Whether the file that was opened is still the one of that name."""
        try:
            return os.path.samestat(os.fstat(descriptor), self._file.stat())
        except OSError:
            return False

    @property
    def is_empty(self) -> bool:
        """Whether the folder holds nothing but the lock."""
        return not self.folder.is_dir() or set(os.listdir(self.folder)) <= {LOCK}

    def release(self) -> None:
        """Lets other runs in, and removes what was made of the folder and its parents if it is empty."""
        if self._owner != os.getpid():  # a fork of the process that holds it
            return
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            # before it is let go, so that nobody can hold a file that has lost its name
            if self._is_mine(descriptor) and sys.platform != "win32":
                self._file.unlink(missing_ok=True)
            _held.discard(descriptor)
            os.close(descriptor)
            if sys.platform == "win32":
                with suppress(OSError):  # another run has opened it
                    self._file.unlink(missing_ok=True)
        while self._made:
            with suppress(OSError):  # something is in it, or it is gone
                self._made.pop().rmdir()


def _holder(descriptor: int) -> str:
    # who has only just got the lock has not signed it yet
    for _ in range(20):
        os.lseek(descriptor, 0, os.SEEK_SET)
        if found := re.fullmatch(r"process \d+ on [\w.-]+", os.read(descriptor, 300).decode(errors="replace").strip()):
            return found[0]
        time.sleep(0.05)
    return "it has left no name"


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        # far behind the text, which others could not read otherwise
        os.lseek(descriptor, 1024, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        os.lseek(descriptor, 0, os.SEEK_SET)

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        # Not fcntl.lockf, whose locks are the process's: a second run in the same process would get the lock as well,
        # and whoever opens and closes the file (a copy, an upload) would release it.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _close_in_child() -> None:
        # flock is the open file's, so that workers which outlive a killed run would hold it
        while _held:
            os.close(_held.pop())

    os.register_at_fork(after_in_child=_close_in_child)
