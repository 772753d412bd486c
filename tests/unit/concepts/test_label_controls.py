"""Labels that are controls, against plain loops."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from cocomix.concepts.attribution import ConceptExtractor
from cocomix.concepts.label_controls import (
    control_labels,
    document_numbers,
    offset_labels,
    permutation_within_types,
)
from cocomix.concepts.label_store import LabeledCorpus, LabelsInfo, features, labels_fingerprint, load_labels
from cocomix.concepts.labeling import LabelsConfig, Side, label_corpus, target_weights
from cocomix.concepts.reading import SameTokens
from cocomix.concepts.sae import SparseAutoencoder
from cocomix.concepts.window import WindowExtractor, inverse_frequencies

BLOCKS, T, A, C, V, EOS = 12, 9, 2, 20, 7, 0
INFO = LabelsInfo("corpus", "teacher", "sae", 1, C, A, "activation", "tokens", shards={"train": 1, "validation": 1})
CONFIG = LabelsConfig(labels_per_token=A, selection="activation", blocks_per_batch=2, blocks_per_shard=5)


def base(weighted: bool = False) -> LabeledCorpus:
    """Labels of random tokens; the last token of a block has none, and some have one."""
    draw = np.random.default_rng(0)

    def side(count: int) -> Dataset:
        ids = draw.integers(0, V, (count, T))
        labels = draw.permuted(np.tile(np.arange(C), (count, T, 1)), axis=-1)[..., :A]
        labels[:, -1] = -100
        labels[::3, 2, 1] = -100
        columns = {"input_ids": list(ids), "concept_ids": labels.tolist()}
        if weighted:
            columns["concept_weights"] = draw.random((count, T, A)).astype(np.float16).tolist()
        return Dataset.from_dict(columns, features=features(T, A, "uint8", C, weighted))

    return LabeledCorpus(side(BLOCKS), side(3), INFO)


def rows(side: Dataset | None, name: str) -> np.ndarray:
    assert side is not None
    return np.array(side[name][:])


def controlled(given: LabeledCorpus, folder: Path, **settings: object) -> LabeledCorpus:
    config = LabelsConfig(**{**CONFIG.__dict__, **settings})
    info = control_labels(given, config, V, EOS, 3, folder)
    stored = load_labels(folder)
    assert stored.info == info
    for side, wanted in ((stored.train, given.train), (stored.validation, given.validation)):
        assert rows(side, "input_ids").tolist() == rows(wanted, "input_ids").tolist()
    return stored


@pytest.mark.parametrize("offset", [1, 3, T])
def test_offset_labels_are_those_of_a_later_token_of_the_document(offset: int, tmp_path: Path) -> None:
    given = base(weighted=True)
    stored = controlled(given, tmp_path, offset=offset, targets="activation")
    assert (stored.info.offset, stored.info.selection, stored.info.seed) == (offset, "activation", None)
    ids, before, after = (rows(side, name) for side, name in (
        (given.train, "input_ids"), (given.train, "concept_ids"), (stored.train, "concept_ids")
    ))  # fmt: skip
    for block in range(BLOCKS):
        for t in range(T):
            reaches = t + offset < T and EOS not in ids[block, t : t + offset]
            assert after[block, t].tolist() == (before[block, t + offset].tolist() if reaches else [-100] * A)
            weights = [rows(side, "concept_weights")[block] for side in (given.train, stored.train)]
            assert weights[1][t].tolist() == (weights[0][t + offset].tolist() if reaches else [0] * A)


def test_documents_end_with_end_of_text() -> None:
    ids = np.array([[5, EOS, 2, 3, EOS, EOS, 4]])
    assert document_numbers(ids, EOS).tolist() == [[0, 0, 1, 1, 1, 2, 3]]
    columns = {"concept_ids": np.arange(7).reshape(1, 7, 1)}
    moved = offset_labels(columns, document_numbers(ids, EOS), 1)["concept_ids"].ravel().tolist()
    assert moved == [1, -100, 3, 4, -100, -100, -100]


def test_token_labels_are_the_most_frequent_ones_of_the_token(tmp_path: Path) -> None:
    given = base()
    stored = controlled(given, tmp_path, selection="token")
    assert stored.info.selection == "token"
    counts: defaultdict[int, Counter[int]] = defaultdict(Counter)
    for ids, labels in zip(rows(given.train, "input_ids"), rows(given.train, "concept_ids"), strict=True):
        for token, found in zip(ids, labels, strict=True):
            counts[token].update(found[found >= 0].tolist())
    for side in (stored.train, stored.validation):
        for ids, labels in zip(rows(side, "input_ids"), rows(side, "concept_ids"), strict=True):
            assert (labels[-1] == -100).all()  # as in the labels that were counted
            for token, found in zip(ids[:-1], labels[:-1], strict=True):
                ranked = sorted(counts[token].values(), reverse=True)
                assert [counts[token][concept] for concept in found] == ranked[:A]


def test_permuted_labels_are_exchanged_among_tokens_of_one_id(tmp_path: Path) -> None:
    given = base(weighted=True)
    stored, again = (controlled(given, tmp_path / name, control="permuted", targets="activation") for name in "ab")
    assert (stored.info.control, stored.info.seed) == ("permuted", 3)
    assert rows(stored.train, "concept_ids").tolist() == rows(again.train, "concept_ids").tolist()
    assert rows(stored.train, "concept_ids").tolist() != rows(given.train, "concept_ids").tolist()

    def by_token(side: Dataset | None) -> dict[int, list[object]]:
        found = defaultdict(list)
        parts = (rows(side, name) for name in ("input_ids", "concept_ids", "concept_weights"))
        for ids, labels, weights in zip(*parts, strict=True):
            for token, *label in zip(ids.tolist(), labels.tolist(), weights.tolist(), strict=True):
                found[token].append(label)
        return {token: sorted(labels) for token, labels in found.items()}

    for name in ("train", "validation"):
        assert by_token(getattr(stored, name)) == by_token(getattr(given, name))
    assert (rows(stored.train, "concept_ids")[:, -1] == -100).all()


def test_a_permutation_stays_within_labeled_tokens_of_one_id() -> None:
    ids, labeled = np.array([1, 2, 1, 2, 1, 1, 2, 3]), np.array([1, 1, 1, 0, 1, 0, 1, 1], bool)
    seen = set()
    for seed in range(200):
        source = permutation_within_types(ids, labeled, seed)
        assert sorted(source) == list(range(8)) and (ids[source] == ids).all()
        assert (source[~labeled] == np.flatnonzero(~labeled)).all()
        seen.add(tuple(source))
    assert len(seen) == 6 * 2  # every order of three tokens and of two


def test_labels_without_controls_have_the_fingerprint_that_they_had() -> None:
    plain = LabelsInfo("corpus", "teacher", "sae", 1, C, A, "activation", "tokens")
    assert labels_fingerprint(plain) == "196606df5f73304c9c4c194a21603716"
    assert labels_fingerprint(LabelsInfo(**{**plain.__dict__, "offset": 1})) != labels_fingerprint(plain)


def draw_sae() -> SparseAutoencoder:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64)

    return SparseAutoencoder(W_enc=draw(32, C), b_enc=draw(C), W_dec=draw(C, 32), b_dec=draw(32), k=4)


@pytest.mark.parametrize("window", [1, 4, 30])
def test_window_labels_stand_out_over_the_next_tokens_of_the_document(random_teacher, window: int) -> None:
    teacher, sae = random_teacher(), draw_sae()
    blocks = Dataset.from_dict({"input_ids": np.random.default_rng(0).integers(0, V, (6, T)).tolist()})
    plain, reader = ConceptExtractor(teacher, sae, 1, A, "activation"), SameTokens(blocks, tokenizer=None)
    frequency = inverse_frequencies(plain, reader, 4)
    extractor = WindowExtractor(
        teacher, sae, 1, A, window=window, inverse_frequency=frequency.double(), eos_token_id=EOS
    )
    ids = torch.tensor(blocks["input_ids"][:])
    found = extractor(ids)
    latents = sae.encode(plain_residual(teacher, ids))
    dense = torch.zeros(6, T, C, dtype=torch.float64).scatter_add_(-1, latents.indices, latents.values)
    expected_frequency = torch.log(6 * T / (dense > 0).sum((0, 1)).clamp(min=1).double())
    torch.testing.assert_close(frequency.double(), expected_frequency, rtol=1e-6, atol=1e-6)
    for block in range(6):
        for t in range(T):
            inside = []
            for u in range(t + 1, min(t + window, T - 1) + 1):
                if EOS in ids[block, t:u]:
                    break
                inside.append(dense[block, u])
            mean = torch.stack(inside).mean(0) if inside else torch.zeros(C, dtype=torch.float64)
            scores = mean * frequency.double()
            best = [i for i in scores.argsort(descending=True).tolist()[:A] if scores[i] > 0]
            assert found.ids[block, t].tolist() == best + [-100] * (A - len(best))
            torch.testing.assert_close(found.activations[block, t, : len(best)], mean[best])


def plain_residual(teacher: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return teacher(ids, output_hidden_states=True).hidden_states[2].detach()


def test_weights_of_labels_are_shares_of_activation_and_stored(random_teacher, tmp_path: Path) -> None:
    extractor = ConceptExtractor(random_teacher(), draw_sae(), 1, A, "attribution")
    blocks = Dataset.from_dict({"input_ids": np.random.default_rng(0).integers(1, V, (5, T)).tolist()})
    blocks = blocks.cast_column("input_ids", features(T, A, "uint8", C)["input_ids"])
    sides = {name: Side(blocks, SameTokens(blocks, tokenizer=None)) for name in ("train", "validation")}
    config = LabelsConfig(labels_per_token=A, selection="attribution", targets="activation", blocks_per_batch=5)
    label_corpus(extractor, sides, tmp_path, config, INFO)
    labels = extractor(torch.tensor(blocks["input_ids"][:]))
    weights = rows(load_labels(tmp_path).train, "concept_weights")
    assert weights.tolist() == target_weights(labels).tolist()
    has = labels.ids >= 0
    shares = labels.activations / labels.activations.sum(-1, keepdim=True).clamp(min=1e-30)
    torch.testing.assert_close(torch.tensor(weights), shares.where(has, 0.0).half().double(), rtol=1e-2, atol=1e-4)
    assert (torch.tensor(weights) > 0).equal(has)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"offset": 1, "window": 2, "selection": "activation"}, "labels.offset and labels.window exclude each other"),
        ({"control": "permuted", "selection": "token"}, "labels.control and labels.selection token exclude each other"),
        ({"offset": 1, "online": True}, "labels.offset needs stored labels; leave labels.online out"),
        ({"targets": "activation", "online": True}, "labels.targets activation needs stored labels"),
        ({"selection": "token", "targets": "activation"}, "labels.targets has no effect on labels.selection token"),
        (
            {"window": 4},
            "labels.window selects by activation, but labels.selection is 'attribution'; set labels.selection",
        ),
        (
            {"window": 4, "selection": "activation", "alignment": "characters"},
            "labels.window needs a teacher that reads the students' tokens",
        ),
        ({"control": "permutd"}, "labels.control is 'permutd'; expected one of none, permuted"),
    ],
    ids=str,
)
def test_controls_that_cannot_work_are_refused(settings: dict[str, object], message: str) -> None:
    (line,) = LabelsConfig(**settings).problems()  # type: ignore[arg-type]
    assert line.startswith(message)
