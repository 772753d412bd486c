"""Record the checksums of finished folders, and find files that have changed since, in `sha256sum --check`'s format."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from cocomix.common.console import progress_bar
from cocomix.common.errors import InputError

SUMS_FILE = "SHA256SUMS"
SILENT_SECONDS = 2
"""A verification that takes longer shows a progress bar."""


def write_sums(folder: Path, exclude: Collection[str] = ()) -> None:
    """Record the SHA-256 of every file below `folder`, except those named in `exclude`, in its `SHA256SUMS`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    names = [path.relative_to(folder).as_posix() for path in paths]
    lines = [f"{_sha256(folder / name)}  {name}\n" for name in names if name not in {SUMS_FILE, *exclude}]
    if (folder / SUMS_FILE).is_symlink():  # what it leads to is not this folder's
        (folder / SUMS_FILE).unlink()
    (folder / SUMS_FILE).write_text("".join(lines), encoding="utf-8")


@contextmanager
def replaced(folder: Path, name: str) -> Iterator[None]:
    """Let the block replace one file of a finished folder, which has no checksum meanwhile, in case of a kill."""
    if not (folder / SUMS_FILE).is_file():
        yield
        return
    others = {path: digest for path, digest in _recorded(folder).items() if path != name}
    _replace_sums(folder, others)
    try:
        yield
    finally:
        if (folder / name).is_file():
            _replace_sums(folder, {**others, name: _sha256(folder / name)})


def _replace_sums(folder: Path, sums: dict[str, str]) -> None:
    temporary = folder / f"{SUMS_FILE}.partial"
    temporary.write_text("".join(f"{digest}  {path}\n" for path, digest in sums.items()), encoding="utf-8")
    temporary.replace(folder / SUMS_FILE)


def verify(folder: Path, remedy: str, names: Collection[str] | None = None) -> None:
    """Check that the files of a finished folder are those that were written.

    Folders of versions that recorded no checksums pass.

    Args:
        folder: finished folder.
        remedy: what to do if a file is damaged, for the error.
        names: check only these files, if they are recorded; by default all.

    Raises:
        InputError: a file is missing or has another content, or the checksums cannot be read.
    """
    if not (folder / SUMS_FILE).is_file():
        return
    try:
        sums = _recorded(folder)
    except (OSError, ValueError):
        raise InputError(f"{folder / SUMS_FILE} is damaged; {remedy}") from None
    wanted = [name for name in sums if names is None or name in names]
    for name in progress_bar(wanted, f"Verifying {folder}", unit=" files", delay=SILENT_SECONDS, leave=False):
        problem = _problem(folder / name, sums[name])
        if problem is not None:
            raise InputError(f"{folder / name} is damaged: {problem}; {remedy}")


def _problem(path: Path, expected: str) -> str | None:
    try:
        found = _sha256(path)
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return None if found == expected else f"its content has changed since {SUMS_FILE} was written"


def _recorded(folder: Path) -> dict[str, str]:
    """Return the recorded SHA-256 of each file, by its path in the folder; ValueError if the record is damaged."""
    return dict(_lines((folder / SUMS_FILE).read_text(encoding="utf-8")))


def _lines(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        digest, separator, name = line.partition("  ")
        path = PurePosixPath(name)
        if not separator or len(digest) != 64 or path.is_absolute() or ".." in path.parts or "\0" in name:
            raise ValueError(line)
        yield name, digest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
