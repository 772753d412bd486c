"""What a training method has to say."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor
from transformers import PreTrainedModel

Batch = dict[str, Tensor]
"""Columns of some blocks: `input_ids` (B, T) int64, and what the objective asks for beside it."""
Counts = dict[str, Tensor]
"""Number of targets of each kind (0-dimensional), in one batch or summed over several."""


class Losses(NamedTuple):
    """Losses of one micro-batch, each a sum over its targets divided by the targets of the whole batch.

    So the micro-batches of a batch, on any number of processes, add up to the batch's mean losses.
    """

    total: Tensor
    """What is minimised; 0-dimensional."""
    parts: dict[str, Tensor]
    """The terms of it, unweighted and without graph, for the log."""


class Objective(Protocol):
    """A training method, as a loss of a model on a batch."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Dataset columns that it reads."""
        ...

    def prepare(self, batches: list[Batch]) -> list[Batch]:
        """The micro-batches of a step, on the device, with what is computed for them now instead of being stored."""
        ...

    def count(self, batch: Batch) -> Counts:
        """Targets in `batch`, by kind."""
        ...

    def __call__(self, model: PreTrainedModel, batch: Batch, counts: Counts) -> Losses:
        """Losses of `batch`, normalised by `counts` of the whole batch of which it is a part."""
        ...


class TeacherSignals(Protocol):
    """What a teacher computes inside a student's training steps. Each is prepared when a method asks for it."""

    def labeler(self) -> Callable[[Tensor], Tensor] | None:
        """Return the labeling of blocks (B, T), concept ids (B, T, A), −100 for none; None if labels are stored."""
        ...

    def logits(self) -> Callable[[Tensor], Tensor]:
        """Return the teacher's logits (B, T, V) of blocks (B, T)."""
        ...

    def hidden_states(self) -> Callable[[Tensor], Tensor]:
        """Return the teacher's hidden states (B, T, d) of blocks (B, T)."""
        ...
