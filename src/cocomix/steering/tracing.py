"""Make a trace of a text: read it once, ask for a gradient at each token, and leave concepts out.

T tokens, D width, C concepts, K concepts mixed per token, M of them ablated, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from cocomix.data.pieces import token_pieces
from cocomix.data.tokenizer import require_unicode
from cocomix.errors import InputError
from cocomix.models.mixer import MixerOutput, moments
from cocomix.models.steering import Steering, as_steering
from cocomix.steering.trace import Mixture, Trace, TracedConcept, TracedToken


def trace(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    names: Mapping[int, str] | None = None,
    steering: Any = None,
    ablate: int = 4,
    positions: Iterable[int] | None = None,
    progress: bool = False,
) -> Trace:
    """Which concepts `model` mixes while it reads `text`, and what they do.

    Costs one pass, a backward pass through the upper blocks for each token that is looked at, and M + 1 passes with a
    cache where M concepts of each of them are ablated.

    Args:
        model: one that mixes concepts in; it is read in evaluation mode.
        tokenizer: its own.
        text: what to read.
        names: of the concepts, as a catalogue has them.
        steering: as the model takes it, but one for all rows; None for an unsteered pass.
        ablate: M, how many concepts of each token are ablated, the first of `concepts`; 0 for none, K for all.
        positions: of the tokens to look at, counted from 0, in any order; all by default.
        progress: show a bar on stderr.

    Raises:
        InputError: a model without concepts, a text without tokens or longer than the model's context, a negative M,
            a position outside the text.
    """
    if not getattr(model, "mixes_concepts", False):
        raise InputError("this model mixes no concepts in, so there are none to trace; give one trained with cocomix")
    if ablate < 0:
        raise InputError(f"ablate is {ablate}; expected 0 for none, or how many concepts of each token")
    ids = text_ids(tokenizer, text, model.config.max_position_embeddings)[None].to(model.device)
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
            model, ids, read.mixture, min(ablate, read.kept.shape[-1]), targets, steering, places
        )
        bar = tqdm(effects, total=len(places), desc="trace", unit=" tokens", disable=not progress)
        for at, ablated in zip(places, bar, strict=True):
            (slope,) = torch.autograd.grad(chosen[at], read.kept, retain_graph=True)
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
    """(T,) the tokens of a text for a model with a context of so many.

    Raises:
        InputError: there are none, or too many; or the text is not valid Unicode.
    """
    require_unicode(text)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)  # as it was trained
    if not 0 < len(ids) <= context:
        raise InputError(f"the text has {len(ids)} tokens; this model reads 1 to {context}")
    return ids


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode with gradients, whatever the caller is in; afterwards as before."""
    training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        model.train(training)


class _Reading(NamedTuple):
    """What one pass over a text shows."""

    token_logprobs: Tensor
    """(T, V) of the next token, nats; they depend on `kept`."""
    kept: Tensor
    """(1, T, K) logits of the concepts that are mixed in."""
    concept_logprobs: Tensor
    """(T, C) of all concepts, nats."""
    mixture: Mixture
    """What is made of them."""


def _read(model: Any, ids: Tensor, steering: Steering) -> _Reading:
    """Read ids (1, T) and look into the mixer while it works."""
    seen: list[tuple[Tensor, MixerOutput]] = []
    reader = get_ident()

    def look(_module: Any, inputs: tuple[Tensor, ...], output: MixerOutput) -> None:
        if get_ident() == reader:  # and not somebody else who uses the same model
            seen.append((inputs[0], output))

    hook = model.mixer.register_forward_hook(look)
    try:
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()  # frozen weights would leave no graph
        logits = model(inputs_embeds=embedded, steering=steering, use_cache=False).logits[0]
    finally:
        hook.remove()
    ((h, output),) = seen
    assert output.active is not None and output.c is not None and output.predicted is not None
    values, indices = output.active
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
    return _Reading(
        token_logprobs=logits.to(full).log_softmax(-1),
        kept=values,
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
    """For each of some tokens of ids (1, T), what the first `concepts` of its concepts add to log p of its target.

    A batch goes through the text: its first row reads it as it is, and at each of the `places`, which ascend, the
    others leave out one concept each. Only the first row's cache goes on to the next token.
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
    """The concepts of the token `at`.

    Args:
        read: the text.
        at: position of the token.
        slope: (K,) ∂ log p / ∂z of those that are mixed in.
        ablated: effects of the first of them by ablation.
        names: of concepts.
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
