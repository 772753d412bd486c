"""Whether the files of a checkpoint are as they were written."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open

from cocomix import files
from cocomix.errors import InputError


def require_readable(checkpoint: Path) -> None:
    """Check every file of a checkpoint before it is loaded.

    Raises:
        InputError: a file is damaged.
    """
    for path in sorted(checkpoint.iterdir()):
        try:
            READERS.get(path.suffix, Path.stat)(path)
        except Exception as error:  # each library raises its own kinds
            reason = " ".join(str(error).split()) or type(error).__name__
            raise damaged(checkpoint, f"{path.name} cannot be read ({reason})") from None


def damaged(checkpoint: Path, problem: str) -> InputError:
    """The error that names a damaged checkpoint."""
    return InputError(
        f"the checkpoint {checkpoint} is damaged: {problem}; delete this folder to resume from the checkpoint before "
        "it, or to start again if there is none"
    )


def _check_archive(path: Path) -> None:
    """Compare the checksums of everything that torch.save wrote."""
    with zipfile.ZipFile(path) as archive:
        if (bad := archive.testzip()) is not None:
            raise ValueError(f"wrong checksum of {bad}")


def _check_weights(path: Path) -> None:
    with safe_open(path, "pt"):  # compares the sizes in its header with the file's
        pass


READERS: dict[str, Callable[[Path], object]] = {
    ".json": files.read_json,
    ".safetensors": _check_weights,
    ".pt": _check_archive,
    ".pth": _check_archive,
    ".bin": _check_archive,
}
