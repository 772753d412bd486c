"""Showcase of a model's concepts for the report: best predicted concepts, a traced sentence, a steered text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from cocomix.catalog.building import CatalogConfig, find_contexts, promoted_tokens
from cocomix.catalog.naming import default_name
from cocomix.catalog.rows import Context
from cocomix.catalog.search import Catalog
from cocomix.evaluation.concepts import concept_predictions
from cocomix.evaluation.prediction import label_tables, training_frequencies
from cocomix.evaluation.steering_arms import Request, SteeredStudent, Writer
from cocomix.evaluation.steering_score import logit_deviation
from cocomix.inspection.runs import OpenRun, open_model
from cocomix.inspection.trace import Trace
from cocomix.inspection.tracing import trace
from cocomix.pipeline.origins import concept_source, learned_labels
from cocomix.pipeline.recipe_file import recipe_of_run

BLOCKS = 128
"""Number of validation blocks to read."""
BEST = 10
LEAST_LABELS = 20
"""Fewest labels of a concept in these blocks; with fewer, precision and recall are noise."""
CONTEXTS = CatalogConfig(contexts=2, context_tokens=8)
LEAST_TOKENS, LEAST_WORDS = 6, 4
"""Shortest sentence to trace."""
TRACED_TOKENS = 16
"""Most tokens of the sentence, and at most half of the context."""
TRACED_CONCEPTS = 3
NEW_TOKENS = 32
"""Tokens generated after the sentence, at most a quarter of the context."""
STRENGTH = 4.0
"""Steering strength in standard deviations of the concept logits."""


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
class Sample:
    """A text and its steered counterpart, sampled with the same random numbers.

    Attributes:
        concept_id: id of the steered concept, the best predicted one.
        name: its name, or None.
        strength: strength added to its logit, in standard deviations of the concept logits.
        prompt: traced sentence.
        plain, steered: continuations of the prompt.
    """

    concept_id: int
    name: str | None
    strength: float
    prompt: str
    plain: str
    steered: str


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
        sample: steered text; None if no concept is predicted.
    """

    student: str
    blocks: int
    best: list[BestConcept]
    trace: list[TracedStep]
    sample: Sample | None


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
    best = predictions.best(BEST, LEAST_LABELS)
    tokenizer, context = run.tokenizer, model.config.max_position_embeddings
    texts = (tokenizer.decode(ids, skip_special_tokens=True) for ids in blocks["input_ids"])
    text = first_sentence(texts, tokenizer, min(TRACED_TOKENS, context // 2))
    if not text:
        return None
    traced = trace(model, tokenizer, text, ablate=TRACED_CONCEPTS)
    shown = {each.concept_id for token in traced.tokens for each in token.concepts[:TRACED_CONCEPTS]} | {*best}
    names, contexts = _describe(run, catalog, sorted(shown), best)

    sample = None
    if best:
        writer = Writer(model, tokenizer, [text], max(1, min(NEW_TOKENS, context // 4)), run.record.seed)
        arm = SteeredStudent(writer, [STRENGTH], "add", logit_deviation(model, tokenizer, [text]))
        plain, steered = (arm.write([Request(0, best[0], strength)])[0] for strength in (0.0, STRENGTH))
        sample = Sample(best[0], names.get(best[0]), STRENGTH, text, plain, steered)
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
        sample=sample,
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
            if len(ids) >= LEAST_TOKENS and len(piece.split()) >= LEAST_WORDS:
                return _truncate(tokenizer, ids, most)
        fallback = fallback or next((piece for piece in (first, *others) if piece), "")
    return _truncate(tokenizer, tokenizer(fallback, add_special_tokens=False)["input_ids"], most)


def _truncate(tokenizer: PreTrainedTokenizerBase, ids: list[int], tokens: int) -> str:
    """Decode the first `tokens` tokens, without a partial character at the end."""
    return str(tokenizer.decode(ids[:tokens])).strip("\ufffd").strip()


def _describe(
    run: OpenRun, catalog: Catalog | None, shown: Sequence[int], best: Sequence[int]
) -> tuple[dict[int, str], list[list[Context]]]:
    """Return the names of all shown concepts, and the contexts of the best."""
    if catalog is not None:
        contexts = [catalog.concept(concept).contexts[: CONTEXTS.contexts] for concept in best]
        return {concept: catalog.names[concept] for concept in shown}, contexts
    source = concept_source(run)
    if source is None:
        return {}, [[] for _ in best]
    teacher, sae, reader = source.teacher, source.sae, source.validation
    promoted = promoted_tokens(teacher, sae.W_dec[list(shown)], CatalogConfig.tokens, source.tokenizer)
    names = {concept: default_name(tokens) for concept, tokens in zip(shown, promoted, strict=True)}
    blocks = min(BLOCKS, len(reader))
    return names, find_contexts(teacher, sae, source.layer, reader, best, blocks, source.blocks_per_batch, CONTEXTS)


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
