"""How well concepts are predicted, counted by hand; what a constant prediction of concepts scores."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value

from cocomix.evaluation.concepts import concept_predictions, constant_recall, label_frequencies


def blocks(labels: list[list[list[int]]]) -> Dataset:
    per_token = len(labels[0][0])
    ids = [[0] * len(row) for row in labels]
    features = Features(
        {
            "input_ids": List(Value("int32"), length=len(ids[0])),
            "concept_ids": List(List(Value("int32"), length=per_token), length=len(ids[0])),
        }
    )
    return Dataset.from_dict({"input_ids": ids, "concept_ids": labels}, features=features)


def test_recall_of_the_most_frequent_training_labels() -> None:
    train = blocks([[[1, 2], [1, 3]], [[1, 2], [-100, -100]]])
    validation = blocks([[[1, 4], [2, -100]]])
    assert constant_recall(train, validation, num_concepts=6, k=1) == pytest.approx(1 / 3)
    assert constant_recall(train, validation, num_concepts=6, k=2) == pytest.approx(2 / 3)
    assert constant_recall(train, validation, num_concepts=6, k=3) == pytest.approx(2 / 3)


def test_frequencies_are_shares_of_the_labelled_tokens() -> None:
    found = label_frequencies(blocks([[[1, 2], [1, 3]], [[1, 2], [-100, -100]]]), num_concepts=5)
    assert found.tolist() == pytest.approx([0, 1, 2 / 3, 1 / 3, 0])


class Predictor(torch.nn.Module):
    """Says the same concept logits whatever it reads: those of the blocks in their order."""

    def __init__(self, z: torch.Tensor, k: int) -> None:
        super().__init__()
        self.z, self.device = z, torch.device("cpu")
        self.config = SimpleNamespace(num_active_concepts=k)
        self.read = 0

    def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        start, self.read = self.read, self.read + len(input_ids)
        return SimpleNamespace(concept_logits=self.z[start : self.read])


def test_bands_against_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every figure by loops over tokens and concepts, and the same in chunks of any size."""
    torch.manual_seed(0)
    rows, length, concepts, k = 3, 5, 7, 3
    z = 2 * torch.randn(rows, length, concepts)
    labels = torch.stack([torch.randperm(concepts)[:2] for _ in range(rows * length)]).view(rows, length, 2)
    labels[0, 0] = -100
    labels[1, 2, 1] = -100
    frequencies = np.array([0.5, 0.2, 0.05, 0.05, 0.002, 0.0, 0.1])
    band_of = [0, 0, 1, 1, 2, 4, 0]
    names = ["10.00% to 100.00%", "1.00% to 10.00%", "0.10% to 1.00%", "0.01% to 0.10%", "below 0.01%"]

    sums = {band: {"labels": 0, "predicted": 0, "at_a": 0, "at_k": 0, "promised": 0.0} for band in range(5)}
    for row in range(rows):
        for t in range(length):
            here = [each for each in labels[row, t].tolist() if each >= 0]
            order = z[row, t].argsort(descending=True).tolist()
            promised = z[row, t].softmax(-1) * len(here)
            for concept in range(concepts) if here else []:
                of_band = sums[band_of[concept]]
                is_label, is_first = concept in here, concept in order[: len(here)]
                of_band["labels"] += is_label
                of_band["predicted"] += is_first
                of_band["at_a"] += is_label and is_first
                of_band["at_k"] += is_label and concept in order[:k]
                of_band["promised"] += promised[concept].item()
    for chunk in (1 << 22, 14):
        monkeypatch.setattr("cocomix.evaluation.concepts.CHUNK_NUMBERS", chunk)
        predictions = concept_predictions(Predictor(z, k).eval(), blocks(labels.tolist()), frequencies, 2)
        everything, *found = predictions.bands
        assert predictions.tokens == 14
        assert predictions.found.sum() == sum(each["at_k"] for each in sums.values())
        for concept in range(concepts):
            top = z.topk(k).indices[(labels >= 0).any(-1)]
            assert predictions.mixed[concept] == (top == concept).sum()
        assert [band.name for band in found] == [names[band] for band in (0, 1, 2, 4)]
        assert [band.concepts for band in (everything, *found)] == [7, 3, 2, 1, 1]
        for band in found:
            expected = sums[names.index(band.name)]
            assert band.labels == expected["labels"]
            if expected["predicted"]:
                assert band.precision == pytest.approx(expected["at_a"] / expected["predicted"])
            if expected["labels"]:
                assert band.recall_at_a == pytest.approx(expected["at_a"] / expected["labels"])
                assert band.recall == pytest.approx(expected["at_k"] / expected["labels"])
            promised = sum(each.promised * each.predictions for each in band.promises)
            assert promised == pytest.approx(expected["promised"], rel=1e-5)
            assert sum(each.found * each.predictions for each in band.promises) == pytest.approx(expected["labels"])
        assert everything.labels == sum(each["labels"] for each in sums.values()) == 27
        assert sum(each.predictions for each in everything.promises) == 14 * concepts


def test_a_calibrated_prediction_misplaces_nothing_and_a_sure_one_its_mistakes() -> None:
    """Two concepts, each a label at half of the tokens: half promised is right, all promised is wrong half the time."""
    labels = blocks([[[0], [1], [0], [1]]])
    frequencies = np.array([0.5, 0.5])
    even = torch.zeros(1, 4, 2)
    everything, _ = concept_predictions(Predictor(even, 1).eval(), labels, frequencies, 1).bands
    assert everything.misplaced == pytest.approx(0)
    sure = torch.tensor([50.0, -50.0]).expand(1, 4, 2)
    everything, _ = concept_predictions(Predictor(sure, 1).eval(), labels, frequencies, 1).bands
    assert everything.precision == everything.recall == 0.5
    assert everything.misplaced == pytest.approx(1.0)
