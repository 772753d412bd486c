"""The losses, as pure functions of tensors.

Dimensions: B sequences, T tokens, V vocabulary, C concepts, A labels per token, d teacher width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""Marks a position without a target and an empty label slot."""


class Gate(NamedTuple):
    """What decides how much a student learns from its teacher at each token."""

    teacher_losses: Tensor
    """The teacher's next-token loss at each token in nats, (B, T) or (N,)."""
    temperature: float
    """τ > 0 in nats: the smaller, the more abrupt."""


def gate_weights(losses: Tensor, gate: Gate) -> Tensor:
    """Return σ((loss of the student − loss of the teacher) / τ) of each token, above 1/2 where the teacher is better.

    This is the project's own criterion.

    Args:
        losses: the student's next-token losses in nats, of the shape of `gate.teacher_losses`, without a gradient.
        gate: the teacher's, and τ.
    """
    return torch.sigmoid((losses - gate.teacher_losses.to(losses)) / gate.temperature)


def at_least_float32(x: Tensor) -> Tensor:
    """Cast half precision to float32; return anything else unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def mean_loss(total: Tensor, is_target: Tensor, num_items: Tensor | int | None) -> Tensor:
    """Divide a summed loss by `num_items`, by default the number of targets here, at least 1."""
    count = is_target.sum().clamp(min=1) if num_items is None else num_items
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)


def token_loss(logits: Tensor, labels: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Next-token cross-entropy in nats: logits of token t against the label of token t + 1.

    Args:
        logits: (B, T, V).
        labels: (B, T), `IGNORE` for no target.
        num_items: divisor of the sum, for parts of a larger batch; by default the number of targets here, which
            gives their mean.
    """
    targets = labels[:, 1:].flatten().to(logits.device)
    total = F.cross_entropy(
        at_least_float32(logits[:, :-1]).flatten(0, 1), targets, ignore_index=IGNORE, reduction="sum"
    )
    return mean_loss(total, targets != IGNORE, num_items)


def label_shares(labels: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return (..., A) the share of each label in the loss of its token; they sum to 1, or to 0 without a label.

    Args:
        labels: (..., A), `IGNORE` for an empty label slot.
        weights: (..., A) relative weights > 0 of the labels; None for equal ones.
        dtype: result dtype.
    """
    has = labels != IGNORE
    if weights is None:
        return has.to(dtype) / has.sum(-1, keepdim=True).clamp(min=1)
    weights = weights.to(labels.device, dtype).masked_fill(~has, 0.0)
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)


def concept_loss(
    concept_logits: Tensor,
    concept_ids: Tensor,
    num_items: Tensor | int | None = None,
    concept_weights: Tensor | None = None,
    token_weights: Tensor | None = None,
) -> Tensor:
    """Concept cross-entropy in nats, averaged over labeled tokens (arXiv 2502.08524, L_concept).

    Args:
        concept_logits: z, (B, T, C).
        concept_ids: (B, T, A) labels, `IGNORE` for an empty label slot; a token with only empty slots has no loss.
        num_items: divisor of the sum over tokens; by default the number of labeled tokens here.
        concept_weights: (B, T, A) relative weights of the labels; by default they are equal.
        token_weights: (B, T) factor of each token's loss in the sum; the divisor does not change.
    """
    per_token = concept_losses(concept_logits, concept_ids, concept_weights)
    total = (per_token if token_weights is None else per_token * token_weights.to(per_token)).sum()
    return mean_loss(total, (concept_ids != IGNORE).any(-1), num_items)


def concept_losses(concept_logits: Tensor, concept_ids: Tensor, concept_weights: Tensor | None = None) -> Tensor:
    """Return (...) the concept cross-entropy of each token in nats, 0 where it has no label.

    The mean of the A cross-entropies of a token is logsumexp(z) − mean of z at its labels, so one normalizer suffices.
    With weights, the mean is weighted: the cross-entropy against a distribution over the labels.

    Args:
        concept_logits: z, (..., C).
        concept_ids: (..., A) labels, `IGNORE` for an empty label slot.
        concept_weights: (..., A) relative weights of the labels; by default they are equal.
    """
    concept_ids = concept_ids.to(concept_logits.device)
    labeled = concept_ids != IGNORE
    z = at_least_float32(concept_logits)
    at_labels = z.gather(-1, concept_ids.clamp(min=0).long()).masked_fill(~labeled, 0.0)
    labels_of_token = labeled.sum(-1)
    if concept_weights is None:
        at_mean = at_labels.sum(-1) / labels_of_token.clamp(min=1)
    else:
        at_mean = (at_labels * label_shares(concept_ids, concept_weights, z.dtype)).sum(-1)
    per_token = z.logsumexp(-1) - at_mean
    return per_token.masked_fill(labels_of_token == 0, 0.0)


def hidden_state_loss(
    predicted: Tensor,
    target: Tensor,
    kind: str,
    num_tokens: Tensor | int | None = None,
    is_token: Tensor | None = None,
) -> Tensor:
    """Distance of predicted to teacher hidden states, averaged over tokens (arXiv 2502.08524, figure 6b).

    Args:
        predicted, target: (B, T, d).
        kind: `l1` or `l2`, mean absolute or squared difference over d; `cosine`, 1 − cos.
        num_tokens: divisor of the sum over tokens; by default their number here.
        is_token: (B, T) bool, False at padding; by default all tokens count.
    """
    predicted = at_least_float32(predicted)
    target = target.to(predicted)
    if kind == "cosine":
        per_token = 1 - F.cosine_similarity(predicted, target, dim=-1)
    else:
        difference = predicted - target
        per_token = (difference.abs() if kind == "l1" else difference.square()).mean(-1)
    if is_token is None:
        is_token = torch.ones_like(per_token, dtype=torch.bool)
    return mean_loss(per_token.masked_fill(~is_token, 0.0).sum(), is_token, num_tokens)
