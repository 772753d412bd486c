"""Open a concept catalog, search it, and format its concepts.

C concepts (SAE latents).
"""

from __future__ import annotations

import sqlite3
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cocomix.catalog.rows import CATALOG_FILE, INFO_FILE, PROMOTED_TOKENS, SCHEMA, CatalogInfo, Concept, Context
from cocomix.common import files, integrity
from cocomix.common.console import BOLD, styled, visible
from cocomix.common.errors import InputError, error_message
from cocomix.data.tokenizer import require_unicode


@dataclass(frozen=True)
class Hit:
    """A search result.

    Attributes:
        concept_id, name, frequency, label_count: as in `Concept`.
        score: see `Catalog.search`; higher is better.
        context: the context that fits the search best; None for a concept that is never active.
    """

    concept_id: int
    name: str
    frequency: float
    label_count: int
    score: float
    context: Context | None


_RUNS = r"([^\pL\pM\pN_\s]+|[\p{Han}\p{Hiragana}\p{Katakana}])"
"""Runs of punctuation and symbols, and the characters of scripts that put no space between words."""
_TOKENIZER = "unicode61 categories 'L* M* N* P* S* Co'"


def _separated(texts: pa.Array) -> pa.Array:
    """The texts with spaces around `_RUNS`, so that `_TOKENIZER` indexes each run as a token."""
    return pc.replace_substring_regex(texts, _RUNS, r" \1 ")


def _match_expression(text: str) -> str:
    """The FTS5 expression for any word of `text`: as a complete word, and, for half as much, as the start of one."""
    words = dict.fromkeys(text.replace("\0", " ").split())
    quoted = ['"' + word.replace('"', '""') + '"' for word in _separated(pa.array(words, pa.string())).to_pylist()]
    return " OR ".join(f"{phrase} OR {phrase}*" for phrase in quoted)


class _Index(NamedTuple):
    """What a search reads: a full-text index of contexts and given names, and the promoted tokens.

    N forms of promoted tokens: each token without spaces, and without punctuation around its letters.
    """

    rows: sqlite3.Connection
    """Table `concepts`, indexed by `rowid`, the concept."""
    starts: np.ndarray
    """(C + 1,) where the contexts of each concept start in `words` and `texts`."""
    words: pa.Array
    """(contexts,) the word around the token at which the concept is active."""
    texts: pa.Array
    """(contexts,) the complete text."""
    forms: list[str]
    """N forms in lower case, sorted."""
    promoting: np.ndarray
    """(N,) the concept that promotes the token of each form."""
    strength: np.ndarray
    """(N,) the token's logit over its rank, from 1, relative to the median of the concepts' largest logits."""

    def promotion(self, word: str) -> np.ndarray:
        """Return (C,) how strongly each concept promotes a word: in full, or for half as much a longer one."""
        first, last = (bisect_left(self.forms, bound) for bound in (word, word + "\U0010ffff"))
        found = slice(first, last)
        complete = np.array([form == word for form in self.forms[found]], bool)
        strongest = np.zeros(len(self.starts) - 1)
        np.maximum.at(strongest, self.promoting[found], self.strength[found] * np.where(complete, 1.0, 0.5))
        return strongest


class Catalog:
    """A catalog in memory.

    Attributes:
        folder: folder of its files.
        info: how it was built.
        table: one row per concept, in order (`SCHEMA`).
    """

    def __init__(self, folder: Path, info: CatalogInfo, table: pa.Table) -> None:
        self.folder = folder
        self.info = info
        self.table = table

    def __repr__(self) -> str:
        return f"Catalog({self.info.num_concepts:,} concepts, in {self.folder})"

    @cached_property
    def names(self) -> dict[int, str]:
        """The name of each concept, by concept."""
        return dict(enumerate(self.table["name"].to_pylist()))

    def concept(self, concept_id: int) -> Concept:
        """Return the row of one concept.

        Raises:
            InputError: there is no such concept.
        """
        if not 0 <= concept_id < self.info.num_concepts:
            raise InputError(
                f"no concept {concept_id} in the catalog {self.folder}; it has 0 to {self.info.num_concepts - 1}"
            )
        (row,) = self.table.slice(concept_id, 1).to_pylist()
        return Concept(**row | {"contexts": [Context(**context) for context in row["contexts"]]})

    @cached_property
    def steerable(self) -> list[int]:
        """The concepts that are active and labels, most frequent labels first; a model can learn only these."""
        labels, frequency = (self.table[column].to_numpy() for column in ("label_count", "frequency"))
        order = np.argsort(-labels, kind="stable")
        return order[(labels[order] > 0) & (frequency[order] > 0)].tolist()

    def named(self, name: str) -> list[int]:
        """Return the concepts with exactly this name, ignoring case: those that are steerable, or else all."""
        wanted = name.strip().casefold()
        same = [concept for concept, known in self.names.items() if known.strip().casefold() == wanted]
        steerable = set(self.steerable)
        return [concept for concept in same if concept in steerable] or same

    def search(self, text: str, limit: int) -> list[Hit]:
        """Find the concepts that fit the words of `text` best.

        Concepts with exactly this name come first (`named`). The others are steerable, fit any of the words, and are
        ranked by the sum of

        - BM25 over three fields, weighted: the words at which the concept is active (8 over the number of contexts),
          the name it was given (4), and its contexts (1 over their number);
        - for each word, `PROMOTED_WEIGHT` times the strongest token that the concept promotes and that is the word, or
          for half as much starts with it. The strength is the token's logit over its rank (`_Index.strength`).

        The sum is divided by 1 + 10 · frequency, because a concept that is active everywhere has met every word. Equal
        scores are ordered by concept.

        Raises:
            InputError: `text` has no word, or is not valid Unicode.
        """
        require_unicode(text)
        expression = _match_expression(text)
        if not expression:
            raise InputError("nothing to search for: give at least one word")
        share, index = 1 / self.info.contexts, self._index
        score = np.zeros(self.info.num_concepts)
        for concept, found in index.rows.execute(
            "SELECT rowid, -bm25(concepts, ?, 4.0, ?) FROM concepts WHERE concepts MATCH ?",
            (8 * share, share, expression),
        ):
            score[concept] = found
        words = text.casefold().split()
        for word in dict.fromkeys(words):
            score += PROMOTED_WEIGHT * index.promotion(word)
        score /= 1 + 10 * self.table["frequency"].to_numpy()
        best = self.named(text)
        fitting = sorted(set(self.steerable) & set(score.nonzero()[0].tolist()) - set(best))
        best += sorted(fitting, key=lambda concept: -score[concept])
        return [self._hit(concept, float(score[concept]), words) for concept in best[:limit]]

    def find(self, name: str) -> int:
        """Return the concept that `name` refers to.

        This is the concept with exactly this name, ignoring case. If there is none, it is the best search hit,
        provided that no other hit has at least half of its score.

        Raises:
            InputError: no concept fits, or several do; the message lists them.
        """
        same = self.named(name)
        hits = [] if same else self.search(name, limit=5)
        likely = same or [hit.concept_id for hit in hits if hit.score >= hits[0].score / 2]
        if len(likely) == 1:
            return likely[0]
        if not likely:
            raise InputError(f"no concept fits the name {name!r}; look for others with: cocomix concepts search TEXT")
        candidates = ", ".join(f"{concept} ({visible(self.names[concept])})" for concept in likely[:5])
        raise InputError(f"several concepts fit the name {name!r}: {candidates}; give a number instead")

    @cached_property
    def _index(self) -> _Index:
        contexts = self.table["contexts"].combine_chunks()
        before, token, after = (pc.struct_field(contexts.values, name) for name in ("before", "token", "after"))
        starts, ends = (pc.match_substring_regex(token, pattern) for pattern in (f"^{_LETTER}", f"{_LETTER}$"))
        head = pc.struct_field(pc.extract_regex(before, f"(?P<part>{_LETTER}*)$"), "part")
        tail = pc.struct_field(pc.extract_regex(after, f"^(?P<part>{_LETTER}*)"), "part")
        words = pc.binary_join_element_wise(pc.if_else(starts, head, ""), token, pc.if_else(ends, tail, ""), "")
        texts = pc.binary_join_element_wise(before, token, after, "")

        def joined(lists: pa.ListArray, values: pa.Array) -> list[str]:
            return pc.binary_join(pa.ListArray.from_arrays(lists.offsets, _separated(values)), " ").to_pylist()

        given = pc.not_equal(self.table["name_source"], PROMOTED_TOKENS)  # other names repeat promoted tokens
        columns = (
            joined(contexts, words),
            _separated(pc.if_else(given, self.table["name"], "")).to_pylist(),
            joined(contexts, texts),
        )
        rows = sqlite3.connect(":memory:", check_same_thread=False)  # the page searches from several threads
        rows.execute(
            f"CREATE VIRTUAL TABLE concepts USING fts5(words, name, contexts, content='', tokenize = \"{_TOKENIZER}\")"
        )
        rows.execute(f"INSERT INTO concepts (concepts, rank) VALUES ('hashsize', {INDEX_BYTES})")
        rows.executemany(
            "INSERT INTO concepts (rowid, words, name, contexts) VALUES (?, ?, ?, ?)",
            zip(self.table["concept_id"].to_pylist(), *columns, strict=True),
        )
        return _Index(rows, contexts.offsets.to_numpy(), words, texts, *self._promotions())

    def _promotions(self) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Return `forms`, `promoting` and `strength` of the index."""
        promoted = self.table["promoted"].combine_chunks()
        logits = self.table["promoted_logits"].combine_chunks().flatten().to_numpy().astype(float)
        counts = pc.list_value_length(promoted).to_numpy()
        concept = np.arange(self.info.num_concepts).repeat(counts)
        rank = np.arange(len(logits)) - promoted.offsets.to_numpy()[:-1].repeat(counts)
        usual = np.median(logits[rank == 0]) if len(logits) else 1.0
        strength = np.clip(logits, 0, None) / max(usual, np.finfo(float).tiny) / (rank + 1)
        plain = [token.strip().casefold() for token in promoted.flatten().to_pylist()]
        inner = pc.replace_substring_regex(pa.array(plain, pa.string()), f"^[^{_SIGN}]+|[^{_SIGN}]+$", "").to_pylist()
        both = [(form, at) for at, forms in enumerate(zip(plain, inner, strict=True)) for form in {*forms} if form]
        forms, at = zip(*sorted(both), strict=True) if both else ((), ())
        return list(forms), concept[list(at)], strength[list(at)]

    def _hit(self, concept_id: int, score: float, words: list[str]) -> Hit:
        concept, index = self.concept(concept_id), self._index
        contexts = slice(*index.starts[concept_id : concept_id + 2].tolist())
        fits = [
            sum(8 * (word in around.lower()) + (word in text.lower()) for word in words)
            for around, text in zip(index.words[contexts].to_pylist(), index.texts[contexts].to_pylist(), strict=True)
        ]
        context = concept.contexts[int(np.argmax(fits))] if fits else None
        return Hit(concept_id, concept.name, concept.frequency, concept.label_count, score, context)


_SIGN = r"\pL\pM\pN_"
_LETTER = f"[{_SIGN}]"
INDEX_BYTES = 2**28
"""Size up to which the full-text index is built in one piece; merging pieces takes almost as long as building them."""
PROMOTED_WEIGHT = 10.0
"""Weight of a promoted token in a search; a rare word at which a concept is active scores about as much in BM25."""


def open_catalog(folder: str | Path) -> Catalog:
    """Open the catalog in `folder`, which is `OUTPUT/catalog` of a recipe.

    Raises:
        InputError: the folder holds no catalog, or a damaged one.
    """
    folder = Path(folder)
    for name in (INFO_FILE, CATALOG_FILE):
        if not (folder / name).is_file():
            raise InputError(f"no concept catalog in {folder}: expected {CATALOG_FILE} and {INFO_FILE}")
    integrity.verify(folder, "build it again", names=(INFO_FILE, CATALOG_FILE))
    try:
        info = CatalogInfo(**files.read_json(folder / INFO_FILE))
        table = pq.read_table(folder / CATALOG_FILE)
    except Exception as error:  # the readers raise many types for truncated files and other formats
        problem = f"{type(error).__name__}: {error_message(error)}"
        raise InputError(f"cannot open the concept catalog in {folder}: {problem}; build it again") from None
    if not table.schema.equals(SCHEMA) or len(table) != info.num_concepts:
        raise InputError(f"{folder / CATALOG_FILE} is not a concept catalog of {info.num_concepts} concepts")
    return Catalog(folder, info, table)


def search_catalog(folder: Path, text: str, limit: int) -> list[Hit]:
    """Open the catalog in `folder` and search it (`Catalog.search`)."""
    return open_catalog(folder).search(text, limit)


def show_concept(folder: Path, concept_id: int) -> Concept:
    """Open the catalog in `folder` and return one concept."""
    return open_catalog(folder).concept(concept_id)


def _highlighted(context: Context) -> str:
    """Format a context on one line, with the token in «» and, in a terminal, in bold."""
    token = styled(f"«{visible(context.token)}»", BOLD)
    return f"{visible(context.before)}{token}{visible(context.after)}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def describe(concept: Concept) -> str:
    """Format a concept as text of several lines."""

    def effects(tokens: list[str], logits: list[float]) -> str:
        return "  ".join(f"«{visible(token)}» {logit:+.1f}" for token, logit in zip(tokens, logits, strict=True))

    lines = [
        f"concept {concept.concept_id}: {visible(concept.name)}   (name: {visible(concept.name_source)})",
        f"active:     {_percent(concept.frequency)} of tokens, on average {concept.mean_activation:.3g}, "
        f"at most {concept.max_activation:.3g}",
        f"label:      {concept.label_count:,} times, {_percent(concept.label_share)} of tokens",
        f"promotes:   {effects(concept.promoted, concept.promoted_logits)}",
        f"suppresses: {effects(concept.suppressed, concept.suppressed_logits)}",
    ]
    for context in concept.contexts:
        source = f"   ({visible(context.source)})" if context.source else ""
        lines.append(f"{context.activation:9.3g}  {_highlighted(context)}{source}")
    return "\n".join(lines if concept.contexts else [*lines, "never active on the text that was read"])


def hits_table(hits: list[Hit]) -> str:
    """Format search results as a table with a header."""
    if not hits:
        return "no concept found"
    rows = [["concept", "active", "labels", "name"]]
    rows += [[str(hit.concept_id), _percent(hit.frequency), f"{hit.label_count:,}", visible(hit.name)] for hit in hits]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    # The last column is not padded, so escape sequences for bold do not affect the alignment.
    last = ["where", *("" if hit.context is None else _highlighted(hit.context) for hit in hits)]
    lines = []
    for row, context in zip(rows, last, strict=True):
        *figures, name = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([*figures, name.strip().ljust(widths[-1]), context]).rstrip())
    return "\n".join(lines)
