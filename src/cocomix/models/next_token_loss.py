"""Losses of the next token from hidden states, without logits (`linear_loss.py`).

Dimensions: B sequences, T tokens, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .divergence import Distribution, TeacherHidden, TeacherTokens, TopTokens, map_tokens
from .linear_loss import linear_cross_entropy, linear_loss
from .losses import IGNORE, Gate, at_least_float32, gate_weights, mean_loss


class TokenLoss(NamedTuple):
    """Result of `distilled_token_loss`."""

    token_loss: Tensor
    """Mean next-token cross-entropy in nats, with the gradient of token_loss + weight · kd_loss."""
    kd_loss: Tensor
    """Mean divergence from the teacher in nats, with the weights of a gate, without a gradient; 0 without `teacher`."""
    token_weights: Tensor | None
    """(B, T) weight of each token by the gate, 1/2 where it has no target, without a gradient; None without a gate."""
    mean_gate: Tensor | None
    """Mean of these weights over tokens with a target."""


def distilled_token_loss(
    head: nn.Module,
    h: Tensor,
    labels: Tensor,
    teacher: TeacherTokens | None,
    num_items: Tensor | int | None = None,
    gate: Gate | None = None,
) -> TokenLoss:
    """Cross-entropy of the next token and divergence from the teacher, without either model's logits.

    With a gate, the divergence of each token is multiplied by its weight (`gate_weights`). The divisor remains the
    number of tokens, not the sum of the weights, so that a student that has outgrown its teacher learns less from it.

    Args:
        head: token head.
        h: (B, T, D) hidden states.
        labels: (B, T), `IGNORE` for no target; a token without a target has neither loss.
        teacher: its distributions at tokens (B, T); None for the token loss and the weights of the gate only.
        num_items: divisor of the sums; by default the number of targets here.
        gate: the teacher's losses at tokens (B, T).
    """
    targets = labels[:, 1:].reshape(-1, 1).to(h.device)
    if teacher is not None:
        teacher = teacher._replace(
            distribution=map_tokens(teacher.distribution, lambda each: each[:, :-1].flatten(0, 1))
        )
    if gate is not None:
        gate = gate._replace(teacher_losses=gate.teacher_losses[:, :-1].flatten().to(h.device))
    found = linear_loss(head, h[:, :-1].flatten(0, 1), targets, teacher=teacher, gate=gate)
    is_target = targets != IGNORE
    token_weights = mean_gate = None
    if gate is not None:
        at_targets = gate_weights(found.losses, gate)
        mean_gate = mean_loss((at_targets * is_target.squeeze(-1)).sum(), is_target, num_items)
        at_targets = torch.where(is_target.squeeze(-1), at_targets, 0.5)
        token_weights = F.pad(at_targets.view(len(h), -1), (0, 1), value=0.5)  # the last token has no target
    return TokenLoss(
        mean_loss(found.total, is_target, num_items),
        mean_loss(found.divergence, is_target, num_items),
        token_weights,
        mean_gate,
    )


@torch.no_grad()
def token_losses(distribution: Distribution, input_ids: Tensor) -> Tensor:
    """Return (B, T) the next-token loss of a model in nats, 0 at the last token.

    Args:
        distribution: its hidden states or logits at tokens (B, T).
        input_ids: (B, T).
    """
    assert not isinstance(distribution, TopTokens), "the next token may not be among the top tokens"
    targets = input_ids[:, 1:].flatten()
    if isinstance(distribution, TeacherHidden):
        hidden, weight, bias = distribution
        found = linear_cross_entropy(hidden[:, :-1].flatten(0, 1), weight, bias, targets.unsqueeze(-1)).losses
    else:
        logits = at_least_float32(distribution[:, :-1].flatten(0, 1))
        found = F.cross_entropy(logits, targets, reduction="none")
    return F.pad(found.view(len(input_ids), -1), (0, 1))


def linear_token_loss(
    head: nn.Module, h: Tensor, labels: Tensor, num_items: Tensor | int | None = None, ahead: int = 1
) -> Tensor:
    """Cross-entropy of a future token: `token_loss` of the logits head(h), without materializing them.

    Args:
        head: token head.
        h: (B, T, D) hidden states.
        labels: (B, T), `IGNORE` for no target.
        num_items: divisor of the sum; by default the number of targets here.
        ahead: h of token t predicts the label of token t + `ahead`.
    """
    targets = labels[:, ahead:].reshape(-1, 1).to(h.device)
    total = linear_loss(head, h[:, :-ahead].flatten(0, 1), targets).total
    return mean_loss(total, targets != IGNORE, num_items)
