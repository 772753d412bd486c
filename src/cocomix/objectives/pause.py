"""Pause tokens: the next token, with a learned vector interleaved where concepts would be (Goyal et al., 2023)."""

from __future__ import annotations

from transformers import PreTrainedModel

from cocomix.objectives.base import Batch, Counts, Losses
from cocomix.objectives.ntp import NextToken


class Pausing(NextToken):
    """Mean next-token cross-entropy of a `CoCoMixForCausalLM` with content `pause`, whose logits are never built."""

    def __call__(self, model: PreTrainedModel, batch: Batch, counts: Counts) -> Losses:
        """Token loss."""
        ids = batch["input_ids"]
        loss = model(
            input_ids=ids, labels=ids, num_items_in_batch=counts["token"], output_logits=False, use_cache=False
        ).loss
        return Losses(loss, {"token_loss": loss.detach()})
