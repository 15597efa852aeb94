"""One process at a time in a folder: a lock that is held from before anything is looked at to the end.

The lock is flock(2) on FOLDER/.lock, held as long as its file is open: the kernel drops it when the process ends,
however it ends. The file says who holds it, for the sentence that refuses a second process, and is removed at the end.
"""

import contextlib
import json
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"
ROUNDS = 100  # of opening a file that its holder removed meanwhile; each needs another holder


class Locked(ValueError):
    """A folder is in use; the sentence says by whom."""


class FolderLock:
    """A lock that is held. `descriptor`: of its file, which a child may inherit to hold it, too."""

    def __init__(self, path: Path, file: IO[str] | None):
        self.path, self._file = path, file
        self.descriptor = -1 if file is None else file.fileno()

    def is_in_place(self) -> bool:
        """Whether the folder still is the one that was locked: it has not been deleted, nor made anew."""
        if self._file is None:
            return self.path.parent.is_dir()
        return _is_at(self._file, self.path)

    def _close(self) -> None:
        if self._file is not None and not self._file.closed:
            self._file.close()

    def release(self) -> None:
        """Give the lock up and remove its file, unless a child holds it still."""
        if self._file is None or self._file.closed:
            return
        self._file.close()
        file = _opened(self.path, create=False)
        if file is not None:
            with file:
                if _taken(file) and _is_at(file, self.path):
                    self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_lock(folder: Path, option: str, *, wait: bool = False) -> Iterator[FolderLock]:
    """Holds a folder, made if it is not there, for the length of the block; forked processes do not hold it.

    option: how the user named the folder, such as "--output_dir runs/tiny", for messages. Raises `Locked` when another
    process holds it; with `wait`, says so and waits. A folder that the block leaves empty is removed if it was new.
    A file system without locks is used without one, with a message.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    if not is_new and not folder.is_dir():
        raise ValueError(f"{option} is not a folder; give a new one")
    folder.mkdir(parents=True, exist_ok=True)
    lock = _acquire(folder / LOCK, option, wait)
    if hasattr(os, "register_at_fork"):  # a data loader's worker may outlive its killed parent by seconds
        os.register_at_fork(after_in_child=lock._close)
    try:
        yield lock
    finally:
        lock.release()
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only if it is empty


def _acquire(path: Path, option: str, wait: bool) -> FolderLock:
    told = False
    for _ in range(ROUNDS):
        file = _opened(path, create=True)
        assert file is not None
        try:
            taken = _taken(file)
            if not taken and wait:
                if not told:
                    print(f"{option} is in use{_holder(file)}; waiting for it", file=sys.stderr, flush=True)
                told = True
                fcntl.flock(file, fcntl.LOCK_EX)
                taken = True
        except (OSError, AttributeError) as error:
            file.close()
            reason = getattr(error, "strerror", None) or "this system has no flock"
            print(
                f"{option} cannot be locked ({reason}): see to it that no second process writes there", file=sys.stderr
            )
            path.unlink(missing_ok=True)
            return FolderLock(path, None)
        if not taken:
            holder = _holder(file)
            file.close()
            raise Locked(f"{option} is in use{holder}; wait for its end, or give another folder")
        if _is_at(file, path):  # else the one before removed it between our opening and our locking
            file.seek(0)  # whoever waited has read who held it
            started = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime())
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": started}) + "\n")
            file.flush()
            return FolderLock(path, file)
        file.close()
    raise Locked(f"{option} is in use by processes that come and go; try again")


def _opened(path: Path, *, create: bool) -> IO[str] | None:
    try:
        kind = os.lstat(path).st_mode
    except FileNotFoundError:
        kind = None
    if kind is not None and not stat.S_ISREG(kind):  # opening a pipe could wait for ever
        if not create:
            return None
        what = "a folder" if stat.S_ISDIR(kind) else "a link" if stat.S_ISLNK(kind) else "no plain file"
        raise ValueError(f"{path} is {what}, where the file that locks its folder belongs; move it away")
    flags = os.O_RDWR | getattr(os, "O_NONBLOCK", 0) | (os.O_CREAT if create else 0) | getattr(os, "O_NOFOLLOW", 0)
    try:
        return os.fdopen(os.open(path, flags, 0o644), "r+", encoding="utf-8", errors="replace")
    except FileNotFoundError:
        if create:
            raise
        return None


def _taken(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        found = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(found, os.fstat(file.fileno()))


def _holder(file: IO[str]) -> str:
    """What the file of a lock says of its holder, for a sentence; "" until the holder has written it."""
    try:
        file.seek(0)
        found = json.loads(file.read(1000))
        by = f" by process {found['pid']} on {found['host']} since {found['started']}"
    except (ValueError, KeyError, TypeError, RecursionError, OSError):
        return ""
    return f"{by}, or by one that it started"
