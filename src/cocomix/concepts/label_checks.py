"""Check labels that another run or another program wrote.

B blocks, T tokens per block, A labels per token.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset

from cocomix.common import integrity
from cocomix.common.errors import InputError
from cocomix.concepts.label_store import LabeledCorpus, LabelsInfo, read_labels_info
from cocomix.data.packing import PackedCorpus
from cocomix.data.shards import REPAIR, all_whole
from cocomix.models.losses import IGNORE

BLOCKS_PER_CHECK = 256
REMEDY = f"restore it, write the labels again, or {REPAIR}"


class Wrong(NamedTuple):
    """A label or weight that no labeling gives."""

    what: str
    block: int
    token: int


def wrong_label(ids: np.ndarray, weights: np.ndarray | None, num_concepts: int) -> Wrong | None:
    """Return the first impossible label or weight of labels (B, T, A), or None."""
    has = ids != IGNORE
    ordered = np.sort(ids, axis=-1)
    repeated = np.zeros(has.shape, bool)
    repeated[..., 1:] = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] != IGNORE)
    problems = {
        f"an id outside 0 to {num_concepts - 1}": has & ((ids < 0) | (ids >= num_concepts)),
        "the same label twice at one token": repeated,
    }
    if weights is not None:
        problems["a weight that is not positive in float16, or of an empty slot and not 0"] = ~np.isfinite(
            weights
        ) | np.where(has, weights.astype(np.float16) <= 0, weights != 0)
    for what, places in problems.items():
        if places.any():
            block, token, _ = np.argwhere(places)[0]
            return Wrong(what, int(block), int(token))
    return None


def verify_labels(folder: Path) -> None:
    """Check the checksums of a labeled corpus: those of all its files, or in older ones those of its shards.

    Raises:
        InputError: a file is damaged or missing.
    """
    if (folder / integrity.SUMS_FILE).is_file():
        integrity.verify(folder, REMEDY)
    elif not all_whole(folder, read_labels_info(folder).shards):
        raise InputError(f"the labels in {folder} are damaged: a shard differs from its recorded checksum; {REMEDY}")


def check_contents(labeled: LabeledCorpus, corpus: PackedCorpus, folder: Path) -> None:
    """Check every block of stored labels: its tokens are those of the corpus, its ids and weights are possible.

    Args:
        labeled: labels of both splits.
        corpus: corpus that they label.
        folder: labels folder, for errors.

    Raises:
        InputError: with the first block that is wrong.
    """
    for side, blocks, own in (
        ("train", labeled.train, corpus.train),
        ("validation", labeled.validation, corpus.validation),
    ):
        if blocks is None:
            continue
        problem = _split_problem(blocks, own, labeled.info)
        if problem is not None:
            raise InputError(f"the labels in {folder} cannot be used: {side} has {problem}; {REMEDY}")


def _split_problem(blocks: Dataset, own: Dataset, info: LabelsInfo) -> str | None:
    if len(blocks) != len(own):
        return f"{len(blocks)} blocks and the corpus {len(own)}"
    columns = {"input_ids", "concept_ids"} | ({"concept_weights"} if info.targets == "activation" else set())
    if lacking := columns - {*blocks.column_names}:
        return f"no column {min(lacking)}"
    found, expected = (each.with_format("numpy") for each in (blocks.select_columns(sorted(columns)), own))
    for start in range(0, len(blocks), BLOCKS_PER_CHECK):
        rows, ids = found[start : start + BLOCKS_PER_CHECK], expected[start : start + BLOCKS_PER_CHECK]["input_ids"]
        shape = (*ids.shape, info.labels_per_token)
        for name in columns - {"input_ids"}:
            if np.shape(rows[name]) != shape or rows[name].dtype.kind != ("f" if name == "concept_weights" else "i"):
                return f"{name} of shape {np.shape(rows[name])[1:]} and type {np.asarray(rows[name]).dtype}"
        if not np.array_equal(rows["input_ids"], ids):
            return f"other tokens than the corpus from block {start} on"
        if wrong := wrong_label(rows["concept_ids"], rows.get("concept_weights"), info.num_concepts):
            return f"{wrong.what}: block {start + wrong.block}, token {wrong.token}"
    return None
