"""Next-token prediction: the baseline, and how teachers are trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from cocomix.objectives.base import Batch, Counts, Losses


def count_tokens(batch: Batch) -> torch.Tensor:
    """Tokens of `batch` that are predicted: all but the first of each block."""
    return torch.tensor(batch["input_ids"][:, 1:].numel(), device=batch["input_ids"].device)


@dataclass(frozen=True)
class NextToken:
    """Mean next-token cross-entropy of any model `with_token_loss`."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Tokens."""
        return ("input_ids",)

    def prepare(self, batches: list[Batch]) -> list[Batch]:
        """As they are."""
        return batches

    def count(self, batch: Batch) -> Counts:
        """Predicted tokens."""
        return {"token": count_tokens(batch)}

    def __call__(self, model: PreTrainedModel, batch: Batch, counts: Counts) -> Losses:
        """Token loss."""
        ids = batch["input_ids"]
        loss = model(
            input_ids=ids, labels=ids, num_items_in_batch=counts["token"], output_logits=False, use_cache=False
        ).loss
        return Losses(loss, {"token_loss": loss.detach()})
