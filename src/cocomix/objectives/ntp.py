"""Next-token prediction: the baseline, and the objective of teachers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from cocomix.objectives.base import Batch, Counts, Losses, Objective


def count_tokens(batch: Batch) -> torch.Tensor:
    """Count the predicted tokens of `batch`: all but the first of each block."""
    return torch.tensor(batch["input_ids"][:, 1:].numel(), device=batch["input_ids"].device)


@dataclass(frozen=True)
class NextToken:
    """Mean next-token cross-entropy of a model prepared by `with_token_loss`."""

    @property
    def columns(self) -> tuple[str, ...]:
        """`input_ids`."""
        return ("input_ids",)

    def at(self, progress: float) -> Objective:
        """Return this objective, which is the same in every step."""
        return self

    def scheduled_weights(self) -> dict[str, float]:
        """Return no weights."""
        return {}

    def prepare(self, batches: list[Batch]) -> list[Batch]:
        """Return the batches unchanged."""
        return batches

    def count(self, batch: Batch) -> Counts:
        """Count predicted tokens."""
        return {"token": count_tokens(batch)}

    def __call__(self, model: PreTrainedModel, batch: Batch, counts: Counts) -> Losses:
        """Compute the token loss."""
        ids = batch["input_ids"]
        loss = model(
            input_ids=ids, labels=ids, num_items_in_batch=counts["token"], output_logits=False, use_cache=False
        ).loss
        return Losses(loss, {"token_loss": loss.detach()})
