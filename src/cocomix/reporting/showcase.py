"""Showcase of a model's concepts for the report: best predicted concepts, a traced sentence, steered next tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from cocomix.catalog.building import CatalogConfig, find_contexts, promoted_tokens
from cocomix.catalog.naming import default_name
from cocomix.catalog.rows import Context
from cocomix.catalog.search import Catalog
from cocomix.evaluation.concepts import concept_predictions
from cocomix.evaluation.prediction import label_tables, training_frequencies
from cocomix.evaluation.steering_score import logit_deviation
from cocomix.inspection.effects import (
    CANDIDATES,
    NextToken,
    most_probable,
    next_token_probabilities,
    rank_effects,
    representative_tokens,
)
from cocomix.inspection.runs import OpenRun, open_model
from cocomix.inspection.trace import Trace
from cocomix.inspection.tracing import text_ids, trace
from cocomix.pipeline.origins import ConceptSource, concept_source, learned_labels
from cocomix.pipeline.recipe_file import recipe_of_run

BLOCKS = 128
"""Number of validation blocks to read."""
BEST = 10
MIN_LABELS = 20
"""Fewest labels of a concept in these blocks; with fewer, precision and recall are noise."""
CONTEXTS = CatalogConfig(contexts=2, context_tokens=8)
MIN_TOKENS, MIN_WORDS = 6, 4
"""Shortest sentence to trace."""
TRACED_TOKENS = 16
"""Most tokens of the sentence, and at most half of the context."""
TRACED_CONCEPTS = 3
STEERED = 5
"""Number of steered concepts, those with the largest effect."""
STRENGTH = 3.0
"""Steering strength in standard deviations of the concept logits, of which a whole number is added."""


@dataclass(frozen=True)
class BestConcept:
    """A concept that is predicted well.

    Attributes:
        concept_id: concept id.
        name: name in the catalog, or the tokens that it promotes; None if neither is known.
        frequency: fraction of labeled training tokens that have it as a label.
        precision: fraction of the tokens with it among the A most probable concepts that have it as a label, where A is
            the number of the token's labels.
        recall: fraction of the tokens with it as a label that have it among these A concepts.
        table_recall: the recall of a table of each token's most frequent labels.
        bigram_recall: the recall of a table of the previous and the current token.
        contexts: texts in which it is most active; empty without a teacher.
    """

    concept_id: int
    name: str | None
    frequency: float
    precision: float
    recall: float
    table_recall: float
    bigram_recall: float
    contexts: list[Context]


@dataclass(frozen=True)
class SteeredConcept:
    """What raising a concept does to the token after the sentence.

    Attributes:
        concept_id: concept id.
        name: name in the catalog, or the tokens that it promotes.
        plain, steered: the probability of the first tokens that it promotes.
        tokens: the most probable next tokens, steered.
    """

    concept_id: int
    name: str
    plain: float
    steered: float
    tokens: list[NextToken]


@dataclass(frozen=True)
class Steered:
    """The next token after the traced sentence, plain and with one concept raised.

    Attributes:
        parameters: number of parameters of the model.
        strength: what is added to the concept's logit at every token.
        prompt: the traced sentence.
        ranked: number of concepts that were tried.
        tokens: the most probable next tokens without steering.
        concepts: the concepts with the largest effect, the largest first.
    """

    parameters: int
    strength: float
    prompt: str
    ranked: int
    tokens: list[NextToken]
    concepts: list[SteeredConcept]


@dataclass(frozen=True)
class TracedStep:
    """A token of the traced sentence, the next token, its log-probability, and the strongest concepts mixed in."""

    text: str
    next_text: str
    next_logprob: float
    concepts: list[dict[str, float | int | str | None]]


@dataclass(frozen=True)
class Showcase:
    """The showcase of one student.

    Attributes:
        student: name of the student.
        blocks: number of validation blocks read.
        best: best predicted concepts, best first.
        trace: traced sentence of validation text.
        steered: next tokens with steering; None if the tokens that concepts promote are unknown.
    """

    student: str
    blocks: int
    best: list[BestConcept]
    trace: list[TracedStep]
    steered: Steered | None


def showcase(folder: Path, catalog: Catalog | None) -> Showcase | None:
    """Compute the showcase of a run; None if its model mixes no concepts in, or there is no text.

    Args:
        folder: folder of the run.
        catalog: catalog of its concepts. Without one, names and contexts of the shown concepts are computed.

    Raises:
        InputError: the run's labels, teacher, SAE or corpus is gone or has changed.
    """
    run = open_model(folder)
    if not getattr(run.config, "mixes_concepts", False):
        return None
    labeled = learned_labels(run)
    assert run.record is not None
    model = run.model
    blocks = labeled.validation.select(range(min(BLOCKS, len(labeled.validation))))
    frequencies = training_frequencies(labeled)
    training = recipe_of_run(run.record.recipe, folder).training
    tables = label_tables(labeled, model)
    predictions = concept_predictions(model, blocks, frequencies, tables, training.blocks_per_batch, training.precision)
    best = predictions.best(2 * BEST, MIN_LABELS)
    tokenizer, context = run.tokenizer, model.config.max_position_embeddings
    texts = (tokenizer.decode(ids, skip_special_tokens=True) for ids in blocks["input_ids"])
    text = first_sentence(texts, tokenizer, min(TRACED_TOKENS, context // 2))
    if not text:
        return None
    traced = trace(model, tokenizer, text, ablate=TRACED_CONCEPTS)
    source = None if catalog is not None else concept_source(run)
    most_used = [concept for concept in np.argsort(-frequencies).tolist() if frequencies[concept]][:CANDIDATES]
    shown = {each.concept_id for token in traced.tokens for each in token.concepts[:TRACED_CONCEPTS]} | {*best}
    described = _describe(catalog, source, sorted({*shown, *most_used}))
    names = {concept: each.name for concept, each in described.items()}
    best, contexts = distinct(best, _contexts(catalog, source, best))
    tokens = {
        concept: representative_tokens(tokenizer, described[concept].promoted)
        for concept in most_used
        if concept in described
    }
    steered = _steered(run, text, tokens, names) if any(tokens.values()) else None
    return Showcase(
        student=folder.name,
        blocks=len(blocks),
        best=[
            BestConcept(
                concept_id=concept,
                name=names.get(concept),
                frequency=float(frequencies[concept]),
                precision=float(predictions.model.at_a[concept] / predictions.model.predicted[concept]),
                recall=float(predictions.model.at_a[concept] / predictions.labels[concept]),
                table_recall=float(predictions.tables.token.at_a[concept] / predictions.labels[concept]),
                bigram_recall=float(predictions.tables.bigram.at_a[concept] / predictions.labels[concept]),
                contexts=contexts[number],
            )
            for number, concept in enumerate(best)
        ],
        trace=_steps(traced, names),
        steered=steered,
    )


def first_sentence(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, most: int) -> str:
    """Return the first sentence or line with enough words and tokens, truncated to `most` tokens.

    The first piece of a text may start mid-sentence and is only a fallback; "" if there is nothing.
    """
    fallback = ""
    for text in texts:
        first, *others = (piece.strip() for piece in re.split(r"(?<=[.!?])\s+|\n", text))
        for piece in others:
            ids = tokenizer(piece, add_special_tokens=False)["input_ids"]
            if len(ids) >= MIN_TOKENS and len(piece.split()) >= MIN_WORDS:
                return _truncate(tokenizer, ids, most)
        fallback = fallback or next((piece for piece in (first, *others) if piece), "")
    return _truncate(tokenizer, tokenizer(fallback, add_special_tokens=False)["input_ids"], most)


def _truncate(tokenizer: PreTrainedTokenizerBase, ids: list[int], tokens: int) -> str:
    """Decode the first `tokens` tokens, without a partial character at the end."""
    return str(tokenizer.decode(ids[:tokens])).strip("\ufffd").strip()


class _Described(NamedTuple):
    """The name of a concept, and the tokens that it promotes most."""

    name: str
    promoted: list[str]


def _describe(catalog: Catalog | None, source: ConceptSource | None, concepts: list[int]) -> dict[int, _Described]:
    """Describe concepts by the catalog, or else by their directions; empty without teacher and SAE."""
    if catalog is not None:
        rows = [catalog.concept(concept) for concept in concepts]
        return {row.concept_id: _Described(row.name, row.promoted) for row in rows}
    if source is None:
        return {}
    promoted = promoted_tokens(source.teacher, source.sae.W_dec[concepts], CatalogConfig.tokens, source.tokenizer)
    return {
        concept: _Described(default_name(tokens), tokens) for concept, tokens in zip(concepts, promoted, strict=True)
    }


def _contexts(catalog: Catalog | None, source: ConceptSource | None, concepts: Sequence[int]) -> list[list[Context]]:
    """Return where concepts are most active; without catalog, teacher and SAE, nowhere."""
    if catalog is not None:
        return [catalog.concept(concept).contexts[: CONTEXTS.contexts] for concept in concepts]
    if source is None:
        return [[] for _ in concepts]
    blocks = min(BLOCKS, len(source.validation))
    return find_contexts(
        source.teacher,
        source.sae,
        source.layer,
        source.validation,
        concepts,
        blocks,
        source.blocks_per_batch,
        CONTEXTS,
    )


def distinct(best: Sequence[int], contexts: Sequence[list[Context]]) -> tuple[list[int], list[list[Context]]]:
    """Return the first `BEST` concepts with their contexts, leaving out those that are most active where another is."""
    kept: dict[int, list[Context]] = {}
    seen: set[tuple[int, int]] = set()
    for concept, found in zip(best, contexts, strict=True):
        place = {(each.block, each.position) for each in found[:1]}
        if not place & seen:
            kept[concept] = found
            seen |= place
    return [*kept][:BEST], [*kept.values()][:BEST]


def _steered(run: OpenRun, prompt: str, tokens: Mapping[int, Sequence[int]], names: Mapping[int, str]) -> Steered:
    """Raise each concept by itself, and keep those that make their own `tokens` more probable after the prompt."""
    model, tokenizer = run.model, run.tokenizer
    strength = float(round(STRENGTH * logit_deviation(model, tokenizer, [prompt])) or 1)
    ids = text_ids(tokenizer, prompt, model.config.max_position_embeddings)
    effects = rank_effects(model, ids, tokens, strength)
    best = [effect for effect in effects if effect.steered > effect.plain][:STEERED]
    plain, *steered = next_token_probabilities(model, ids, [None, *({each.concept_id: strength} for each in best)])
    return Steered(
        parameters=model.num_parameters(),
        strength=strength,
        prompt=prompt,
        ranked=len(effects),
        tokens=most_probable(tokenizer, plain),
        concepts=[
            SteeredConcept(
                effect.concept_id,
                names[effect.concept_id],
                effect.plain,
                effect.steered,
                most_probable(tokenizer, probabilities),
            )
            for effect, probabilities in zip(best, steered, strict=True)
        ],
    )


def _steps(traced: Trace, names: Mapping[int, str]) -> list[TracedStep]:
    return [
        TracedStep(
            text=token.text,
            next_text=token.next_text,
            next_logprob=token.next_logprob,
            concepts=[
                {"concept_id": each.concept_id, "name": names.get(each.concept_id), "effect": each.ablation_effect}
                for each in token.concepts[:TRACED_CONCEPTS]
            ],
        )
        for token in traced.tokens
    ]
