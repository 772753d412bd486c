"""Forward KL from a teacher's token distribution to a student's, whole or from the teacher's most probable tokens.

B sequences, T tokens, V vocabulary, k tokens kept of each distribution, τ temperature. With p the teacher's and q the
student's softmax of logits / τ, the divergence of a token is KL(p ‖ q) · τ², so that gradients keep their size
whatever τ is (Hinton et al., 2015, section 2).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class TopTokens(NamedTuple):
    """A distribution over the vocabulary, of which the k most probable tokens are known one by one."""

    ids: Tensor
    """(..., k) those tokens, the most probable first; int64."""
    log_probs: Tensor
    """(..., k) log p of each, float32."""
    log_rest: Tensor
    """(...) log of the mass of all other tokens together, float32; −inf if there are none."""


def top_tokens(logits: Tensor, k: int, temperature: float) -> TopTokens:
    """The k most probable tokens of softmax(logits / τ), and the mass of the rest: nothing is lost or guessed."""
    scaled = logits.float() / temperature
    kept = scaled.topk(k, dim=-1)
    normaliser = scaled.logsumexp(-1)
    log_rest = _of_the_rest(scaled, kept.indices) - normaliser
    return TopTokens(kept.indices, kept.values - normaliser.unsqueeze(-1), log_rest)


def divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """KL(p ‖ q) · τ², summed over all tokens; both logits are (B, T, V). In nats."""
    log_q = F.log_softmax(student_logits.float() / temperature, dim=-1)
    log_p = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) * temperature**2


def divergence_of_top(student_logits: Tensor, teacher: TopTokens, temperature: float) -> Tensor:
    """The same of the distributions over k + 1 outcomes: each of the teacher's top tokens, and any other token.

    Σ_top p log(p / q) + p_rest log(p_rest / q_rest). Both rests are exact masses, so this is the divergence of two
    true distributions; merging outcomes can only lower it, and with k = V − 1 it is the whole one.

    Args:
        student_logits: (B, T, V).
        teacher: (B, T, k), taken at the same temperature.
        temperature: τ.
    """
    scaled = student_logits.float() / temperature
    normaliser = scaled.logsumexp(-1)
    log_q = scaled.gather(-1, teacher.ids) - normaliser.unsqueeze(-1)
    of_top = (teacher.log_probs.exp() * (teacher.log_probs - log_q)).sum(-1)
    has_rest = teacher.log_rest > -torch.inf
    log_q_rest = _of_the_rest(scaled, teacher.ids) - normaliser
    # A rest of no mass adds nothing; 0 · ∞ would be no number, nor would its gradient.
    difference = torch.where(has_rest, teacher.log_rest - log_q_rest, 0.0)
    return (of_top + teacher.log_rest.exp() * difference).sum() * temperature**2


def _of_the_rest(scaled: Tensor, ids: Tensor) -> Tensor:
    """logsumexp of all logits but those at `ids` (..., k): subtracting masses instead would cancel."""
    return scaled.scatter(-1, ids, -torch.inf).logsumexp(-1)
