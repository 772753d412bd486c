"""What a model that has learnt nothing about its input would score on concepts."""

from __future__ import annotations

import numpy as np
from datasets import Dataset

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
