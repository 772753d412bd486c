"""How well concepts are predicted is counted once, over the labels that the run learnt, if they are there."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from datasets import Dataset

from cocomix import InputError
from cocomix.app import predictability
from cocomix.app.predictability import Predictability
from cocomix.concepts.label_store import LabeledCorpus, LabelsInfo, features
from cocomix.inspection.runs import OpenRun
from small_catalog import CONCEPTS


@pytest.fixture
def labels() -> LabeledCorpus:
    """Of validation text, as online labels are."""
    draw = np.random.default_rng(0)
    columns = {
        "input_ids": draw.integers(0, 50, (20, 16)).tolist(),
        "concept_ids": draw.integers(0, CONCEPTS, (20, 16, 2)).tolist(),
    }
    blocks = Dataset.from_dict(columns, features=features(16, 2, "uint16", CONCEPTS))
    info = {field.name: "" for field in dataclasses.fields(LabelsInfo)} | {"num_concepts": CONCEPTS}
    return LabeledCorpus(None, blocks, LabelsInfo(**info))


def test_it_is_counted_once_and_over_some_blocks(opened, labels, monkeypatch):
    monkeypatch.setattr(predictability, "learned_labels", lambda run: labels)
    run = opened()
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
    assert counted.tokens == 5 * 16
    mixed = [len(counted.logits(concept)) for concept in range(CONCEPTS)]
    assert mixed == counts.model.mixed.tolist()
    assert sum(mixed) == 5 * 16 * run.model.config.num_active_concepts


def test_why_there_is_nothing_to_count(opened, monkeypatch, tmp_path):
    run = dataclasses.replace(opened(), folder=tmp_path)
    alone = Predictability(run)
    assert alone.count() is None
    assert alone.missing.startswith(f"not known: no finished run in {tmp_path}")
    assert alone.known

    def changed(run: OpenRun) -> LabeledCorpus:
        raise InputError("the labels changed since it was trained")

    monkeypatch.setattr(predictability, "learned_labels", changed)
    others = Predictability(run)
    assert others.count() is None
    assert others.missing == "not known: the labels changed since it was trained"
