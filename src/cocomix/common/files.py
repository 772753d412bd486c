"""Atomic files and folders: complete or absent whenever the process is killed, and never in place of the user's.

Three rules keep the user's files safe:

- A finished folder is renamed into place, which the system refuses if a file or a non-empty folder has the name.
- A folder is deleted only if it holds our marker file (`Folder.delete`). The folder stays open from the check to the
  deletion, so that another folder that takes its name in between is not touched.
- An output file that the user names (`write_output`) replaces only regular files. Links are followed; devices and
  pipes are written to.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import resource
import secrets
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cocomix.common import integrity
from cocomix.common.errors import InputError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
TORCH_WRITES = ("PytorchStreamWriter failed", "] . unexpected pos ")
"""Parts of the messages with which torch.save reports that a file cannot be written."""


def located(given: str | Path) -> Path:
    """Resolve `~`, `..` and links in a path that the user gave; the result is relative below the working directory.

    Raises:
        InputError: there is no such user, or the links form a loop.
    """
    try:
        path, here = Path(given).expanduser().resolve(), Path.cwd()
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{str(given)!r} is not a path: {error}; give an existing or a new folder") from None
    return path.relative_to(here) if path.is_relative_to(here) else path


def partial(path: Path) -> Path:
    """Return the path of the unfinished form of `path`: in the same folder, so that the rename is atomic."""
    return path.with_name(path.name + ".partial")


# Files


def write_text(path: Path, text: str) -> None:
    """Write `text` to one of our files, atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write `content` to one of our files, atomically; a failed attempt leaves nothing."""
    _replace(path, partial(path), content)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to one of our files, atomically; ValueError for NaN and infinity."""
    write_text(path, to_json(value))


def to_json(value: Any) -> str:
    """Return `value` as indented JSON; ValueError for NaN and infinity."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def write_output(path: Path, text: str) -> None:
    """Write an output file that the user named, atomically. Links are followed; devices and pipes are written to."""
    if path.exists() and not path.is_file():  # before links are followed: those of pipes lead nowhere
        path.write_text(text, encoding="utf-8")  # a folder raises IsADirectoryError
    else:
        path = path.resolve()
        _replace(path, path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial"), text.encode())


def _replace(path: Path, temporary: Path, content: bytes | memoryview) -> None:
    with replacing(path, temporary):
        temporary.write_bytes(content)


@contextmanager
def replacing(path: Path, temporary: Path) -> Iterator[None]:
    """Replace `path` by the file `temporary`, which the block writes; delete `temporary` if anything fails."""
    try:
        yield
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def read_json(path: Path) -> Any:
    """Return the JSON value in the file at `path`.

    Raises:
        InputError: the file is damaged.
    """
    return _parse_json(path.read_bytes(), path)


def _parse_json(content: bytes, path: Path) -> Any:
    try:
        return json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {error}") from None


def is_disk_full(error: OSError) -> bool:
    """Return whether an operation failed because the disk or the user's quota is full."""
    return error.errno in DISK_FULL


def system_failure(error: BaseException | None) -> OSError | None:
    """Return the system error that caused `error`, or None.

    Native libraries raise other exceptions: the messages of Rust end with the error number; those of torch lack it, but
    mean that a file could not be written: because it exceeds the user's limit if there is one, or the disk is full.
    """
    if error is None or (isinstance(error, OSError) and error.errno is not None):
        return error
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        return OSError(int(found[1]), os.strerror(int(found[1])))
    if any(words in str(error) for words in TORCH_WRITES):
        is_limited = resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY
        number = errno.EFBIG if is_limited else errno.ENOSPC
        return OSError(number, os.strerror(number))
    return system_failure(error.__cause__)


# Folders


def check_creatable(folder: Path) -> None:
    """Raise InputError if `folder` cannot be created because of a file or a read-only folder."""
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise InputError(f"{existing} is not a folder; choose another output folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{existing} cannot be written to; choose another output folder")


def check_new(target: Path) -> None:
    """Raise InputError if `target` exists, finished or unfinished, or cannot be created."""
    check_creatable(target.parent)
    for path in (target, partial(target)):
        if path.exists():
            raise InputError(f"{path} exists; choose another name")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder to write into; it becomes `target` when the block ends, and is deleted if the block fails.

    Raises:
        InputError: `target` exists, finished or unfinished, or cannot be created.
    """
    check_new(target)
    unfinished = partial(target)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
    except BaseException:
        shutil.rmtree(unfinished)
        raise
    finish(target)


def finish(folder: Path, exclude: Collection[str] = ()) -> None:
    """Record the checksums of `partial(folder)`, flush it to the disk, and rename it to `folder`.

    Args:
        folder: final name.
        exclude: names of files without a checksum.

    Raises:
        InputError: the name is taken; its holder is untouched.
    """
    integrity.write_sums(partial(folder), exclude)
    sync(partial(folder))
    try:
        os.rename(partial(folder), folder)
    except OSError as error:
        if not os.path.lexists(folder):
            raise
        raise InputError(
            f"{folder} exists and was not created by cocomix ({error.strerror}); the result is kept in "
            f"{partial(folder)}: move the other one away and repeat the command"
        ) from None
    _sync(folder.parent)


def sync(folder: Path) -> None:
    """Flush all files and folders in `folder` to the disk, so that a power cut cannot leave them empty."""
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink() and (path.is_file() or path.is_dir()):
            _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write into; it replaces `folder` if the block ends without an error.

    Only for folders inside a stage's unfinished folder, which belongs to us.
    """
    unfinished = partial(folder)
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    yield unfinished
    if folder.exists():
        shutil.rmtree(folder)
    finish(folder)


def checkpoints(unfinished: Path) -> list[Path]:
    """Return the checkpoints in a stage's unfinished folder, including incomplete ones."""
    return [
        path
        for path in unfinished.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+(\.partial)?", path.name) and path.is_dir() and not path.is_symlink()
    ]


def step_of(checkpoint: Path) -> int:
    """Return the number of optimizer steps before a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


class Folder:
    """An open folder. All methods act on it even if another folder takes its name."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    def names(self) -> set[str]:
        """Return the names of its entries."""
        return set(os.listdir(self._descriptor))

    def read_json(self, name: str) -> Any:
        """Return the JSON value in one of its files; InputError if the file is damaged."""
        with open(name, "rb", opener=self._open) as file:
            return _parse_json(file.read(), self.path / name)

    def write(self, contents: dict[str, bytes]) -> None:
        """Write files and replace those of the same names, in this order, once all of them are written."""
        at = self._descriptor
        temporary = {name: name + ".partial" for name in contents}
        try:
            for name, content in contents.items():
                with open(temporary[name], "wb", opener=self._open) as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            for name in contents:
                os.replace(temporary[name], name, src_dir_fd=at, dst_dir_fd=at)
        except BaseException:
            for name in self.names() & {*temporary.values()}:
                self.remove(name)
            raise
        os.fsync(at)

    def remove(self, name: str) -> None:
        """Remove one of its files; of a link, the link itself."""
        os.unlink(name, dir_fd=self._descriptor)

    def delete(self, marker: str) -> None:
        """Delete the folder and its contents, `marker` last.

        Raises:
            InputError: it lacks the file `marker`, so it is not ours.
        """
        names = self.names()
        if marker not in names:
            raise InputError(f"{self.path} exists and was not created by cocomix; move it away and repeat the command")
        self.write({marker: b"{}\n"})  # still marks the folder as ours if the deletion is interrupted
        for name in names - {marker}:
            if stat.S_ISDIR(os.stat(name, dir_fd=self._descriptor, follow_symlinks=False).st_mode):
                shutil.rmtree(name, dir_fd=self._descriptor)
            else:
                self.remove(name)
        self.remove(marker)
        self.path.rmdir()  # fails if another folder has taken the name and is not empty

    def _open(self, name: str, flags: int) -> int:
        try:
            return os.open(name, flags | os.O_NOFOLLOW, 0o666, dir_fd=self._descriptor)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path / name)) from None


@contextmanager
def held(path: Path) -> Iterator[Folder]:
    """Open the folder at `path`, for one process at a time; a link raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        with suppress(OSError):  # not every file system has locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield Folder(path, descriptor)
    finally:
        os.close(descriptor)
