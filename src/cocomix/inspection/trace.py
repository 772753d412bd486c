"""A trace: the concepts that a model mixes at each token, their parts of the continuous vector, and their effects.

The continuous vector of a token is a sum, c = Σ_i z_i · W_comp[i] · std(h) + (b_comp + b_pre) · std(h) + mean(h), so
the part of each concept is exact. Its effect on the next token has no such sum: `gradient_effect` is
z_i · ∂ log p / ∂z_i, a first-order approximation for all concepts at once; `ablation_effect` is log p minus log p
without the concept, at the cost of a pass for each. Details: docs/steering.md.

Dimensions: T tokens, D width, C concepts, K concepts mixed per token.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
"""By dtype: largest deviation of the sum of parts, relative to the largest number in c; 3e-2 in half precision."""

NEGLIGIBLE = 1e-5
"""Effect in nats below which rounding dominates."""


@dataclass(frozen=True)
class TracedConcept:
    """A concept that is mixed in at a token.

    Attributes:
        concept_id: concept id.
        name: its name in the catalog, a hint; None without a catalog.
        logit: z_i as mixed in, after steering.
        probability: softmax of z over all C concepts.
        share: share of the continuous vector: ⟨part, v⟩ / ⟨v, v⟩, where v = c − mean(h) is the sum of the parts of all
            concepts and of the biases. The shares of a token sum to 1. A part that points against v has a negative
            share.
        norm: length of its part.
        gradient_effect: effect on log p of the next token, nats: z_i · ∂ log p / ∂z_i.
        ablation_effect: effect on log p of the next token, nats: log p minus its value with z_i = 0 at this token; None
            if not ablated.
    """

    concept_id: int
    name: str | None
    logit: float
    probability: float
    share: float
    norm: float
    gradient_effect: float
    ablation_effect: float | None

    @property
    def effect(self) -> float:
        """Effect on log p of the next token, nats: by ablation if available, else by gradient."""
        return self.gradient_effect if self.ablation_effect is None else self.ablation_effect


@dataclass(frozen=True)
class TracedToken:
    """A token of the text and the concepts mixed in at it.

    Attributes:
        position: position in the text, from 0.
        token_id: token id.
        text: text of the token; for part of a character, the complete character.
        next_id: id of the token on whose log-probability the effects act: the next one of the text, or at its end the
            model's prediction.
        next_text: text of that token.
        next_in_text: whether that token is in the text.
        next_logprob: its log-probability after this token, nats.
        concepts: K concepts that are mixed in, largest logit first.
        bias_share: share of the biases in the continuous vector.
    """

    position: int
    token_id: int
    text: str
    next_id: int
    next_text: str
    next_in_text: bool
    next_logprob: float
    concepts: tuple[TracedConcept, ...]
    bias_share: float


@dataclass(frozen=True)
class Comparison:
    """Agreement of the two effects over all ablated concepts of all tokens.

    Attributes:
        concepts: number of compared concepts.
        correlation: Pearson correlation of gradient and ablation effects; None if either does not vary.
        sign_agreement: fraction with equal signs among those whose ablation effect exceeds `NEGLIGIBLE`; None if there
            are none.
        largest_difference: largest difference between the two, nats.
    """

    concepts: int
    correlation: float | None
    sign_agreement: float | None
    largest_difference: float


class Mixture(NamedTuple):
    """The continuous vectors of a text and their components, at least in float32."""

    values: Tensor
    """(T, K) logits of the concepts that are mixed in."""
    indices: Tensor
    """(T, K) ids of these concepts."""
    c: Tensor
    """(T, D) continuous vectors, as the mixer computed them."""
    mean: Tensor
    """(T, 1) mean of h."""
    std: Tensor
    """(T, 1) standard deviation of h."""
    bias: Tensor
    """(D,) b_comp + b_pre."""
    weight: Tensor
    """(C, D) W_comp in the model's dtype, sharing its memory."""

    def parts(self, position: int) -> Tensor:
        """(K, D) part of each concept in the continuous vector at a token: z_i · W_comp[i] · std(h)."""
        rows = self.weight[self.indices[position]].to(self.c.dtype)
        return self.values[position, :, None] * rows * self.std[position]

    def bias_part(self, position: int) -> Tensor:
        """(D,) part of the biases: (b_comp + b_pre) · std(h)."""
        return self.bias * self.std[position]

    def shares(self, position: int) -> Tensor:
        """(K + 1,) shares of the concepts and, last, of the biases in c − mean(h); 0 if that is 0."""
        parts = torch.cat((self.parts(position), self.bias_part(position)[None]))
        v = parts.sum(0)
        return parts @ v / v.dot(v).clamp(min=torch.finfo(v.dtype).tiny)


@dataclass(frozen=True)
class Trace:
    """Result of `trace`.

    Attributes:
        text: traced text.
        tokens: its tokens with their concepts.
        mixture: the vectors; `mixture.parts(position)` returns the exact parts.
        dtype: dtype of the model, which sets the tolerance of `verify`.
    """

    text: str
    tokens: tuple[TracedToken, ...]
    mixture: Mixture = field(repr=False)
    dtype: torch.dtype

    def __repr__(self) -> str:
        """Return a line for each token: the next token, and the concept with the largest logit."""
        return "\n".join([f"Trace of {len(self.tokens)} tokens", *map(_line, self.tokens)])

    def verify(self) -> float:
        """Return the largest deviation of mean(h) + biases + Σ parts from c, relative to the largest number in c.

        Raises:
            ArithmeticError: the deviation exceeds rounding.
        """
        apart = 0.0
        for token in self.tokens:
            at = token.position
            total = self.mixture.mean[at] + self.mixture.bias_part(at) + self.mixture.parts(at).sum(0)
            apart = max(apart, (total - self.mixture.c[at]).abs().max().item())
        deviation = apart / max(self.mixture.c.abs().max().item(), torch.finfo(self.mixture.c.dtype).tiny)
        if not deviation <= TOLERANCE.get(self.dtype, 3e-2):
            raise ArithmeticError(
                f"the parts do not sum to the continuous vector: the relative deviation is {deviation:.1e}"
            )
        return deviation

    @property
    def comparison(self) -> Comparison | None:
        """Comparison of gradient and ablation effects; None if nothing was ablated."""
        pairs = [
            (concept.gradient_effect, concept.ablation_effect)
            for token in self.tokens
            for concept in token.concepts
            if concept.ablation_effect is not None
        ]
        if not pairs:
            return None
        gradient, ablation = torch.tensor(pairs, dtype=torch.float64).unbind(-1)
        correlation = torch.corrcoef(torch.stack((gradient, ablation)))[0, 1].item() if len(pairs) > 1 else float("nan")
        has_effect = ablation.abs() > NEGLIGIBLE
        agree = (gradient.sign() == ablation.sign())[has_effect].double().mean().item()
        return Comparison(
            concepts=len(pairs),
            correlation=correlation if correlation == correlation else None,
            sign_agreement=agree if has_effect.any() else None,
            largest_difference=(gradient - ablation).abs().max().item(),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the vectors, for JSON."""
        comparison = self.comparison
        return {
            "text": self.text,
            "tokens": [asdict(token) for token in self.tokens],
            "comparison": None if comparison is None else asdict(comparison),
            "verified": self.verify(),
        }


def _line(token: TracedToken) -> str:
    text = f"{token.position:5}  {token.text!r} → {token.next_text!r}, log p {token.next_logprob:.3f}"
    if not token.concepts:
        return text
    concept = token.concepts[0]
    name = "" if concept.name is None else f" {concept.name}"
    return f"{text}; concept {concept.concept_id}{name}, effect {concept.effect:+.3f}"
