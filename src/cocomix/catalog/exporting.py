"""Export a concept catalog in the forms of SAEDashboard and of Neuronpedia.

Both show tokens with an activation each. A catalog keeps the activation of the strongest token of a context only, so a
context becomes three pieces of text, before it, the token, and after it, the outer ones with activation 0.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from cocomix.catalog.rows import PROMOTED_TOKENS, Concept, Context
from cocomix.catalog.search import Catalog
from cocomix.common import files
from cocomix.common.errors import InputError

FEATURES_PER_BATCH = 1024
CREATOR = "cocomix"
ENDPOINT = "endpoint "
"""Start of `name_source` if a language model wrote the name."""
NOT_COMPUTED = (
    "neuron_alignment_indices",
    "neuron_alignment_values",
    "neuron_alignment_l1",
    "correlated_neurons_indices",
    "correlated_neurons_l1",
    "correlated_neurons_pearson",
    "correlated_features_indices",
    "correlated_features_l1",
    "correlated_features_pearson",
    "freq_hist_data_bar_values",
    "freq_hist_data_bar_heights",
    "logits_hist_data_bar_values",
    "logits_hist_data_bar_heights",
    "decoder_weights_dist",
)
"""Fields of a feature that a catalog does not hold; they are written as empty lists."""
SOURCE_FIELDS = ("n_prompts_total", "n_tokens_in_prompt", "dataset")
"""Fields of a feature in SAEDashboard's form that Neuronpedia keeps with the SAE."""


def export_catalog(catalog: Catalog, target: Path, to: str, model: str, source_set: str) -> int:
    """Write a catalog to the new folder `target`.

    Args:
        catalog: the source.
        target: folder to create.
        to: `saedashboard`, files `batch-N.json` as its NeuronpediaRunner writes them, or `neuronpedia`, the folder
            MODEL/LAYER-SET of its bulk import.
        model: name of the teacher there.
        source_set: name of the SAE there.

    Returns:
        Number of concepts.

    Raises:
        InputError: `target` exists or cannot be created, or a name cannot be that of a folder.
    """
    for option, name in (("--model", model), ("--set", source_set)):
        if not name or Path(name).name != name:
            raise InputError(f"{option} is {name!r}; expected a name without slashes")
    count = catalog.info.num_concepts
    with files.new_folder(target) as folder:
        for number, start in enumerate(range(0, count, FEATURES_PER_BATCH)):
            concepts = [catalog.concept(each) for each in range(start, min(count, start + FEATURES_PER_BATCH))]
            if to == "saedashboard":
                content = _dashboard(catalog, concepts, model, source_set)
                files.write_text(folder / f"batch-{number}.json", json.dumps(content))
            else:
                _write_batch(Source(catalog, model, source_set), concepts, folder, number)
        if to == "neuronpedia":
            _write_source(Source(catalog, model, source_set), folder)
    return count


def _dashboard(catalog: Catalog, concepts: Iterable[Concept], model: str, source_set: str) -> dict[str, Any]:
    """Return a batch of features in SAEDashboard's form."""
    return {
        "model_id": model,
        "layer": catalog.info.teacher_layer,
        "sae_set": source_set,
        "features": [{"feature_index": each.concept_id, **_feature(catalog, each)} for each in concepts],
    }


def _feature(catalog: Catalog, concept: Concept) -> dict[str, Any]:
    return {
        **{name: [] for name in NOT_COMPUTED},
        "neg_str": concept.suppressed,
        "neg_values": concept.suppressed_logits,
        "pos_str": concept.promoted,
        "pos_values": concept.promoted_logits,
        "frac_nonzero": concept.frequency,
        "n_prompts_total": catalog.info.blocks,
        "n_tokens_in_prompt": round(catalog.info.tokens / max(1, catalog.info.blocks)),
        "dataset": "",
        "activations": [_activation(context) for context in concept.contexts],
    }


def _activation(context: Context) -> dict[str, Any]:
    """Return a context as the pieces of its text and their activations."""
    pieces = ((context.before, 0.0), (context.token, context.activation), (context.after, 0.0))
    shown = [(text, value) for text, value in pieces if text or value]
    return {
        "bin_min": -1,
        "bin_max": context.activation,
        "bin_contains": -1,
        "tokens": [text for text, _ in shown],
        "values": [value for _, value in shown],
        "qualifying_token_index": [value for _, value in shown].index(context.activation),
    }


class Source(NamedTuple):
    """An SAE on Neuronpedia, and the catalog of its latents."""

    catalog: Catalog
    model: str
    name: str

    @property
    def id(self) -> str:
        """Its id, LAYER-SET."""
        return f"{self.catalog.info.teacher_layer}-{self.name}"

    def row(self, concept: Concept) -> dict[str, Any]:
        """Return the columns by which every row of a concept names it."""
        return {"modelId": self.model, "layer": self.id, "index": str(concept.concept_id)}


def _write_source(source: Source, folder: Path) -> None:
    """Write the rows of the release, the model, the set of SAEs and the SAE."""
    name, model = source.name, source.model
    shared = {"creatorId": CREATOR, "visibility": "PUBLIC", "createdAt": datetime.now(UTC).isoformat()}
    rows: dict[str, dict[str, Any]] = {
        "release": {"name": name, "description": name, "creatorName": CREATOR},
        "model": {"id": model, "displayName": model, "displayNameShort": model, "instruct": False},
        "sourceset": {"modelId": model, "name": name, "releaseName": name, "description": name, "creatorName": CREATOR},
        "source": {
            "id": source.id,
            "modelId": model,
            "setName": name,
            "hasDashboards": True,
            "num_prompts": source.catalog.info.blocks,
        },
    }
    for kind, row in rows.items():
        _write_lines(folder / model / source.id / f"{kind}.jsonl", [{**row, **shared}])


def _write_batch(source: Source, concepts: Iterable[Concept], folder: Path, number: int) -> None:
    """Write the features of concepts, their activations, and the names that somebody gave them."""
    rows: dict[str, list[dict[str, Any]]] = {"features": [], "activations": [], "explanations": []}
    hook = f"blocks.{source.catalog.info.teacher_layer}.hook_resid_post"
    for concept in concepts:
        row, feature = source.row(concept), _feature(source.catalog, concept)
        activations = feature.pop("activations")
        known = {key: value for key, value in feature.items() if key not in SOURCE_FIELDS}
        owned = {**row, "creatorId": CREATOR}
        rows["features"].append({**owned, "maxActApprox": concept.max_activation, "hookName": hook, **known})
        rows["activations"] += [{**owned, **_activation_row(shown)} for shown in activations]
        if concept.name_source != PROMOTED_TOKENS:
            rows["explanations"].append({**row, "authorId": CREATOR, **_explanation(concept)})
    for kind, found in rows.items():
        identified = found if kind == "features" else [{"id": _id(row, at), **row} for at, row in enumerate(found)]
        _write_lines(folder / source.model / source.id / kind / f"batch-{number}.jsonl.gz", identified)


def _id(row: dict[str, Any], number: int) -> str:
    return f"{row['modelId']}-{row['layer']}-{row['index']}-{number}"


def _activation_row(shown: dict[str, Any]) -> dict[str, Any]:
    values = shown["values"]
    return {
        "tokens": shown["tokens"],
        "values": values,
        "maxValue": max(values),
        "maxValueTokenIndex": values.index(max(values)),
        "minValue": min(values),
        "binMin": shown["bin_min"],
        "binMax": shown["bin_max"],
        "binContains": shown["bin_contains"],
        "qualifyingTokenIndex": shown["qualifying_token_index"],
    }


def _explanation(concept: Concept) -> dict[str, Any]:
    written = concept.name_source.startswith(ENDPOINT)
    model = concept.name_source.removeprefix(ENDPOINT) if written else None
    return {"description": concept.name, "typeName": None, "explanationModelName": model}


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
