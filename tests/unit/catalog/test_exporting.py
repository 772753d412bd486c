"""A catalog in the forms of SAEDashboard and Neuronpedia."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from cocomix import InputError
from cocomix.catalog import exporting
from cocomix.catalog.exporting import export_catalog
from cocomix.catalog.naming import read_names
from small_catalog import CONCEPTS, catalog_of

NAMES = {3: "words about fire", 30: "lakes"}
CATALOG = catalog_of(NAMES, {3: ("the ", "fire", " burns"), 4: ("", "x", "")})


def lines(path: Path) -> list[dict[str, Any]]:
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in content.splitlines()]


def test_batches_of_saedashboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "FEATURES_PER_BATCH", 32)
    assert export_catalog(CATALOG, tmp_path / "out", "saedashboard", "mine", "res") == CONCEPTS
    batches = [json.loads((tmp_path / "out" / f"batch-{number}.json").read_text()) for number in (0, 1)]
    assert [len(batch["features"]) for batch in batches] == [32, 8]
    assert (batches[0]["model_id"], batches[0]["layer"], batches[0]["sae_set"]) == ("mine", 1, "res")
    feature = batches[0]["features"][3]
    assert feature["feature_index"] == 3 and feature["frac_nonzero"] == 0.01
    assert (feature["pos_str"], feature["neg_values"]) == (["yes"], [-3.0])
    (shown,) = feature["activations"]
    assert shown["tokens"] == ["the ", "fire", " burns"] and shown["values"] == [0.0, 2.0, 0.0]
    assert shown["qualifying_token_index"] == 1
    assert batches[0]["features"][4]["activations"][0]["tokens"] == ["x"]


def test_the_folder_of_neuronpedia_and_the_names_back(tmp_path: Path) -> None:
    export_catalog(CATALOG, tmp_path / "out", "neuronpedia", "mine", "res")
    source = tmp_path / "out" / "mine" / "1-res"
    (row,) = lines(source / "source.jsonl")
    assert (row["id"], row["modelId"], row["setName"]) == ("1-res", "mine", "res")
    assert all((source / f"{kind}.jsonl").is_file() for kind in ("release", "model", "sourceset"))
    features = lines(source / "features" / "batch-0.jsonl.gz")
    assert [feature["index"] for feature in features] == [str(number) for number in range(CONCEPTS)]
    assert features[3]["maxActApprox"] == 2.0 and features[3]["pos_str"] == ["yes"]
    first, second = lines(source / "activations" / "batch-0.jsonl.gz")
    assert (first["index"], first["maxValue"], first["maxValueTokenIndex"], first["minValue"]) == ("3", 2.0, 1, 0.0)
    assert first["id"] != second["id"]
    assert read_names(source / "explanations" / "batch-0.jsonl.gz") == NAMES


def test_an_export_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="out exists"):
        export_catalog(CATALOG, tmp_path / "out", "neuronpedia", "mine", "res")
    with pytest.raises(InputError, match=r"--model is .* expected a name without slashes"):
        export_catalog(CATALOG, tmp_path / "new", "neuronpedia", "../x", "res")
