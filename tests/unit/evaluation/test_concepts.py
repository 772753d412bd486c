"""How well concepts are predicted, counted by hand; what a constant prediction of concepts scores."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value

from cocomix.concepts.label_baselines import label_baselines
from cocomix.concepts.label_statistics import label_frequencies
from cocomix.concepts.label_tables import LabelHits, LabelTables, TokenTable, label_hits
from cocomix.evaluation.concepts import ConceptPredictions, TableHits, concept_predictions
from cocomix.reporting.concept_tables import concept_summary, concept_tables, explained_share
from cocomix.reporting.wording import concept_sentences


def blocks(labels: list[list[list[int]]], ids: list[list[int]] | None = None) -> Dataset:
    per_token = len(labels[0][0])
    ids = ids or [[0] * len(row) for row in labels]
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
    for k, share in ((1, 1 / 3), (2, 2 / 3), (3, 2 / 3)):
        found = label_baselines(train, validation, vocab_size=1, num_concepts=6, k=k)
        assert found["constant_recall"] == pytest.approx(share)


def test_recall_precision_and_loss_of_the_tables_against_loops() -> None:
    """Count by hand; token 4 never occurs in training, token 0 has fewer labels than predictions there."""
    torch.manual_seed(0)
    rows, length, vocab_size, concepts, k = 6, 8, 5, 9, 3
    ids = torch.randint(1, 4, (2 * rows, length))
    labels = torch.stack([torch.randperm(concepts)[:2] for _ in range(2 * rows * length)]).view(2 * rows, length, 2)
    labels[:, 0, 1], labels[:, 1] = -100, -100
    ids[0, 3], ids[rows, 3], ids[rows, 4] = 0, 0, 4
    train, validation = (
        blocks(labels[part].tolist(), ids[part].tolist()) for part in (slice(0, rows), slice(rows, None))
    )
    counts, of_pair = np.zeros((vocab_size, concepts)), np.zeros((vocab_size, vocab_size, concepts))
    for row, t in itertools.product(range(rows), range(length)):
        for label in (own := labels[row, t])[own >= 0]:
            counts[ids[row, t], label] += 1
            if t > 0:
                of_pair[ids[row, t - 1], ids[row, t], label] += 1
    overall = counts.sum(0)
    frequent = np.argsort(-overall, kind="stable")[:k]
    hits, losses, floors, at_a, pair_hits, pair_losses, constant, seen, unseen_pairs = [], [], [], [], [], [], [], 0, 0
    for row, t in itertools.product(range(rows, 2 * rows), range(length)):
        token, own = ids[row, t], labels[row, t]
        known = own[own >= 0].tolist()
        if not known:
            continue
        bonus = np.where(np.isin(np.arange(concepts), frequent), overall / overall.sum(), 0)
        order = np.argsort(-(counts[token] + bonus), kind="stable")[:k]
        hits += [label in order for label in known]
        shares = (counts[token] + (overall + 1) / (overall.sum() + concepts)) / (counts[token].sum() + 1)
        losses.append(np.mean([-np.log(shares[label]) for label in known]))
        floors.append(np.log(len(known)))
        at_a += [label in order[: len(known)] for label in known]
        constant.append(np.mean([-np.log((overall[label] + 1) / (overall.sum() + concepts)) for label in known]))
        seen += len(known)
        pair = of_pair[ids[row, t - 1], token] if t > 0 else np.zeros(concepts)
        distinct = (pair > 0).sum()
        unseen_pairs += distinct == 0
        mixed = (pair + distinct * shares) / (pair.sum() + distinct) if distinct else shares
        pair_losses.append(np.mean([-np.log(mixed[label]) for label in known]))
        likely = np.where((pair > 0) | np.isin(np.arange(concepts), order), mixed, 0)
        pair_hits += [(likely > likely[label]).sum() < k for label in known]
    found = label_baselines(train, validation, vocab_size, concepts, k)
    assert found["token_table_recall"] == pytest.approx(sum(hits) / seen)
    assert found["token_table_loss"] == pytest.approx(np.mean(losses))
    assert found["token_table_precision_at_a"] == pytest.approx(sum(at_a) / seen)
    assert found["constant_loss"] == pytest.approx(np.mean(constant))
    assert found["bigram_table_loss"] == pytest.approx(np.mean(pair_losses))
    assert found["bigram_table_recall"] == pytest.approx(sum(pair_hits) / seen)
    assert 0 < unseen_pairs < len(losses)
    assert found["concept_loss_floor"] == pytest.approx(np.mean(floors))
    table = TokenTable.from_blocks(train, vocab_size, concepts, k)
    assert table.concepts[4].tolist() == frequent.tolist()
    assert set(table.concepts[0]) >= set(labels[0, 3].tolist())


def test_two_tokens_predict_what_one_cannot() -> None:
    """After token 0, token 2 has label 3, and after token 1, label 4; token 2 alone has either equally often."""
    train = blocks([[[1], [3], [2], [4]]] * 2, [[0, 2, 1, 2]] * 2)
    found = label_baselines(train, train, vocab_size=3, num_concepts=6, k=1)
    assert found["token_table_precision_at_a"] == 0.75
    assert found["bigram_table_precision_at_a"] == found["bigram_table_recall"] == 1
    assert found["bigram_table_loss"] < found["token_table_loss"] < found["constant_loss"]


def test_at_rank_a_a_token_has_as_many_predictions_as_labels() -> None:
    predictions = np.array([[1, 2]] * 3)
    hits = label_hits(predictions, np.array([[2, -100, -100], [4, 2, 1], [-100] * 3]), k=2, num_concepts=5)
    assert hits.at_a.tolist() == [0, 1, 1, 0, 0]
    assert hits.predicted.tolist() == [0, 2, 1, 0, 0]
    assert hits.at_k.tolist() == [0, 1, 2, 0, 0]
    assert hits.mixed.tolist() == [0, 2, 2, 0, 0]


@pytest.mark.parametrize(
    ("recall", "table", "words"),
    [
        (0.996, 0.990, "most of the recall beyond the most frequent labels (50.0%) follows from the current"),
        (0.9, 0.6, "a table that reads only the current token, 60.0%."),
        (0.9, 0.9, "the model predicts no more than the table."),
        (0.45, 0.6, "the model predicts no more than the table."),
    ],
)
def test_recall_is_stated_beside_the_table(recall: float, table: float, words: str) -> None:
    metrics = {"concept_recall": recall, "token_table_recall": table, "constant_recall": 0.5}
    (sentence,) = concept_sentences({"a": {"metrics": metrics}, "ntp": {"metrics": {"loss": 1.0}}})
    assert words in sentence


def test_runs_of_older_versions_have_no_table() -> None:
    old = {"concept_loss": math.log(4), "concept_precision": 0.1, "concept_recall": 0.9, "constant_recall": 0.5}
    bits, shares = concept_summary({"a": {"metrics": old}, "ntp": {"metrics": {"loss": 1.0}}})
    assert bits.rows[-1] == ["a", "–", "–", "–", "2.000", "–", "–", "–"]
    assert shares.rows[-1] == ["a", "–", "–", "–", "90.0%", "–", "–", "50.0%", "10.0% (at most 11.1%)"]
    assert concept_sentences({"a": {"metrics": old}}) == []


def test_the_tokens_explain_a_share_of_what_the_student_learns() -> None:
    metrics = {"constant_loss": 5.0, "token_table_loss": 2.5, "concept_loss": 2.0, "concept_recall": 0.9}
    recalls = {"token_table_recall": 0.9, "constant_recall": 0.5}
    assert explained_share(metrics, "token_table_loss") == pytest.approx(2.5 / 3)
    assert explained_share(metrics, "bigram_table_loss") is None
    assert explained_share({**metrics, "concept_loss": 5.5}, "token_table_loss") is None
    (sentence,) = concept_sentences({"a": {"metrics": {**metrics, **recalls, "bigram_table_loss": 1.85}}})
    assert sentence.endswith(
        "The current token explains 83% of what it learns of its labels, the previous and the current token 105%."
    )


def test_frequencies_are_shares_of_the_labeled_tokens() -> None:
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
                is_label, is_main_process = concept in here, concept in order[: len(here)]
                of_band["labels"] += is_label
                of_band["predicted"] += is_main_process
                of_band["at_a"] += is_label and is_main_process
                of_band["at_k"] += is_label and concept in order[:k]
                of_band["promised"] += promised[concept].item()
    read = blocks(labels.tolist())
    tables = LabelTables.from_blocks(read, vocab_size=1, num_concepts=concepts, k=k)
    for chunk in (1 << 22, 14):
        monkeypatch.setattr("cocomix.evaluation.concepts.CHUNK_NUMBERS", chunk)
        predictions = concept_predictions(Predictor(z, k).eval(), read, frequencies, tables, 2)
        everything, *found = predictions.bands
        assert predictions.tokens == 14
        assert predictions.model.at_k.sum() == sum(each["at_k"] for each in sums.values())
        for concept in range(concepts):
            top = z.topk(k).indices[(labels >= 0).any(-1)]
            assert predictions.model.mixed[concept] == (top == concept).sum()
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
    labels = blocks([[[0], [1], [0], [1]]], [[0, 1, 0, 0]])
    frequencies = np.array([0.5, 0.5])
    tables = LabelTables.from_blocks(labels, vocab_size=2, num_concepts=2, k=1)
    even = torch.zeros(1, 4, 2)
    predictions = concept_predictions(Predictor(even, 1).eval(), labels, frequencies, tables, 1)
    everything, _ = predictions.bands
    assert everything.misplaced == pytest.approx(0)
    assert everything.table_recall_at_a == everything.table_recall == 0.75  # all but the last, whose token has label 0
    assert everything.table_precision == 0.75
    assert predictions.tables.token.at_a.tolist() == predictions.tables.token.at_k.tolist() == [2, 1]
    assert everything.bigram_precision == everything.bigram_recall == 1  # the last token follows another
    sure = torch.tensor([50.0, -50.0]).expand(1, 4, 2)
    everything, _ = concept_predictions(Predictor(sure, 1).eval(), labels, frequencies, tables, 1).bands
    assert everything.precision == everything.recall == 0.5
    assert everything.misplaced == pytest.approx(1.0)


def test_evaluations_of_older_versions_have_no_table() -> None:
    shares = dict.fromkeys(("precision", "recall_at_a", "recall", "misplaced"), 0.5)
    band = {"name": "all", "concepts": 2, "labels": 4, "promises": [], **shares}
    old = {"settings": {"limit": None, "precision": "fp32"}, "figures": {"bands": [band], "channel": None}}
    at_a, at_k, _ = concept_tables([("a", old)])
    assert at_a.rows[-1] == ["a", "all", "2", "4", "50.0%", "–", "–", "50.0%", "–", "–"]
    assert at_k.rows[-1] == ["a", "all", "2", "4", "50.0%", "–", "–", "50.0%"]


def test_the_best_concepts_are_ahead_of_both_tables() -> None:
    labels, none = np.full(5, 10), np.zeros(5, np.int64)

    def hits(at_a: list[int]) -> LabelHits:
        return LabelHits(np.full(5, 10), np.array(at_a), none, none)

    tables = TableHits(hits([9, 1, 0, 0, 0]), hits([9, 2, 6, 0, 0]))
    found = ConceptPredictions([], 100, labels, hits([10, 8, 9, 2, 0]), tables)
    assert found.best(9, least_labels=10) == [1, 2, 0, 3]  # 0.6, 0.3 and 0.1 ahead; then a weak one, never the last
    assert found.best(1, least_labels=10) == [1] and found.best(9, least_labels=11) == []
