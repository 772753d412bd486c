"""Checkpoints: mark complete ones, keep the newest, find the one to resume from, and load its weights."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from cocomix.common import files, integrity
from cocomix.common.console import status
from cocomix.common.errors import InputError

COMPLETE = "complete"
"""File written last into a checkpoint; without it, writing the checkpoint was interrupted."""
WEIGHTS = "*.safetensors"
REMEDY = "delete this checkpoint to resume from the one before it, or to start again if there is none"


def position_file(checkpoint: Path, rank: int) -> Path:
    """Return the file with the position of rank `rank` in its stream of blocks."""
    return checkpoint / f"position-{rank}.json"


def branch_point(folder: Path, step: int) -> Path:
    """Return the folder with the checkpoint of a run after `step` steps, from which branches continue."""
    return folder / f"branch-{step}"


def copy_checkpoint(checkpoint: Path, target: Path) -> None:
    """Copy a complete checkpoint; the copy is complete or has no mark."""
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(checkpoint, target, ignore=shutil.ignore_patterns(COMPLETE))
    mark_complete(target)


def mark_complete(checkpoint: Path) -> None:
    """Record checksums, sync to disk, and mark complete: no interruption leaves a damaged checkpoint that is used."""
    integrity.write_sums(checkpoint)
    files.sync(checkpoint)
    files.write_bytes(checkpoint / COMPLETE, b"")


def keep_newest(folder: Path, count: int) -> None:
    """Delete all but the newest `count` checkpoints in `folder`."""
    by_age = sorted(files.checkpoints(folder), key=files.step_of)
    for older in by_age[:-count]:
        (older / COMPLETE).unlink(missing_ok=True)  # first, so that no half-deleted checkpoint counts as complete
        shutil.rmtree(older)


def last_complete_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in `folder`, or None; delete incomplete ones."""
    complete = []
    for checkpoint in files.checkpoints(folder):
        if (checkpoint / COMPLETE).exists():
            complete.append(checkpoint)
        else:
            shutil.rmtree(checkpoint)
    return max(complete, key=files.step_of, default=None)


def intact_checkpoint(folder: Path) -> Path | None:
    """Return the newest undamaged checkpoint in `folder`, or None if there is none; delete damaged newer ones.

    Raises:
        InputError: the only checkpoint is damaged.
    """
    newest = last_complete_checkpoint(folder)
    if newest is None:
        return None
    try:
        integrity.verify(newest, REMEDY)
    except InputError as error:
        if len(files.checkpoints(folder)) == 1:
            raise
        status(f"{error}. Resuming from the checkpoint before it.")
        (newest / COMPLETE).unlink()
        return intact_checkpoint(folder)
    return newest


def load_weights(checkpoint: Path, model: PreTrainedModel) -> dict[str, Tensor]:
    """Load the weights of a checkpoint, one for each name in the model's state dict.

    Raises:
        InputError: the checkpoint lacks a weight of the model, or has an unknown one.
    """
    found: dict[str, Tensor] = {}
    for path in checkpoint.glob(WEIGHTS):
        found |= load_file(path)
    for target, source in model.all_tied_weights_keys.items():  # the file holds one of two tied weights
        for name, other in ((target, source), (source, target)):
            if name not in found and other in found:
                found[name] = found[other]
    names = model.state_dict().keys()
    for problem, wrong in (("lacks", names - found.keys()), ("has the unknown", found.keys() - names)):
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise InputError(
                f"the checkpoint {checkpoint} is damaged: it {problem} weight {min(wrong)}{more}; {REMEDY}"
            )
    return found
