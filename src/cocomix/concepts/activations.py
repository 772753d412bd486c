"""A teacher's residual stream as an endless, shuffled stream of batches that can be saved and gone on with.

N tokens of a batch, M tokens of the buffer, d teacher width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from cocomix.concepts.teacher import residual_stream

_BLOCK_ORDER, _BUFFER_ORDER = 0, 1  # the two things that are drawn, each from a random generator of its own


class ActivationStream(Iterator[Tensor]):
    """Batches (N, d) float32 of the residual stream after one block, over all blocks, round after round.

    Blocks come in a new order every round. Their tokens go through a buffer that is shuffled whenever it is
    full: half of it is served, the other half stays and is mixed with what fills it up again. This is what
    SAELens' `mixing_buffer` does; that is a generator, whose position and contents nobody can save, so a
    training that reads from it cannot be resumed exactly.

    At no time more activations are held than `buffer_tokens` and those of one teacher batch, the batch that
    is being served apart: the buffer is shuffled by its row numbers, and refilled in place.

    Args:
        teacher: frozen.
        blocks: with the column `input_ids`.
        layer: 0-based teacher block after which the stream is tapped.
        tokens_per_step: N.
        buffer_tokens: M, at least N.
        seed: decides both orders.
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
        self._order = torch.arange(buffer_tokens)  # rows of the buffer, in the order in which they are served
        self._served = buffer_tokens  # how many of them have been: all, so that the first batch fills the buffer
        self._fillings = 0
        self._waiting = self._buffer[:0]  # the rest of a teacher batch for which the buffer had no room
        self._round = 0
        self._blocks_read = 0  # of this round

    def __next__(self) -> Tensor:
        """The next batch (N, d), on the teacher's device."""
        if self._served >= self._served_per_filling:
            self._fill()
        rows = self._order[self._served : self._served + self.tokens_per_step]
        self._served += self.tokens_per_step
        return self._buffer[rows.to(self._buffer.device)]

    def state_dict(self) -> dict[str, Any]:
        """All that decides the batches to come; tensors of it share no memory with the stream."""
        unserved = self._order[self._served :].to(self._buffer.device)
        return {
            "unserved": self._buffer[unserved],
            "waiting": self._waiting.clone(),
            "fillings": self._fillings,
            "round": self._round,
            "blocks_read": self._blocks_read,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken, of a stream with the same arguments.

        Which row an activation lies in is not kept: what is served depends on the order alone.
        """
        unserved = state["unserved"]
        self._order = torch.arange(len(self._buffer))
        self._served = len(self._buffer) - len(unserved)
        self._buffer[self._served :] = unserved
        self._waiting = state["waiting"].to(self._buffer)
        self._fillings, self._round, self._blocks_read = state["fillings"], state["round"], state["blocks_read"]

    def _fill(self) -> None:
        """Put new activations where served ones lie, and shuffle all."""
        free = self._order[: self._served].to(self._buffer.device)
        while len(free):
            if not len(self._waiting):
                self._waiting = self._buffer[:0]  # lets go of the teacher batch that is used up before there is another
                self._waiting = self._read()
            taken = min(len(free), len(self._waiting))
            self._buffer[free[:taken]] = self._waiting[:taken]
            free, self._waiting = free[taken:], self._waiting[taken:]
        self._order = self._order[torch.from_numpy(self._permutation(_BUFFER_ORDER, self._fillings, len(self._order)))]
        self._served = 0
        self._fillings += 1

    def _read(self) -> Tensor:
        """The activations of the next blocks of this round, or of the first ones of the next."""
        if self._blocks_read >= len(self.blocks):
            self._round, self._blocks_read = self._round + 1, 0
        order = self._permutation(_BLOCK_ORDER, self._round, len(self.blocks))
        chosen = order[self._blocks_read : self._blocks_read + self.blocks_per_batch]
        self._blocks_read += len(chosen)
        ids = torch.from_numpy(self.blocks[chosen]["input_ids"].astype(np.int64)).to(self.teacher.device)
        return residual_stream(self.teacher, ids, self.layer).flatten(0, 1).float()

    def _permutation(self, what: int, number: int, length: int) -> np.ndarray:
        """The `number`th order of `what`: made from its number, so that no generator has to be saved."""
        return np.random.default_rng((self.seed, what, number)).permutation(length)
