"""The processes that `torchrun` started, if it did: who is first, who does what, and where all wait for each other."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

if TYPE_CHECKING:
    from accelerate import PartialState

T = TypeVar("T")
TIMEOUT = timedelta(days=30)
"""The others wait while the first trains a teacher; a process that dies is noticed by torchrun at once."""

LAUNCHER_SETTINGS = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")
"""Environment variables by which `accelerate launch` and its configuration change how a model is trained."""
PLACEMENT = {"ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE", "ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE"}
"""Those of them that change only where it is trained."""


def ignore_launcher_settings() -> None:
    """Drop what Accelerate would read from the environment, so that the recipe alone decides how models are trained."""
    for name in [name for name in os.environ if name.startswith(LAUNCHER_SETTINGS) and name not in PLACEMENT]:
        del os.environ[name]


def count() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this is the process that makes what only one can make, and that speaks."""
    return rank() == 0


def share(items: Sequence[T]) -> list[T]:
    """The items that fall to this process; every item falls to exactly one."""
    return list(items[rank() :: count()])


def sum_arrays(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Arrays of one shape, float64, each summed over all processes."""
    if count() == 1:
        return arrays
    found = torch.from_numpy(np.stack(arrays)).to(device())
    torch.distributed.all_reduce(found)
    return list(found.cpu().numpy())


def sum_over(values: dict[str, float]) -> dict[str, float]:
    """Each figure summed over all processes, which all have the same names."""
    if count() == 1:
        return values
    (summed,) = sum_arrays([np.array(list(values.values()), dtype=np.float64)])
    return dict(zip(values, summed.tolist(), strict=True))


def device() -> str:
    """The device of this process."""
    return str(_state().device)


def wait_for_all() -> None:
    """Go on only when every process has come here. Where one of them has failed, the others end quietly."""
    if count() == 1:
        return
    try:
        _state().wait_for_everyone()
    except RuntimeError:  # the connection broke: the process that failed says why
        sys.exit(1)


def wait_for_first() -> None:
    """All but the first wait here until it calls them, so that a mistake in the input is told once.

    Where every process meets the same mistake later, the others wait here for the first to end of it.
    """
    if not is_first():
        wait_for_all()


def call_others() -> None:
    """What the first does in `run_until` when it has checked everything."""
    if is_first():
        wait_for_all()


def _state() -> PartialState:
    from accelerate import PartialState

    ignore_launcher_settings()
    if count() == 1:
        return PartialState()
    return PartialState(cpu=not torch.cuda.is_available(), timeout=TIMEOUT)  # else it would see no CPU but its own
