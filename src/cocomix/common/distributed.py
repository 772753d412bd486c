"""Distributed processes as started by `torchrun`: rank, world size, work sharing, barriers."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import PartialState

T = TypeVar("T")
CONNECTION_LOST = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "ncclRemoteError")
"""Parts of the errors of collectives whose peer has exited."""
TIMEOUT = timedelta(days=30)
"""Timeout of collectives: rank 0 may work for long; torchrun notices at once if a process dies."""

LAUNCHER_SETTINGS = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")
"""Prefixes of environment variables by which `accelerate launch` changes how a model is trained."""
PLACEMENT = {"ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE", "ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE"}
"""Exceptions that change only where it is trained."""


def ignore_launcher_settings() -> None:
    """Delete the variables that Accelerate would read, so that only the recipe decides how models are trained."""
    for name in [name for name in os.environ if name.startswith(LAUNCHER_SETTINGS) and name not in PLACEMENT]:
        del os.environ[name]


def world_size() -> int:
    """Return the number of processes (world size)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the rank of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """Return whether this is rank 0, which writes files and prints messages."""
    return rank() == 0


def shard(items: Sequence[T]) -> list[T]:
    """Return the items that this rank works on; each item belongs to exactly one rank."""
    return list(items[rank() :: world_size()])


def sum_arrays(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Sum float64 arrays of one shape over all ranks."""
    if world_size() == 1:
        return arrays
    found = torch.from_numpy(np.stack(arrays)).to(device())
    torch.distributed.all_reduce(found)
    return list(found.cpu().numpy())


def sum_over(values: dict[str, float]) -> dict[str, float]:
    """Sum named values over all ranks, which must have the same names."""
    if world_size() == 1:
        return values
    (summed,) = sum_arrays([np.array(list(values.values()), dtype=np.float64)])
    return dict(zip(values, summed.tolist(), strict=True))


def sum_tensors(tensors: Sequence[Tensor]) -> None:
    """Sum tensors over all ranks, in place."""
    if world_size() > 1:
        _connect()
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)


def from_each_rank(mine: Tensor, lengths: Sequence[int]) -> Tensor:
    """Concatenate the tensors of all ranks along their first dimension, whose length on rank r is `lengths[r]`."""
    if world_size() == 1:
        return mine
    _connect()
    parts = [
        mine if number == rank() else mine.new_empty(length, *mine.shape[1:]) for number, length in enumerate(lengths)
    ]
    for number, part in enumerate(parts):
        torch.distributed.broadcast(part, number)
    return torch.cat(parts)


def device() -> str:
    """Return the device of this process."""
    return str(_state().device)


def barrier() -> None:
    """Wait at a barrier for all ranks. If one of them has failed, exit without another message."""
    if world_size() == 1:
        return
    try:
        _state().wait_for_everyone()
    except RuntimeError:  # the connection broke; the rank that failed reports why
        sys.exit(1)


def is_connection_lost(error: RuntimeError) -> bool:
    """Return whether a collective failed because another process has ended."""
    return world_size() > 1 and any(words in str(error) for words in CONNECTION_LOST)


def wait_for_main_process() -> None:
    """Block every rank but 0 until rank 0 calls `release_others`, so that invalid input is reported once."""
    if not is_main_process():
        barrier()


def release_others() -> None:
    """Release the ranks that wait in `wait_for_main_process`; rank 0 calls this once it has checked the input."""
    if is_main_process():
        barrier()


def _connect() -> None:
    """Connect to the other ranks unless that is done; cheap enough for every training step."""
    if not torch.distributed.is_initialized():
        _state()


def _state() -> PartialState:
    from accelerate import PartialState

    ignore_launcher_settings()
    if world_size() == 1:
        return PartialState()
    # Without `cpu`, Accelerate ignores the other processes on a machine without GPUs.
    return PartialState(cpu=not torch.cuda.is_available(), timeout=TIMEOUT)
