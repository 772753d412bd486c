"""The losses, as pure functions.

B sequences, T tokens, V vocabulary, C concepts, A labels per token, d teacher width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""Marks a position without a target and a slot without a label."""


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def token_loss(logits: Tensor, labels: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Next-token cross-entropy in nats: the logits of token t against the label of token t + 1.

    Args:
        logits: (B, T, V).
        labels: (B, T), `IGNORE` where there is no target.
        num_items: what the sum is divided by, for batches that are parts of a larger one; by default
            the number of targets here, which gives their mean.
    """
    targets = labels[:, 1:].flatten()
    total = F.cross_entropy(
        _at_least_float32(logits[:, :-1]).flatten(0, 1), targets, ignore_index=IGNORE, reduction="sum"
    )
    return total / (num_items if num_items is not None else (targets != IGNORE).sum().clamp(min=1))


def concept_loss(concept_logits: Tensor, concept_ids: Tensor, num_labelled: Tensor | int | None = None) -> Tensor:
    """Cross-entropy of the concept prediction, averaged over each token's labels (arXiv 2502.08524, L_concept).

    The mean of the A cross-entropies of a token is logsumexp(z) − mean of z at its labels, so one
    normaliser serves all of them.

    Args:
        concept_logits: z, (B, T, C).
        concept_ids: (B, T, A) labels; `IGNORE` in a slot means no label, in every slot an unlabelled token.
        num_labelled: what the sum is divided by; by default the number of labelled tokens here.
    """
    labelled = concept_ids != IGNORE
    z = _at_least_float32(concept_logits)
    at_labels = z.gather(-1, concept_ids.clamp(min=0).long()).masked_fill(~labelled, 0.0)
    labels_of_token = labelled.sum(-1)
    per_token = z.logsumexp(-1) - at_labels.sum(-1) / labels_of_token.clamp(min=1)
    has_label = labels_of_token > 0
    total = per_token.masked_fill(~has_label, 0.0).sum()
    return total / (num_labelled if num_labelled is not None else has_label.sum().clamp(min=1))


def hidden_state_loss(predicted: Tensor, target: Tensor, kind: str, num_tokens: Tensor | int | None = None) -> Tensor:
    """How far predicted hidden states are from the teacher's, averaged over tokens (arXiv 2502.08524, figure 6b).

    Args:
        predicted, target: (B, T, d).
        kind: `l1` and `l2`, the mean absolute and squared difference over d, or `cosine`, 1 − cos.
        num_tokens: what the sum over tokens is divided by; by default B · T.
    """
    predicted, target = _at_least_float32(predicted), target.to(_at_least_float32(predicted).dtype)
    if kind == "cosine":
        per_token = 1 - F.cosine_similarity(predicted, target, dim=-1)
    else:
        difference = predicted - target
        per_token = (difference.abs() if kind == "l1" else difference.square()).mean(-1)
    return per_token.sum() / (num_tokens if num_tokens is not None else per_token.numel())
