"""Label a packed corpus with concepts, once, for every student, seed and ablation.

Any number of processes share the work: each makes shards of its own. B blocks, T tokens, A labels per token.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features
from torch import Tensor
from tqdm.auto import tqdm

from cocomix import files, processes
from cocomix.concepts.attribution import SELECTIONS, ConceptExtractor, ConceptLabels
from cocomix.concepts.label_store import (
    NOTHING,
    LabelCounts,
    LabelsInfo,
    Shard,
    bytes_per_block,
    features,
    finish_labels,
    shards_of,
)
from cocomix.concepts.reading import TeacherReader
from cocomix.console import say
from cocomix.errors import InputError
from cocomix.models.losses import IGNORE
from cocomix.suggest import did_you_mean

ALIGNMENTS = ("tokens", "characters")


@dataclass
class LabelsConfig:
    """How the corpus is labelled.

    Args:
        source: a labelled corpus made before, instead of labelling; it must fit the recipe's corpus.
        online: label the training blocks inside each training step instead of storing their labels. Costs the
            teacher's time in every run, and no disk.
        labels_per_token: A, concepts that each token is labelled with.
        selection: attribution (as published), attribution_abs, attribution_negative or activation.
        alignment: tokens, if the teacher reads the students' tokens; characters, if it has a tokenizer of its own,
            so that a student's token takes the labels of the teacher's token in which its last character lies.
        blocks_per_batch: blocks that the teacher reads at once.
        blocks_per_shard: blocks of one shard, which is finished or absent.
    """

    source: str | None = None
    online: bool = False
    labels_per_token: int = 4
    selection: str = "attribution"
    alignment: str = "tokens"
    blocks_per_batch: int = 16
    blocks_per_shard: int = 1024

    def problems(self) -> list[str]:
        """What cannot work about these settings, a line each."""
        found = []
        for name, known in (("selection", SELECTIONS), ("alignment", ALIGNMENTS)):
            value = getattr(self, name)
            if value not in known:
                hint = did_you_mean(value, known)
                found.append(f"labels.{name} is {value!r}; expected one of {', '.join(known)}{hint}")
        for name in ("labels_per_token", "blocks_per_batch", "blocks_per_shard"):
            if getattr(self, name) < 1:
                found.append(f"labels.{name} is {getattr(self, name)}; expected 1 or more")
        if self.online and self.source is not None:
            found.append("labels.source has no effect with labels.online; leave one of them out")
        if self.online and self.alignment == "characters":
            found.append(
                "labels.online needs a teacher that reads the students' tokens; with labels.alignment characters "
                "store the labels instead"
            )
        return found


@dataclass(frozen=True)
class Side:
    """One side of the corpus to label.

    Attributes:
        blocks: the students' blocks, column `input_ids`.
        reader: the same blocks as the teacher reads them.
    """

    blocks: Dataset
    reader: TeacherReader


def label_in_equal_batches(
    extractor: ConceptExtractor, input_ids: Tensor, attention_mask: Tensor | None, blocks_per_batch: int
) -> ConceptLabels:
    """Labels of input_ids (B, S), the teacher reading exactly `blocks_per_batch` blocks at a time.

    A last batch with fewer is filled up with repetitions: matrix products of another shape can differ in their
    last bit, and a block's labels must not depend on what it is read with, here or inside a training step.
    """
    parts = []
    for start in range(0, len(input_ids), blocks_per_batch):
        rows = torch.arange(start, start + blocks_per_batch).clamp(max=len(input_ids) - 1)
        mask = None if attention_mask is None else attention_mask[rows].to(extractor.teacher.device)
        labels = extractor(input_ids[rows].to(extractor.teacher.device), mask)
        parts.append(ConceptLabels(*(part[: len(input_ids) - start] for part in labels)))
    return ConceptLabels(*(torch.cat(part) for part in zip(*parts, strict=True)))


def label_corpus(
    extractor: ConceptExtractor, sides: dict[str, Side], folder: Path, config: LabelsConfig, plan: LabelsInfo
) -> LabelsInfo:
    """Label the sides of a corpus into `folder`, keeping its whole shards: an interrupted attempt goes on.

    Called by every process, each does its share. A shard whose bytes are not those that were written is named
    and made anew. That whole shards were made from the same things is the caller's to know, as `stages.Stage` does.

    Args:
        extractor: teacher, SAE and selection.
        sides: what to label, by name.
        folder: where to.
        config: settings.
        plan: what the labels are made from; counts are filled in.

    Raises:
        InputError: the disk is too small, or was full; whole shards are kept.
    """
    shards = {
        name: shards_of(folder, name, math.ceil(len(side.blocks) / config.blocks_per_shard))
        for name, side in sides.items()
    }
    if processes.is_first():
        for name in (*sides, "shards"):
            (folder / name).mkdir(parents=True, exist_ok=True)
    processes.wait_for_all()
    every = [shard for side in shards.values() for shard in side]
    discard_damaged(processes.share([shard for shard in every if shard.record_path.is_file()]))
    processes.wait_for_all()
    missing = [shard for shard in every if shard.record() is None]
    columns = {name: _columns(extractor, side.blocks) for name, side in sides.items()}
    if processes.is_first():
        _check_space(folder, sum(_blocks_of(s, sides, config) * bytes_per_block(columns[s.side]) for s in missing))
    processes.wait_for_all()  # only now, or one would see what another has just made

    _label_shards(extractor, processes.share(missing), sides, columns, config)
    processes.wait_for_all()

    info = _with_counts(plan, shards)
    if processes.is_first():
        finish_labels(folder, info, next(iter(columns.values())))
    return info


def discard_damaged(shards: list[Shard]) -> list[Shard]:
    """Delete the records of those that are no longer what was written, so that they are made anew; names them."""
    damaged = [shard for shard in shards if not shard.is_whole()]
    for shard in damaged:
        say(f"The shard {shard.path} is damaged (its checksum is not the recorded one) and is made anew.")
        shard.record_path.unlink(missing_ok=True)
    return damaged


def _columns(extractor: ConceptExtractor, blocks: Dataset) -> Features:
    ids = blocks.features["input_ids"]
    return features(ids.length, extractor.labels_per_token, ids.feature.dtype, extractor.sae.d_sae)


def _blocks_of(shard: Shard, sides: dict[str, Side], config: LabelsConfig) -> int:
    return min(config.blocks_per_shard, len(sides[shard.side].blocks) - shard.index * config.blocks_per_shard)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"the labels need another {needed / 1e9:.3g} GB, {folder} has {free / 1e9:.3g} GB left; free some space, "
            "lower labels.labels_per_token, or set labels.online, which stores none for training"
        )


def _label_shards(
    extractor: ConceptExtractor,
    shards: list[Shard],
    sides: dict[str, Side],
    columns: dict[str, Features],
    config: LabelsConfig,
) -> None:
    tokens = sum(_blocks_of(shard, sides, config) * columns[shard.side]["input_ids"].length for shard in shards)
    several = "" if processes.count() == 1 else f", this of {processes.count()} processes"
    with tqdm(
        total=tokens,
        desc=f"labels{several}",
        unit=" tokens",
        unit_scale=True,
        dynamic_ncols=True,
        disable=not processes.is_first(),
    ) as progress:
        for done, shard in enumerate(shards):
            try:
                _label_shard(extractor, shard, sides[shard.side], columns[shard.side], config, progress)
            except OSError as error:
                if not files.is_disk_full(error):
                    raise
                raise InputError(
                    f"no space left for {shard.path}; {done} of the {len(shards)} shards that this process had to make "
                    "are finished and kept: free some space and give the same command again"
                ) from None


def _label_shard(
    extractor: ConceptExtractor, shard: Shard, side: Side, columns: Features, config: LabelsConfig, progress: tqdm
) -> None:
    start = shard.index * config.blocks_per_shard
    stop = min(start + config.blocks_per_shard, len(side.blocks))
    concept_ids, counts = [], NOTHING
    for first in range(start, stop, config.blocks_per_batch):
        passages = side.reader(first, min(first + config.blocks_per_batch, stop))
        found = label_in_equal_batches(extractor, passages.input_ids, passages.attention_mask, config.blocks_per_batch)
        labels = ConceptLabels(*(passages.to_students(part.cpu()) for part in found))
        counts = counts.plus(_count(labels))
        concept_ids.append(labels.ids.numpy())
        progress.update(labels.ids[..., 0].numel())
    ids = side.blocks.select_columns("input_ids").with_format("numpy")[start:stop]["input_ids"]
    shard.write(columns, ids, np.concatenate(concept_ids), counts)


def _count(labels: ConceptLabels) -> LabelCounts:
    has = labels.ids != IGNORE  # (B, T, A)
    labelled = has.any(-1)
    return LabelCounts(
        tokens=labelled.numel(),
        labelled=int(labelled.sum()),
        full=int(has.all(-1).sum()),
        labels=int(has.sum()),
        fewer_positive=int((labelled & ~(labels.scores > 0).all(-1)).sum()),
        cut=int((labelled & labels.cut).sum()),
    )


def _with_counts(plan: LabelsInfo, shards: dict[str, list[Shard]]) -> LabelsInfo:
    """`plan`, completed by what was counted on the first of the sides."""
    total = NOTHING
    for shard in next(iter(shards.values())):
        total = total.plus(shard.written().counts)
    return dataclasses.replace(
        plan,
        labelled_share=total.labelled / total.tokens,
        full_share=total.full / total.tokens,
        mean_labels=total.labels / total.tokens,
        fewer_positive_share=total.fewer_positive / max(1, total.labelled),
        cut_tokens=total.cut,
        shards={name: len(side) for name, side in shards.items()},
    )
