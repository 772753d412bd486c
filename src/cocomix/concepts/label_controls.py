"""Labels computed from stored labels, to test what a student learns from them.

B blocks, T tokens per block, A labels per token, N = B · T tokens of a split.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset

from cocomix.common import distributed
from cocomix.concepts.label_store import LabeledCorpus, LabelsInfo, finish_labels
from cocomix.concepts.label_tables import TokenTable
from cocomix.concepts.labeling import TOKEN, LabelsConfig, count_ids, with_counts
from cocomix.data.blocks import stored_columns
from cocomix.data.shards import Part, describe, write_shards
from cocomix.models.losses import IGNORE

Columns = dict[str, np.ndarray]
"""`concept_ids` (B, T, A) and, for labels with weights, `concept_weights` (B, T, A)."""
Control = Callable[[str, int, int], Columns]
"""Computes the columns of the blocks `start` to `stop` − 1 of a split."""


def document_numbers(input_ids: np.ndarray, eos_token_id: int) -> np.ndarray:
    """Return (B, T) the number, within its block, of the document of each token; a document ends with end-of-text."""
    ends = input_ids == eos_token_id
    return ends.cumsum(-1) - ends


def offset_labels(columns: Columns, documents: np.ndarray, offset: int) -> Columns:
    """Move labels: token t takes those of token t + `offset`, and none beyond the end of its document or block."""
    same = np.zeros(documents.shape, bool)
    same[:, : documents.shape[1] - offset] = documents[:, offset:] == documents[:, : documents.shape[1] - offset]
    empty = {"concept_ids": IGNORE, "concept_weights": 0}
    return {
        name: np.where(same[..., None], np.roll(column, -offset, axis=1), empty[name]).astype(column.dtype)
        for name, column in columns.items()
    }


def permutation_within_types(input_ids: np.ndarray, is_labeled: np.ndarray, seed: int) -> np.ndarray:
    """Return (N,) the token from which each token takes its labels: another labeled one with the same id, at random.

    Among the labeled tokens with one id it is a uniformly drawn permutation. Tokens without labels keep none.

    Args:
        input_ids: (N,).
        is_labeled: (N,) bool.
        seed: decides the permutation.
    """
    source = np.arange(len(input_ids))
    labeled = np.flatnonzero(is_labeled)
    types = input_ids[labeled]
    shuffled = np.random.default_rng(seed).permutation(len(labeled))
    by_type = np.argsort(types, kind="stable")
    source[labeled[by_type]] = labeled[shuffled[np.argsort(types[shuffled], kind="stable")]]
    return source


def control_labels(
    base: LabeledCorpus, config: LabelsConfig, vocab_size: int, eos_token_id: int, seed: int, folder: Path
) -> LabelsInfo:
    """Write the labels of a control into `folder`. Every rank must call this; the ranks share the work.

    Args:
        base: labels from which they are computed.
        config: settings; exactly one of `offset`, `selection` token and `control` is set.
        vocab_size: V.
        eos_token_id: id of end-of-text, which ends documents.
        seed: permutation seed.
        folder: destination; complete shards that it already holds are kept.
    """
    assert base.train is not None, "labels of controls are stored"
    sides = {"train": base.train, "validation": base.validation}
    if config.control == "permuted":
        control = _permuted(sides, seed)
    elif config.selection == TOKEN:
        control = _most_frequent_of_token(sides, vocab_size, base.info)
    else:
        control = _offset(sides, eos_token_id, config.offset)

    def compute(side: str, start: int, stop: int) -> Iterator[Part]:
        columns = control(side, start, stop)
        yield Part(columns, count_ids(columns["concept_ids"]))

    columns = base.validation.features
    shards = write_shards(
        folder,
        sides,
        dict.fromkeys(sides, columns),
        compute,
        blocks_per_shard=config.blocks_per_shard,
        what="labels",
        remedy="lower labels.labels_per_token",
    )
    info = dataclasses.replace(
        with_counts(dataclasses.replace(base.info, **config.control_fields(seed)), shards),
        fewer_positive_share=base.info.fewer_positive_share,
        cut_tokens=base.info.cut_tokens,
    )
    if distributed.is_main_process():
        describe(folder, shards, columns)
        finish_labels(folder, info)
    return info


def _labels(blocks: Dataset, start: int, stop: int) -> tuple[np.ndarray, Columns]:
    """Read the tokens (B, T) of some blocks and their label columns."""
    found = stored_columns(blocks, start, stop)
    return found.pop("input_ids"), found


def _offset(sides: dict[str, Dataset], eos_token_id: int, offset: int) -> Control:
    def control(side: str, start: int, stop: int) -> Columns:
        ids, columns = _labels(sides[side], start, stop)
        return offset_labels(columns, document_numbers(ids, eos_token_id), offset)

    return control


def _most_frequent_of_token(sides: dict[str, Dataset], vocab_size: int, info: LabelsInfo) -> Control:
    table = TokenTable.from_blocks(sides["train"], vocab_size, info.num_concepts, info.labels_per_token).concepts

    def control(side: str, start: int, stop: int) -> Columns:
        ids, columns = _labels(sides[side], start, stop)
        has_label = (columns["concept_ids"] != IGNORE).any(-1, keepdims=True)
        return {"concept_ids": np.where(has_label, table[ids], IGNORE)}

    return control


def _permuted(sides: dict[str, Dataset], seed: int) -> Control:
    """Read all labels of a split at once, because a token may take those of any other."""
    read: dict[str, Columns] = {}

    def control(side: str, start: int, stop: int) -> Columns:
        if side not in read:
            ids, columns = _labels(sides[side], 0, len(sides[side]))
            is_labeled = (columns["concept_ids"] != IGNORE).any(-1)
            source = permutation_within_types(ids.ravel(), is_labeled.ravel(), seed)
            flat = {name: column.reshape(ids.size, -1) for name, column in columns.items()}
            read[side] = {name: column[source].reshape(columns[name].shape) for name, column in flat.items()}
        return {name: column[start:stop] for name, column in read[side].items()}

    return control
