"""What a constant prediction of concepts scores."""

from __future__ import annotations

import pytest
from datasets import Dataset

from cocomix.evaluation.concepts import constant_recall


def blocks(labels: list[list[list[int]]]) -> Dataset:
    return Dataset.from_dict({"concept_ids": labels})


def test_recall_of_the_most_frequent_training_labels() -> None:
    train = blocks([[[1, 2], [1, 3]], [[1, 2], [-100, -100]]])
    validation = blocks([[[1, 4], [2, -100]]])
    assert constant_recall(train, validation, num_concepts=6, k=1) == pytest.approx(1 / 3)
    assert constant_recall(train, validation, num_concepts=6, k=2) == pytest.approx(2 / 3)
    assert constant_recall(train, validation, num_concepts=6, k=3) == pytest.approx(2 / 3)
