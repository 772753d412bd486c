"""Forward KL divergence from a teacher's token distribution to a student's, over all tokens or the teacher's top k.

B sequences, T tokens, V vocabulary, k top tokens per distribution, τ temperature. With p the teacher's and q the
student's softmax of logits / τ, the divergence at a token is KL(p ‖ q) · τ², so that the size of gradients does not
depend on τ (Hinton et al., 2015, section 2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .losses import at_least_float32


class TopTokens(NamedTuple):
    """A distribution over the vocabulary, reduced to its k most probable tokens and the mass of the rest."""

    ids: Tensor
    """(..., k) the top tokens, most probable first; int64."""
    log_probs: Tensor
    """(..., k) log p of each top token, float32."""
    log_rest: Tensor
    """(...) log of the total mass of all other tokens, float32; −inf if there are none."""


class TeacherHidden(NamedTuple):
    """A distribution over the vocabulary as hidden states and a token head, whose logits are never materialized."""

    hidden: Tensor
    """(..., d) the teacher's last hidden states."""
    weight: Tensor
    """(V, d) weight of its token head."""
    bias: Tensor | None
    """(V,) its bias."""


Distribution = TopTokens | TeacherHidden | Tensor
"""A teacher's distribution at each token; a tensor holds its logits (..., V)."""


class TeacherTokens(NamedTuple):
    """What a student learns of a teacher's predictions: weight · KL(p ‖ q) · τ²."""

    distribution: Distribution
    """p, of tokens (B, T)."""
    weight: float
    """Weight of the divergence relative to the token loss."""
    temperature: float
    """τ."""


def map_tokens(distribution: Distribution, select: Callable[[Tensor], Tensor]) -> Distribution:
    """Apply `select` to the tensors of `distribution` that have an entry for each token."""
    if isinstance(distribution, TopTokens):
        return TopTokens(*(select(each) for each in distribution))
    if isinstance(distribution, TeacherHidden):
        return distribution._replace(hidden=select(distribution.hidden))
    return select(distribution)


def teacher_logits(distribution: TeacherHidden | Tensor) -> Tensor:
    """Return the teacher's logits (..., V)."""
    if isinstance(distribution, TeacherHidden):
        hidden, weight, bias = distribution
        return F.linear(hidden.to(weight.dtype), weight, bias)
    return distribution


def divergence_and_gradient(student_logits: Tensor, teacher: TeacherTokens) -> tuple[Tensor, Tensor]:
    """Return KL(p ‖ q) · τ² of each row of logits (N, V), (N,), and its gradient with respect to them, (N, V).

    Equals `divergence` or `divergence_of_top` and their derivative: τ (q − p), where the mass of the other tokens of
    `TopTokens` is distributed as the student distributes it.
    """
    distribution, _, temperature = teacher
    scaled = at_least_float32(student_logits) / temperature
    if not isinstance(distribution, TopTokens):
        log_p = F.log_softmax(teacher_logits(distribution).to(scaled.dtype) / temperature, dim=-1)
        log_q = F.log_softmax(scaled, dim=-1)
        values = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        return values * temperature**2, (log_q.exp_() - log_p.exp_()) * temperature
    log_normalizer = scaled.logsumexp(-1, keepdim=True)
    log_q_top = scaled.gather(-1, distribution.ids) - log_normalizer
    rest = scaled.scatter(-1, distribution.ids, -torch.inf)
    p_top = distribution.log_probs.exp()
    has_rest = (distribution.log_rest > -torch.inf).unsqueeze(-1)
    log_rest = torch.where(has_rest, distribution.log_rest.unsqueeze(-1), 0.0)
    p_rest = has_rest * log_rest.exp()  # (N, 1)
    log_normalizer_rest = torch.where(has_rest, rest.logsumexp(-1, keepdim=True), 0.0)
    values = (p_top * (distribution.log_probs - log_q_top)).sum(-1, keepdim=True)
    values = values + p_rest * (log_rest - (log_normalizer_rest - log_normalizer))
    mass = p_top.sum(-1, keepdim=True) + p_rest  # 1 but for rounding
    grad = mass * (scaled - log_normalizer).exp() - p_rest * (rest - log_normalizer_rest).exp()
    grad.scatter_add_(-1, distribution.ids, -p_top.to(grad.dtype))
    return values.squeeze(-1) * temperature**2, grad * temperature


def teacher_divergence(student_logits: Tensor, teacher: TeacherTokens) -> Tensor:
    """Return KL(p ‖ q) · τ² in nats of each token, (...), of logits (..., V), differentiable."""
    distribution, _, temperature = teacher
    if isinstance(distribution, TopTokens):
        return divergence_of_top(student_logits, distribution, temperature)
    return divergence(student_logits, teacher_logits(distribution), temperature)


def top_tokens(logits: Tensor, k: int, temperature: float) -> TopTokens:
    """Return the k most probable tokens of softmax(logits / τ), and the exact mass of the rest. Logits are (..., V)."""
    scaled = logits.float() / temperature
    top = scaled.topk(k, dim=-1)
    log_normalizer = scaled.logsumexp(-1)
    log_rest = _logsumexp_without(scaled, top.indices) - log_normalizer
    return TopTokens(top.indices, top.values - log_normalizer.unsqueeze(-1), log_rest)


def divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return KL(p ‖ q) · τ² in nats of each token, (...); both logits are (..., V)."""
    log_q = F.log_softmax(student_logits.float() / temperature, dim=-1)
    log_p = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1) * temperature**2


def divergence_of_top(student_logits: Tensor, teacher: TopTokens, temperature: float) -> Tensor:
    """Return the divergence of each token, (...), over k + 1 outcomes: each of the teacher's top tokens, and any other.

    Σ_top p log(p / q) + p_rest log(p_rest / q_rest). Both rests are exact masses, so this is the divergence of two
    proper distributions. Merging outcomes can only lower it; with k = V − 1 it equals `divergence`.

    Args:
        student_logits: (..., V).
        teacher: (..., k), computed at the same temperature.
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
    return (top_terms + teacher.log_rest.exp() * difference) * temperature**2


def _logsumexp_without(scaled: Tensor, ids: Tensor) -> Tensor:
    """Return the logsumexp of all logits except those at `ids` (..., k); subtracting masses would cancel digits."""
    return scaled.scatter(-1, ids, -torch.inf).logsumexp(-1)
