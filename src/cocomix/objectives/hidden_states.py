"""Hidden-state regression, the paper's 'direct prediction': predict hidden states instead of concepts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from cocomix.objectives.base import Batch, Counts, Losses
from cocomix.objectives.ntp import NextToken

HiddenStates = Callable[[Tensor], Tensor]
"""Computes the teacher's hidden states (B, T, d) of blocks (B, T)."""


@dataclass(frozen=True)
class HiddenStateMixing(NextToken):
    """L_token + λ · L_hidden of a `CoCoMixForCausalLM` with content `hidden_states` (arXiv 2502.08524, figure 6b).

    Args:
        teacher: computes the hidden states of each micro-batch. Stored, they would take hundreds of times the size of
            the text.
    """

    teacher: HiddenStates

    def __call__(self, model: PreTrainedModel, batch: Batch, counts: Counts) -> Losses:
        """Compute both losses. Every token has a hidden state, including the last of a block."""
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
        return Losses(output.loss, parts)

    def count(self, batch: Batch) -> Counts:
        """Count predicted tokens, and tokens with a hidden state."""
        return {**super().count(batch), "hidden": batch["input_ids"].new_tensor(batch["input_ids"].numel())}
