"""Multi-token prediction: each position predicts several future tokens (Gloeckle et al., 2024)."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cocomix.models.losses import IGNORE, token_loss
from cocomix.objectives.base import Batch, Counts, Losses
from cocomix.objectives.ntp import NextToken


class MultiToken(NextToken):
    """Σ over the heads of a `MultiTokenForCausalLM` of each one's mean cross-entropy; head i predicts token t + i."""

    def count(self, batch: Batch) -> Counts:
        """Tokens predicted by each head, `token` by the first; a block of T tokens has T − i of head i."""
        rows, length = batch["input_ids"].shape
        device = batch["input_ids"].device
        return {"token": torch.tensor(rows * (length - 1), device=device), "block": torch.tensor(rows, device=device)}

    def __call__(self, model: PreTrainedModel, batch: Batch, counts: Counts) -> Losses:
        """The losses of all heads; that of the first, `token_loss`, is next-token prediction's."""
        ids = batch["input_ids"]
        parts: dict[str, Tensor] = {}
        total = torch.zeros((), device=ids.device)
        for head, logits in enumerate(model(input_ids=ids, use_cache=False, output_all_heads=True).head_logits, 1):
            targets = torch.full_like(ids, IGNORE)  # token_loss compares token t with the target at t + 1
            targets[:, 1 : ids.shape[1] - head + 1] = ids[:, head:]
            loss = token_loss(logits, targets, counts["block"] * (ids.shape[1] - head))
            parts["token_loss" if head == 1 else f"token_{head}_loss"] = loss.detach()
            total = total + loss
        return Losses(total, parts)
