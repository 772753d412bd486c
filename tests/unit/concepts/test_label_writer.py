"""Labels of any program become a folder that a recipe reads, or are refused with the block that is wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value

import cocomix
from cocomix import InputError
from cocomix.common import files
from cocomix.concepts.label_store import labels_fingerprint, labels_whole, load_labels
from cocomix.data.corpus import PACKED_FILE
from cocomix.data.packing import PackedInfo

BLOCKS, T, A, C = {"train": 7, "validation": 2}, 5, 2, 40_000


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    for side, count in BLOCKS.items():
        ids = np.random.default_rng(count).integers(0, 50, (count, T))
        columns = Features({"input_ids": List(Value("uint8"), length=T)})
        Dataset.from_dict({"input_ids": list(ids)}, features=columns).save_to_disk(folder / side)
    counts = {"train_blocks": 7, "validation_blocks": 2}
    described = {each.name: counts.get(each.name, 0) for each in dataclasses.fields(PackedInfo)}
    info = PackedInfo(**{**described, "block_size": T, "fingerprint": "corpus"})  # type: ignore[arg-type]
    files.write_json(folder / PACKED_FILE, dataclasses.asdict(info))
    return folder


def drawn(side: str) -> np.ndarray:
    labels = np.random.default_rng(1).permuted(np.tile(np.arange(60), (BLOCKS[side], T, 1)), axis=-1)[..., :A]
    labels[:, -1] = -100
    labels[1, 2, 1] = -100
    labels[0, 0, 0] = C - 1
    return labels


def weights(labels: np.ndarray) -> np.ndarray:
    return np.where(labels < 0, 0.0, 0.25 + np.arange(A))


def test_arrays_and_iterators_of_blocks_write_the_same_labels(corpus: Path, tmp_path: Path) -> None:
    train, validation = drawn("train"), drawn("validation")
    cocomix.write_labels(tmp_path / "a", corpus, train, validation, num_concepts=C, blocks_per_shard=3)
    parts = (train[start:stop] for start, stop in ((0, 1), (1, 6), (6, 7)))
    cocomix.write_labels(tmp_path / "b", corpus, parts, iter([validation]), num_concepts=C, blocks_per_shard=3)
    stored = load_labels(tmp_path / "a")
    assert labels_whole(tmp_path / "a") and not files.partial(tmp_path / "a").exists()
    assert stored.train is not None and np.array(stored.train["concept_ids"][:]).tolist() == train.tolist()
    assert np.array(stored.validation["concept_ids"][:]).tolist() == validation.tolist()
    assert stored.info == load_labels(tmp_path / "b").info
    assert (stored.info.corpus, stored.info.selection, stored.info.labels_per_token) == ("corpus", "external", A)
    assert stored.info.shards == {"train": 3, "validation": 1}
    assert stored.info.labelled_share == pytest.approx((T - 1) / T)


def test_weights_are_stored_and_other_labels_have_another_fingerprint(corpus: Path, tmp_path: Path) -> None:
    train, validation = drawn("train"), drawn("validation")
    given = {"train_weights": weights(train), "validation_weights": weights(validation)}
    cocomix.write_labels(tmp_path / "a", corpus, train, validation, num_concepts=C, **given)
    cocomix.write_labels(tmp_path / "b", corpus, train[:, ::-1], validation, num_concepts=C)
    one, other = load_labels(tmp_path / "a"), load_labels(tmp_path / "b")
    assert one.train is not None and one.info.targets == "activation"
    assert np.array(one.train["concept_weights"][:]).tolist() == weights(train).tolist()
    assert other.info.targets == "uniform" and labels_fingerprint(one.info) != labels_fingerprint(other.info)


def with_value(value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(labels: np.ndarray) -> np.ndarray:
        labels[4, 3, 1] = value
        return labels

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda labels: labels[:-1], "train has concept_ids of 6 blocks; expected those of all 7 blocks"),
        (lambda labels: np.concatenate([labels, labels]), "train has concept_ids of more than the 7 blocks"),
        (
            lambda labels: labels[:, :-1],
            r"train has concept_ids of shape \(7, 4, 2\) and type int64; expected integers",
        ),
        (lambda labels: labels[0], r"labels have shape \(5, 2\); expected \(blocks, tokens, labels per token\)"),
        (lambda labels: labels.astype(float), "and type float64; expected integers"),
        (with_value(C), "train has an id outside 0 to 39999: block 4, token 3"),
        (with_value(-1), "train has an id outside 0 to 39999: block 4, token 3"),
        (
            lambda labels: np.repeat(labels[..., :1], 2, -1),
            "train has the same label twice at one token: block 0, token 0",
        ),
        (lambda labels: iter([]), "there are no labels of training blocks"),
    ],
)
def test_labels_that_do_not_fit_are_refused_and_nothing_is_written(
    change: Callable[[np.ndarray], np.ndarray], message: str, corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        cocomix.write_labels(tmp_path / "a", corpus, change(drawn("train")), drawn("validation"), num_concepts=C)
    assert {path.name for path in tmp_path.iterdir()} == {"corpus"}


def test_weights_that_do_not_fit_and_folders_that_exist_are_refused(corpus: Path, tmp_path: Path) -> None:
    train, validation = drawn("train"), drawn("validation")
    wrong = weights(train)
    wrong[2, 1, 0] = 0.0
    given = {"train_weights": wrong, "validation_weights": weights(validation)}
    with pytest.raises(InputError, match=r"train has a weight that is not positive.*: block 2, token 1"):
        cocomix.write_labels(tmp_path / "a", corpus, train, validation, num_concepts=C, **given)
    with pytest.raises(InputError, match="for one of train and validation"):
        cocomix.write_labels(tmp_path / "a", corpus, train, validation, num_concepts=C, train_weights=wrong)
    with pytest.raises(InputError, match="corpus exists; choose another folder"):
        cocomix.write_labels(corpus, corpus, train, validation, num_concepts=C)
    with pytest.raises(InputError, match="is not a packed corpus"):
        cocomix.write_labels(tmp_path / "a", tmp_path, train, validation, num_concepts=C)
