"""Hidden-state regression, the paper's 'direct prediction': predict hidden states instead of concepts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor
from transformers import PreTrainedModel

from cocomix.objectives.base import Batch, Counts, Losses
from cocomix.objectives.ntp import NextToken
from cocomix.objectives.schedule import WeightSchedule, scheduled

HiddenStates = Callable[[Tensor], Tensor]
"""Computes the teacher's hidden states (B, T, d) of blocks (B, T)."""


@dataclass(frozen=True)
class HiddenStateMixing(NextToken):
    """L_token + λ · L_hidden of a `CoCoMixForCausalLM` with content `hidden_states` (arXiv 2502.08524, figure 6b).

    Args:
        teacher: computes the hidden states of each micro-batch. Stored, they would take hundreds of times the size of
            the text.
        weight: λ; by default the model's `concept_loss_weight`. With weight 0, the teacher does not run.
        schedule: how λ changes during training; it needs `weight`.
    """

    teacher: HiddenStates
    weight: float | None = None
    schedule: WeightSchedule | None = None

    def at(self, progress: float) -> HiddenStateMixing:
        """Return the objective of a step, with the weight of the schedule."""
        return self if self.weight is None else replace(self, weight=scheduled(self.weight, self.schedule, progress))

    def scheduled_weights(self) -> dict[str, float]:
        """Return λ if it changes."""
        return {} if self.schedule is None or self.weight is None else {"concept_loss_weight": self.weight}

    def __call__(self, model: PreTrainedModel, batch: Batch, counts: Counts) -> Losses:
        """Compute both losses. Every token has a hidden state, including the last of a block."""
        if self.weight == 0:
            return super().__call__(model, batch, counts)
        ids = batch["input_ids"]
        output = model(
            input_ids=ids,
            labels=ids,
            teacher_hidden_states=self.teacher(ids),
            num_items_in_batch=counts["token"],
            num_hidden_in_batch=counts["hidden"],
            output_logits=False,
            use_cache=False,
        )
        parts = {"token_loss": output.token_loss.detach(), "hidden_loss": output.hidden_loss.detach()}
        total = output.loss if self.weight is None else output.token_loss + self.weight * output.hidden_loss
        return Losses(total, parts)

    def count(self, batch: Batch) -> Counts:
        """Count predicted tokens, and tokens with a hidden state."""
        return {**super().count(batch), "hidden": batch["input_ids"].new_tensor(batch["input_ids"].numel())}
