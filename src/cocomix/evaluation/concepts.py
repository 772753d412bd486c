"""How well concepts are predicted: each of them by a model, and all by one that has learnt nothing about its input."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from cocomix.data.blocks import Blocks, collate

SAMPLE_BLOCKS = 4096
"""Training blocks from which frequencies are counted."""


def constant_recall(train: Dataset, validation: Dataset, num_concepts: int, k: int) -> float:
    """Share of the validation labels that are among the k most frequent training labels.

    The recall of predicting the same k concepts at every token: what a predictor has to beat.

    Args:
        train: blocks with `concept_ids` (T, A); the first `SAMPLE_BLOCKS` are counted.
        validation: the same.
        num_concepts: C.
        k: predictions per token.
    """

    def counts(blocks: Dataset) -> np.ndarray:
        total = np.zeros(num_concepts, dtype=np.int64)
        for part in blocks.select_columns("concept_ids").with_format("numpy").iter(batch_size=256):
            ids = part["concept_ids"]
            total += np.bincount(ids[ids >= 0], minlength=num_concepts)
        return total

    frequent = np.argsort(-counts(train.select(range(min(SAMPLE_BLOCKS, len(train))))), kind="stable")[:k]
    labels = counts(validation)
    return float(labels[frequent].sum() / max(1, labels.sum()))


class ConceptPredictions(NamedTuple):
    """How a model predicts each of C concepts on labelled blocks."""

    tokens: int
    """Tokens with a label."""
    labels: np.ndarray
    """(C,) int64 tokens that it is a label of."""
    predicted: np.ndarray
    """(C,) int64 tokens with a label at which it is among the K concepts that are mixed in."""
    found: np.ndarray
    """(C,) int64 tokens at which it is both."""


@torch.no_grad()
def concept_predictions(model: PreTrainedModel, blocks: Dataset, batch_size: int) -> ConceptPredictions:
    """Count labels and predictions of each concept, and where they meet.

    Args:
        model: one with concepts, in evaluation mode.
        blocks: with `input_ids` (T,) and `concept_ids` (T, A), −100 for none.
        batch_size: blocks read at once.
    """
    concepts, k = model.config.num_concepts, model.config.num_active_concepts
    labels, predicted, found = (torch.zeros(concepts, dtype=torch.long) for _ in range(3))
    tokens, rows = 0, Blocks(blocks, ["input_ids", "concept_ids"])
    for start in range(0, len(rows), batch_size):
        batch = collate(rows.__getitems__(list(range(start, min(start + batch_size, len(rows))))))
        ids = batch["concept_ids"]  # (B, T, A)
        z = model(batch["input_ids"].to(model.device), output_concepts=True, use_cache=False).concept_logits
        top = z.topk(k, dim=-1).indices.cpu()  # (B, T, K)
        is_label = ids >= 0
        labelled = is_label.any(-1)
        hit = is_label & (ids.unsqueeze(-1) == top.unsqueeze(-2)).any(-1)  # (B, T, A)
        tokens += int(labelled.sum())
        labels += ids[is_label].bincount(minlength=concepts)
        predicted += top[labelled].flatten().bincount(minlength=concepts)
        found += ids[hit].bincount(minlength=concepts)
    return ConceptPredictions(tokens, labels.numpy(), predicted.numpy(), found.numpy())
