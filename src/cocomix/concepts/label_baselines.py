"""Baselines for concept prediction that need no model: the most frequent labels, overall and of the current token.

B blocks, T tokens, N tokens of a batch, V vocabulary, C concepts, A labels per token, K predictions per token.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from datasets import Dataset
from scipy.sparse import csr_matrix, kron

from cocomix.data.blocks import Blocks, collate

SAMPLE_BLOCKS = 4096
"""Training blocks in which labels are counted."""
BATCH_BLOCKS = 64
"""Blocks read at once."""


class TokenTable:
    """Predict the most frequent labels of the current token, regardless of context.

    Ties, and tokens with fewer distinct labels than predictions, fall back on the most frequent labels overall.

    Args:
        counts: (V, C) how often each concept is a label of each token.
        k: predictions per token.

    Attributes:
        concepts: (V, K) predictions for each token, most frequent first; K = min(k, C).
        frequent: (K,) concepts that are most frequent overall.
    """

    def __init__(self, counts: csr_matrix, k: int) -> None:
        overall = np.asarray(counts.sum(0)).ravel()
        self.frequent = np.argsort(-overall, kind="stable")[:k]
        # Below one count, so that it never outweighs an observed label.
        prior = csr_matrix(
            (np.linspace(0.5, 0.25, len(self.frequent)), (np.zeros_like(self.frequent), self.frequent)),
            shape=(1, counts.shape[1]),
        )
        scores = (counts + kron(np.ones((counts.shape[0], 1)), prior, format="csr")).tocsr()
        entries = np.diff(scores.indptr)
        rows = np.repeat(np.arange(len(entries)), entries)
        order = np.lexsort((-scores.data, rows))
        ranks = np.arange(len(order)) - np.repeat(scores.indptr[:-1], entries)
        self.concepts = scores.indices[order][ranks < len(self.frequent)].reshape(len(entries), -1)
        self._counts = counts
        self._token_totals = np.asarray(counts.sum(1)).ravel()
        self._shares = (overall + 1) / (overall.sum() + len(overall))

    @classmethod
    def of_blocks(cls, blocks: Dataset, vocab_size: int, num_concepts: int, k: int) -> TokenTable:
        """Count the labels of the first `SAMPLE_BLOCKS` blocks; memory is proportional to the labels counted.

        Args:
            blocks: with columns `input_ids` (T,) and `concept_ids` (T, A).
            vocab_size: V.
            num_concepts: C.
            k: predictions per token.
        """
        shape = (vocab_size, num_concepts)
        counts = csr_matrix(shape, dtype=np.int64)
        for ids, labels in _batches(blocks.select(range(min(SAMPLE_BLOCKS, len(blocks))))):
            has = labels >= 0
            tokens = np.broadcast_to(ids[:, None], labels.shape)[has]
            counts = counts + csr_matrix((np.ones(len(tokens), np.int64), (tokens, labels[has])), shape=shape)
        return cls(counts, k)

    def hits(self, ids: np.ndarray, labels: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Count predicted labels by concept: (C,) at rank A, the number of labels of each token, and (C,) at rank k.

        Args:
            ids: (N,) tokens.
            labels: (N, A), negative where a token has fewer.
            k: at most K.
        """
        matches = self.concepts[ids][:, None, :] == labels[:, :, None]  # (N, A, K)
        ranks = np.where(matches.any(-1), matches.argmax(-1), max(matches.shape[1:]))
        per_token = (labels >= 0).sum(-1, keepdims=True)
        at_a, at_k = (np.bincount(labels[ranks < limit], minlength=len(self._shares)) for limit in (per_token, k))
        return at_a, at_k

    def losses(self, ids: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """(N,) concept loss of each labeled token, nats: the mean cross-entropy of its labels.

        The counts of each token are smoothed by one label with the overall distribution.

        Args:
            ids: (N,) tokens.
            labels: (N, A), negative where a token has fewer; each token has at least one.
        """
        has = labels >= 0
        tokens, concepts = np.broadcast_to(ids[:, None], labels.shape)[has], labels[has]
        seen = np.asarray(self._counts[tokens, concepts]).ravel()
        nll = np.zeros(labels.shape)
        nll[has] = -np.log((seen + self._shares[concepts]) / (self._token_totals[tokens] + 1))
        return nll.sum(-1) / has.sum(-1)


def label_baselines(
    known: Dataset, validation: Dataset, vocab_size: int, num_concepts: int, k: int
) -> dict[str, float]:
    """Evaluate the baselines on the validation labels.

    Args:
        known: blocks in which labels are counted, with `input_ids` (T,) and `concept_ids` (T, A).
        validation: blocks to evaluate on, with the same columns.
        vocab_size: V.
        num_concepts: C.
        k: predictions per token.

    Returns:
        `constant_recall` and `token_table_recall`, the shares of labels among the k most frequent labels overall and
        of the current token; `token_table_loss`, nats per labeled token; and `concept_loss_floor`, the loss of a
        prediction that knows the labels of each token. Empty if there are no validation labels.
    """
    table = TokenTable.of_blocks(known, vocab_size, num_concepts, k)
    constant = table_hits = labels_seen = labeled = 0
    loss = floor = 0.0
    for ids, labels in _batches(validation):
        per_token = (labels >= 0).sum(-1)
        ids, labels, per_token = (each[per_token > 0] for each in (ids, labels, per_token))
        labels_seen += int(per_token.sum())
        labeled += len(ids)
        constant += int(np.isin(labels, table.frequent).sum())
        table_hits += int(table.hits(ids, labels, k)[1].sum())
        loss += float(table.losses(ids, labels).sum())
        floor += float(np.log(per_token).sum())
    if not labeled:
        return {}
    return {
        "constant_recall": constant / labels_seen,
        "token_table_recall": table_hits / labels_seen,
        "token_table_loss": loss / labeled,
        "concept_loss_floor": floor / labeled,
    }


def _batches(blocks: Dataset) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield tokens (N,) and labels (N, A) of `BATCH_BLOCKS` blocks at a time."""
    rows = Blocks(blocks, ["input_ids", "concept_ids"])
    for start in range(0, len(blocks), BATCH_BLOCKS):
        batch = collate(rows.__getitems__(list(range(start, min(start + BATCH_BLOCKS, len(blocks))))))
        yield batch["input_ids"].flatten().numpy(), batch["concept_ids"].flatten(0, 1).numpy()
