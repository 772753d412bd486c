"""Baselines for concept prediction that need no model: the most frequent labels, overall and of one or two tokens."""

from __future__ import annotations

import numpy as np
from datasets import Dataset

from cocomix.concepts.label_tables import LabelTable, LabelTables, label_hits, labeled_batches


def label_baselines(
    known: Dataset, validation: Dataset, vocab_size: int, num_concepts: int, k: int
) -> dict[str, float]:
    """Evaluate the baselines on the validation labels.

    Args:
        known: blocks in which labels are counted, with `input_ids` (T,) and `concept_ids` (T, A).
        validation: blocks to evaluate on, with the same columns.
        vocab_size: V.
        num_concepts: C.
        k: predictions per token, K.

    Returns:
        `constant_recall`, `token_table_recall` and `bigram_table_recall`: shares of labels among the K most frequent
        labels overall and among the K predictions of the tables; `token_table_precision_at_a` and
        `bigram_table_precision_at_a`: shares of labels among as many predictions per token as it has labels;
        `constant_loss`, `token_table_loss` and `bigram_table_loss`: nats per labeled token, the mean cross-entropy of
        its labels; and `concept_loss_floor`: the loss of a prediction that knows the labels of each token. Empty if
        there are no validation labels.
    """
    # The tables predict no fewer concepts than a token has labels.
    per_token = validation.features["concept_ids"].feature.length
    tables = LabelTables.from_blocks(known, vocab_size, num_concepts, max(k, per_token))
    frequent, shares = tables.token.frequent[:k], tables.token.shares
    sums = dict.fromkeys(("labels", "tokens", "hits", "loss", "floor"), 0.0)
    named: dict[str, LabelTable] = {"token": tables.token, "bigram": tables.bigram}
    scores = {name: dict.fromkeys(("recall", "precision", "loss"), 0.0) for name in named}
    for tokens, labels in labeled_batches(validation):
        has = labels >= 0
        counted = np.flatnonzero(has.any(-1))
        tokens, labels, has = tokens.at(counted), labels[counted], has[counted]
        sums["labels"] += has.sum()
        sums["tokens"] += len(labels)
        sums["hits"] += np.isin(labels, frequent).sum()
        at = np.where(has, labels, 0)
        sums["loss"] += _loss(shares[at], has)
        sums["floor"] += np.log(has.sum(-1)).sum()
        for name, table in named.items():
            hits = label_hits(table.predictions(tokens), labels, k, num_concepts)
            scores[name]["recall"] += hits.at_k.sum()
            scores[name]["precision"] += hits.at_a.sum()
            scores[name]["loss"] += _loss(table.probabilities(tokens, at), has)
    if not sums["tokens"]:
        return {}
    found = {
        "constant_recall": sums["hits"] / sums["labels"],
        "constant_loss": sums["loss"] / sums["tokens"],
        "concept_loss_floor": sums["floor"] / sums["tokens"],
    }
    for name, score in scores.items():
        found[f"{name}_table_recall"] = score["recall"] / sums["labels"]
        found[f"{name}_table_precision_at_a"] = score["precision"] / sums["labels"]
        found[f"{name}_table_loss"] = score["loss"] / sums["tokens"]
    return {name: float(value) for name, value in found.items()}


def _loss(probabilities: np.ndarray, has: np.ndarray) -> float:
    """Sum over tokens the mean cross-entropy of their labels; `has` (N, A) marks the labels."""
    return float((-np.log(probabilities, where=has, out=np.zeros(has.shape)).sum(-1) / has.sum(-1)).sum())
