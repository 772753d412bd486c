"""Losses and concept predictions of a model on validation blocks.

B blocks, T tokens, C concepts, K concepts that the model mixes, A labels per token.
"""

from __future__ import annotations

import contextlib
import math

import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from cocomix import processes
from cocomix.data.blocks import Blocks, collate
from cocomix.models.configuration import CoCoMixConfig
from cocomix.models.losses import IGNORE, concept_loss, token_loss


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """The context in which a model of that precision runs: `fp32`, or `bf16` or `fp16` for its matrix products."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def concept_hits(concept_logits: Tensor, concept_ids: Tensor, k: int) -> Tensor:
    """Labels that are among their token's k largest concept logits; 0-dimensional count.

    Args:
        concept_logits: (B, T, C).
        concept_ids: (B, T, A), −100 for none.
        k: predictions per token.
    """
    predicted = concept_logits.topk(k, dim=-1).indices  # (B, T, K)
    found = predicted.unsqueeze(-1) == concept_ids.unsqueeze(-2)  # (B, T, K, A)
    return found.sum()


def evaluation_sums(model: PreTrainedModel, batch: dict[str, Tensor], precision: str) -> dict[str, Tensor | int]:
    """What `evaluate_model` adds up, of one batch; 0-dimensional."""
    ids, concept_ids = batch["input_ids"], batch.get("concept_ids")
    with autocast(model.device, precision):
        extra = {} if concept_ids is None else {"output_concepts": True}
        output = model(input_ids=ids, use_cache=False, **extra)
    found: dict[str, Tensor | int] = {"nll": token_loss(output.logits, ids, 1), "tokens": ids[:, 1:].numel()}
    if concept_ids is None:
        return found
    return found | {
        "concept_nll": concept_loss(output.concept_logits, concept_ids, 1),
        "labelled": (concept_ids != IGNORE).any(-1).sum(),
        "labels": (concept_ids != IGNORE).sum(),
        "hits": concept_hits(output.concept_logits, concept_ids, model.config.num_active_concepts),
    }


@torch.no_grad()
def evaluate_model(
    model: PreTrainedModel, blocks: Dataset, batch_size: int, precision: str = "fp32", progress: bool = True
) -> dict[str, float]:
    """Mean losses over all blocks; the model must be in evaluation mode.

    Called by every process, each reads its share of the blocks; all get the result.

    Returns:
        `loss`: nats per predicted token. For a CoCoMix model on labelled blocks also `concept_loss` (nats
        per labelled token), `concept_precision` (share of the K predicted concepts that are labels) and
        `concept_recall` (share of labels that are predicted), over labelled tokens.
    """
    assert not model.training, "evaluation in training mode"
    with_concepts = isinstance(model.config, CoCoMixConfig) and "concept_ids" in blocks.column_names
    rows = Blocks(blocks, ["input_ids", "concept_ids"] if with_concepts else ["input_ids"])
    sums: dict[str, float] = dict.fromkeys(("nll", "tokens", "concept_nll", "labelled", "hits", "labels"), 0.0)
    starts = range(0, len(blocks), batch_size)
    mine = processes.share(starts)
    # A sharded model runs in all processes at once: who has none left reads its first, or the first, once more.
    rounds = math.ceil(len(starts) / processes.count())
    for turn in tqdm(
        range(rounds),
        desc="validation",
        unit="batch",
        leave=False,
        disable=not (progress and processes.is_first()),
        delay=1.0,
    ):
        start = mine[turn] if turn < len(mine) else starts[0]
        indices = list(range(start, min(start + batch_size, len(blocks))))
        batch = {name: part.to(model.device) for name, part in collate(rows.__getitems__(indices)).items()}
        found = evaluation_sums(model, batch, precision)
        if turn < len(mine):
            for name, value in found.items():
                sums[name] += float(value)
    sums = processes.sum_over(sums)
    metrics = {"loss": sums["nll"] / sums["tokens"]}
    if with_concepts and sums["labelled"]:
        metrics |= {
            "concept_loss": sums["concept_nll"] / sums["labelled"],
            "concept_precision": sums["hits"] / (sums["labelled"] * model.config.num_active_concepts),
            "concept_recall": sums["hits"] / sums["labels"],
        }
    return metrics


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Nats per token as bits per byte of text, so that tokenizers compare."""
    return loss / math.log(2) / bytes_per_token
