"""Forward KL divergence from a teacher's token distribution to a student's, over all tokens or the teacher's top k.

B sequences, T tokens, V vocabulary, k top tokens per distribution, τ temperature. With p the teacher's and q the
student's softmax of logits / τ, the divergence at a token is KL(p ‖ q) · τ², so that the size of gradients does not
depend on τ (Hinton et al., 2015, section 2).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class TopTokens(NamedTuple):
    """A distribution over the vocabulary, reduced to its k most probable tokens and the mass of the rest."""

    ids: Tensor
    """(..., k) the top tokens, most probable first; int64."""
    log_probs: Tensor
    """(..., k) log p of each top token, float32."""
    log_rest: Tensor
    """(...) log of the total mass of all other tokens, float32; −inf if there are none."""


def top_tokens(logits: Tensor, k: int, temperature: float) -> TopTokens:
    """Return the k most probable tokens of softmax(logits / τ), and the exact mass of the rest. Logits are (..., V)."""
    scaled = logits.float() / temperature
    top = scaled.topk(k, dim=-1)
    log_normalizer = scaled.logsumexp(-1)
    log_rest = _logsumexp_without(scaled, top.indices) - log_normalizer
    return TopTokens(top.indices, top.values - log_normalizer.unsqueeze(-1), log_rest)


def divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return KL(p ‖ q) · τ² in nats, summed over all tokens; both logits are (B, T, V)."""
    log_q = F.log_softmax(student_logits.float() / temperature, dim=-1)
    log_p = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) * temperature**2


def divergence_of_top(student_logits: Tensor, teacher: TopTokens, temperature: float) -> Tensor:
    """Return the divergence over k + 1 outcomes: each of the teacher's top tokens, and any other token.

    Σ_top p log(p / q) + p_rest log(p_rest / q_rest). Both rests are exact masses, so this is the divergence of two
    proper distributions. Merging outcomes can only lower it; with k = V − 1 it equals `divergence`.

    Args:
        student_logits: (B, T, V).
        teacher: (B, T, k), computed at the same temperature.
        temperature: τ.
    """
    scaled = student_logits.float() / temperature
    log_normalizer = scaled.logsumexp(-1)
    log_q = scaled.gather(-1, teacher.ids) - log_normalizer.unsqueeze(-1)
    top_terms = (teacher.log_probs.exp() * (teacher.log_probs - log_q)).sum(-1)
    has_rest = teacher.log_rest > -torch.inf
    log_q_rest = _logsumexp_without(scaled, teacher.ids) - log_normalizer
    # A rest without mass adds nothing. 0 · ∞ would be NaN, and so would its gradient.
    difference = torch.where(has_rest, teacher.log_rest - log_q_rest, 0.0)
    return (top_terms + teacher.log_rest.exp() * difference).sum() * temperature**2


def _logsumexp_without(scaled: Tensor, ids: Tensor) -> Tensor:
    """Return the logsumexp of all logits except those at `ids` (..., k); subtracting masses would cancel digits."""
    return scaled.scatter(-1, ids, -torch.inf).logsumexp(-1)
