"""A catalog in memory, of a few lines."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from cocomix.catalog.rows import PROMOTED_TOKENS, SCHEMA, CatalogInfo
from cocomix.catalog.search import Catalog

CONCEPTS = 40
PLACE = {"activation": 2.0, "source": "a.txt", "block": 0, "position": 0}


def catalog_of(names: dict[int, str], contexts: dict[int, tuple[str, str, str]] | None = None) -> Catalog:
    """A catalog in which concepts have these names, and a context (before, token, after)."""
    rows = [
        {
            "concept_id": concept,
            "name": names.get(concept, "nothing"),
            "name_source": "names.json" if concept in names else PROMOTED_TOKENS,
            "frequency": 0.01,
            "mean_activation": 1.0,
            "max_activation": 2.0,
            "label_count": concept,
            "label_share": 0.001,
            "promoted": ["yes"],
            "promoted_logits": [3.0],
            "suppressed": ["no"],
            "suppressed_logits": [-3.0],
            "contexts": [dict(zip(("before", "token", "after"), contexts[concept], strict=True), **PLACE)]
            if contexts and concept in contexts
            else [],
        }
        for concept in range(CONCEPTS)
    ]
    info = CatalogInfo(
        num_concepts=CONCEPTS,
        sae="of these concepts",
        active_concepts=CONCEPTS,
        tokens=1000,
        blocks=10,
        labelled_tokens=1000,
        teacher_layer=1,
        contexts=1,
        context_tokens=4,
    )
    return Catalog(Path("catalog"), info, pa.Table.from_pylist(rows, schema=SCHEMA))
