"""Locks, so that one command at a time writes a folder."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from cocomix.common.errors import InputError

READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the name `folder` for this process. The system releases the lock when the process ends.

    The folder need not exist. There is no lock in read-only places and on file systems without locks. Parent folders
    that were created for the lock are removed with it if they are empty.

    Raises:
        InputError: another process holds the lock.
    """
    created = [path for path in folder.parents if not path.exists()]
    path = lock_file(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = _lock(path, folder)
    except OSError as error:
        if error.errno not in READ_ONLY + UNSUPPORTED:
            raise
        yield
        return
    with lock:
        lock.write(f"process {os.getpid()} on {platform.node()}")
        lock.truncate()
        lock.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):
                for each in created:
                    each.rmdir()


def lock_file(folder: Path) -> Path:
    """Return the lock file of `folder`. It lies next to the folder, which is renamed into place."""
    return folder.with_name(f".{folder.name}.lock")


def _lock(path: Path, folder: Path) -> TextIO:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        lock = open(descriptor, "r+", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor)):
                return lock
        except BlockingIOError:
            holder = lock.read().strip() or "another process"
            raise InputError(
                f"{folder} is being written by {holder}; wait until it has ended, or choose another output folder"
            ) from None
        except OSError:  # the file system has no locks
            lock.close()
            path.unlink(missing_ok=True)
            raise
        lock.close()  # the holder deleted the file before we locked it
