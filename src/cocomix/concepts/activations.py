"""Stream a teacher's residual activations as endless, shuffled, resumable batches.

N tokens per batch, M tokens in the buffer, d teacher width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from cocomix.common import distributed
from cocomix.concepts.teacher import residual_stream

_BLOCK_ORDER, _BUFFER_ORDER = 0, 1  # the two random orders, each with its own generator


class ActivationStream(Iterator[Tensor]):
    """Yield batches (N, d) float32 of the residual stream after one teacher block, epoch after epoch.

    Blocks are shuffled in every epoch. Their tokens pass through a buffer that is shuffled whenever it is full: half
    of it is served, and the other half is mixed with the activations that refill it. SAELens' `mixing_buffer` does
    the same, but it is a generator whose state cannot be saved, so training with it cannot be resumed exactly.

    Memory: `buffer_tokens` activations, one teacher batch, and the batch being served. The buffer is shuffled by row
    numbers and refilled in place.

    Several processes share the teacher's work and each yield the same batches as one process. Every rank must ask for
    each batch.

    Args:
        teacher: frozen.
        blocks: with the column `input_ids`.
        layer: 0-based teacher block after which the stream is tapped.
        tokens_per_step: N.
        buffer_tokens: M, at least N.
        seed: seed of both orders.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        blocks: Dataset,
        layer: int,
        *,
        tokens_per_step: int,
        buffer_tokens: int,
        seed: int,
    ) -> None:
        assert buffer_tokens >= tokens_per_step
        self.teacher = teacher
        self.blocks = blocks.with_format("numpy")
        self.layer = layer
        self.tokens_per_step = tokens_per_step
        self.seed = seed
        self.blocks_per_batch = max(1, tokens_per_step // len(self.blocks[0]["input_ids"]))
        half = buffer_tokens - buffer_tokens // 2
        self._served_per_filling = max(1, half // tokens_per_step) * tokens_per_step
        width = teacher.config.get_text_config().hidden_size
        self._buffer = torch.zeros(buffer_tokens, width, device=teacher.device)
        self._order = torch.arange(buffer_tokens)  # rows of the buffer, in serving order
        self._served = buffer_tokens  # number of rows served: all, so that the first batch fills the buffer
        self._fillings = 0
        self._waiting = self._buffer[:0]  # activations of the last teacher batch that did not fit
        self._round = 0
        self._blocks_read = 0  # in this round

    def __next__(self) -> Tensor:
        """Return the next batch (N, d), on the teacher's device."""
        if self._served >= self._served_per_filling:
            self._fill()
        rows = self._order[self._served : self._served + self.tokens_per_step]
        self._served += self.tokens_per_step
        return self._buffer[rows.to(self._buffer.device)]

    def state_dict(self) -> dict[str, Any]:
        """Return everything that determines the following batches; its tensors share no memory with the stream."""
        unserved = self._order[self._served :].to(self._buffer.device)
        return {
            "unserved": self._buffer[unserved],
            "waiting": self._waiting.clone(),
            "fillings": self._fillings,
            "round": self._round,
            "blocks_read": self._blocks_read,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from the `state_dict` of a stream with the same arguments.

        Row numbers are not restored, because the served batches depend on the serving order alone.
        """
        unserved = state["unserved"]
        self._order = torch.arange(len(self._buffer))
        self._served = len(self._buffer) - len(unserved)
        self._buffer[self._served :] = unserved
        self._waiting = state["waiting"].to(self._buffer)
        self._fillings, self._round, self._blocks_read = state["fillings"], state["round"], state["blocks_read"]

    def _fill(self) -> None:
        """Replace served activations by new ones, and shuffle the buffer."""
        free = self._order[: self._served].to(self._buffer.device)
        while len(free):
            if not len(self._waiting):
                self._waiting = self._buffer[:0]  # free the used batch before the next one is computed
                self._waiting = self._read()
            taken = min(len(free), len(self._waiting))
            self._buffer[free[:taken]] = self._waiting[:taken]
            free, self._waiting = free[taken:], self._waiting[taken:]
        self._order = self._order[torch.from_numpy(self._permutation(_BUFFER_ORDER, self._fillings, len(self._order)))]
        self._served = 0
        self._fillings += 1

    def _read(self) -> Tensor:
        """Compute the activations of the next batches of blocks, one batch on each rank."""
        chosen = [self._choose() for _ in range(distributed.world_size())]
        ids = self.blocks[chosen[distributed.rank()]]["input_ids"].astype(np.int64)
        found = residual_stream(self.teacher, torch.from_numpy(ids).to(self.teacher.device), self.layer)
        return distributed.from_each_rank(found.flatten(0, 1).float(), [len(each) * ids.shape[1] for each in chosen])

    def _choose(self) -> np.ndarray:
        """Return the numbers of the next blocks; start the next round if this one is finished."""
        if self._blocks_read >= len(self.blocks):
            self._round, self._blocks_read = self._round + 1, 0
        order = self._permutation(_BLOCK_ORDER, self._round, len(self.blocks))
        chosen = order[self._blocks_read : self._blocks_read + self.blocks_per_batch]
        self._blocks_read += len(chosen)
        return chosen

    def _permutation(self, what: int, number: int, length: int) -> np.ndarray:
        """Return the `number`-th order of `what`, derived from its number so that no generator has to be saved."""
        return np.random.default_rng((self.seed, what, number)).permutation(length)
