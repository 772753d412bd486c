"""Checkpoints of an interrupted training: which one to resume from, and reading it safely."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from cocomix import files
from cocomix.integrity import damaged

COMPLETE = "complete"
"""File that a checkpoint folder gets last; a checkpoint without it was interrupted while being written."""
WEIGHTS = "*.safetensors"


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done when a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def position_file(checkpoint: Path, of: int) -> Path:
    """File with the position of process `of` in its stream of blocks when a checkpoint was written."""
    return checkpoint / f"position-{of}.json"


def mark_complete(checkpoint: Path) -> None:
    """Mark a checkpoint as written, once the disk has all of it: a power failure leaves no half of a complete one."""
    files.sync(checkpoint)
    files.write_bytes(checkpoint / COMPLETE, b"")


def keep_newest(folder: Path, count: int) -> None:
    """Delete all but the newest `count` checkpoints in `folder`."""
    by_age = sorted(files.checkpoints(folder), key=step_of)
    for older in by_age[:-count]:
        (older / COMPLETE).unlink(missing_ok=True)  # first, so that none is ever complete and half deleted
        shutil.rmtree(older)


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that was completely written; incomplete ones are deleted."""
    complete = []
    for checkpoint in files.checkpoints(folder):
        if (checkpoint / COMPLETE).exists():
            complete.append(checkpoint)
        else:
            shutil.rmtree(checkpoint)
    return max(complete, key=step_of, default=None)


def load_weights(checkpoint: Path, model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of a checkpoint, one for each name in the model's state dict.

    Raises:
        InputError: the file lacks a weight of the model, or holds one that the model does not have.
    """
    found: dict[str, Tensor] = {}
    for path in checkpoint.glob(WEIGHTS):
        found |= load_file(path)
    for target, source in model.all_tied_weights_keys.items():  # of tied weights, one is in the file
        for name, other in ((target, source), (source, target)):
            if name not in found and other in found:
                found[name] = found[other]
    names = model.state_dict().keys()
    for problem, wrong in (("lacks", names - found.keys()), ("has the unknown", found.keys() - names)):
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise damaged(checkpoint, f"{problem} weight {min(wrong)}{more}")
    return found
