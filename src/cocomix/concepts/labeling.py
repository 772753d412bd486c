"""Label a packed corpus with concepts, once for all students, seeds, and ablations.

Any number of processes can share the work; each writes separate shards. B blocks, T tokens, A labels per token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, Features
from torch import Tensor

from cocomix.common import distributed
from cocomix.common.errors import did_you_mean
from cocomix.common.settings import Batch, Count, LabelsPerToken
from cocomix.concepts.attribution import SELECTIONS, ConceptExtractor, ConceptLabels
from cocomix.concepts.label_store import LabelsInfo, features, finish_labels
from cocomix.concepts.reading import TeacherReader
from cocomix.data.shards import Part, Shard, describe, total_counts, write_shards
from cocomix.models.losses import IGNORE

ALIGNMENTS = ("tokens", "characters")


@dataclass
class LabelsConfig:
    """The `labels` section of a recipe.

    The paper selects concepts by attribution. The default, activation, learned faster in docs/results.md.

    Args:
        source: an existing labeled corpus to use instead of labeling; it must match the recipe's corpus.
        online: label the training blocks inside each training step instead of storing their labels. Every run then
            pays for the teacher, but no disk space is needed.
        labels_per_token: A, the number of concepts per token.
        selection: activation, attribution, attribution_abs or attribution_negative.
        alignment: `tokens` if teacher and students share a tokenizer; `characters` if they do not. A student token
            then takes the labels of the teacher token that contains its last character.
        blocks_per_batch: blocks that the teacher reads at once.
        blocks_per_shard: blocks per shard. Shards are written atomically, so this is the work lost by an interruption.
    """

    source: str | None = None
    online: bool = False
    labels_per_token: LabelsPerToken = 4
    selection: str = "activation"
    alignment: str = "tokens"
    blocks_per_batch: Batch = 16
    blocks_per_shard: Count = 1024

    def problems(self) -> list[str]:
        """List the problems of these settings, one line each."""
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
                "labels.online needs a teacher that reads the students' tokens; with labels.alignment characters, "
                "store the labels instead"
            )
        return found


@dataclass(frozen=True)
class Side:
    """One split of the corpus to label.

    Attributes:
        blocks: the students' blocks, with the column `input_ids`.
        reader: the same blocks as the teacher reads them.
    """

    blocks: Dataset
    reader: TeacherReader


def label_in_equal_batches(
    extractor: ConceptExtractor, input_ids: Tensor, attention_mask: Tensor | None, blocks_per_batch: int
) -> ConceptLabels:
    """Label input_ids (B, S) in batches of exactly `blocks_per_batch` blocks.

    A smaller last batch is padded by repeating a block. Matrix products of another shape can differ in the last bit,
    and the labels of a block must not depend on its batch, here or inside a training step.
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
    """Label the splits of a corpus into `folder`. Complete shards are kept, so an interrupted call can be resumed.

    Every rank must call this; the ranks share the work (`write_shards`).

    Args:
        extractor: teacher, SAE, and selection.
        sides: splits to label, by name.
        folder: destination.
        config: settings.
        plan: description of the labels; counts are filled in.

    Raises:
        InputError: the disk has too little space; complete shards are kept.
    """
    columns = {name: _columns(extractor, side.blocks) for name, side in sides.items()}

    def compute(name: str, start: int, stop: int) -> Iterator[Part]:
        for first in range(start, stop, config.blocks_per_batch):
            passages = sides[name].reader(first, min(first + config.blocks_per_batch, stop))
            found = label_in_equal_batches(
                extractor, passages.input_ids, passages.attention_mask, config.blocks_per_batch
            )
            labels = ConceptLabels(*(passages.to_students(part.cpu()) for part in found))
            yield Part({"concept_ids": labels.ids.numpy()}, count(labels))

    shards = write_shards(
        folder,
        {name: side.blocks for name, side in sides.items()},
        columns,
        compute,
        blocks_per_shard=config.blocks_per_shard,
        what="labels",
        remedy="lower labels.labels_per_token, or set labels.online, which stores none for training",
    )
    info = _with_counts(plan, shards)
    if distributed.is_main_process():
        describe(folder, shards, next(iter(columns.values())))
        finish_labels(folder, info)
    return info


def _columns(extractor: ConceptExtractor, blocks: Dataset) -> Features:
    ids = blocks.features["input_ids"]
    return features(ids.length, extractor.labels_per_token, ids.feature.dtype, extractor.sae.d_sae)


def count(labels: ConceptLabels) -> dict[str, int]:
    """Count the tokens and labels of labeled blocks.

    Returns:
        `tokens`; `labeled`, tokens with a label; `full`, tokens with A labels; `labels`; `fewer_positive`, labeled
        tokens with fewer than A positive scores; and `cut`, labeled tokens with more active latents than `max_active`.
    """
    has = labels.ids != IGNORE  # (B, T, A)
    labeled = has.any(-1)
    return {
        "tokens": labeled.numel(),
        "labelled": int(labeled.sum()),
        "full": int(has.all(-1).sum()),
        "labels": int(has.sum()),
        "fewer_positive": int((labeled & ~(labels.scores > 0).all(-1)).sum()),
        "cut": int((labeled & labels.cut).sum()),
    }


def _with_counts(plan: LabelsInfo, shards: dict[str, list[Shard]]) -> LabelsInfo:
    """Fill the counts of the first split into `plan`."""
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
