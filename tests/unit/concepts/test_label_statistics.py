"""Label statistics against counting by hand."""

from __future__ import annotations

import math

import pytest
from datasets import Dataset, Features, List, Value

from cocomix.concepts.label_statistics import label_statistics, plot_concept_frequency

LABELS = [
    [[0, 1], [0, -100], [-100, -100]],
    [[0, 3], [1, 0], [-100, -100]],
]


@pytest.fixture
def blocks() -> Dataset:
    column = {"concept_ids": List(List(Value("int16"), length=2), length=3)}
    return Dataset.from_dict({"concept_ids": LABELS}, features=Features(column))


def test_counts(blocks):
    found = label_statistics(blocks, 5)
    assert found.tokens == 6
    assert found.slots.tolist() == [2, 1, 3]
    assert found.concept_counts.tolist() == [4, 2, 0, 1, 0]


def test_figures(blocks):
    figures = label_statistics(blocks, 5).figures()
    assert figures["labels"] == 7
    assert figures["labels_per_token"] == pytest.approx(7 / 6)
    assert figures["labelled_share"] == pytest.approx(4 / 6)
    assert figures["fewer_than_all_share"] == pytest.approx(3 / 6)
    assert figures["concepts_used_share"] == pytest.approx(3 / 5)
    assert figures["most_frequent_share"] == pytest.approx(4 / 7)
    entropy = -sum(p * math.log(p) for p in (4 / 7, 2 / 7, 1 / 7))
    assert figures["effective_concepts"] == pytest.approx(math.exp(entropy))


def test_a_corpus_without_labels_has_figures_too(blocks):
    none = blocks.map(lambda row: {"concept_ids": [[-100, -100]] * 3})
    figures = label_statistics(none, 5).figures()
    assert figures["labelled_share"] == figures["most_frequent_share"] == figures["effective_concepts"] == 0.0


def test_the_table_says_how_many_labels_are_complete(blocks):
    assert "| tokens with fewer than 2           |               50.00% |" in label_statistics(blocks, 5).table()


def test_the_curve_is_a_picture(blocks, tmp_path):
    plot_concept_frequency(label_statistics(blocks, 5), tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "curve.png").stat().st_size > 10_000
