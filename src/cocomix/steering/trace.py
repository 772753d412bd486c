"""Trace: which concepts a model mixes at each token, what they make of the continuous vector, and what they do.

T tokens, D width, C concepts, K concepts mixed per token, M of them ablated. The mathematics: docs/steering.md.

The continuous vector of a token is a sum, c = Σ_i z_i · W_comp[i] · std(h) + (b_comp + b_pre) · std(h) + mean(h), so what
concept i puts into it is exact. What it does to the next token is not: `gradient_effect` is z_i · ∂ log p / ∂z_i, a first
approximation for all concepts at once, and `ablation_effect` is log p − log p without it, one pass for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cocomix.errors import InputError
from cocomix.models.mixer import MixerOutput, moments
from cocomix.models.steering import Steering, active_steering, as_steering

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Largest deviation of the sum of the parts, relative to the largest number in c; 3e-2 in half precision."""


@dataclass(frozen=True)
class TracedConcept:
    """A concept that is mixed in at a token.

    Attributes:
        concept_id: which.
        name: of the catalogue, a hint; None without one.
        logit: z_i, as mixed in (and so as steered).
        probability: softmax of z over all C concepts.
        share: of the continuous vector: ⟨part, v⟩ / ⟨v, v⟩, where v = c − mean(h) is the sum of the parts of all concepts
            and of the biases. The shares of a token sum to 1; a part that points against v has a negative one.
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


@dataclass(frozen=True)
class TracedToken:
    """A token of the text, and what the model thinks at it.

    Attributes:
        position: in the text, from 0.
        token_id: which.
        text: of it alone.
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
        sign_agreement: share in which both have one sign, of those whose ablation has an effect; None if none has.
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
        has_effect = ablation != 0
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


def trace(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    names: Mapping[int, str] | None = None,
    steering: Any = None,
    ablate: int = 4,
    progress: bool = False,
) -> Trace:
    """Which concepts `model` mixes while it reads `text`, and what they do.

    Costs one pass, a backward pass through the upper blocks for each token, and, with `ablate` M, for each token a batch
    of M + 1 passes over the text up to it.

    Args:
        model: one that mixes concepts in; it is read in evaluation mode.
        tokenizer: its own.
        text: what to read.
        names: of the concepts, as a catalogue has them.
        steering: as the model takes it, but not by row; by default what a `with model.steered(...)` around says.
        ablate: M, how many concepts of each token are ablated, the first of `concepts`; 0 for none, K for all.
        progress: show a bar on stderr.

    Raises:
        InputError: a model without concepts, a text without tokens or longer than the model's context, a negative M.
    """
    if not getattr(model, "mixes_concepts", False):
        raise InputError("this model mixes no concepts in, so there are none to trace; give one trained with cocomix")
    if ablate < 0:
        raise InputError(f"ablate is {ablate}; expected 0 for none, or how many concepts of each token")
    ids = text_ids(tokenizer, text, model.config.max_position_embeddings)[None].to(model.device)
    steering = as_steering(active_steering(model) if steering is None else steering)
    with _evaluating(model):
        z, mixed, mixture, logprobs = _read(model, ids, steering)
        choice = logprobs[-1:].argmax(-1)
        targets = torch.cat((ids[0, 1:], choice))
        chosen = logprobs.gather(-1, targets[:, None])[:, 0]  # (T,)
        concepts = min(ablate, mixed.shape[-1])
        tokens = []
        for at in tqdm(range(len(targets)), desc="trace", unit=" tokens", disable=not progress):
            (slope,) = torch.autograd.grad(chosen[at], mixed, retain_graph=True)
            ablated = _ablation_effects(model, ids[:, : at + 1], mixture, concepts, targets[at], steering)
            tokens.append(
                TracedToken(
                    position=at,
                    token_id=int(ids[0, at]),
                    text=tokenizer.decode([int(ids[0, at])]),
                    next_id=int(targets[at]),
                    next_text=tokenizer.decode([int(targets[at])]),
                    next_in_text=at + 1 < len(targets),
                    next_logprob=chosen[at].item(),
                    **_concepts(mixture, at, z[at], slope[0, at], ablated, names or {}),
                )
            )
    return Trace(text, tuple(tokens), mixture, model.dtype)


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, context: int) -> Tensor:
    """(T,) the tokens of a text for a model with a context of so many.

    Raises:
        InputError: there are none, or too many.
    """
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)  # as it was trained
    if not 0 < len(ids) <= context:
        raise InputError(f"the text has {len(ids)} tokens; this model reads 1 to {context}")
    return ids


@contextmanager
def _evaluating(model: PreTrainedModel) -> Any:
    """Evaluation mode with gradients, whatever the caller is in; afterwards as before."""
    training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        model.train(training)


def _read(model: Any, ids: Tensor, steering: Steering) -> tuple[Tensor, Tensor, Mixture, Tensor]:
    """One pass over ids (1, T): log-probabilities of concepts (T, C), the kept logits (1, T, K), of which the
    log-probabilities of tokens (T, V), which come last, depend; and between them the mixture."""
    seen: list[tuple[Tensor, MixerOutput]] = []
    hook = model.mixer.register_forward_hook(lambda _module, inputs, output: seen.append((inputs[0], output)))
    try:
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()  # frozen weights would leave no graph
        logits = model(inputs_embeds=embedded, steering=steering, use_cache=False).logits[0]
    finally:
        hook.remove()
    ((h, output),) = seen
    values, indices = output.kept
    of_h, mixer, full = moments(h[0].detach()), model.mixer, torch.promote_types(logits.dtype, torch.float32)
    mixture = Mixture(
        values=values[0].detach().to(full),
        indices=indices[0],
        c=output.c[0].detach().to(full),
        mean=of_h.mean.to(full),
        std=of_h.std.to(full),
        bias=(mixer.compress_bias + mixer.pre_bias).detach().to(full),
        weight=mixer.compress_weight.detach(),
    )
    return output.predicted[0].detach().to(full).log_softmax(-1), values, mixture, logits.to(full).log_softmax(-1)


@torch.no_grad()
def _ablation_effects(
    model: Any, ids: Tensor, mixture: Mixture, concepts: int, target: Tensor, steering: Steering
) -> list[float]:
    """What the strongest concepts at the last of ids (1, t) add to the log-probability of `target` after it."""
    if concepts == 0:
        return []
    last = ids.shape[1] - 1
    without = [
        steering + Steering.set({int(concept): 0.0}, positions=[last], after_choice=True)
        for concept in mixture.indices[last, :concepts]
    ]
    # The plain pass is a row of the same batch, so that both round alike.
    logits = model(
        ids.expand(1 + concepts, -1), steering=[steering, *without], logits_to_keep=1, use_cache=False
    ).logits[:, 0]
    logprob = logits.to(mixture.c.dtype).log_softmax(-1)[:, target]
    return (logprob[0] - logprob[1:]).tolist()


def _concepts(
    mixture: Mixture, at: int, log_softmax: Tensor, slope: Tensor, ablated: list[float], names: Mapping[int, str]
) -> dict[str, Any]:
    """`concepts` and `bias_share` of the token `at`.

    Args:
        mixture: of the text.
        at: position of the token.
        log_softmax: (C,) log-probabilities of its concepts.
        slope: (K,) ∂ log p / ∂z of those that are mixed in.
        ablated: effects of the first of them by ablation.
        names: of concepts.
    """
    parts, bias, indices = mixture.parts(at), mixture.bias_part(at), mixture.indices[at]
    v = parts.sum(0) + bias
    along = v / v.dot(v) if v.any() else v  # (D,)
    figures = zip(
        indices.tolist(),
        mixture.values[at].tolist(),
        log_softmax[indices].exp().tolist(),
        (parts @ along).tolist(),
        parts.norm(dim=-1).tolist(),
        (slope.to(parts.dtype) * mixture.values[at]).tolist(),
        strict=True,
    )
    concepts = tuple(
        TracedConcept(
            concept,
            names.get(concept),
            *rest,
            ablation_effect=ablated[number] if number < len(ablated) else None,
        )
        for number, (concept, *rest) in enumerate(figures)
    )
    return {"concepts": concepts, "bias_share": bias.dot(along).item()}
