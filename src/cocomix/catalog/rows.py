"""A catalogue as it lies on disk: a row for each concept."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cocomix import files

CATALOG_FILE = "catalog.parquet"
INFO_FILE = "catalog.json"
PROMOTED_TOKENS = "promoted tokens"
"""The source of a name that nobody gave."""
ROWS_PER_GROUP = 1024

_CONTEXT = pa.struct(
    {
        "before": pa.string(),
        "token": pa.string(),
        "after": pa.string(),
        "activation": pa.float32(),
        "source": pa.string(),
        "block": pa.int32(),
        "position": pa.int32(),
    }
)
SCHEMA = pa.schema(
    {
        "concept_id": pa.int32(),
        "name": pa.string(),
        "name_source": pa.string(),
        "frequency": pa.float64(),
        "mean_activation": pa.float64(),
        "max_activation": pa.float64(),
        "label_count": pa.int64(),
        "label_share": pa.float64(),
        "promoted": pa.list_(pa.string()),
        "promoted_logits": pa.list_(pa.float32()),
        "suppressed": pa.list_(pa.string()),
        "suppressed_logits": pa.list_(pa.float32()),
        "contexts": pa.list_(_CONTEXT),
    }
)


@dataclass(frozen=True)
class CatalogInfo:
    """What a catalogue was made from.

    Attributes:
        num_concepts: C.
        sae: fingerprint of the SAE whose latents the concepts are.
        active_concepts: concepts that were active at least once.
        tokens: teacher tokens counted, without padding and beginnings of text.
        blocks: blocks read.
        labelled_tokens: tokens of the labelled corpus, which `label_share` refers to.
        teacher_layer: tapped block.
        contexts: n, kept per concept at most.
        context_tokens: tokens before the place where it is active.
    """

    num_concepts: int
    sae: str
    active_concepts: int
    tokens: int
    blocks: int
    labelled_tokens: int
    teacher_layer: int
    contexts: int
    context_tokens: int


@dataclass(frozen=True)
class Context:
    """A place where a concept is active: `before` + `token` + `after` is the text around it.

    Attributes:
        before: text before the token, of the same document.
        token: text of the token; of a character spread over several tokens, the whole character.
        after: text after it.
        activation: how active the concept is there.
        source: where the document was read from; empty if not known.
        block: block of the training corpus.
        position: teacher token in that block.
    """

    before: str
    token: str
    after: str
    activation: float
    source: str
    block: int
    position: int


@dataclass(frozen=True)
class Concept:
    """A row of the catalogue.

    Attributes:
        concept_id: latent of the SAE.
        name: a hint, not a definition: what the concept was called, by `name_source`.
        name_source: "promoted tokens", the name of a file, or "endpoint MODEL".
        frequency: share of the tokens at which it is active.
        mean_activation: where it is active; 0 if nowhere.
        max_activation: the largest; 0 if nowhere.
        label_count: labels that name it in the labelled corpus.
        label_share: the same per labelled token.
        promoted: tokens whose logits its decoder direction raises most, and `promoted_logits`.
        suppressed: tokens whose logits it lowers most, and `suppressed_logits`.
        contexts: where it is most active, the strongest first.
    """

    concept_id: int
    name: str
    name_source: str
    frequency: float
    mean_activation: float
    max_activation: float
    label_count: int
    label_share: float
    promoted: list[str]
    promoted_logits: list[float]
    suppressed: list[str]
    suppressed_logits: list[float]
    contexts: list[Context]


def write_rows(path: Path, tables: Iterable[pa.Table]) -> None:
    """Write the rows of a catalogue to `path`, whole or not at all."""
    unfinished = files.partial(path)
    with files.replacing(path, unfinished), pq.ParquetWriter(unfinished, SCHEMA, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table, row_group_size=ROWS_PER_GROUP)


_SIGNS = {"\n": "⏎", "\r": "⏎", "\t": "⇥", "\u00a0": " "}


def visible(text: str) -> str:
    """The text in one line, without anything that a terminal would obey."""
    text = text.replace("\r\n", "\n")
    return "".join(
        char if char.isprintable() else _SIGNS.get(char) or char.encode("unicode_escape").decode() for char in text
    )


def one_line(text: str) -> str:
    return visible(" ".join(text.split()))
