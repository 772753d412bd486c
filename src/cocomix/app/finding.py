"""Concepts by number or by words, with or without a catalogue."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cocomix.catalog.rows import Context
from cocomix.catalog.search import Catalog
from cocomix.errors import InputError
from cocomix.steering.runs import OpenRun

NO_CATALOGUE = "This run has no concept catalogue, so concepts have numbers only; `cocomix concepts RECIPE` makes one."
LONGEST_QUERY = 200
"""Characters."""


class FoundConcept(NamedTuple):
    """A concept in a list."""

    concept_id: int
    """Which."""
    name: str
    """Of the catalogue, a hint; empty without one."""
    frequency: float | None
    """Share of the tokens at which it is active; None without a catalogue."""
    context: Context | None
    """A place where it is active, the one that fits the search best; None where there is none."""


def find_concepts(run: OpenRun, query: str, limit: int) -> list[FoundConcept]:
    """The concept with that number, or those that fit the words best; without either, those that are labels most often.

    Raises:
        InputError: a number that no concept has, too long a query, or words without a catalogue.
    """
    query = query.strip()
    if len(query) > LONGEST_QUERY:
        raise InputError(f"the search has {len(query)} characters; at most {LONGEST_QUERY} are read")
    if query.isdecimal() and query.isascii():
        return [found_concept(run, concept_number(run, query))]
    if run.catalog is None:
        if query:
            raise InputError(f"{query!r} is no number. {NO_CATALOGUE}")
        return []
    if not query:
        return [found_concept(run, concept) for concept in most_used(run.catalog, limit)]
    return [
        FoundConcept(hit.concept_id, hit.name, hit.frequency, hit.context) for hit in run.catalog.search(query, limit)
    ]


def concept_number(run: OpenRun, written: object) -> int:
    """The number of a concept of this run.

    Raises:
        InputError: it is none.
    """
    last = run.model.config.num_concepts - 1
    text = str(written)
    number = int(text) if text.isdecimal() and text.isascii() and len(text) < 12 else -1
    if not 0 <= number <= last:
        raise InputError(f"there is no concept {text[:40]}; this model has 0 to {last:,}")
    return number


def found_concept(run: OpenRun, concept_id: int) -> FoundConcept:
    """A concept as lists show it."""
    if run.catalog is None:
        return FoundConcept(concept_id, "", None, None)
    concept = run.catalog.concept(concept_id)
    return FoundConcept(concept_id, concept.name, concept.frequency, next(iter(concept.contexts), None))


def most_used(catalog: Catalog, limit: int) -> list[int]:
    """The concepts that are labels most often, the most frequent first."""
    return np.argsort(-catalog.table["label_count"].to_numpy(), kind="stable")[:limit].tolist()
