"""Check the files of a checkpoint for damage."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open

from cocomix.common import files
from cocomix.common.errors import InputError


def require_readable(checkpoint: Path) -> None:
    """Check every file of a checkpoint before it is loaded.

    Raises:
        InputError: a file is damaged.
    """
    for path in sorted(checkpoint.iterdir()):
        try:
            READERS.get(path.suffix, Path.stat)(path)
        except Exception as error:  # every library raises different exceptions
            reason = " ".join(str(error).split()) or type(error).__name__
            raise damaged(checkpoint, f"{path.name} cannot be read ({reason})") from None


def damaged(checkpoint: Path, problem: str) -> InputError:
    """Return the error that names a damaged checkpoint and its remedy."""
    return InputError(
        f"the checkpoint {checkpoint} is damaged: {problem}; delete this folder to resume from the checkpoint before "
        "it, or to start again if there is none"
    )


def _check_archive(path: Path) -> None:
    """Verify the checksums of a file written by torch.save."""
    with zipfile.ZipFile(path) as archive:
        if (bad := archive.testzip()) is not None:
            raise ValueError(f"wrong checksum of {bad}")


def _check_weights(path: Path) -> None:
    with safe_open(path, "pt"):  # compares the sizes in the header with the file size
        pass


READERS: dict[str, Callable[[Path], object]] = {
    ".json": files.read_json,
    ".safetensors": _check_weights,
    ".pt": _check_archive,
    ".pth": _check_archive,
    ".bin": _check_archive,
}
