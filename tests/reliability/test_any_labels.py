"""Any folder of labels from outside the run is used as it was written, or refused in one line."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays, from_dtype

import cocomix
from cocomix.common import files, integrity
from cocomix.common.errors import InputError
from cocomix.concepts.label_checks import check_contents, verify_labels
from cocomix.concepts.label_store import features, load_labels
from cocomix.data.corpus import PACKED_FILE
from cocomix.data.packing import PackedInfo, load_packed
from cocomix.data.shards import Shard
from property_cases import CASES, DAMAGE, Cases, damaged

BLOCKS, T, A, C = {"train": 5, "validation": 2}, 4, 2, 30
Contents = tuple[list[Any], list[Any], list[Any], list[Any]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "corpus"
    for side, count in BLOCKS.items():
        ids = np.random.default_rng(count).integers(0, 50, (count, T))
        columns = Features({"input_ids": List(Value("uint8"), length=T)})
        Dataset.from_dict({"input_ids": list(ids)}, features=columns).save_to_disk(folder / side)
    described = {each.name: 0 for each in dataclasses.fields(PackedInfo)}
    sizes = {"block_size": T, "train_blocks": 5, "validation_blocks": 2, "fingerprint": "corpus"}
    files.write_json(folder / PACKED_FILE, described | sizes)
    return folder


@pytest.fixture(scope="module")
def labels(corpus: Path) -> Path:
    """Labels with weights, in two shards of training blocks and one of validation blocks."""
    folder = corpus.parent / "labels"
    ids = {side: np.random.default_rng(0).permuted(np.tile(np.arange(C), (count, T, 1)), axis=-1)[..., :A]
           for side, count in BLOCKS.items()}  # fmt: skip
    for each in ids.values():
        each[0, 0, 1] = -100
    weights = {side: np.where(each < 0, 0.0, 0.5) for side, each in ids.items()}
    cocomix.write_labels(
        folder, corpus, ids["train"], ids["validation"], num_concepts=C, blocks_per_shard=3,
        train_weights=weights["train"], validation_weights=weights["validation"],
    )  # fmt: skip
    return folder


def read(folder: Path, corpus: Path) -> Contents | None:
    """Open labels as a run does: their contents, or None if they are refused in one line."""
    try:
        labeled = load_labels(folder)
        verify_labels(folder)
        check_contents(labeled, load_packed(corpus), folder)
    except InputError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000, error
        return None
    assert labeled.train is not None
    sides, names = (labeled.train, labeled.validation), ("concept_ids", "concept_weights")
    return tuple(side[name][:] for side in sides for name in names)  # type: ignore[return-value]


def spoil(folder: Path, name: str, how: tuple[int, int] | str | bytes) -> None:
    """Damage a file, replace it by bytes or by another file of the folder, or delete it."""
    content = (folder / name).read_bytes()
    if isinstance(how, tuple):
        (folder / name).write_bytes(damaged(content, *how))
    elif isinstance(how, bytes):
        (folder / name).write_bytes(how)
    elif how:
        (folder / name).write_bytes((folder / how).read_bytes())
        (folder / how).write_bytes(content)
    else:
        (folder / name).unlink()


@pytest.mark.parametrize("recorded", ["all checksums", "checksums of shards"])
@pytest.mark.parametrize("cases", CASES)
def test_damaged_labels(cases: Cases, recorded: str, corpus: Path, labels: Path, tmp_path: Path) -> None:
    """Damaged or swapped files never change what a student learns; labels of older versions have fewer checksums."""
    names = sorted(path.relative_to(labels).as_posix() for path in labels.rglob("*") if path.is_file())
    names = [name for name in names if recorded == "all checksums" or name != integrity.SUMS_FILE]
    json_values = st.none() | st.integers() | st.text(max_size=4) | st.lists(st.integers(), max_size=2)
    other = st.binary(max_size=30) | json_values.map(json.dumps).map(str.encode)
    folder, expected = shutil.copytree(labels, tmp_path / "labels"), read(labels, corpus)
    assert expected is not None
    if recorded != "all checksums":
        (folder / integrity.SUMS_FILE).unlink()

    @cases.settings
    @given(st.sampled_from(names), DAMAGE | other | st.just("") | st.sampled_from(names))
    def check(name: str, how: tuple[int, int] | str | bytes) -> None:
        spoil(folder, name, how)
        try:
            assert read(folder, corpus) in (None, expected)
        finally:
            for changed in {name, how} & {*names}:
                shutil.copyfile(labels / changed, folder / changed)

    check()


def of_any_numbers(name: str, shape: tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
    kinds = {"concept_ids": st.integers(-101, C + 1), "concept_weights": from_dtype(np.dtype(np.float16))}
    return arrays({"concept_ids": np.int16, "concept_weights": np.float16}[name], shape, elements=kinds[name])


@pytest.mark.parametrize("cases", CASES)
def test_labels_of_another_program(cases: Cases, corpus: Path, labels: Path, tmp_path: Path) -> None:
    """Valid files with any numbers: NaN, infinity, ids of no concept, other tokens, another number of blocks."""
    folder = shutil.copytree(labels, tmp_path / "labels")
    (folder / integrity.SUMS_FILE).unlink()
    counts = Shard(folder, "validation", 0, 1).written().counts
    own = load_packed(corpus).validation.with_format("numpy")[:]["input_ids"]
    expected = load_labels(labels).validation.with_format("numpy")[:]

    @cases.settings
    @given(st.data())
    def check(data: st.DataObject) -> None:
        rows = data.draw(st.sampled_from([1, 2, 2, 2, 3]))
        shape = (rows, T, data.draw(st.sampled_from([A, A, A, 1])))
        ids = data.draw(of_any_numbers("concept_ids", shape))
        weights = data.draw(of_any_numbers("concept_weights", shape))
        tokens = np.resize(own, (rows, T)) + data.draw(st.sampled_from([0, 0, 0, 1])).__index__()
        columns = features(T, shape[-1], "uint8", C, has_weights=True)
        content = {"input_ids": tokens, "concept_ids": ids, "concept_weights": weights}
        Shard(folder, "validation", 0, 1).write(columns, content, counts)
        found = read(folder, corpus)
        if found is not None:
            has = ids != -100
            assert shape == expected["concept_ids"].shape and (tokens == own).all()
            assert ((ids >= 0) & (ids < C))[has].all()
            assert (np.isfinite(weights) & (weights > 0))[has].all() and (weights[~has] == 0).all()

    check()


@pytest.mark.parametrize(
    ("spoiled", "line"),
    [
        (lambda ids, weights: ids.__setitem__((1, 2, 0), C), "an id outside 0 to 29: block 1, token 2"),
        (lambda ids, weights: weights.__setitem__((1, 2, 0), np.nan), "a weight that is not positive"),
        (lambda ids, weights: weights.__setitem__((1, 2, 0), np.inf), "a weight that is not positive"),
    ],
)
def test_a_wrong_label_is_named(
    spoiled: Callable[..., None], line: str, corpus: Path, labels: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(labels, tmp_path / "labels")
    (folder / integrity.SUMS_FILE).unlink()
    labeled = load_labels(folder)
    content = {name: np.array(column) for name, column in labeled.validation.with_format("numpy")[:].items()}
    spoiled(content["concept_ids"], content["concept_weights"])
    shard = Shard(folder, "validation", 0, 1)
    shard.write(labeled.validation.features, content, shard.written().counts)
    with pytest.raises(InputError, match=line):
        check_contents(load_labels(folder), load_packed(corpus), folder)
