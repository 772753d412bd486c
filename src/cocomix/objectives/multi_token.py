"""Multi-token prediction: each position predicts several future tokens (Gloeckle et al., 2024)."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from cocomix.objectives.base import Batch, Counts, Losses
from cocomix.objectives.ntp import NextToken


class MultiToken(NextToken):
    """Sum of the heads' mean cross-entropies of a `MultiTokenForCausalLM`; head i predicts token t + i."""

    def count(self, batch: Batch) -> Counts:
        """Count the tokens that head 1 predicts, and blocks; head i predicts T − i tokens of a block."""
        rows, length = batch["input_ids"].shape
        device = batch["input_ids"].device
        return {"token": torch.tensor(rows * (length - 1), device=device), "block": torch.tensor(rows, device=device)}

    def __call__(self, model: PreTrainedModel, batch: Batch, counts: Counts) -> Losses:
        """Compute the losses of all heads. `token_loss`, of head 1, is the loss of next-token prediction."""
        ids = batch["input_ids"]
        sums = model(input_ids=ids, labels=ids, use_cache=False, output_all_heads=True, output_logits=False).head_losses
        losses = [total / (counts["block"] * (ids.shape[1] - ahead)) for ahead, total in enumerate(sums, 1)]
        names = ["token_loss", *(f"token_{ahead}_loss" for ahead in range(2, len(losses) + 1))]
        return Losses(sum(losses), {name: loss.detach() for name, loss in zip(names, losses, strict=True)})
