"""Label a packed corpus with concepts, once, for every student, seed and ablation.

A labelled corpus is the packed corpus with one more column, `concept_ids` (T, A), −100 for none, and a
`labels.json` that says from which corpus, teacher, SAE and settings it was made.
"""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, List, Value, load_from_disk
from tqdm.auto import tqdm

from cocomix import files
from cocomix.concepts.attribution import SELECTIONS, ConceptExtractor
from cocomix.errors import InputError

LABELS_FILE = "labels.json"


@dataclass
class LabelsConfig:
    """How the corpus is labelled.

    Args:
        source: a labelled corpus made before, instead of labelling; it must fit the recipe's corpus.
        labels_per_token: A, concepts that each token is labelled with.
        selection: attribution (as published), attribution_abs, attribution_negative or activation.
        blocks_per_batch: blocks that the teacher reads at once.
        blocks_per_shard: blocks of one shard, which is finished or absent.
    """

    source: str | None = None
    labels_per_token: int = 4
    selection: str = "attribution"
    blocks_per_batch: int = 16
    blocks_per_shard: int = 1024

    def problems(self) -> list[str]:
        """What cannot work about these settings, a line each."""
        found = []
        if self.selection not in SELECTIONS:
            found.append(f"labels.selection is {self.selection!r}; expected one of {', '.join(SELECTIONS)}")
        for name in ("labels_per_token", "blocks_per_batch", "blocks_per_shard"):
            if getattr(self, name) < 1:
                found.append(f"labels.{name} is {getattr(self, name)}; expected 1 or more")
        return found


@dataclass(frozen=True)
class LabelsInfo:
    """What a labelled corpus was made from. Training compares it with what the recipe says.

    Attributes:
        corpus: fingerprint of the packed corpus.
        teacher: fingerprint of the teacher's weights.
        sae: fingerprint of the SAE.
        teacher_layer: tapped block.
        num_concepts: C, latents of the SAE.
        labels_per_token: A.
        selection: criterion.
        labelled_share: share of the training tokens with at least one label.
        full_share: share of the training tokens with A labels.
    """

    corpus: str
    teacher: str
    sae: str
    teacher_layer: int
    num_concepts: int
    labels_per_token: int
    selection: str
    labelled_share: float = 0.0
    full_share: float = 0.0


@dataclass(frozen=True)
class LabelledCorpus:
    """A labelled corpus, memory-mapped: columns `input_ids` (T,) and `concept_ids` (T, A)."""

    train: Dataset
    validation: Dataset
    info: LabelsInfo


def check_labels(info: LabelsInfo, folder: Path, **expected: object) -> None:
    """Raise InputError unless each named field of `info` has the expected value."""
    for name, wanted in expected.items():
        found = getattr(info, name)
        if found != wanted:
            raise InputError(
                f"the labels in {folder} were made with {name} {found!r}, the recipe has {wanted!r}; "
                "label this corpus again, or change the recipe to what the labels were made with"
            )


def load_labels(folder: Path) -> LabelledCorpus:
    """Open a labelled corpus.

    Raises:
        InputError: there is none at `folder`.
    """
    if not (folder / LABELS_FILE).is_file():
        raise InputError(f"no labelled corpus at {folder}: expected train/, validation/ and {LABELS_FILE}")
    try:
        info = LabelsInfo(**files.read_json(folder / LABELS_FILE))
    except (TypeError, ValueError) as error:
        raise InputError(f"{folder / LABELS_FILE} does not describe a labelled corpus: {error}") from None
    return LabelledCorpus(load_from_disk(str(folder / "train")), load_from_disk(str(folder / "validation")), info)


def label_corpus(
    extractor: ConceptExtractor,
    train: Dataset,
    validation: Dataset,
    folder: Path,
    config: LabelsConfig,
    corpus_fingerprint: str,
    teacher_fingerprint: str,
) -> LabelsInfo:
    """Label both sides of a packed corpus into `files.partial(folder)`; the caller gives it its final name.

    Shards that are already there are kept: an interrupted attempt goes on. That they were made from the same
    things is the caller's to know, as `stages.Stage` does.
    """
    plan = LabelsInfo(
        corpus=corpus_fingerprint,
        teacher=teacher_fingerprint,
        sae=extractor.sae.fingerprint(),
        teacher_layer=extractor.teacher_layer,
        num_concepts=extractor.sae.d_sae,
        labels_per_token=extractor.labels_per_token,
        selection=extractor.selection,
    )
    unfinished = files.partial(folder)
    for name, blocks in (("train", train), ("validation", validation)):
        side = unfinished / name
        side.mkdir(parents=True, exist_ok=True)
        shards = math.ceil(len(blocks) / config.blocks_per_shard)
        with tqdm(total=blocks.num_rows, desc=f"labels, {name}", unit="block", dynamic_ncols=True) as progress:
            for index in range(shards):
                start = index * config.blocks_per_shard
                part = blocks.select(range(start, min(start + config.blocks_per_shard, len(blocks))))
                _label_shard(extractor, part, side / _shard_name(index, shards), config.blocks_per_batch, progress)
        _make_dataset_folder(side, shards)
    tokens, labelled, full = _coverage(unfinished / "train").tolist()
    info = LabelsInfo(**{**asdict(plan), "labelled_share": labelled / tokens, "full_share": full / tokens})
    files.write_json(unfinished / LABELS_FILE, asdict(info))
    return info


def _shard_name(index: int, shards: int) -> str:
    return f"data-{index:05d}-of-{shards:05d}.arrow"


def features(block_size: int, labels_per_token: int, token_type: str, num_concepts: int) -> Features:
    """Columns of a labelled corpus, each of the smallest type that fits."""
    label_type = "int16" if num_concepts <= np.iinfo(np.int16).max + 1 else "int32"
    return Features(
        {
            "input_ids": List(Value(token_type), length=block_size),
            "concept_ids": List(List(Value(label_type), length=labels_per_token), length=block_size),
        }
    )


def _label_shard(
    extractor: ConceptExtractor, blocks: Dataset, path: Path, blocks_per_batch: int, progress: tqdm
) -> None:
    """Write one shard, whole or not at all."""
    if path.exists():
        progress.update(len(blocks))
        return
    ids = blocks.with_format("numpy")[:]["input_ids"]
    labels = []
    for start in range(0, len(ids), blocks_per_batch):
        batch = torch.from_numpy(ids[start : start + blocks_per_batch].astype(np.int64))
        labels.append(extractor(batch.to(extractor.teacher.device)).ids.cpu().numpy())
        progress.update(len(batch))
    token_type = blocks.features["input_ids"].feature.dtype
    columns = features(ids.shape[1], extractor.labels_per_token, token_type, extractor.sae.d_sae)
    label_type = columns["concept_ids"].feature.feature.dtype
    shard = Dataset.from_dict(
        {
            "input_ids": list(ids.astype(token_type)),
            "concept_ids": list(np.concatenate(labels).astype(label_type)),
        },
        features=columns,
    )
    made = files.partial(path)
    shutil.rmtree(made, ignore_errors=True)
    shard.save_to_disk(str(made), num_shards=1)
    for description in ("dataset_info.json", "state.json"):
        os.replace(made / description, path.parent / description)
    os.replace(made / "data-00000-of-00001.arrow", path)  # last: a shard that is there needs nothing more
    made.rmdir()


def _make_dataset_folder(side: Path, shards: int) -> None:
    """Turn a folder of shards into one that `datasets.load_from_disk` opens."""
    state = files.read_json(side / "state.json")
    state["_data_files"] = [{"filename": _shard_name(index, shards)} for index in range(shards)]
    files.write_json(side / "state.json", state)


def _coverage(side: Path) -> np.ndarray:
    """Tokens, tokens with a label, tokens with a label in every slot."""
    counts = np.zeros(3, dtype=np.int64)
    for part in load_from_disk(str(side)).with_format("numpy").iter(batch_size=256):
        has = part["concept_ids"] >= 0
        counts += [has[..., 0].size, int(has.any(-1).sum()), int(has.all(-1).sum())]
    return counts
