"""Label a packed corpus with concepts, once, for every student, seed and ablation.

Any number of processes share the work: each makes shards of its own. B blocks, T tokens, A labels per token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, Features
from torch import Tensor

from cocomix import processes
from cocomix.concepts.attribution import SELECTIONS, ConceptExtractor, ConceptLabels
from cocomix.concepts.label_store import LabelsInfo, features, finish_labels
from cocomix.concepts.reading import TeacherReader
from cocomix.data.shards import Part, Shard, describe, make_shards, total_counts
from cocomix.errors import did_you_mean
from cocomix.models.losses import IGNORE
from cocomix.settings import Batch, Count, LabelsPerToken

ALIGNMENTS = ("tokens", "characters")


@dataclass
class LabelsConfig:
    """How the corpus is labelled.

    As published the selection is attribution; activation, the default, learns sooner in docs/results.md.

    Args:
        source: a labelled corpus made before, instead of labelling; it must fit the recipe's corpus.
        online: label the training blocks inside each training step instead of storing their labels. Costs the
            teacher's time in every run, and no disk.
        labels_per_token: A, concepts that each token is labelled with.
        selection: activation, attribution, attribution_abs or attribution_negative.
        alignment: tokens, if the teacher reads the students' tokens; characters, if it has a tokenizer of its own,
            so that a student's token takes the labels of the teacher's token in which its last character lies.
        blocks_per_batch: blocks that the teacher reads at once.
        blocks_per_shard: blocks of one shard, which is finished or absent.
    """

    source: str | None = None
    online: bool = False
    labels_per_token: LabelsPerToken = 4
    selection: str = "activation"
    alignment: str = "tokens"
    blocks_per_batch: Batch = 16
    blocks_per_shard: Count = 1024

    def problems(self) -> list[str]:
        """What cannot work about these settings, a line each."""
        found = []
        for name, known in (("selection", SELECTIONS), ("alignment", ALIGNMENTS)):
            value = getattr(self, name)
            if value not in known:
                hint = did_you_mean(value, known)
                found.append(f"labels.{name} is {value!r}; expected one of {', '.join(known)}{hint}")
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

    Called by every process, each does its share (`make_shards`).

    Args:
        extractor: teacher, SAE and selection.
        sides: what to label, by name.
        folder: where to.
        config: settings.
        plan: what the labels are made from; counts are filled in.

    Raises:
        InputError: the disk is too small, or was full; whole shards are kept.
    """
    columns = {name: _columns(extractor, side.blocks) for name, side in sides.items()}

    def make(name: str, start: int, stop: int) -> Iterator[Part]:
        for first in range(start, stop, config.blocks_per_batch):
            passages = sides[name].reader(first, min(first + config.blocks_per_batch, stop))
            found = label_in_equal_batches(
                extractor, passages.input_ids, passages.attention_mask, config.blocks_per_batch
            )
            labels = ConceptLabels(*(passages.to_students(part.cpu()) for part in found))
            yield Part({"concept_ids": labels.ids.numpy()}, count(labels))

    shards = make_shards(
        folder,
        {name: side.blocks for name, side in sides.items()},
        columns,
        make,
        blocks_per_shard=config.blocks_per_shard,
        what="labels",
        remedy="lower labels.labels_per_token, or set labels.online, which stores none for training",
    )
    info = _with_counts(plan, shards)
    if processes.is_first():
        describe(folder, shards, next(iter(columns.values())))
        finish_labels(folder, info)
    return info


def _columns(extractor: ConceptExtractor, blocks: Dataset) -> Features:
    ids = blocks.features["input_ids"]
    return features(ids.length, extractor.labels_per_token, ids.feature.dtype, extractor.sae.d_sae)


def count(labels: ConceptLabels) -> dict[str, int]:
    """Figures of labelled blocks, in tokens: all, with a label, with one in every slot, and of the labelled ones
    those with fewer than A positive scores and those whose active latents were cut; and `labels`, which are counted.
    """
    has = labels.ids != IGNORE  # (B, T, A)
    labelled = has.any(-1)
    return {
        "tokens": labelled.numel(),
        "labelled": int(labelled.sum()),
        "full": int(has.all(-1).sum()),
        "labels": int(has.sum()),
        "fewer_positive": int((labelled & ~(labels.scores > 0).all(-1)).sum()),
        "cut": int((labelled & labels.cut).sum()),
    }


def _with_counts(plan: LabelsInfo, shards: dict[str, list[Shard]]) -> LabelsInfo:
    """`plan`, completed by what was counted on the first of the sides."""
    total = total_counts(next(iter(shards.values())))
    return dataclasses.replace(
        plan,
        labelled_share=total["labelled"] / total["tokens"],
        full_share=total["full"] / total["tokens"],
        mean_labels=total["labels"] / total["tokens"],
        fewer_positive_share=total["fewer_positive"] / max(1, total["labelled"]),
        cut_tokens=total["cut"],
        shards={name: len(side) for name, side in shards.items()},
    )
