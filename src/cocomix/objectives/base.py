"""Interface of a training method.

Dimensions: B blocks, T tokens, V vocabulary, A labels per token, d teacher width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from cocomix.models.divergence import Distribution

Batch = dict[str, Tensor]
"""Columns of a batch of blocks: `input_ids` (B, T) int64, and the other columns that the objective reads."""
PredictTokens = Callable[[Tensor], Distribution]
"""Computes a teacher's distributions at the tokens of blocks (B, T)."""
Counts = dict[str, Tensor]
"""Number of targets by kind, as scalars, in one micro-batch or summed over several."""


class Losses(NamedTuple):
    """Losses of one micro-batch, each summed over its targets and divided by the number of targets in the full batch.

    So the losses of all micro-batches, on any number of processes, add up to the mean losses of the full batch.
    """

    total: Tensor
    """Scalar to minimize."""
    parts: dict[str, Tensor]
    """Its terms by name, without the objective's weights and detached, for the log."""


class Objective(Protocol):
    """A training method: a loss of a model on a batch."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Dataset columns to read."""
        ...

    def at(self, progress: float) -> Objective:
        """Return the objective of a step, with scheduled weights; `progress` is the share of the steps before it."""
        ...

    def scheduled_weights(self) -> dict[str, float]:
        """Return the weights that change during training, for the log."""
        ...

    def prepare(self, batches: list[Batch]) -> list[Batch]:
        """Add the columns that are computed during training to a step's micro-batches, which are on the device."""
        ...

    def count(self, batch: Batch) -> Counts:
        """Count the targets in `batch`, by kind."""
        ...

    def __call__(self, model: PreTrainedModel, batch: Batch, counts: Counts) -> Losses:
        """Compute the losses of `batch`, divided by the `counts` of the full batch of which it is a part."""
        ...


class TeacherSignals(Protocol):
    """Functions with which a teacher contributes to a student's training steps, prepared on first use."""

    def labeler(self) -> Callable[[Tensor], Tensor] | None:
        """Return the labeling of blocks (B, T), concept ids (B, T, A), −100 for none; None if labels are stored."""
        ...

    def labels_have_weights(self) -> bool:
        """Return whether stored labels have weights, in the column `concept_weights`."""
        ...

    def losses_are_stored(self) -> bool:
        """Return whether the teacher's losses are stored, in the column `teacher_losses`."""
        ...

    def token_distributions(self) -> PredictTokens:
        """Return the teacher's distributions at the tokens of blocks (B, T)."""
        ...

    def hidden_states(self) -> Callable[[Tensor], Tensor]:
        """Return the teacher's hidden states (B, T, d) of blocks (B, T)."""
        ...
