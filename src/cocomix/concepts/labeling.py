"""Label a packed corpus with concepts, once for all students, seeds, and ablations.

Any number of processes can share the work; each writes separate shards. B blocks, T tokens, A labels per token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from datasets import Dataset, Features
from torch import Tensor
from transformers import PreTrainedModel

from cocomix.common import distributed
from cocomix.common.errors import did_you_mean
from cocomix.common.settings import Batch, Count, LabelsPerToken, Range
from cocomix.concepts.attribution import SELECTIONS, ConceptExtractor, ConceptLabels
from cocomix.concepts.label_store import LabelsInfo, features, finish_labels
from cocomix.concepts.reading import TeacherReader
from cocomix.data.shards import Part, Shard, describe, total_counts, write_shards
from cocomix.models.losses import IGNORE

ALIGNMENTS = ("tokens", "characters")
CONTROLS = ("none", "permuted")
TARGETS = ("uniform", "activation")
TOKEN = "token"
"""Selection without a teacher: labels by the id of the current token."""
EXTERNAL = "external"
"""Selection of labels that another program wrote (`label_writer`)."""
BLOCKS_PER_BATCH = 16
HIDDEN_STATES = 40
"""Upper estimate of the hidden states that one block keeps for its backward pass, in widths per token."""
MAX_TOKENS = 65_536
"""Tokens in a batch beyond which a GPU gains no speed."""
COMPARED_BLOCKS = 16
"""Number of validation blocks on which labels are compared with those of float32."""


@dataclass
class LabelsConfig:
    """The `labels` section of a recipe.

    Args:
        source: an existing labeled corpus to use instead of labeling; it must match the recipe's corpus.
        online: label the training blocks inside each training step instead of storing their labels. Every run then
            pays for the teacher, but no disk space is needed.
        labels_per_token: A, the number of concepts per token.
        selection: attribution (published), attribution_abs, attribution_negative or activation; or token, the
            labels_per_token labels by activation that are most frequent for the current token: a baseline without
            context; or external, for a source that `cocomix.write_labels` wrote.
        offset: label token t with the concepts of token t + offset; none where that is in another document or block.
        window: label token t with the concepts that stand out over the next `window` tokens instead of its own: those
            with the largest mean activation times log inverse frequency. Needs selection activation.
        control: permuted: exchange the labels at random among the tokens with the same id, by the recipe's seed, so
            that they depend on the token but not on its context; or none.
        targets: uniform: the labels of a token count equally in the concept loss; activation: in proportion to their
            activation.
        alignment: `tokens` if teacher and students share a tokenizer; `characters` if they do not. A student token
            then takes the labels of the teacher token that contains its last character.
        blocks_per_batch: blocks that the teacher reads at once. By default 16, and on a GPU as many as fit into half of
            its free memory.
        blocks_per_shard: blocks per shard. Shards are written atomically, so this is the work lost by an interruption.
    """

    source: str | None = None
    online: bool = False
    labels_per_token: LabelsPerToken = 4
    selection: str = "attribution"
    offset: Annotated[int, Range(0, 2**20)] = 0
    window: Annotated[int, Range(0, 2**20)] = 0
    control: str = "none"
    targets: str = "uniform"
    alignment: str = "tokens"
    blocks_per_batch: Batch | None = None
    blocks_per_shard: Count = 1024

    def problems(self) -> list[str]:
        """List the problems of these settings, one line each."""
        found = []
        choices = {
            "selection": (*SELECTIONS, TOKEN, EXTERNAL),
            "alignment": ALIGNMENTS,
            "control": CONTROLS,
            "targets": TARGETS,
        }
        for name, known in choices.items():
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
        return found + self._control_problems()

    def _control_problems(self) -> list[str]:
        """List the controls that exclude each other or the rest of these settings, one line each."""
        is_set = {
            "labels.offset": self.offset > 0,
            "labels.window": self.window > 0,
            "labels.control": self.control != "none",
            "labels.selection token": self.selection == TOKEN,
        }
        used = [key for key, given in is_set.items() if given]
        found = []
        if len(used) > 1:
            found.append(f"{' and '.join(used)} exclude each other; leave all but one of them out")
        if self.online and (used or self.targets != "uniform"):
            found.append(f"{(used or ['labels.targets activation'])[0]} needs stored labels; leave labels.online out")
        if self.selection == EXTERNAL and self.source is None:
            found.append("labels.selection external needs labels.source, a folder that cocomix.write_labels wrote")
        if self.selection == TOKEN and self.targets != "uniform":
            found.append(
                "labels.targets has no effect on labels.selection token, which reads no activation; leave it out"
            )
        if self.window and self.selection not in ("activation", TOKEN):
            found.append(
                f"labels.window selects by activation, but labels.selection is {self.selection!r}; "
                "set labels.selection to activation, or leave labels.window out"
            )
        if self.window and self.alignment == "characters":
            found.append("labels.window needs a teacher that reads the students' tokens; leave labels.alignment out")
        return found

    def base(self) -> LabelsConfig:
        """Return the settings of the labels from which these are computed; these if the teacher computes them."""
        if self.source is not None:
            return self
        selection = "activation" if self.selection == TOKEN else self.selection
        return dataclasses.replace(self, offset=0, control="none", selection=selection)

    def control_fields(self, seed: int) -> dict[str, Any]:
        """Return the fields of `LabelsInfo` that differ from those of `base`."""
        found = {"selection": self.selection, "offset": self.offset, "control": self.control}
        return found if self.control == "none" else {**found, "seed": seed}

    def suffix(self) -> str:
        """Return what distinguishes the folder of these labels, e.g. `activation-4-offset-1`."""
        parts = [self.selection, str(self.labels_per_token)]
        parts += [f"{name}-{value}" for name, value in (("offset", self.offset), ("window", self.window)) if value]
        parts += [self.control] if self.control != "none" else []
        return "-".join([*parts, *(["weighted"] if self.targets == "activation" else [])])

    def batch(self) -> int:
        """Return `blocks_per_batch`, or its default without a GPU."""
        return self.blocks_per_batch or BLOCKS_PER_BATCH

    def resolved(self) -> LabelsConfig:
        """Return the settings as records hold them: with every default, independent of the machine."""
        return dataclasses.replace(self, blocks_per_batch=self.batch())


def fitting_blocks(device: torch.device, teacher: PreTrainedModel, block_size: int) -> int:
    """Return how many blocks a frozen teacher reads at once: a constant, except on a GPU, where memory decides."""
    if device.type != "cuda":
        return BLOCKS_PER_BATCH
    free, _ = torch.cuda.mem_get_info(device)
    config = teacher.config.get_text_config()
    # Kept for the backward pass of each block; and the logits, in two precisions, where they are needed at once.
    per_token = teacher.dtype.itemsize * HIDDEN_STATES * config.hidden_size * config.num_hidden_layers
    per_token += (teacher.dtype.itemsize + 4) * config.vocab_size
    return blocks_that_fit(free, per_token, block_size)


def blocks_that_fit(free_bytes: int, bytes_per_token: int, block_size: int) -> int:
    """Return the largest power of two of blocks within half of the memory and `MAX_TOKENS`; at least 1.

    A power of two, because the last bits of a label depend on the batch, which should not change with every byte of
    free memory.
    """
    blocks = min(free_bytes // 2 // bytes_per_token, MAX_TOKENS) // block_size
    return 1 << max(0, blocks.bit_length() - 1)


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


def differing_share(
    extractor: ConceptExtractor, reference: ConceptExtractor, reader: TeacherReader, blocks_per_batch: int
) -> float:
    """Return the share of the reference's labels that `extractor` does not give, on the first blocks of `reader`."""
    passages = reader(0, min(COMPARED_BLOCKS, len(reader)))
    found, expected = (
        label_in_equal_batches(each, passages.input_ids, passages.attention_mask, blocks_per_batch).ids
        for each in (extractor, reference)
    )
    labeled = expected != IGNORE
    agree = (expected.unsqueeze(-1) == found.unsqueeze(-2)).any(-1) & labeled
    return 1 - (agree.sum() / labeled.sum().clamp(min=1)).item()


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
    columns = {name: _columns(extractor, side.blocks, config.targets) for name, side in sides.items()}

    def compute(name: str, start: int, stop: int) -> Iterator[Part]:
        for first in range(start, stop, config.batch()):
            passages = sides[name].reader(first, min(first + config.batch(), stop))
            found = label_in_equal_batches(extractor, passages.input_ids, passages.attention_mask, config.batch())
            labels = ConceptLabels(*(passages.to_students(part.cpu()) for part in found))
            arrays = {"concept_ids": labels.ids.numpy()}
            if config.targets == "activation":
                arrays["concept_weights"] = target_weights(labels).numpy()
            yield Part(arrays, count(labels))

    shards = write_shards(
        folder,
        {name: side.blocks for name, side in sides.items()},
        columns,
        compute,
        blocks_per_shard=config.blocks_per_shard,
        what="labels",
        remedy="lower labels.labels_per_token, or set labels.online, which stores none for training",
    )
    info = with_counts(plan, shards)
    if distributed.is_main_process():
        describe(folder, shards, next(iter(columns.values())))
        finish_labels(folder, info)
    return info


def _columns(extractor: ConceptExtractor, blocks: Dataset, targets: str) -> Features:
    ids = blocks.features["input_ids"]
    sizes = ids.length, extractor.labels_per_token, ids.feature.dtype, extractor.sae.d_sae
    return features(*sizes, has_weights=targets == "activation")


def target_weights(labels: ConceptLabels) -> Tensor:
    """Return (B, T, A) the activations of each token's labels divided by their sum, in float16; 0 without a label."""
    total = labels.activations.sum(-1, keepdim=True)
    smallest = torch.finfo(torch.float16).tiny  # a label with weight 0 would not be one
    weights = (labels.activations / total.clamp(min=torch.finfo(total.dtype).tiny)).clamp(min=smallest)
    return weights.masked_fill(labels.ids == IGNORE, 0.0).half()


def count(labels: ConceptLabels) -> dict[str, int]:
    """Count the tokens and labels of labeled blocks.

    Returns:
        `tokens`; `labelled`, tokens with a label; `full`, tokens with A labels; `labels`; `fewer_positive`, labeled
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


def count_ids(concept_ids: np.ndarray) -> dict[str, int]:
    """Count the tokens and labels (B, T, A) of blocks as `count` does, without scores."""
    has = concept_ids != IGNORE
    return {
        "tokens": has[..., 0].size,
        "labelled": int(has.any(-1).sum()),
        "full": int(has.all(-1).sum()),
        "labels": int(has.sum()),
        "fewer_positive": 0,
        "cut": 0,
    }


def with_counts(plan: LabelsInfo, shards: dict[str, list[Shard]]) -> LabelsInfo:
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
