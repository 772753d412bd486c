"""A labelled corpus on disk: shards that are whole or absent, each with its checksum.

    labels.json            what it was made from, and what came out (`LabelsInfo`)
    train/, validation/    Arrow shards; columns `input_ids` (T,) and `concept_ids` (T, A), −100 for none
    shards/                a record of each shard: checksum and counts (`ShardRecord`)
    README.md              a dataset card, so that `datasets.load_dataset` and the hub know the splits

T tokens of a block, A labels per token.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value, load_from_disk

from cocomix import files, fingerprint
from cocomix.data.arrow import quiet
from cocomix.errors import InputError

LABELS_FILE = "labels.json"
SPLITS_FILE = "dataset_dict.json"
CARD_FILE = "README.md"
REPAIR = "run cocomix label with its recipe again, which makes just what is damaged anew"
SIDES = ("train", "validation")


@dataclass(frozen=True)
class LabelsInfo:
    """What a labelled corpus was made from, and how much of it has labels.

    Attributes:
        corpus: fingerprint of the packed corpus.
        teacher: fingerprint of the teacher's weights.
        sae: fingerprint of the SAE.
        teacher_layer: tapped block.
        num_concepts: C, latents of the SAE.
        labels_per_token: A.
        selection: criterion.
        alignment: how labels come from the teacher's tokens to the students'.
        online: whether training computes the labels of its own blocks, and only validation's are here.
        labelled_share: share of the tokens with at least one label.
        full_share: share of the tokens with A labels.
        mean_labels: labels per token.
        fewer_positive_share: of the labelled tokens, the share with fewer than A concepts whose score is positive.
        cut_tokens: labelled tokens at which the SAE had more active latents than were looked at.
        shards: number of shards of each side.
    """

    corpus: str
    teacher: str
    sae: str
    teacher_layer: int
    num_concepts: int
    labels_per_token: int
    selection: str
    alignment: str
    online: bool = False
    labelled_share: float = 0.0
    full_share: float = 0.0
    mean_labels: float = 0.0
    fewer_positive_share: float = 0.0
    cut_tokens: int = 0
    shards: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class LabelledCorpus:
    """A labelled corpus, memory-mapped: columns `input_ids` (T,) and `concept_ids` (T, A).

    Where labels are made online, `train` is None.
    """

    train: Dataset | None
    validation: Dataset
    info: LabelsInfo


class LabelCounts(NamedTuple):
    """What is counted of some blocks while they are labelled, in tokens; sums of two are those of both."""

    tokens: int
    labelled: int
    """With at least one label."""
    full: int
    """With a label in every slot."""
    labels: int
    """Labels, not tokens."""
    fewer_positive: int
    """Labelled, with fewer than A positive scores."""
    cut: int
    """Labelled, with more active latents than the SAE's encoder keeps."""

    def plus(self, other: LabelCounts) -> LabelCounts:
        """Both."""
        return LabelCounts(*(a + b for a, b in zip(self, other, strict=True)))


NOTHING = LabelCounts(0, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class ShardRecord:
    """Written after a shard: the shard is whole if it has this checksum."""

    sha256: str
    size_in_bytes: int
    blocks: int
    counts: LabelCounts


@dataclass(frozen=True)
class Shard:
    """One shard of a side, there or not.

    Attributes:
        folder: of the labelled corpus.
        side: train or validation.
        index, total: it is shard `index` of `total`, from 0.
    """

    folder: Path
    side: str
    index: int
    total: int

    @property
    def file_name(self) -> str:
        """As `datasets` names shards."""
        return f"data-{self.index:05d}-of-{self.total:05d}.arrow"

    @property
    def path(self) -> Path:
        """The Arrow file."""
        return self.folder / self.side / self.file_name

    @property
    def record_path(self) -> Path:
        """The record of the whole shard."""
        return self.folder / "shards" / f"{self.side}-{self.index:05d}-of-{self.total:05d}.json"

    def record(self) -> ShardRecord | None:
        """The record of a finished shard; None if there is none that can be read."""
        try:
            content = files.read_json(self.record_path)
            return ShardRecord(**{**content, "counts": LabelCounts(**content["counts"])})
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None

    def written(self) -> ShardRecord:
        """The record of a shard that is known to be finished."""
        record = self.record()
        assert record is not None, self.record_path
        return record

    def has_its_size(self) -> bool:
        """Whether the shard was finished and has the size that it had then: a look, not a proof."""
        record = self.record()
        return record is not None and self.path.is_file() and self.path.stat().st_size == record.size_in_bytes

    def is_whole(self) -> bool:
        """Whether the shard was finished and every byte is as it was then."""
        if not self.has_its_size():
            return False
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == self.written().sha256

    def write(self, columns: Features, input_ids: np.ndarray, concept_ids: np.ndarray, counts: LabelCounts) -> None:
        """Write the shard, whole or not at all: input_ids (blocks, T), concept_ids (blocks, T, A).

        The same blocks and labels give the same bytes.
        """
        content = _arrow_bytes(columns, input_ids, concept_ids)
        self.record_path.unlink(missing_ok=True)
        files.write_bytes(self.path, memoryview(content))
        record = ShardRecord(hashlib.sha256(content).hexdigest(), len(content), len(input_ids), counts)
        files.write_json(self.record_path, {**asdict(record), "counts": counts._asdict()})


def features(block_size: int, labels_per_token: int, token_type: str, num_concepts: int) -> Features:
    """Columns of a labelled corpus, each of the smallest type that fits."""
    label_type = "int16" if num_concepts <= np.iinfo(np.int16).max + 1 else "int32"
    return Features(
        {
            "input_ids": List(Value(token_type), length=block_size),
            "concept_ids": List(List(Value(label_type), length=labels_per_token), length=block_size),
        }
    )


def bytes_per_block(columns: Features) -> int:
    """What a block takes on disk."""
    ids, labels = columns["input_ids"], columns["concept_ids"]
    label = labels.feature.length * np.dtype(labels.feature.feature.dtype).itemsize
    return ids.length * (np.dtype(ids.feature.dtype).itemsize + label)


def _arrow_bytes(columns: Features, input_ids: np.ndarray, concept_ids: np.ndarray) -> pa.Buffer:
    """Both columns as an Arrow stream that `datasets` reads."""
    schema = columns.arrow_schema
    block_size, labels_per_token = concept_ids.shape[1:]
    token_type, label_type = schema.field("input_ids").type.value_type, schema.field("concept_ids").type.value_type
    tokens = pa.array(input_ids.ravel(), type=token_type)
    labels = pa.FixedSizeListArray.from_arrays(
        pa.array(concept_ids.ravel(), type=label_type.value_type), labels_per_token
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(
            pa.record_batch(
                [pa.FixedSizeListArray.from_arrays(array, block_size) for array in (tokens, labels)], schema=schema
            )
        )
    return sink.getvalue()


def shards_of(folder: Path, side: str, total: int) -> list[Shard]:
    """The shards of a side."""
    return [Shard(folder, side, index, total) for index in range(total)]


def finish_labels(folder: Path, info: LabelsInfo, columns: Features) -> None:
    """Describe the whole shards in `folder` for `datasets`: each side, both as splits, and on a dataset card."""
    for side, total in info.shards.items():
        empty, kept = folder / f"{side}.empty", folder / side
        with quiet():
            Dataset.from_dict({name: [] for name in columns}, features=columns).save_to_disk(str(empty))
        state = files.read_json(empty / "state.json")
        state["_data_files"] = [{"filename": shard.file_name} for shard in shards_of(folder, side, total)]
        state["_fingerprint"] = hashlib.sha256(
            "".join(shard.written().sha256 for shard in shards_of(folder, side, total)).encode()
        ).hexdigest()[:16]  # else a random one, and no two labellings would be alike
        files.write_json(kept / "state.json", state)
        files.write_json(kept / "dataset_info.json", files.read_json(empty / "dataset_info.json"))
        shutil.rmtree(empty)
    files.write_json(folder / SPLITS_FILE, _splits(info))
    files.write_text(folder / CARD_FILE, _dataset_card(info))
    files.write_json(folder / LABELS_FILE, asdict(info))


def load_labels(folder: Path) -> LabelledCorpus:
    """Open a labelled corpus.

    Raises:
        InputError: there is none at `folder`, or something of it is missing, cut off or unreadable.
    """
    info = read_labels_info(folder)
    for shard in all_shards(folder, info):
        if not shard.has_its_size():
            raise InputError(f"the shard {shard.path} is missing or cut off; {REPAIR}")
    try:
        sides = {side: load_from_disk(str(folder / side)) for side in info.shards}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"the labelled corpus {folder} cannot be read: {' '.join(str(error).split())[:160]}; {REPAIR}"
        ) from None
    return LabelledCorpus(sides.get("train"), sides["validation"], info)


def read_labels_info(folder: Path) -> LabelsInfo:
    """The `labels.json` of a labelled corpus; InputError if there is none that can be read."""
    if not (folder / LABELS_FILE).is_file():
        raise InputError(f"no labelled corpus at {folder}: expected train/, validation/ and {LABELS_FILE}")
    try:
        return LabelsInfo(**files.read_json(folder / LABELS_FILE))
    except (TypeError, ValueError) as error:
        raise InputError(f"{folder / LABELS_FILE} does not describe a labelled corpus ({error}); {REPAIR}") from None


def labels_fingerprint(info: LabelsInfo) -> str:
    """Fingerprint of labels: of what they were made from, and what was counted."""
    return fingerprint.of_json(asdict(info))


def all_shards(folder: Path, info: LabelsInfo) -> Iterator[Shard]:
    """The shards of both sides."""
    for side, total in info.shards.items():
        yield from shards_of(folder, side, total)


def all_whole(folder: Path) -> bool:
    """Whether every shard of a labelled corpus is as it was written, and what describes them is there."""
    try:
        info = load_labels(folder).info
        splits = files.read_json(folder / SPLITS_FILE)
    except (InputError, FileNotFoundError, ValueError):
        return False
    described = splits == _splits(info) and (folder / CARD_FILE).is_file()
    return described and all(shard.is_whole() for shard in all_shards(folder, info))


def check_labels(info: LabelsInfo, folder: Path, **expected: object) -> None:
    """Raise InputError unless each named field of `info` has the expected value."""
    for name, wanted in expected.items():
        found = getattr(info, name)
        if found != wanted:
            raise InputError(
                f"the labels in {folder} were made with {name} {found!r}, the recipe has {wanted!r}; "
                "label this corpus again, or change the recipe to what the labels were made with"
            )


def _splits(info: LabelsInfo) -> dict[str, list[str]]:
    return {"splits": list(info.shards)}


def _dataset_card(info: LabelsInfo) -> str:
    splits = "\n".join(f"  - split: {side}\n    path: {side}/*.arrow" for side in info.shards)
    rows = "\n".join(f"| {name} | {value} |" for name, value in asdict(info).items() if name != "shards")
    return f"""---
configs:
- config_name: default
  data_files:
{splits}
---

Blocks of tokens (`input_ids`) with the concepts that a teacher model used at each of them (`concept_ids`,
ids of sparse autoencoder latents, the most influential first, −100 for none).

    from datasets import load_dataset
    blocks = load_dataset("PATH/OF/THIS/FOLDER")

Made by cocomix from:

| | |
|---|---|
{rows}
"""
