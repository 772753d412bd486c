"""How well concepts are predicted is counted once, if there is something to count."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from datasets import Dataset

from cocomix.app import predictability
from cocomix.app.predictability import Predictability
from cocomix.concepts.label_store import LabelledCorpus, LabelsInfo, features


def labels_beside(folder: Path, concepts: int, monkeypatch) -> Path:
    """A run's folder beside which labels of so many concepts seem to lie."""
    (folder / "labels").mkdir(parents=True)
    (folder / "labels" / "labels.json").write_text("{}")
    draw = np.random.default_rng(0)
    columns = {
        "input_ids": draw.integers(0, 50, (20, 16)).tolist(),
        "concept_ids": draw.integers(0, concepts, (20, 16, 2)).tolist(),
    }
    blocks = Dataset.from_dict(columns, features=features(16, 2, "uint16", concepts))
    info = {field.name: "" for field in dataclasses.fields(LabelsInfo)} | {"num_concepts": concepts}
    monkeypatch.setattr(predictability, "load_labels", lambda _: LabelledCorpus(None, blocks, LabelsInfo(**info)))
    return folder / "students" / "cocomix"


def test_it_is_counted_once_and_over_some_blocks(opened, tmp_path, monkeypatch):
    run = dataclasses.replace(opened(), folder=labels_beside(tmp_path, 40, monkeypatch))
    monkeypatch.setattr(predictability, "TOKENS", 5 * 16)
    passes = []
    run.model.mixer.register_forward_hook(lambda *_: passes.append(None))
    counted = Predictability(run)
    assert not counted.known
    counts = counted.count()
    assert counts is not None
    assert counts.tokens == 5 * 16
    assert counted.known
    done = len(passes)
    assert counted.count() is counts
    assert len(passes) == done > 0


def test_nothing_to_count(opened, tmp_path, monkeypatch):
    alone = Predictability(dataclasses.replace(opened(), folder=tmp_path / "students" / "cocomix"))
    assert alone.count() is None
    assert alone.missing == "not known: no labels lie beside this run"
    assert alone.known
    others = Predictability(dataclasses.replace(opened(), folder=labels_beside(tmp_path, 41, monkeypatch)))
    assert others.count() is None
    assert "of 41 other concepts" in others.missing
