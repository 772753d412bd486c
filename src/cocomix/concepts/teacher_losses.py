"""Store the teacher's next-token loss at every training token, computed once for all students.

    losses.json            how they were computed (`LossesInfo`)
    train/                 shards (`data.shards`); columns `input_ids` (T,) and `teacher_losses` (T,), float16, in nats

T tokens per block. The last token of a block has no next token, and the loss 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedModel

from cocomix.common import distributed, files
from cocomix.common.errors import InputError
from cocomix.data.shards import REPAIR, Part, all_whole, describe, open_shards, write_shards
from cocomix.models.linear_loss import token_losses
from cocomix.objectives.distillation import predictor
from cocomix.objectives.gate import COLUMN

LOSSES_FILE = "losses.json"
SIDE = "train"


@dataclass(frozen=True)
class LossesInfo:
    """How stored losses of a teacher were computed.

    Attributes:
        corpus: fingerprint of the packed corpus.
        teacher: fingerprint of the teacher's weights.
        mean_loss: in nats per token with a next token.
        shards: number of shards.
    """

    corpus: str
    teacher: str
    mean_loss: float = 0.0
    shards: int = 0


def losses_of_corpus(
    teacher: PreTrainedModel,
    blocks: Dataset,
    folder: Path,
    plan: LossesInfo,
    *,
    vocab_size: int,
    blocks_per_batch: int,
    blocks_per_shard: int,
) -> LossesInfo:
    """Store the teacher's losses on `blocks` in `folder`. Every rank must call this; the ranks share the work.

    Args:
        teacher: frozen.
        blocks: training blocks.
        folder: destination; complete shards that it already holds are kept.
        plan: settings; `mean_loss` and `shards` are filled in.
        vocab_size: V; logits from this id on belong to no token and are ignored.
        blocks_per_batch: blocks that the teacher reads at once.
        blocks_per_shard: blocks per shard.

    Raises:
        InputError: the disk has too little space.
    """
    ids = blocks.select_columns("input_ids").with_format("numpy")
    columns = loss_columns(blocks.features["input_ids"])
    predict = predictor(teacher, vocab_size)

    def compute(_: str, start: int, stop: int) -> Iterator[Part]:
        for first in range(start, stop, blocks_per_batch):
            batch = ids[first : min(first + blocks_per_batch, stop)]["input_ids"].astype(np.int64)
            tokens = torch.from_numpy(batch).to(teacher.device)
            losses = token_losses(predict(tokens), tokens).half().cpu()
            # Counts are integers, whose sum does not depend on the order.
            counts = {"tokens": batch[:, 1:].size, "nats_in_millionths": int(losses.double().sum() * 1e6)}
            yield Part({COLUMN: losses.numpy()}, counts)

    shards = write_shards(
        folder,
        {SIDE: blocks},
        {SIDE: columns},
        compute,
        blocks_per_shard=blocks_per_shard,
        what="losses",
        remedy="free some, or leave out the students' gate",
    )[SIDE]
    counts = [shard.written().counts for shard in shards]
    mean = sum(c["nats_in_millionths"] for c in counts) / sum(c["tokens"] for c in counts) / 1e6
    info = LossesInfo(plan.corpus, plan.teacher, mean, len(shards))
    if distributed.is_main_process():
        describe(folder, {SIDE: shards}, columns)
        files.write_json(folder / LOSSES_FILE, asdict(info))
    return info


def load_losses(folder: Path) -> Dataset:
    """Open the training blocks with the teacher's losses; raise InputError if they are damaged."""
    return open_shards(folder, {SIDE: _info(folder).shards}, "teacher's losses")[SIDE]


def losses_whole(folder: Path) -> bool:
    """Check that every shard has its recorded checksum and that their description exists."""
    try:
        load_losses(folder)
    except InputError:
        return False
    return all_whole(folder, {SIDE: _info(folder).shards})


def _info(folder: Path) -> LossesInfo:
    try:
        return LossesInfo(**files.read_json(folder / LOSSES_FILE))
    except (FileNotFoundError, TypeError, ValueError) as error:
        raise InputError(f"{folder / LOSSES_FILE} does not describe losses ({error}); {REPAIR}") from None


def loss_columns(ids: List) -> Features:
    """Return the columns of stored losses; `ids` is the type of the corpus column `input_ids`."""
    return Features({"input_ids": ids, COLUMN: List(Value("float16"), length=ids.length)})
