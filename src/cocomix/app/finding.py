"""Find concepts by number or by words, with or without a catalog."""

from __future__ import annotations

from typing import NamedTuple

from cocomix.catalog.rows import Context
from cocomix.common.errors import InputError
from cocomix.inspection.runs import OpenRun

LONGEST_QUERY = 200
"""Maximum number of characters."""


class FoundConcept(NamedTuple):
    """A concept in a list."""

    concept_id: int
    name: str
    """Its name in the catalog, a hint; empty without a catalog."""
    frequency: float | None
    """Share of tokens at which it is active; None without a catalog."""
    context: Context | None
    """The context that fits the search best; None if there is none."""


def find_concepts(run: OpenRun, query: str, limit: int) -> list[FoundConcept]:
    """Find the concept with this number, or those that fit the words best; none for an empty query.

    Raises:
        InputError: no concept has this number, the query is too long, or it has words and there is no catalog.
    """
    query = query.strip()
    if len(query) > LONGEST_QUERY:
        raise InputError(f"the search has {len(query)} characters; the limit is {LONGEST_QUERY}")
    if query.isdecimal() and query.isascii():
        return [found_concept(run, concept_number(run, query))]
    if not query:
        return []
    if run.catalog is None:
        raise InputError(f"{query!r} is not a number. {run.no_catalog}")
    return [
        FoundConcept(hit.concept_id, hit.name, hit.frequency, hit.context) for hit in run.catalog.search(query, limit)
    ]


def concept_number(run: OpenRun, written: object) -> int:
    """Parse the number of a concept of this run.

    Raises:
        InputError: it is not a number, or there is no such concept.
    """
    last = run.model.config.num_concepts - 1
    text = str(written)
    number = int(text) if text.isdecimal() and text.isascii() and len(text) < 12 else -1
    if not 0 <= number <= last:
        raise InputError(f"there is no concept {text[:40]}; this model has 0 to {last:,}")
    return number


def found_concept(run: OpenRun, concept_id: int) -> FoundConcept:
    """Look up a concept for a list."""
    if run.catalog is None:
        return FoundConcept(concept_id, "", None, None)
    concept = run.catalog.concept(concept_id)
    return FoundConcept(concept_id, concept.name, concept.frequency, next(iter(concept.contexts), None))


def context_text(run: OpenRun, concept_id: int | None, written: object) -> str | None:
    """Return the complete text of a context of a concept by its number; None if there is none."""
    if run.catalog is None or concept_id is None:
        return None
    contexts = run.catalog.concept(concept_id).contexts
    known = dict(zip(map(str, range(len(contexts))), contexts, strict=True))
    context = known.get(str(written))
    return None if context is None else context.before + context.token + context.after
