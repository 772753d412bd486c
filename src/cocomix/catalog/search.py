"""Open a catalogue, search it, show what it holds.

C concepts (SAE latents).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cocomix import files
from cocomix.catalog.rows import (
    CATALOG_FILE,
    INFO_FILE,
    PROMOTED_TOKENS,
    SCHEMA,
    CatalogInfo,
    Concept,
    Context,
    visible,
)
from cocomix.console import BOLD, styled
from cocomix.errors import InputError


@dataclass(frozen=True)
class Hit:
    """A concept that a search found.

    Attributes:
        concept_id, name, frequency, label_count: as in `Concept`.
        score: by which hits are ranked (`Catalog.search`).
        context: the strongest of the contexts that fit the search best; None for one that was never active.
    """

    concept_id: int
    name: str
    frequency: float
    label_count: int
    score: float
    context: Context | None


class _SearchedText(NamedTuple):
    """The contexts of all concepts, one after another."""

    concept_of: np.ndarray
    """(contexts,) the concept of each."""
    firing_words: pa.Array
    """The word that the token at which the concept is active stands in."""
    texts: pa.Array
    """All of its text."""


class Catalog:
    """A catalogue in memory.

    Attributes:
        folder: where it lies.
        info: what it was made from.
        table: its rows, in the order of the concepts (`SCHEMA`).
    """

    def __init__(self, folder: Path, info: CatalogInfo, table: pa.Table) -> None:
        self.folder = folder
        self.info = info
        self.table = table

    @cached_property
    def names(self) -> dict[int, str]:
        """The name of each concept."""
        return dict(enumerate(self.table["name"].to_pylist()))

    def concept(self, concept_id: int) -> Concept:
        """Everything about one concept.

        Raises:
            InputError: there is no such concept.
        """
        if not 0 <= concept_id < self.info.num_concepts:
            raise InputError(
                f"no concept {concept_id} in the catalogue {self.folder}; it has 0 to {self.info.num_concepts - 1}"
            )
        (row,) = self.table.slice(concept_id, 1).to_pylist()
        return Concept(**row | {"contexts": [Context(**context) for context in row["contexts"]]})

    def search(self, text: str, limit: int) -> list[Hit]:
        """The `limit` concepts that have most to do with the words of `text`, the best first.

        For each word, a concept gets 8 points for the share of its contexts whose firing word it is (the token
        at which the concept is active, with the rest of its word), 4 if the name that it was given has the word,
        2 if a promoted token has it, and 1 for the share of its contexts that have it anywhere; half of that where
        the word is only part of another. Case plays no part. The sum over the words is divided by 1 + 10 · frequency,
        since a concept that is active everywhere has met every word. Equal scores are ordered by concept.

        Raises:
            InputError: no word to search for.
        """
        words = list(dict.fromkeys(text.lower().split()))
        if not words:
            raise InputError("nothing to search for: give one word or more")
        points = [self._points(word) for word in words]
        in_concept, in_context = (np.sum(parts, axis=0) for parts in zip(*points, strict=True))
        frequency = self.table["frequency"].to_numpy()
        of_context = self._searched.concept_of
        from_contexts = np.bincount(of_context, in_context, minlength=len(frequency)) / self.info.contexts
        score = (in_concept + from_contexts) / (1 + 10 * frequency)
        best = np.argsort(-score, kind="stable")[:limit]
        return [self._hit(int(row), float(score[row]), in_context) for row in best if score[row] > 0]

    def find(self, name: str) -> int:
        """The concept that a person means by `name`.

        That is the one with exactly this name, but for case; without one, the one that a search finds, if it finds no
        other with at least half of its score.

        Raises:
            InputError: none fits, or several do; the message lists them.
        """
        wanted = name.strip().casefold()
        same = [concept for concept, known in self.names.items() if known.strip().casefold() == wanted]
        hits = [] if same else self.search(name, limit=5)
        likely = same or [hit.concept_id for hit in hits if hit.score >= hits[0].score / 2]
        if len(likely) == 1:
            return likely[0]
        if not likely:
            raise InputError(f"no concept fits the name {name!r}; look for others with: cocomix concepts search TEXT")
        candidates = ", ".join(f"{concept} ({visible(self.names[concept])})" for concept in likely[:5])
        raise InputError(f"several concepts fit the name {name!r}: {candidates}; give a number instead")

    @cached_property
    def _searched(self) -> _SearchedText:
        contexts = self.table["contexts"].combine_chunks()
        before, token, after = (pc.struct_field(contexts.flatten(), name) for name in ("before", "token", "after"))
        starts, ends = (pc.match_substring_regex(token, pattern) for pattern in (f"^{_LETTER}", f"{_LETTER}$"))
        head = pc.struct_field(pc.extract_regex(before, f"(?P<part>{_LETTER}*)$"), "part")
        tail = pc.struct_field(pc.extract_regex(after, f"^(?P<part>{_LETTER}*)"), "part")
        words = pc.binary_join_element_wise(pc.if_else(starts, head, ""), token, pc.if_else(ends, tail, ""), "")
        concept_of = np.repeat(np.arange(len(self.table)), pc.list_value_length(contexts).to_numpy())
        return _SearchedText(concept_of, words, pc.binary_join_element_wise(before, token, after, ""))

    def _points(self, word: str) -> tuple[np.ndarray, np.ndarray]:
        """What one word of a search gives each concept (C,), and each context (contexts,)."""
        promoted = self.table["promoted"].combine_chunks()
        by_promoted = np.zeros(len(self.table))
        concept_of = np.repeat(np.arange(len(self.table)), pc.list_value_length(promoted).to_numpy())
        np.maximum.at(by_promoted, concept_of, _holds(promoted.flatten(), word))
        given = pc.not_equal(self.table["name_source"], PROMOTED_TOKENS).to_numpy()  # other names repeat these tokens
        by_name = given * _holds(self.table["name"].combine_chunks(), word)
        in_context = 8 * _holds(self._searched.firing_words, word) + _holds(self._searched.texts, word)
        return 4 * by_name + 2 * by_promoted, in_context

    def _hit(self, concept_id: int, score: float, in_context: np.ndarray) -> Hit:
        concept = self.concept(concept_id)
        points = in_context[self._searched.concept_of == concept_id]
        context = concept.contexts[int(points.argmax())] if len(points) else None
        return Hit(concept_id, concept.name, concept.frequency, concept.label_count, score, context)


_LETTER = r"[\pL\pM\pN_]"


def _holds(strings: pa.Array, word: str) -> np.ndarray:
    """1 where a string has `word` as a whole word, ½ where it has it in another, else 0."""
    edge = _LETTER.replace("[", "[^")
    whole = pc.match_substring_regex(strings, f"(?:^|{edge}){re.escape(word)}(?:{edge}|$)", ignore_case=True)
    part = pc.match_substring(strings, word, ignore_case=True)
    return np.mean([each.to_numpy(zero_copy_only=False) for each in (whole, part)], axis=0)


def open_catalog(folder: Path) -> Catalog:
    """Open the catalogue in `folder`.

    Raises:
        InputError: there is none, or it is damaged.
    """
    for name in (INFO_FILE, CATALOG_FILE):
        if not (folder / name).is_file():
            raise InputError(f"no concept catalogue in {folder}: expected {CATALOG_FILE} and {INFO_FILE}")
    try:
        info = CatalogInfo(**files.read_json(folder / INFO_FILE))
        table = pq.read_table(folder / CATALOG_FILE)
    except Exception as error:  # whatever the readers raise when a file is cut off, or is something else
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise InputError(f"the concept catalogue in {folder} does not open: {reason:.160}; build it again") from None
    if not table.schema.equals(SCHEMA) or len(table) != info.num_concepts:
        raise InputError(f"{folder / CATALOG_FILE} is not a concept catalogue of {info.num_concepts} concepts")
    return Catalog(folder, info, table)


def search_catalog(folder: Path, text: str, limit: int) -> list[Hit]:
    """`Catalog.search` in the catalogue in `folder`."""
    return open_catalog(folder).search(text, limit)


def show_concept(folder: Path, concept_id: int) -> Concept:
    """One concept of the catalogue in `folder`."""
    return open_catalog(folder).concept(concept_id)


# Showing it


def _highlighted(context: Context) -> str:
    """The context in one line, the token in «», and bold in a terminal."""
    token = styled(f"«{visible(context.token)}»", BOLD)
    return f"{visible(context.before)}{token}{visible(context.after)}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def describe(concept: Concept) -> str:
    """A concept as a person reads it, in some lines."""

    def effects(tokens: list[str], logits: list[float]) -> str:
        return "  ".join(f"«{visible(token)}» {logit:+.1f}" for token, logit in zip(tokens, logits, strict=True))

    lines = [
        f"concept {concept.concept_id}: {visible(concept.name)}   (name: {visible(concept.name_source)})",
        f"active:     {_percent(concept.frequency)} of tokens, on average {concept.mean_activation:.3g}, "
        f"at most {concept.max_activation:.3g}",
        f"label:      {concept.label_count:,} times, {_percent(concept.label_share)} of labelled tokens",
        f"promotes:   {effects(concept.promoted, concept.promoted_logits)}",
        f"suppresses: {effects(concept.suppressed, concept.suppressed_logits)}",
    ]
    for context in concept.contexts:
        source = f"   ({visible(context.source)})" if context.source else ""
        lines.append(f"{context.activation:9.3g}  {_highlighted(context)}{source}")
    return "\n".join(lines if concept.contexts else [*lines, "never active on the text that was read"])


def hits_table(hits: list[Hit]) -> str:
    """The concepts that a search found, a line each under a header."""
    if not hits:
        return "no concept found"
    rows = [["concept", "active", "labels", "name"]]
    rows += [[str(hit.concept_id), _percent(hit.frequency), f"{hit.label_count:,}", visible(hit.name)] for hit in hits]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    # The last column is as long as it likes: signs for bold in it disturb nothing.
    last = ["where", *("" if hit.context is None else _highlighted(hit.context) for hit in hits)]
    lines = []
    for row, context in zip(rows, last, strict=True):
        *figures, name = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([*figures, name.strip().ljust(widths[-1]), context]).rstrip())
    return "\n".join(lines)
