"""Store, open, and check a labeled corpus on disk.

    labels.json            how it was labeled, and summary counts (`LabelsInfo`)
    train/, validation/    shards (`data.shards`); columns `input_ids` (T,) and `concept_ids` (T, A), −100 for none, and
                           where labels have weights `concept_weights` (T, A)
    README.md              a dataset card, so that `datasets.load_dataset` and the Hub find the splits

T tokens per block, A labels per token.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, List, Value

from cocomix.common import files, fingerprint
from cocomix.common.errors import InputError
from cocomix.data.shards import REPAIR, all_whole, open_shards

LABELS_FILE = "labels.json"
CARD_FILE = "README.md"


@dataclass(frozen=True)
class LabelsInfo:
    """How a corpus was labeled, and how many of its tokens have labels.

    Attributes:
        corpus: fingerprint of the packed corpus.
        teacher: fingerprint of the teacher's weights.
        sae: fingerprint of the SAE.
        teacher_layer: tapped block.
        num_concepts: C, latents of the SAE.
        labels_per_token: A.
        selection: criterion by which concepts were selected.
        alignment: how labels are transferred from the teacher's tokens to the students'.
        online: True if training labels its own blocks, so that only validation labels are stored.
        labelled_share: share of tokens with at least one label.
        full_share: share of tokens with A labels.
        mean_labels: mean number of labels per token.
        fewer_positive_share: among labeled tokens, the share with fewer than A concepts with a positive score.
        cut_tokens: labeled tokens at which the SAE had more active latents than `max_active`.
        shards: number of shards of each split.
        offset: tokens by which labels were moved; token t has those of token t + offset.
        window: number of next tokens over which concepts were selected; 0 if at the token itself.
        control: none, or how labels were changed to control for something.
        targets: whether the labels of a token count equally, or by their activation.
        seed: of a random control.
        content: fingerprint of the labels themselves, if another program computed them.
        precision: dtype of teacher and SAE, such as bfloat16; None for float32 and in older records.
        differing_share: with a `precision`, the share of labels that float32 would give and this does not, on a sample
            of the validation text; None if unknown.
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
    offset: int = 0
    window: int = 0
    control: str = "none"
    targets: str = "uniform"
    seed: int | None = None
    content: str | None = None
    precision: str | None = None
    differing_share: float | None = None


LATER_FIELDS = ("offset", "window", "control", "targets", "seed", "content", "precision")
"""Fields of `LabelsInfo` that older labels lack; default values do not enter a fingerprint."""


@dataclass(frozen=True)
class LabeledCorpus:
    """A memory-mapped labeled corpus with the columns `input_ids` (T,) and `concept_ids` (T, A).

    `train` is None if training labels its blocks online.
    """

    train: Dataset | None
    validation: Dataset
    info: LabelsInfo


def features(
    block_size: int, labels_per_token: int, token_type: str, num_concepts: int, has_weights: bool = False
) -> Features:
    """Return the columns of a labeled corpus, each with the smallest type that fits."""
    label_type = "int16" if num_concepts <= np.iinfo(np.int16).max + 1 else "int32"

    def per_label(kind: str) -> List:
        return List(List(Value(kind), length=labels_per_token), length=block_size)

    columns = {"input_ids": List(Value(token_type), length=block_size), "concept_ids": per_label(label_type)}
    return Features({**columns, "concept_weights": per_label("float16")} if has_weights else columns)


def finish_labels(folder: Path, info: LabelsInfo) -> None:
    """Write the description of complete shards: `labels.json` and the dataset card."""
    files.write_text(folder / CARD_FILE, _dataset_card(info))
    files.write_json(folder / LABELS_FILE, asdict(info))


def load_labels(folder: Path) -> LabeledCorpus:
    """Open a labeled corpus.

    Raises:
        InputError: `folder` holds none, or a part of it is missing, truncated, or unreadable.
    """
    info = read_labels_info(folder)
    sides = open_shards(folder, info.shards, "labeled corpus")
    return LabeledCorpus(sides.get("train"), sides["validation"], info)


def read_labels_info(folder: Path) -> LabelsInfo:
    """Read the `labels.json` of a labeled corpus; raise InputError if it is missing or unreadable."""
    if not (folder / LABELS_FILE).is_file():
        raise InputError(f"no labeled corpus at {folder}: expected train/, validation/ and {LABELS_FILE}")
    try:
        return LabelsInfo(**files.read_json(folder / LABELS_FILE))
    except (TypeError, ValueError) as error:
        raise InputError(f"{folder / LABELS_FILE} does not describe a labeled corpus ({error}); {REPAIR}") from None


def labels_fingerprint(info: LabelsInfo) -> str:
    """Return the fingerprint of labels: a hash of how they were computed and of their counts."""
    defaults = {each.name: each.default for each in fields(LabelsInfo) if each.name in LATER_FIELDS}
    described = {name: value for name, value in asdict(info).items() if defaults.get(name, ...) != value}
    del described["differing_share"]  # measured, and no part of what the labels are
    return fingerprint.hash_json(described)


def precision_remark(info: LabelsInfo) -> str | None:
    """Describe the precision in which the labels were computed; None if it was float32 or is unknown."""
    if info.precision is None or info.differing_share is None:
        return None
    return f"Computed in {info.precision}: {info.differing_share:.2%} of the labels differ from those of float32."


def labels_whole(folder: Path) -> bool:
    """Check that every shard has its recorded checksum and that their description exists."""
    try:
        info = load_labels(folder).info
    except InputError:
        return False
    return (folder / CARD_FILE).is_file() and all_whole(folder, info.shards)


def check_labels(info: LabelsInfo, folder: Path, **expected: object) -> None:
    """Raise InputError unless each of the `expected` fields of `info` has that value."""
    for name, wanted in expected.items():
        found = getattr(info, name)
        if found != wanted:
            raise InputError(
                f"the labels in {folder} were computed with {name} {found!r}, but the recipe has {wanted!r}; "
                "label this corpus again, or change the recipe to match the labels"
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

Blocks of tokens (`input_ids`) with the concepts that a teacher model used at each token (`concept_ids`:
ids of sparse autoencoder latents, most influential first, −100 for none).

    from datasets import load_dataset
    blocks = load_dataset("PATH/OF/THIS/FOLDER")

Created by cocomix from:

| | |
|---|---|
{rows}
"""
