"""Files and folders that are whole or absent, whenever the process is killed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def partial(path: Path) -> Path:
    """Where the unfinished form of `path` lies, beside it so that a rename is atomic."""
    return path.with_name(path.name + ".partial")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write `content` to `path`, whole or not at all; nothing is left of an attempt that fails."""
    temporary = partial(path)
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def is_disk_full(error: OSError) -> bool:
    """Whether an operation failed because no space, or no more of one's share of it, is left."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def read_json(path: Path) -> Any:
    """The JSON value in the file at `path`."""
    return json.loads(path.read_text(encoding="utf-8"))


def finish(folder: Path) -> None:
    """Give the finished folder `partial(folder)` its final name, replacing an older one."""
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial(folder), folder)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A fresh folder to write into, which becomes `folder` only if the block ends without an error.

    What an earlier, interrupted attempt left is thrown away. Work that goes on from such
    left-overs uses `partial` and `finish` itself.
    """
    unfinished = partial(folder)
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    yield unfinished
    finish(folder)
