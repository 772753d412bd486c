"""A labelled corpus on disk: what it was made from, and how it is opened and checked.

    labels.json            what it was made from, and what came out (`LabelsInfo`)
    train/, validation/    shards (`data.shards`); columns `input_ids` (T,) and `concept_ids` (T, A), −100 for none
    README.md              a dataset card, so that `datasets.load_dataset` and the hub know the splits

T tokens of a block, A labels per token.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, List, Value

from cocomix import files, fingerprint
from cocomix.data.shards import REPAIR, all_whole, open_shards
from cocomix.errors import InputError

LABELS_FILE = "labels.json"
CARD_FILE = "README.md"


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


def features(block_size: int, labels_per_token: int, token_type: str, num_concepts: int) -> Features:
    """Columns of a labelled corpus, each of the smallest type that fits."""
    label_type = "int16" if num_concepts <= np.iinfo(np.int16).max + 1 else "int32"
    return Features(
        {
            "input_ids": List(Value(token_type), length=block_size),
            "concept_ids": List(List(Value(label_type), length=labels_per_token), length=block_size),
        }
    )


def finish_labels(folder: Path, info: LabelsInfo) -> None:
    """Say in the folder of whole shards what it holds."""
    files.write_text(folder / CARD_FILE, _dataset_card(info))
    files.write_json(folder / LABELS_FILE, asdict(info))


def load_labels(folder: Path) -> LabelledCorpus:
    """Open a labelled corpus.

    Raises:
        InputError: there is none at `folder`, or something of it is missing, cut off or unreadable.
    """
    info = read_labels_info(folder)
    sides = open_shards(folder, info.shards, "labelled corpus")
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
    return fingerprint.hash_json(asdict(info))


def labels_whole(folder: Path) -> bool:
    """Whether every shard of a labelled corpus is as it was written, and what describes them is there."""
    try:
        info = load_labels(folder).info
    except InputError:
        return False
    return (folder / CARD_FILE).is_file() and all_whole(folder, info.shards)


def check_labels(info: LabelsInfo, folder: Path, **expected: object) -> None:
    """Raise InputError unless each named field of `info` has the expected value."""
    for name, wanted in expected.items():
        found = getattr(info, name)
        if found != wanted:
            raise InputError(
                f"the labels in {folder} were made with {name} {found!r}, the recipe has {wanted!r}; "
                "label this corpus again, or change the recipe to what the labels were made with"
            )


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
