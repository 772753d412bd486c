"""Trace a text: read it once, take a gradient at each token, and ablate concepts.

Dimensions: T tokens, D width, C concepts, K concepts mixed per token, M of them ablated, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from cocomix.common.console import progress_bar
from cocomix.common.errors import InputError
from cocomix.data.pieces import decoded, token_pieces
from cocomix.data.tokenizer import require_unicode
from cocomix.inspection.trace import Mixture, Trace, TracedConcept, TracedToken
from cocomix.models.mixer import MixerOutput, moments
from cocomix.models.steering import Steering, as_steering


def trace(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[int],
    *,
    names: Mapping[int, str] | None = None,
    steering: Any = None,
    ablate: int = 4,
    positions: Iterable[int] | None = None,
    progress: bool = False,
) -> Trace:
    """Trace which concepts `model` mixes while it reads `text`, and their effects.

    Costs one pass, and for each traced token a backward pass through the upper blocks and, to ablate M concepts,
    M + 1 passes over one token with a cache.

    Args:
        model: model that mixes concepts, traced in evaluation mode.
        tokenizer: tokenizer of the model.
        text: text to trace, or the ids of its tokens.
        names: names of concepts by id.
        steering: steering as the model takes it, but not one per row.
        ablate: M, number of concepts to ablate at each token, strongest first; 0 for none, K for all.
        positions: positions of the tokens to trace, from 0, in any order; all by default.
        progress: show a progress bar on stderr.

    Raises:
        InputError: the model mixes no concepts, the text has no tokens or exceeds the model's context, M is negative,
            or a position is outside the text.
    """
    if not getattr(model, "mixes_concepts", False):
        raise InputError("this model mixes no concepts in, so there are none to trace; give one trained with cocomix")
    if ablate < 0:
        raise InputError(f"ablate is {ablate}; expected 0 for none, or a number of concepts per token")
    if isinstance(text, str):
        ids = text_ids(tokenizer, text, model.config.max_position_embeddings)
    else:
        ids, text = torch.tensor(text, dtype=torch.long), decoded(tokenizer, text)
        _require_fitting(ids, model.config.max_position_embeddings)
    ids = ids[None].to(model.device)
    places = range(ids.shape[1]) if positions is None else sorted(set(positions))
    if outside := [at for at in places if not 0 <= at < ids.shape[1]]:
        raise InputError(f"position {outside[0]} is not in the text; its tokens are 0 to {ids.shape[1] - 1}")
    steering = as_steering(steering)
    with _evaluating(model):
        read = _read(model, ids, steering)
        targets = torch.cat((ids[0, 1:], read.token_logprobs[-1:].argmax(-1)))
        chosen = read.token_logprobs.gather(-1, targets[:, None])[:, 0]  # (T,)
        tokens = []
        pieces = token_pieces(tokenizer, [*ids[0].tolist(), int(targets[-1])])
        effects = _ablation_effects(
            model, ids, read.mixture, min(ablate, read.concept_logits.shape[-1]), targets, steering, places
        )
        bar = progress_bar(effects, total=len(places), desc="trace", unit=" tokens", disable=not progress)
        for at, ablated in zip(places, bar, strict=True):
            (slope,) = torch.autograd.grad(chosen[at], read.concept_logits, retain_graph=True)
            tokens.append(
                TracedToken(
                    position=at,
                    token_id=int(ids[0, at]),
                    text=pieces[at],
                    next_id=int(targets[at]),
                    next_text=pieces[at + 1],
                    next_in_text=at + 1 < len(targets),
                    next_logprob=chosen[at].item(),
                    concepts=_concepts(read, at, slope[0, at], ablated, names or {}),
                    bias_share=read.mixture.shares(at)[-1].item(),
                )
            )
    return Trace(text, tuple(tokens), read.mixture, model.dtype)


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, context: int) -> Tensor:
    """Encode a text to (T,) token ids for a model with a context of `context` tokens.

    Raises:
        InputError: there are no tokens or too many, or the text is not valid Unicode.
    """
    require_unicode(text)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)  # as in training
    _require_fitting(ids, context)
    return ids


def _require_fitting(ids: Tensor, context: int) -> None:
    if not 0 < len(ids) <= context:
        raise InputError(f"the text has {len(ids)} tokens; this model reads 1 to {context}")


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Switch to evaluation mode with gradients; restore the mode afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        model.train(training)


class _Reading(NamedTuple):
    """Results of one pass over a text."""

    token_logprobs: Tensor
    """(T, V) log-probabilities of the next token, nats, with a graph from `concept_logits`."""
    concept_logits: Tensor
    """(1, T, K) logits of the concepts that are mixed in."""
    concept_logprobs: Tensor
    """(T, C) log-probabilities of all concepts, nats."""
    mixture: Mixture
    """Continuous vectors."""


def _read(model: Any, ids: Tensor, steering: Steering) -> _Reading:
    """Read ids (1, T) and record the mixer's output."""
    seen: list[tuple[Tensor, MixerOutput]] = []
    reader = get_ident()

    def record(_module: Any, inputs: tuple[Tensor, ...], output: MixerOutput) -> None:
        if get_ident() == reader:  # not another thread that uses the same model
            seen.append((inputs[0], output))

    hook = model.mixer.register_forward_hook(record)
    try:
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()  # frozen weights build no graph
        logits = model(inputs_embeds=embedded, steering=steering, use_cache=False).logits[0]
    finally:
        hook.remove()
    ((h, output),) = seen
    assert output.active is not None and output.c is not None and output.predicted is not None
    values, indices = output.active
    stats, mixer, full = moments(h[0].detach()), model.mixer, torch.promote_types(logits.dtype, torch.float32)
    mixture = Mixture(
        values=values[0].detach().to(full),
        indices=indices[0],
        c=output.c[0].detach().to(full),
        mean=stats.mean.to(full),
        std=stats.std.to(full),
        bias=(mixer.compress_bias + mixer.pre_bias).detach().to(full),
        weight=mixer.compress_weight.detach(),
    )
    return _Reading(
        token_logprobs=logits.to(full).log_softmax(-1),
        concept_logits=values,
        concept_logprobs=output.predicted[0].detach().to(full).log_softmax(-1),
        mixture=mixture,
    )


def _ablation_effects(
    model: Any,
    ids: Tensor,
    mixture: Mixture,
    concepts: int,
    targets: Tensor,
    steering: Steering,
    places: Sequence[int],
) -> Iterator[list[float]]:
    """Yield the ablation effects of the first `concepts` concepts at each of the ascending `places` in ids (1, T).

    At each place a batch reads one token: the first row unchanged, each other row without one concept. Only the cache
    of the first row continues to the next token.
    """
    cache, read = DynamicCache(config=model.config.backbone_config), 0
    for at in places:
        without = [
            steering + Steering.set({concept: 0.0}, positions=[at], after_choice=True)
            for concept in mixture.indices[at, :concepts].tolist()
        ]
        if not without:
            yield []
            continue
        with torch.no_grad():
            if read < at:
                model(ids[:, read:at], past_key_values=cache, use_cache=True, steering=steering, output_logits=False)
            cache.batch_repeat_interleave(1 + concepts)
            logits = model(
                ids[:, at : at + 1].expand(1 + concepts, -1),
                past_key_values=cache,
                use_cache=True,
                steering=[steering, *without],
            ).logits[:, 0]
        cache.batch_select_indices(torch.tensor([0], device=ids.device))
        read = at + 1
        logprob = logits.to(mixture.c.dtype).log_softmax(-1)[:, targets[at]]
        yield (logprob[0] - logprob[1:]).tolist()


def _concepts(
    read: _Reading, at: int, slope: Tensor, ablated: list[float], names: Mapping[int, str]
) -> tuple[TracedConcept, ...]:
    """Describe the concepts of the token at position `at`.

    Args:
        read: results of the pass over the text.
        at: position of the token.
        slope: (K,) ∂ log p / ∂z of the concepts that are mixed in.
        ablated: ablation effects of the first concepts.
        names: names of concepts by id.
    """
    mixture = read.mixture
    ids, values = mixture.indices[at], mixture.values[at]
    probabilities, shares = read.concept_logprobs[at, ids].exp().tolist(), mixture.shares(at).tolist()
    norms, gradient = mixture.parts(at).norm(dim=-1).tolist(), (slope.to(values.dtype) * values).tolist()
    return tuple(
        TracedConcept(
            concept_id=concept,
            name=names.get(concept),
            logit=values[number].item(),
            probability=probabilities[number],
            share=shares[number],
            norm=norms[number],
            gradient_effect=gradient[number],
            ablation_effect=ablated[number] if number < len(ablated) else None,
        )
        for number, concept in enumerate(ids.tolist())
    )
