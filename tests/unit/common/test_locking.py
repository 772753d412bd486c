"""One process at a time holds a folder, until it ends."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from pathlib import Path

import pytest

from cocomix.common.errors import InputError
from cocomix.common.locking import lock_file, locked


def refused_because_of(process: int, folder: Path) -> None:
    with pytest.raises(InputError, match=rf"out is being written by process {process} on "), locked(folder):
        pass


def test_the_second_is_refused_and_the_holder_named(tmp_path: Path) -> None:
    with locked(tmp_path / "new" / "out"):
        refused_because_of(os.getpid(), tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "new" / "out"), locked(tmp_path / "new" / "other"):
        (tmp_path / "new" / "out").mkdir()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    ready, begun = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(tmp_path / "out"):
            os.write(begun, b"!")
            signal.pause()
    os.read(ready, 1)
    refused_because_of(child, tmp_path / "out")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with locked(tmp_path / "out"):
        refused_because_of(os.getpid(), tmp_path / "out")


def test_a_lock_file_removed_meanwhile_is_not_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, locks = fcntl.flock, []

    def removed_first(file: int, kind: int) -> None:
        if not locks:
            lock_file(tmp_path / "out").unlink()
        locks.append(lock(file, kind))

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with locked(tmp_path / "out"):
        assert len(locks) == 2 and lock_file(tmp_path / "out").exists()


@pytest.mark.parametrize("reason", [errno.EROFS, errno.EACCES, errno.ENOLCK])
def test_what_cannot_be_locked_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / "out"):
        pass
