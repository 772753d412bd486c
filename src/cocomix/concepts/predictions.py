"""Store the teacher's most probable next tokens at every token of a corpus, computed once for all students.

    predictions.json       how they were computed (`PredictionsInfo`)
    train/                 shards (`data.shards`); columns `input_ids` (T,) and the fields of `TopTokens`

Only training text is covered, because nothing is distilled on validation text. T tokens per block, k top tokens.
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
from cocomix.models.divergence import top_tokens

PREDICTIONS_FILE = "predictions.json"
SIDE = "train"


@dataclass(frozen=True)
class PredictionsInfo:
    """How stored predictions were computed.

    Attributes:
        corpus: fingerprint of the packed corpus.
        teacher: fingerprint of the teacher's weights.
        top_k: k.
        temperature: τ.
        mean_rest: mean mass of the tokens outside the top k.
        shards: number of shards.
    """

    corpus: str
    teacher: str
    top_k: int
    temperature: float
    mean_rest: float = 0.0
    shards: int = 0


def predict_corpus(
    teacher: PreTrainedModel,
    blocks: Dataset,
    folder: Path,
    plan: PredictionsInfo,
    *,
    vocab_size: int,
    blocks_per_batch: int,
    blocks_per_shard: int,
) -> PredictionsInfo:
    """Store the teacher's top tokens of `blocks` in `folder`. Every rank must call this; the ranks share the work.

    Args:
        teacher: frozen.
        blocks: training blocks.
        folder: destination; complete shards that it already holds are kept.
        plan: settings; `mean_rest` and `shards` are filled in.
        vocab_size: V; logits from this id on belong to no token and are ignored.
        blocks_per_batch: blocks that the teacher reads at once.
        blocks_per_shard: blocks per shard.

    Raises:
        InputError: top_k is not smaller than the vocabulary, or the disk has too little space.
    """
    if plan.top_k >= vocab_size:
        raise InputError(
            f"distillation.top_k is {plan.top_k}, but there are only {vocab_size} tokens: lower it, or leave it out"
        )
    ids = blocks.select_columns("input_ids").with_format("numpy")
    columns = prediction_columns(blocks.features["input_ids"], plan.top_k)

    @torch.no_grad()
    def compute(_: str, start: int, stop: int) -> Iterator[Part]:
        for first in range(start, stop, blocks_per_batch):
            batch = ids[first : min(first + blocks_per_batch, stop)]["input_ids"].astype(np.int64)
            logits = teacher(input_ids=torch.from_numpy(batch).to(teacher.device), use_cache=False).logits
            top = top_tokens(logits[..., :vocab_size], plan.top_k, plan.temperature)
            arrays = {f"teacher_{name}": tensor.cpu().numpy() for name, tensor in top._asdict().items()}
            # Counts are integers, whose sum does not depend on the order.
            yield Part(arrays, {"tokens": batch.size, "rest_in_millionths": int(top.log_rest.exp().sum() * 1e6)})

    shards = write_shards(
        folder,
        {SIDE: blocks},
        {SIDE: columns},
        compute,
        blocks_per_shard=blocks_per_shard,
        what="predictions",
        remedy="lower distillation.top_k, or leave it out: the teacher then runs in every training step",
    )[SIDE]
    counts = [shard.written().counts for shard in shards]
    mean_rest = sum(c["rest_in_millionths"] for c in counts) / sum(c["tokens"] for c in counts) / 1e6
    info = PredictionsInfo(plan.corpus, plan.teacher, plan.top_k, plan.temperature, mean_rest, len(shards))
    if distributed.is_main_process():
        describe(folder, {SIDE: shards}, columns)
        files.write_json(folder / PREDICTIONS_FILE, asdict(info))
    return info


def load_predictions(folder: Path) -> Dataset:
    """Open the training blocks with the teacher's predictions; raise InputError if they are damaged."""
    return open_shards(folder, {SIDE: read_predictions_info(folder).shards}, "teacher's predictions")[SIDE]


def read_predictions_info(folder: Path) -> PredictionsInfo:
    """Read the `predictions.json` of a folder; raise InputError if it is unreadable."""
    try:
        return PredictionsInfo(**files.read_json(folder / PREDICTIONS_FILE))
    except (FileNotFoundError, TypeError, ValueError) as error:
        raise InputError(f"{folder / PREDICTIONS_FILE} does not describe predictions ({error}); {REPAIR}") from None


def predictions_whole(folder: Path) -> bool:
    """Check that every shard has its recorded checksum and that their description exists."""
    try:
        load_predictions(folder)
    except InputError:
        return False
    return all_whole(folder, {SIDE: read_predictions_info(folder).shards})


def prediction_columns(ids: List, k: int) -> Features:
    """Return the columns of stored predictions; `ids` is the type of the corpus column `input_ids`."""
    per_token = {
        "teacher_ids": List(Value(ids.feature.dtype), length=k),
        "teacher_log_probs": List(Value("float32"), length=k),
        "teacher_log_rest": Value("float32"),
    }
    return Features({"input_ids": ids, **{name: List(column, length=ids.length) for name, column in per_token.items()}})
