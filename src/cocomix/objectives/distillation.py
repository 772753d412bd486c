"""Knowledge distillation: predict the next token and the teacher's distribution over it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cocomix.models.divergence import TopTokens, divergence, divergence_of_top
from cocomix.models.losses import token_loss
from cocomix.objectives.base import Batch, Counts, Losses
from cocomix.objectives.ntp import NextToken
from cocomix.objectives.schedule import WeightSchedule, scheduled

TeacherLogits = Callable[[Tensor], Tensor]
"""Computes logits (B, T, V) of blocks (B, T)."""
COLUMNS = ("teacher_ids", "teacher_log_probs", "teacher_log_rest")
"""Dataset columns of stored predictions: the fields of `TopTokens`."""


@dataclass(frozen=True)
class Distillation(NextToken):
    """L_token + weight · KL(teacher ‖ student) of any causal language model (arXiv 2502.08524, section 3.1: 0.1).

    The divergence is averaged over the predicted tokens, as the token loss is.

    Args:
        weight: weight of the divergence. With weight 0, the teacher does not run.
        temperature: τ, temperature of both distributions.
        teacher: computes the teacher's logits of each micro-batch; by default its top tokens are read from `COLUMNS`.
        schedule: how the weight changes during training.
    """

    weight: float = 0.1
    temperature: float = 1.0
    teacher: TeacherLogits | None = None
    schedule: WeightSchedule | None = None

    def at(self, progress: float) -> Distillation:
        """Return the objective of a step, with the weight of its schedule."""
        return replace(self, weight=scheduled(self.weight, self.schedule, progress))

    def scheduled_weights(self) -> dict[str, float]:
        """Return the weight if it changes."""
        return {} if self.schedule is None else {"kd_weight": self.weight}

    @property
    def columns(self) -> tuple[str, ...]:
        """`input_ids`, and the teacher's predictions if they are stored."""
        return ("input_ids",) if self.teacher else ("input_ids", *COLUMNS)

    def __call__(self, model: PreTrainedModel, batch: Batch, counts: Counts) -> Losses:
        """Compute both losses."""
        if self.weight == 0:
            return super().__call__(model, batch, counts)
        ids = batch["input_ids"]
        logits = model(input_ids=ids, use_cache=False).logits
        next_token_loss = token_loss(logits, ids, counts["token"])
        kd_loss = self.teacher_loss(logits, batch, counts)
        parts = {"token_loss": next_token_loss.detach(), "kd_loss": kd_loss.detach()}
        return Losses(next_token_loss + self.weight * kd_loss, parts)

    def teacher_loss(self, logits: Tensor, batch: Batch, counts: Counts) -> Tensor:
        """Compute the unweighted divergence of the teacher from logits (B, T, V)."""
        # The target of a block's last token is in no block, so that token has no loss.
        return self._divergence(logits[:, :-1], batch) / counts["token"]

    def _divergence(self, logits: Tensor, batch: Batch) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            if self.teacher is not None:
                return divergence(logits, self.teacher(batch["input_ids"])[:, :-1], self.temperature)
            teacher = TopTokens(*(batch[name][:, :-1] for name in COLUMNS))
            return divergence_of_top(logits, teacher, self.temperature)
