"""Write labels from any program as a folder that `labels.source` reads.

B blocks, T tokens per block, A labels per token.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from cocomix.common import files, fingerprint
from cocomix.common.errors import InputError
from cocomix.concepts.label_checks import wrong_label
from cocomix.concepts.label_store import LabelsInfo, features, finish_labels
from cocomix.concepts.labeling import EXTERNAL, count_ids, with_counts
from cocomix.data.packing import load_packed
from cocomix.data.shards import Part, describe, write_shards

Labels = np.ndarray | Iterable[np.ndarray]
"""Labels (B, T, A) of all blocks of a split, or of consecutive parts of them."""


def write_labels(
    folder: str | Path,
    corpus: str | Path,
    train: Labels,
    validation: Labels,
    *,
    num_concepts: int,
    train_weights: Labels | None = None,
    validation_weights: Labels | None = None,
    blocks_per_shard: int = 1024,
) -> None:
    """Write labels of a packed corpus as a folder for a recipe's `labels.source`.

    The recipe also sets `labels.selection: external`, `labels.labels_per_token` to A and, with weights,
    `labels.targets: activation`.

    Args:
        folder: where to write; it must not exist.
        corpus: folder of the packed corpus, such as `runs/quickstart/corpus`.
        train: labels of the training blocks, in order: an array (B, T, A) of concept ids, −100 in an empty slot, or an
            iterable of such arrays for consecutive blocks, so that not all labels are in memory.
        validation: the same for the validation blocks.
        num_concepts: C; ids are below it.
        train_weights: relative weight > 0 of each label in the concept loss, 0 in an empty slot, in the form of
            `train`; by default labels count equally.
        validation_weights: the same for the validation blocks; required with `train_weights`.
        blocks_per_shard: blocks per file.

    Raises:
        InputError: no packed corpus, the folder exists, or labels or weights do not fit: another number of blocks,
            another shape, an id out of range or twice at one token, or a weight that is not positive.
    """
    folder, packed = Path(folder), load_packed(Path(corpus))
    unfinished = files.partial(folder)
    for path in (folder, unfinished):
        if os.path.lexists(path):
            raise InputError(f"{path} exists; choose another folder for the labels, or delete it")
    if (train_weights is None) != (validation_weights is None):
        raise InputError("weights were given for one of train and validation; give them for both or for neither")
    sides = {"train": packed.train, "validation": packed.validation}
    first, train = _with_first(train)
    if first.ndim != 3:
        raise InputError(f"labels have shape {first.shape}; expected (blocks, tokens, labels per token)")
    labels_per_token, block_size = first.shape[-1], packed.info.block_size
    shape = (block_size, labels_per_token)
    readers = {"train": _Reader("train", train, train_weights, shape, num_concepts)}
    readers["validation"] = _Reader("validation", validation, validation_weights, shape, num_concepts)

    def compute(side: str, start: int, stop: int) -> Iterator[Part]:
        arrays = readers[side].read(stop - start, of=len(sides[side]))
        yield Part(arrays, count_ids(arrays["concept_ids"]))

    token_type = packed.train.features["input_ids"].feature.dtype
    columns = features(block_size, labels_per_token, token_type, num_concepts, has_weights=train_weights is not None)
    info = LabelsInfo(
        corpus=packed.info.fingerprint,
        teacher="none",
        sae="none",
        teacher_layer=0,
        num_concepts=num_concepts,
        labels_per_token=labels_per_token,
        selection=EXTERNAL,
        alignment="tokens",
        targets="uniform" if train_weights is None else "activation",
    )
    unfinished.mkdir(parents=True)
    try:
        shards = write_shards(
            unfinished,
            sides,
            dict.fromkeys(sides, columns),
            compute,
            blocks_per_shard=blocks_per_shard,
            what="labels",
            remedy="give fewer labels per token",
        )
        for reader in readers.values():
            reader.require_end()
        describe(unfinished, shards, columns)
        content = fingerprint.hash_json([shard.written().sha256 for side in shards.values() for shard in side])
        finish_labels(unfinished, dataclasses.replace(with_counts(info, shards), content=content))
    except BaseException:
        shutil.rmtree(unfinished)
        raise
    files.finish(folder)


def _with_first(labels: Labels) -> tuple[np.ndarray, Labels]:
    """Return the first part of labels, and all of them."""
    if isinstance(labels, np.ndarray):
        return labels, labels
    parts = iter(labels)
    first = next(parts, None)
    if first is None:
        raise InputError("there are no labels of training blocks")
    return first, itertools.chain([first], parts)


class _Reader:
    """Cuts the labels and weights of a split into shards, and checks them.

    Args:
        side: train or validation.
        labels: of all blocks.
        weights: of all blocks, or None.
        shape: (T, A).
        num_concepts: C.
    """

    def __init__(
        self, side: str, labels: Labels, weights: Labels | None, shape: tuple[int, int], num_concepts: int
    ) -> None:
        self._side, self._shape, self._num_concepts = side, shape, num_concepts
        given = {"concept_ids": labels, "concept_weights": weights}
        self._blocks = {name: self._each_block(name, parts) for name, parts in given.items() if parts is not None}
        self._done = 0

    def read(self, count: int, of: int) -> dict[str, np.ndarray]:
        """Return the columns of the next `count` blocks, of the `of` blocks that the corpus has."""
        found = {}
        for name, blocks in self._blocks.items():
            rows = list(itertools.islice(blocks, count))
            if len(rows) < count:
                raise InputError(
                    f"{self._side} has {name} of {self._done + len(rows)} blocks; expected those of all {of} blocks of "
                    "the corpus"
                )
            found[name] = np.stack(rows)
        if wrong := wrong_label(found["concept_ids"], found.get("concept_weights"), self._num_concepts):
            raise InputError(f"{self._side} has {wrong.what}: block {self._done + wrong.block}, token {wrong.token}")
        self._done += count
        return found

    def require_end(self) -> None:
        """Raise InputError if there are more blocks than the corpus has."""
        for name, blocks in self._blocks.items():
            if next(blocks, None) is not None:
                raise InputError(f"{self._side} has {name} of more than the {self._done} blocks of the corpus")

    def _each_block(self, name: str, parts: Labels) -> Iterator[np.ndarray]:
        for part in [parts] if isinstance(parts, np.ndarray) else parts:
            part = np.asarray(part)
            kind = "iu" if name == "concept_ids" else "f"
            if part.ndim != 3 or part.shape[1:] != self._shape or part.dtype.kind not in kind:
                wanted = "integers" if kind == "iu" else "floating-point numbers"
                raise InputError(
                    f"{self._side} has {name} of shape {part.shape} and type {part.dtype}; expected {wanted} of shape "
                    f"(blocks, {self._shape[0]}, {self._shape[1]})"
                )
            yield from part
