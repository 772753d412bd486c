"""Losses and concept predictions of a model on validation blocks.

B blocks, T tokens, C concepts, K active concepts, A labels per token.
"""

from __future__ import annotations

import contextlib
import math

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from cocomix.common import distributed
from cocomix.common.console import progress_bar
from cocomix.data.blocks import Blocks
from cocomix.models.configuration import CoCoMixConfig
from cocomix.models.losses import IGNORE, concept_loss, token_loss


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """Return the autocast context of a precision: none for `fp32`, matrix products in `bf16` or `fp16`."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def concept_hits(concept_logits: Tensor, concept_ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Count the labels that are among the k, or the A, largest concept logits of their token; 0-dimensional each.

    Args:
        concept_logits: (B, T, C).
        concept_ids: (B, T, A) labels, padded with −100; the second count uses each token's own number of labels.
        k: number of predictions per token.
    """
    most = max(k, concept_ids.shape[-1])
    predicted = concept_logits.topk(most, dim=-1).indices  # (B, T, max(K, A))
    found = (predicted.unsqueeze(-1) == concept_ids.unsqueeze(-2)).any(-1)  # (B, T, max(K, A))
    per_token = (concept_ids != IGNORE).sum(-1, keepdim=True)
    return found[..., :k].sum(), (found & (torch.arange(most, device=found.device) < per_token)).sum()


def evaluation_sums(model: PreTrainedModel, batch: dict[str, Tensor], precision: str) -> dict[str, Tensor | int]:
    """Compute the sums of `evaluate_model` for one batch; 0-dimensional."""
    ids, concept_ids = batch["input_ids"], batch.get("concept_ids")
    with autocast(model.device, precision):
        extra = {} if concept_ids is None else {"output_concepts": True}
        output = model(input_ids=ids, use_cache=False, **extra)
    found: dict[str, Tensor | int] = {"nll": token_loss(output.logits, ids, 1), "tokens": ids[:, 1:].numel()}
    if concept_ids is None:
        return found
    hits, hits_at_a = concept_hits(output.concept_logits, concept_ids, model.config.num_active_concepts)
    return found | {
        "concept_nll": concept_loss(output.concept_logits, concept_ids, 1),
        "labeled": (concept_ids != IGNORE).any(-1).sum(),
        "labels": (concept_ids != IGNORE).sum(),
        "hits": hits,
        "hits_at_a": hits_at_a,
    }


def batches_of_rank(starts: range) -> list[tuple[int, bool]]:
    """Return the first blocks of this rank's batches, each with whether it counts.

    All ranks get equally many batches, because a sharded model runs on all ranks at once. The padding repeats the first
    batch and does not count.
    """
    mine = distributed.shard(starts)
    padding = math.ceil(len(starts) / distributed.world_size()) - len(mine)
    return [(start, True) for start in mine] + [(starts[0], False)] * padding


@torch.no_grad()
def evaluate_model(
    model: PreTrainedModel, blocks: Dataset, batch_size: int, precision: str = "fp32", progress: bool = True
) -> dict[str, float]:
    """Compute mean losses over all blocks. Call it on every rank; each reads its share and all get the result.

    Args:
        model: a causal language model in evaluation mode.
        blocks: rows with the column `input_ids` (T,); with `concept_ids` (T, A), a CoCoMix model's concept
            predictions are scored too.
        batch_size: blocks per batch.
        precision: `fp32`, or `bf16` or `fp16` for matrix products.
        progress: show a progress bar.

    Returns:
        `loss` in nats per predicted token. For a CoCoMix model on labeled blocks also, over labeled tokens,
        `concept_loss` (nats per token), `concept_precision` (share of the K predicted concepts that are labels),
        `concept_recall` (share of labels that are predicted) and `concept_precision_at_a` (share of labels among as
        many predictions per token as it has labels, A).
    """
    assert not model.training, "evaluation in training mode"
    with_concepts = isinstance(model.config, CoCoMixConfig) and "concept_ids" in blocks.column_names
    rows = Blocks(blocks, ["input_ids", "concept_ids"] if with_concepts else ["input_ids"])
    sums: dict[str, float] = dict.fromkeys(
        ("nll", "tokens", "concept_nll", "labeled", "hits", "hits_at_a", "labels"), 0.0
    )
    for start, counts in progress_bar(
        batches_of_rank(range(0, len(blocks), batch_size)),
        desc="validation",
        unit="batch",
        leave=False,
        disable=not (progress and distributed.is_main_process()),
        delay=1.0,
    ):
        batch = {name: part.to(model.device) for name, part in rows.batch(start, batch_size).items()}
        found = evaluation_sums(model, batch, precision)
        if counts:
            for name, value in found.items():
                sums[name] += float(value)
    sums = distributed.sum_over(sums)
    metrics = {"loss": sums["nll"] / sums["tokens"]}
    if with_concepts and sums["labeled"]:
        metrics |= {
            "concept_loss": sums["concept_nll"] / sums["labeled"],
            "concept_precision": sums["hits"] / (sums["labeled"] * model.config.num_active_concepts),
            "concept_recall": sums["hits"] / sums["labels"],
            "concept_precision_at_a": sums["hits_at_a"] / sums["labels"],
        }
    return metrics


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Convert nats per token to bits per byte of text, which is comparable across tokenizers."""
    return loss / math.log(2) / bytes_per_token
