"""Show what steering does to the next token, and rank concepts by how much they do.

Dimensions: T tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cocomix.catalog.search import Catalog
from cocomix.data.pieces import decoded

SMALL = 10_000_000
"""Number of parameters below which a model illustrates the mechanics of steering only."""
CANDIDATES = 512
"""Number of concepts to rank, those that are labels most often."""
TOKENS = 3
"""Number of promoted tokens that represent a concept, as in its name."""
ROWS = 64
"""Number of concepts in a forward pass."""


class Effect(NamedTuple):
    """What steering one concept does to the next token."""

    concept_id: int
    plain: float
    """Probability of the tokens that represent the concept, without steering."""
    steered: float
    """Their probability with steering."""


class NextToken(NamedTuple):
    """A token that may come next, and its probability."""

    token: str
    probability: float


@torch.no_grad()
def next_token_probabilities(model: PreTrainedModel, ids: Tensor, steerings: Sequence[Any]) -> Tensor:
    """Return the probabilities (n, V) of the token after a prompt (T,) under each of n steerings, in one pass."""
    logits = model(ids.to(model.device).expand(len(steerings), -1), steering=[*steerings], logits_to_keep=1).logits
    return logits[:, -1].float().softmax(-1)


def rank_effects(
    model: PreTrainedModel, ids: Tensor, tokens: Mapping[int, Sequence[int]], strength: float
) -> list[Effect]:
    """Rank concepts by how much more probable their tokens become after a prompt when the concept is raised.

    Args:
        model: model that mixes concepts, in evaluation mode.
        ids: (T,) the prompt.
        tokens: the tokens that represent each concept, as from `representative_tokens`; concepts without are left out.
        strength: summand of the concept's logit.

    Returns:
        The effects, the largest increase first.
    """
    (plain,) = next_token_probabilities(model, ids, [None])
    concepts = [concept for concept in tokens if tokens[concept]]
    effects: list[Effect] = []
    for start in range(0, len(concepts), ROWS):
        part = concepts[start : start + ROWS]
        for concept, steered in zip(
            part, next_token_probabilities(model, ids, [{concept: strength} for concept in part]), strict=True
        ):
            own = [*tokens[concept]]
            effects.append(Effect(concept, plain[own].sum().item(), steered[own].sum().item()))
    return sorted(effects, key=lambda effect: effect.plain - effect.steered)


def representative_tokens(tokenizer: PreTrainedTokenizerBase, promoted: Sequence[str]) -> list[int]:
    """Return the ids of the first `TOKENS` promoted texts that are one visible token of `tokenizer`."""
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in promoted if text.strip("\ufffd \n\t")]
    return list(dict.fromkeys(ids[0] for ids in encoded if len(ids) == 1))[:TOKENS]


def candidates(catalog: Catalog, tokenizer: PreTrainedTokenizerBase) -> dict[int, list[int]]:
    """Return the tokens that represent each of the `CANDIDATES` concepts that are labels most often."""
    return {
        concept: representative_tokens(tokenizer, catalog.concept(concept).promoted)
        for concept in catalog.steerable[:CANDIDATES]
    }


def most_probable(tokenizer: PreTrainedTokenizerBase, probabilities: Tensor, count: int = 5) -> list[NextToken]:
    """Return the `count` most probable tokens of probabilities (V,)."""
    found = probabilities.topk(min(count, len(probabilities)))
    pairs = zip(found.indices.tolist(), found.values.tolist(), strict=True)
    return [NextToken(decoded(tokenizer, [token]), probability) for token, probability in pairs]
