"""What a constant prediction of concepts scores, and how a model predicts each of them."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from cocomix.concepts.label_store import features
from cocomix.evaluation.concepts import concept_predictions, constant_recall
from cocomix.evaluation.validation import evaluate_model


def blocks(labels: list[list[list[int]]]) -> Dataset:
    return Dataset.from_dict({"concept_ids": labels})


def test_recall_of_the_most_frequent_training_labels() -> None:
    train = blocks([[[1, 2], [1, 3]], [[1, 2], [-100, -100]]])
    validation = blocks([[[1, 4], [2, -100]]])
    assert constant_recall(train, validation, num_concepts=6, k=1) == pytest.approx(1 / 3)
    assert constant_recall(train, validation, num_concepts=6, k=2) == pytest.approx(2 / 3)
    assert constant_recall(train, validation, num_concepts=6, k=3) == pytest.approx(2 / 3)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_predictions_of_each_concept_are_those_of_a_plain_count(random_model, batch_size) -> None:
    model = random_model()
    ids, labels = torch.randint(0, 53, (5, 7)), torch.stack([torch.randperm(40)[:2] for _ in range(35)]).view(5, 7, 2)
    labels[:, -1] = -100
    labels[2, 3, 1] = -100
    columns = {"input_ids": ids.tolist(), "concept_ids": labels.tolist()}
    rows = Dataset.from_dict(columns, features=features(7, 2, "uint16", 40))
    counts = concept_predictions(model, rows, batch_size)
    top = model(ids, output_concepts=True).concept_logits.topk(5).indices.tolist()
    labelled = [(row, at) for row in range(5) for at in range(6)]
    assert counts.tokens == len(labelled)
    for concept in range(40):
        is_label = {(row, at) for row, at in labelled if concept in labels[row, at]}
        is_predicted = {(row, at) for row, at in labelled if concept in top[row][at]}
        assert counts.labels[concept] == len(is_label)
        assert counts.predicted[concept] == len(is_predicted)
        assert counts.found[concept] == len(is_label & is_predicted)
    recall = evaluate_model(model, rows, batch_size, progress=False)["concept_recall"]
    assert counts.found.sum() / counts.labels.sum() == pytest.approx(recall)
