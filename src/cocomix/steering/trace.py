"""A trace: which concepts a model mixes at each token, what they make of the continuous vector, and what they do.

T tokens, D width, C concepts, K concepts mixed per token. The mathematics: docs/steering.md.

The continuous vector of a token is a sum, c = Σ_i z_i · W_comp[i] · std(h) + (b_comp + b_pre) · std(h) + mean(h), so
what concept i puts into it is exact. What it does to the next token has no such sum: `gradient_effect` is
z_i · ∂ log p / ∂z_i, a first approximation for all concepts at once, and `ablation_effect` is log p less log p without
it, at the cost of a pass for each.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Largest deviation of the sum of the parts, relative to the largest number in c; 3e-2 in half precision."""

NEGLIGIBLE = 1e-5
"""Nats: an effect below is not told from rounding."""


@dataclass(frozen=True)
class TracedConcept:
    """A concept that is mixed in at a token.

    Attributes:
        concept_id: which.
        name: of the catalogue, a hint; None without one.
        logit: z_i, as mixed in (and so as steered).
        probability: softmax of z over all C concepts.
        share: of the continuous vector: ⟨part, v⟩ / ⟨v, v⟩, where v = c − mean(h) is the sum of the parts of all
            concepts and of the biases. The shares of a token sum to 1; a part that points against v has a negative one.
        norm: length of its part.
        gradient_effect: on log p of the next token, nats: z_i · ∂ log p / ∂z_i.
        ablation_effect: on the same, nats: log p less what it is with z_i = 0 at this token; None where not ablated.
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
        """On log p of the next token, nats: by ablation where that was done, else by gradient."""
        return self.gradient_effect if self.ablation_effect is None else self.ablation_effect


@dataclass(frozen=True)
class TracedToken:
    """A token of the text, and what the model thinks at it.

    Attributes:
        position: in the text, from 0.
        token_id: which.
        text: of it alone; where it holds part of a character, the whole character.
        next_id: the token whose log-probability the effects are on: the text's next one, at its end the model's choice.
        next_text: of that.
        next_in_text: whether the text goes on with it.
        next_logprob: its log-probability after this token, nats.
        concepts: that are mixed in, K of them, in the order of their choice: the largest logit first.
        bias_share: of the continuous vector, of the part that is the same at every token but for std(h).
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
    """How far the two effects agree, over all concepts of all tokens that were ablated.

    Attributes:
        concepts: that were compared.
        correlation: Pearson's, of gradient and ablation effect; None where either does not vary.
        sign_agreement: share in which both have one sign, of those whose ablation has more than a `NEGLIGIBLE` effect;
            None if none has.
        largest_difference: of the two, nats.
    """

    concepts: int
    correlation: float | None
    sign_agreement: float | None
    largest_difference: float


class Mixture(NamedTuple):
    """The continuous vectors of a text and what they are made of, at least in float32."""

    values: Tensor
    """(T, K) logits of the concepts that are mixed in."""
    indices: Tensor
    """(T, K) which they are."""
    c: Tensor
    """(T, D) the continuous vectors, as the mixer made them."""
    mean: Tensor
    """(T, 1) of h."""
    std: Tensor
    """(T, 1) of h."""
    bias: Tensor
    """(D,) b_comp + b_pre."""
    weight: Tensor
    """(C, D) W_comp, of the model's type: a view of the model's own."""

    def parts(self, position: int) -> Tensor:
        """(K, D) what each concept puts into the continuous vector at a token: z_i · W_comp[i] · std(h)."""
        rows = self.weight[self.indices[position]].to(self.c.dtype)
        return self.values[position, :, None] * rows * self.std[position]

    def bias_part(self, position: int) -> Tensor:
        """(D,) what the biases put into it: (b_comp + b_pre) · std(h)."""
        return self.bias * self.std[position]

    def shares(self, position: int) -> Tensor:
        """(K + 1,) shares of the concepts and, last, of the biases in c − mean(h); 0 where that is 0."""
        parts = torch.cat((self.parts(position), self.bias_part(position)[None]))
        v = parts.sum(0)
        return parts @ v / v.dot(v).clamp(min=torch.finfo(v.dtype).tiny)


@dataclass(frozen=True)
class Trace:
    """What `trace` found.

    Attributes:
        text: that was read.
        tokens: of it, with their concepts.
        mixture: the vectors themselves; `mixture.parts(position)` are the exact contributions.
        dtype: of the model, which decides how exact `verify` can be.
    """

    text: str
    tokens: tuple[TracedToken, ...]
    mixture: Mixture = field(repr=False)
    dtype: torch.dtype

    def verify(self) -> float:
        """The largest deviation of mean(h) + biases + Σ parts from c, relative to the largest number in c.

        Raises:
            ArithmeticError: it is more than rounding.
        """
        apart = 0.0
        for token in self.tokens:
            at = token.position
            whole = self.mixture.mean[at] + self.mixture.bias_part(at) + self.mixture.parts(at).sum(0)
            apart = max(apart, (whole - self.mixture.c[at]).abs().max().item())
        deviation = apart / max(self.mixture.c.abs().max().item(), torch.finfo(self.mixture.c.dtype).tiny)
        if not deviation <= TOLERANCE.get(self.dtype, 3e-2):
            raise ArithmeticError(f"the parts do not sum to the continuous vector: {deviation:.1e} of it is missing")
        return deviation

    @property
    def comparison(self) -> Comparison | None:
        """Gradient against ablation; None if nothing was ablated."""
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
        """Everything but the vectors, for JSON."""
        comparison = self.comparison
        return {
            "text": self.text,
            "tokens": [asdict(token) for token in self.tokens],
            "comparison": None if comparison is None else asdict(comparison),
            "verified": self.verify(),
        }
