"""Labels are stored as they were extracted, in shards that are whole or made anew."""

from __future__ import annotations

import dataclasses
import errno
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, List, Value, load_dataset, load_from_disk
from datasets import Features as DatasetFeatures

from cocomix import InputError
from cocomix.common import files
from cocomix.common.fingerprint import hash_json
from cocomix.concepts.attribution import ConceptExtractor
from cocomix.concepts.label_store import (
    LATER_FIELDS,
    LabelsInfo,
    features,
    labels_fingerprint,
    labels_whole,
    load_labels,
    read_labels_info,
)
from cocomix.concepts.labeling import (
    LabelsConfig,
    Side,
    blocks_that_fit,
    differing_share,
    fitting_blocks,
    label_corpus,
    label_in_equal_batches,
)
from cocomix.concepts.reading import SameTokens
from cocomix.concepts.sae import SparseAutoencoder
from cocomix.data import shards
from cocomix.data.shards import Shard, shards_of

BLOCKS, T, A, C = 11, 9, 3, 60
CONFIG = LabelsConfig(labels_per_token=A, selection="attribution", blocks_per_batch=2, blocks_per_shard=4)
PLAN = LabelsInfo("corpus", "teacher", "sae", 1, C, A, "attribution", "tokens")


@pytest.fixture
def extractor(random_teacher) -> ConceptExtractor:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64)

    sae = SparseAutoencoder(W_enc=draw(32, C), b_enc=draw(C), W_dec=draw(C, 32), b_dec=draw(32), k=6)
    return ConceptExtractor(random_teacher(), sae, 1, A, selection="attribution")


def blocks(count: int = BLOCKS) -> Dataset:
    ids = np.random.default_rng(0).integers(1, 53, (count, T)).astype(np.uint8)
    return Dataset.from_dict({"input_ids": list(ids)}, features=DatasetFeatures({"input_ids": List(Value("uint8"), T)}))


def sides() -> dict[str, Side]:
    made = {"train": blocks(), "validation": blocks(3)}
    return {name: Side(side, SameTokens(side, tokenizer=None)) for name, side in made.items()}


def label(extractor: ConceptExtractor, folder: Path) -> LabelsInfo:
    return label_corpus(extractor, sides(), folder, CONFIG, PLAN)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_stored_labels_are_the_extracted_ones(extractor, tmp_path):
    info = label(extractor, tmp_path)
    assert info.shards == {"train": 3, "validation": 1}
    stored = load_labels(tmp_path)
    assert stored.info == info
    for side, source in ((stored.train, blocks()), (stored.validation, blocks(3))):
        rows = side.with_format("numpy")[:]
        ids = np.array(source["input_ids"][:])
        assert rows["input_ids"].tolist() == ids.tolist()
        expected = extractor(torch.from_numpy(ids).long()).ids
        assert rows["concept_ids"].tolist() == expected.tolist()
    assert side.features["input_ids"].feature.dtype == "uint8"
    assert side.features["concept_ids"].feature.feature.dtype == "int16"


def test_what_is_counted(extractor, tmp_path):
    info = label(extractor, tmp_path)
    labels = extractor(torch.tensor(blocks()["input_ids"][:]))
    has = labels.ids >= 0
    assert info.labelled_share == pytest.approx(has.any(-1).double().mean().item()) == pytest.approx((T - 1) / T)
    assert info.full_share == pytest.approx(has.all(-1).double().mean().item())
    assert info.mean_labels == pytest.approx(has.sum().item() / has[..., 0].numel())
    few = has.any(-1) & ((labels.scores > 0).sum(-1) < A)
    assert 0 < info.fewer_positive_share == pytest.approx(few.sum().item() / has.any(-1).sum().item())
    assert info.cut_tokens == 0


@pytest.mark.filterwarnings("ignore:.*more than max_active")
def test_cut_tokens_are_the_labeled_ones_and_each_counted_once(extractor, tmp_path):
    """Neither the repetitions that fill a batch up, nor tokens that have no label."""
    weights = dict(extractor.sae.named_buffers())
    extractor.sae = SparseAutoencoder(**weights, threshold=torch.zeros(C), max_active=28)
    info = label(extractor, tmp_path)
    labels = extractor(torch.tensor(blocks()["input_ids"][:]))
    assert not labels.cut.all()
    assert info.cut_tokens == int(labels.cut[:, :-1].sum()) > 0


@pytest.mark.parametrize(("concepts", "expected"), [(32_768, "int16"), (32_769, "int32")])
def test_label_columns_are_as_small_as_the_ids_allow(concepts, expected):
    assert features(T, A, "uint16", concepts)["concept_ids"].feature.feature.dtype == expected


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8])
def test_a_block_has_the_same_labels_whatever_it_is_read_with(extractor, batch):
    """Bit for bit, in float32, as stored and online labels are compared."""
    extractor.teacher.float()
    extractor.sae.float()
    ids = torch.tensor(blocks(8)["input_ids"][:])
    whole = label_in_equal_batches(extractor, ids, None, 3)
    order = torch.randperm(8)
    mixed = [label_in_equal_batches(extractor, ids[part], None, 3) for part in order.split(batch)]
    assert torch.equal(torch.cat([labels.ids for labels in mixed]), whole.ids[order])


def test_a_second_run_makes_nothing_anew(extractor, tmp_path):
    label(extractor, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.arrow")}
    label(extractor, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.arrow")} == before


def spoil(shard: Path, how: str) -> None:
    if how == "one byte":
        content = bytearray(shard.read_bytes())
        content[-100] ^= 1
        shard.write_bytes(content)
    elif how == "cut off":
        shard.write_bytes(shard.read_bytes()[:-3])
    elif how == "gone":
        shard.unlink()


@pytest.mark.parametrize("how", ["one byte", "cut off", "gone"])
def test_a_damaged_shard_is_named_and_made_anew(how, extractor, tmp_path, capsys):
    label(extractor, tmp_path)
    undamaged = content(tmp_path)
    damaged = tmp_path / "train" / "data-00001-of-00003.arrow"
    kept = tmp_path / "train" / "data-00000-of-00003.arrow"
    kept_since = kept.stat().st_mtime_ns
    spoil(damaged, how)
    assert not labels_whole(tmp_path)
    capsys.readouterr()
    label(extractor, tmp_path)
    assert f"{damaged} is damaged" in capsys.readouterr().err
    assert content(tmp_path) == undamaged
    assert kept.stat().st_mtime_ns == kept_since


def test_a_shard_without_a_record_is_made_anew(extractor, tmp_path):
    """Killed between the two files."""
    label(extractor, tmp_path)
    undamaged = content(tmp_path)
    (tmp_path / "shards" / "train-00002-of-00003.json").unlink()
    assert not labels_whole(tmp_path)
    label(extractor, tmp_path)
    assert content(tmp_path) == undamaged


@pytest.mark.parametrize("how", ["gone", "empty", "cut off"])
@pytest.mark.parametrize(
    "name",
    [
        "labels.json",
        "dataset_dict.json",
        "train/state.json",
        "validation/dataset_info.json",
        "shards/train-00001-of-00003.json",
    ],
)
def test_what_describes_the_shards_is_made_anew(name, how, extractor, tmp_path):
    label(extractor, tmp_path)
    undamaged = content(tmp_path)
    file = tmp_path / name
    if how == "empty":
        file.write_bytes(b"")
    else:
        spoil(file, how)
    assert not labels_whole(tmp_path)
    label(extractor, tmp_path)
    assert content(tmp_path) == undamaged
    assert labels_whole(tmp_path)


@pytest.mark.parametrize("name", ["train/state.json", "validation/dataset_info.json"])
def test_labels_that_datasets_cannot_open_are_refused_in_one_line(name, extractor, tmp_path):
    label(extractor, tmp_path)
    (tmp_path / name).write_text("{")
    with pytest.raises(InputError, match=r"cannot be read: .*; run cocomix label RECIPE") as caught:
        load_labels(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_cut_off_shard_is_refused_by_training(extractor, tmp_path):
    label(extractor, tmp_path)
    spoil(tmp_path / "validation" / "data-00000-of-00001.arrow", "cut off")
    with pytest.raises(InputError, match=r"data-00000-of-00001.arrow is missing or truncated; run cocomix label"):
        load_labels(tmp_path)


def test_a_full_disk_keeps_whole_shards_only(extractor, tmp_path, monkeypatch):
    written = []
    write = Path.write_bytes

    def fill_up(path: Path, content: bytes) -> int:
        if path.suffix == ".partial" and path.stem.endswith(".arrow"):
            written.append(path)
            if len(written) == 2:
                write(path, content[:50])
                raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", fill_up)
    with pytest.raises(InputError, match=r"no space left for .*data-00001-of-00003.arrow; 1 of the 4 shards") as caught:
        label(extractor, tmp_path)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.rglob("data-*")] == ["data-00000-of-00003.arrow"]
    assert Shard(tmp_path, "train", 0, 3).is_whole()
    monkeypatch.undo()
    label(extractor, tmp_path)
    assert labels_whole(tmp_path)


def test_a_disk_that_is_too_small_is_refused_before_labeling(extractor, tmp_path, monkeypatch):
    usage = shards.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(InputError, match=r"the labels need 8.82e-07 GB more, but .* has 1e-07 GB left"):
        label(extractor, tmp_path)
    assert not list(tmp_path.rglob("*.arrow"))


def test_datasets_opens_what_is_there(extractor, tmp_path):
    label(extractor, tmp_path / "labels")
    folder = str(tmp_path / "labels")
    expected = load_labels(tmp_path / "labels").train["concept_ids"][:]
    splits = load_from_disk(folder)
    assert {name: len(split) for name, split in splits.items()} == {"train": BLOCKS, "validation": 3}
    cache = str(tmp_path / "cache")
    for opened in (splits["train"], load_dataset(folder, split="train", cache_dir=cache)):
        assert opened["concept_ids"][:] == expected
    assert "| selection | attribution |" in (tmp_path / "labels" / "README.md").read_text()


def test_two_labelings_are_the_same_files(extractor, tmp_path):
    label(extractor, tmp_path / "a")
    label(extractor, tmp_path / "b")
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_records_survive_writing_and_reading(extractor, tmp_path):
    info = label(extractor, tmp_path)
    records = [shard.record() for shard in shards_of(tmp_path, read_labels_info(tmp_path).shards)]
    assert [record.blocks for record in records] == [4, 4, 3, 3]
    assert sum(record.counts["tokens"] for record in records[:3]) == BLOCKS * T
    assert info.shards == json.loads((tmp_path / "labels.json").read_text())["shards"]


@pytest.mark.parametrize("content", ["{", "[]", '{"corpus": "x"}'])
def test_a_broken_description_is_refused(content, extractor, tmp_path):
    label(extractor, tmp_path)
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(InputError, match=r"labels\.json does not describe a labeled corpus"):
        load_labels(tmp_path)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(path: Path, content: bytes) -> int:
        path.touch()
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="quota") as caught:
        files.write_bytes(tmp_path / "file", b"content")
    assert files.is_disk_full(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"selection": "atribution"}, "labels.selection is 'atribution'; .* did you mean 'attribution'"),
        ({"alignment": "bytes"}, "labels.alignment is 'bytes'; expected one of tokens, characters"),
        ({"online": True, "source": "x"}, "labels.source has no effect with labels.online"),
        ({"online": True, "alignment": "characters"}, "labels.online needs a teacher that reads the students' tokens"),
    ],
)
def test_settings_that_cannot_work(settings, expected):
    (problem,) = LabelsConfig(**settings).problems()
    assert re.search(expected, problem), problem


def test_the_share_of_differing_labels_is_counted_label_by_label(extractor, random_teacher):
    reader = sides()["validation"].reader
    assert differing_share(extractor, extractor, reader, 2) == 0.0
    other = ConceptExtractor(random_teacher(), extractor.sae, 1, A, selection="attribution_negative")
    found, expected = (
        [{*ids} - {-100} for ids in each(reader(0, 3).input_ids).ids.flatten(0, 1).tolist()]
        for each in (extractor, other)
    )
    differing = sum(len(one - two) for one, two in zip(expected, found, strict=True))
    assert differing_share(extractor, other, reader, 2) == pytest.approx(differing / sum(map(len, expected)))


def test_the_fingerprint_of_older_labels_is_unchanged_and_a_measured_share_is_no_part_of_it():
    added = {*LATER_FIELDS, "differing_share"}
    older = {name: value for name, value in dataclasses.asdict(PLAN).items() if name not in added}
    assert labels_fingerprint(PLAN) == hash_json(older)
    low = dataclasses.replace(PLAN, precision="bfloat16")
    assert labels_fingerprint(low) != labels_fingerprint(PLAN)
    assert labels_fingerprint(dataclasses.replace(low, differing_share=0.1)) == labels_fingerprint(low)


@pytest.mark.parametrize(
    ("free", "expected"), [(0, 1), (2 * 256 * 1000, 1), (7 * 256 * 1000, 2), (100 * 256 * 1000, 32), (10**15, 256)]
)
def test_a_batch_fills_half_of_the_free_memory(free, expected):
    assert blocks_that_fit(free, 1000, 256) == expected


def test_without_a_gpu_the_batch_is_constant(extractor):
    assert fitting_blocks(torch.device("cpu"), extractor.teacher, 256) == 16
    assert LabelsConfig().resolved() == LabelsConfig(blocks_per_batch=16)
