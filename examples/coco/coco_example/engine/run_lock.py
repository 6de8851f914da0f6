"""One process at a time in a run's folder: a lock of the operating system, which ends with its process."""

from __future__ import annotations

import errno
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from coco_example.commands import say
from coco_example.errors import RunError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = ["LOCK", "locked_folder"]

LOCK = "run.lock"

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold a folder, made if absent, for one run; one that is still empty at the end is removed.

    The lock is on an open file, so a killed process leaves none behind. The file stays: it only marks the folder as
    one that a run has claimed, and has the number of the process.

    Raises:
        RunError: Another process holds it, which is named.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    file = _open_locked(path)
    try:
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {platform.node() or 'this machine'}\n".encode())
        yield
    finally:
        # A run that was refused leaves no folder that looks in use. The file goes while it is locked: who opened it in
        # vain finds that it is no longer the one in the folder.
        with suppress(OSError):
            if [entry.name for entry in folder.iterdir()] == [LOCK]:
                path.unlink()
                if new:
                    folder.rmdir()
        os.close(file)


def _open_locked(path: Path) -> int:
    while True:
        # 1. Open and lock.
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(file)
        except OSError as error:
            os.lseek(file, 0, os.SEEK_SET)
            if error.errno in _NO_LOCKS:
                say(f"no locks on the file system of {path.parent}: see that no other run works there")
                return file
            holder = os.read(file, 200).decode(errors="replace").strip()
            os.close(file)
            if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                raise RunError(
                    expected="a folder that no other run works in",
                    got=f"one in use by {holder or 'another process'}",
                    where=f"{path.parent}",
                    fix="wait for it, stop it, or choose another --output",
                ) from error
            error.filename = str(path)
            raise

        # 2. Another process may have removed it between the two.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                return file
        os.close(file)


def _lock(file: int) -> None:
    """Lock a file for this process alone: not for those that it starts, which may outlive it for seconds."""
    if sys.platform == "win32":
        os.lseek(file, 1 << 20, os.SEEK_SET)  # locked bytes cannot be read by others; these hold nothing
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        os.lseek(file, 0, os.SEEK_SET)
    else:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
