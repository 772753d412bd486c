"""The concept catalog on disk: one row per concept."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cocomix.common import files

CATALOG_FILE = "catalog.parquet"
INFO_FILE = "catalog.json"
PROMOTED_TOKENS = "promoted tokens"
"""`name_source` of a default name."""
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
    """How a catalog was built.

    Attributes:
        num_concepts: C.
        sae: fingerprint of the SAE whose latents the concepts are.
        active_concepts: concepts that were active at least once.
        tokens: teacher tokens counted, without padding and beginning-of-text tokens.
        blocks: blocks read.
        labelled_tokens: tokens of the labeled corpus, the denominator of `label_share`.
        teacher_layer: tapped block.
        contexts: n, the maximum number of contexts per concept.
        context_tokens: tokens shown before the place where the concept is active.
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
    """A place where a concept is active, with the text around it: `before` + `token` + `after`.

    Attributes:
        before: text before the token, from the same document.
        token: text of the token; the complete character if the token is part of one.
        after: text after the token.
        activation: activation of the concept there.
        source: where the document was read from; empty if unknown.
        block: block of the training corpus.
        position: index of the teacher token in that block.
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
    """A row of the catalog.

    Attributes:
        concept_id: index of the SAE latent.
        name: a hint, not a definition.
        name_source: where the name comes from: "promoted tokens", the name of a file, or "endpoint MODEL".
        frequency: share of tokens at which the concept is active.
        mean_activation: mean over the tokens at which it is active; 0 if there are none.
        max_activation: largest activation; 0 if it is never active.
        label_count: number of labels in the labeled corpus that are this concept.
        label_share: `label_count` per token.
        promoted, promoted_logits: the tokens whose logits its decoder direction raises most.
        suppressed, suppressed_logits: the tokens whose logits it lowers most.
        contexts: where it is most active, strongest first.
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
    """Write the rows of a catalog to `path` atomically."""
    unfinished = files.partial(path)
    with files.replacing(path, unfinished), pq.ParquetWriter(unfinished, SCHEMA, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table, row_group_size=ROWS_PER_GROUP)
