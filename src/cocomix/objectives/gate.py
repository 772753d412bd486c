"""Supervise only where the teacher knows better: weight what a student learns from its teacher, token by token.

With ℓ_S and ℓ_T the losses of student and teacher on the next token, the weight of a token is

    w_t = σ((ℓ_S(t) − ℓ_T(t)) / τ),

without a gradient. It multiplies the token's concept loss and its divergence from the teacher. Both remain sums over
tokens divided by the number of tokens, not by the sum of the weights: as the student outgrows its teacher, the weights
fall, and the supervision ends by itself. This is the project's own criterion.
"""

from __future__ import annotations

from dataclasses import dataclass

from cocomix.models.divergence import Distribution, TopTokens
from cocomix.models.losses import Gate
from cocomix.models.next_token_loss import token_losses
from cocomix.objectives.base import Batch, PredictTokens

COLUMN = "teacher_losses"
"""Dataset column of the teacher's stored losses, (T,) float16."""


@dataclass(frozen=True)
class TeacherGate:
    """Reads or computes the teacher's losses of a batch.

    Args:
        temperature: τ.
        teacher: computes the teacher's distributions for each micro-batch; by default `COLUMN` holds its losses.
    """

    temperature: float
    teacher: PredictTokens | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The teacher's losses if they are stored."""
        return () if self.teacher else (COLUMN,)

    def __call__(self, batch: Batch, distribution: Distribution | None = None) -> Gate:
        """Return the gate of `batch`; a complete `distribution` of the teacher at its tokens is not computed again."""
        if self.teacher is None:
            return Gate(batch[COLUMN].float(), self.temperature)
        ids = batch["input_ids"]
        if distribution is None or isinstance(distribution, TopTokens):
            distribution = self.teacher(ids)
        return Gate(token_losses(distribution, ids).half().float(), self.temperature)  # rounded as stored ones
