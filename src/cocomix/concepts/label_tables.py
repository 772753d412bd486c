"""Predict labels without a model: from the current token, or from the previous and the current token.

N tokens, V vocabulary, C concepts, A labels per token, K predictions per token, P pairs of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
from datasets import Dataset
from scipy.sparse import csr_matrix, kron, vstack

from cocomix.data.blocks import Blocks

SAMPLE_BLOCKS = 4096
"""Training blocks in which labels are counted."""
BATCH_BLOCKS = 64
"""Blocks read at once."""


class Tokens(NamedTuple):
    """Tokens (N,), each with its predecessor, −1 for the first of a block."""

    current: np.ndarray
    previous: np.ndarray

    @classmethod
    def from_blocks(cls, ids: np.ndarray) -> Tokens:
        """Flatten blocks (B, T)."""
        previous = np.full_like(ids, -1)
        previous[:, 1:] = ids[:, :-1]
        return cls(ids.ravel(), previous.ravel())

    def at(self, positions: np.ndarray) -> Tokens:
        """Select some of the tokens."""
        return Tokens(self.current[positions], self.previous[positions])


class LabelTable(Protocol):
    """A prediction of labels from one or two tokens."""

    num_concepts: int

    def predictions(self, tokens: Tokens) -> np.ndarray:
        """Return the K most probable concepts (N, K) of each token, most probable first."""
        ...

    def probabilities(self, tokens: Tokens, concepts: np.ndarray) -> np.ndarray:
        """Return the probability of each of the concepts (N, A) as a label of its token; it is positive."""
        ...


class TokenTable:
    """Predict the most frequent labels of the current token, regardless of context.

    Ties, and tokens with fewer distinct labels than predictions, fall back on the most frequent labels overall.

    Args:
        counts: (V, C) how often each concept is a label of each token.
        k: predictions per token.

    Attributes:
        concepts: (V, K) predictions for each token, most frequent first; K = min(k, C).
        frequent: (K,) concepts that are most frequent overall.
        shares: (C,) frequency of each label overall, smoothed by one count.
    """

    def __init__(self, counts: csr_matrix, k: int) -> None:
        overall = np.asarray(counts.sum(0)).ravel()
        self.num_concepts = counts.shape[1]
        self.frequent = np.argsort(-overall, kind="stable")[:k]
        # Below one count, so that it never outweighs an observed label.
        prior = csr_matrix(
            (np.linspace(0.5, 0.25, len(self.frequent)), (np.zeros_like(self.frequent), self.frequent)),
            shape=(1, self.num_concepts),
        )
        scores = (counts + kron(np.ones((counts.shape[0], 1)), prior, format="csr")).tocsr()
        rows = np.repeat(np.arange(counts.shape[0]), np.diff(scores.indptr))
        self.concepts = _largest(rows, scores.indices, scores.data, len(self.frequent))
        self.shares = (overall + 1) / (overall.sum() + len(overall))
        self._counts = _Counts(counts)
        self._totals = np.asarray(counts.sum(1)).ravel()

    @classmethod
    def from_blocks(cls, blocks: Dataset, vocab_size: int, num_concepts: int, k: int) -> TokenTable:
        """Count the labels of the first `SAMPLE_BLOCKS` blocks; memory is proportional to the labels counted.

        Args:
            blocks: with columns `input_ids` (T,) and `concept_ids` (T, A).
            vocab_size: V.
            num_concepts: C.
            k: predictions per token.
        """
        shape = (vocab_size, num_concepts)
        counts = csr_matrix(shape, dtype=np.int64)
        for tokens, labels in labeled_batches(_sample(blocks)):
            has = labels >= 0
            current = np.broadcast_to(tokens.current[:, None], labels.shape)[has]
            counts = counts + csr_matrix((np.ones(len(current), np.int64), (current, labels[has])), shape=shape)
        return cls(counts, k)

    def predictions(self, tokens: Tokens) -> np.ndarray:
        """Return the predictions (N, K) for the current tokens."""
        return self.concepts[tokens.current]

    def probabilities(self, tokens: Tokens, concepts: np.ndarray) -> np.ndarray:
        """Return the share (N, A) of concepts among the token's labels, smoothed by one label as overall."""
        current = np.broadcast_to(tokens.current[:, None], concepts.shape)
        return (self._counts.at(current, concepts) + self.shares[concepts]) / (self._totals[current] + 1)


class BigramTable:
    """Predict labels from the previous and the current token, backing off to the current token.

    The probability of concept c after a pair that has n labels, of d distinct concepts, is
    (n_c + d · p_token(c)) / (n + d), as in Witten and Bell's smoothing; that of an unseen pair is p_token(c).

    Args:
        pairs: (P,) pairs previous · V + current, ascending.
        counts: (P, C) how often each concept is a label of the current token of each pair.
        vocab_size: V.
        token_table: the table to back off to.
    """

    def __init__(self, pairs: np.ndarray, counts: csr_matrix, vocab_size: int, token_table: TokenTable) -> None:
        unseen = csr_matrix((1, counts.shape[1]), dtype=counts.dtype)
        self.num_concepts = counts.shape[1]
        self._pairs, self._vocab_size, self._token_table = pairs, vocab_size, token_table
        self._labels = vstack([counts, unseen], format="csr")
        self._counts = _Counts(self._labels)
        self._totals = np.asarray(self._labels.sum(1)).ravel()
        self._distinct = np.diff(self._labels.indptr)

    @classmethod
    def from_blocks(cls, blocks: Dataset, vocab_size: int, token_table: TokenTable) -> BigramTable:
        """Count the labels of the blocks in which `TokenTable.from_blocks` counts them."""
        pairs, concepts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for tokens, labels in labeled_batches(_sample(blocks)):
            has = (labels >= 0) & (tokens.previous >= 0)[:, None]
            pair = tokens.previous.astype(np.int64) * vocab_size + tokens.current
            pairs.append(np.broadcast_to(pair[:, None], labels.shape)[has])
            concepts.append(labels[has])
        known, rows = np.unique(np.concatenate(pairs), return_inverse=True)
        shape = (len(known), token_table.num_concepts)
        counts = csr_matrix((np.ones(len(rows), np.int64), (rows, np.concatenate(concepts))), shape=shape)
        return cls(known, counts, vocab_size, token_table)

    def predictions(self, tokens: Tokens) -> np.ndarray:
        """Return the most probable concepts (N, K): of the pair's labels and the token table's K predictions."""
        _, at, repeats = np.unique(self._pair(tokens), return_index=True, return_inverse=True)
        tokens = tokens.at(at)
        backoff, known = self._token_table.predictions(tokens), self._rows(tokens)
        other = self._counts.at(known[:, None], backoff) == 0  # not yet among the pair's labels
        labels = self._labels[known].tocoo()
        rows = np.concatenate([labels.row, np.nonzero(other)[0]])
        concepts = np.concatenate([labels.col, backoff[other]])
        scores = self.probabilities(tokens.at(rows), concepts[:, None]).ravel()
        return _largest(rows, concepts, scores, backoff.shape[1])[repeats]

    def probabilities(self, tokens: Tokens, concepts: np.ndarray) -> np.ndarray:
        """Return the smoothed share (N, A) of concepts among the pair's labels."""
        rows = np.broadcast_to(self._rows(tokens)[:, None], concepts.shape)
        backoff = self._token_table.probabilities(tokens, concepts)
        weight = np.where(self._totals[rows], self._distinct[rows], 1)  # an unseen pair has no labels
        return (self._counts.at(rows, concepts) + weight * backoff) / (self._totals[rows] + weight)

    def _pair(self, tokens: Tokens) -> np.ndarray:
        """Return the number (N,) of each pair; those of a block's first token are negative."""
        return tokens.previous.astype(np.int64) * self._vocab_size + tokens.current

    def _rows(self, tokens: Tokens) -> np.ndarray:
        """Return the row (N,) of each pair in the counts; unseen pairs have the last row."""
        pairs = self._pair(tokens)
        rows = np.searchsorted(self._pairs, pairs)
        found = np.append(self._pairs, -self._vocab_size - 1)[rows] == pairs
        return np.where(found, rows, len(self._pairs))


class _Counts:
    """Look up many entries of a sparse matrix, which SciPy searches linearly."""

    def __init__(self, counts: csr_matrix) -> None:
        counts = counts.sorted_indices()
        rows = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
        self._columns = counts.shape[1]
        self._places = np.append(rows * self._columns + counts.indices, -1)  # the last stands for zero
        self._values = np.append(counts.data, 0)

    def at(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Return the entries at rows and columns, which broadcast."""
        wanted = rows * self._columns + columns
        found = np.searchsorted(self._places[:-1], wanted)
        return np.where(self._places[found] == wanted, self._values[found], 0)


class LabelTables(NamedTuple):
    """The tables that a model's predictions are compared with."""

    token: TokenTable
    bigram: BigramTable

    @classmethod
    def from_blocks(cls, blocks: Dataset, vocab_size: int, num_concepts: int, k: int) -> LabelTables:
        """Count the labels of both tables; see `TokenTable.from_blocks`."""
        token = TokenTable.from_blocks(blocks, vocab_size, num_concepts, k)
        return cls(token, BigramTable.from_blocks(blocks, vocab_size, token))


class LabelHits(NamedTuple):
    """Predictions that are labels, by concept (C,)."""

    predicted: np.ndarray
    """Predictions with as many per token as it has labels, A."""
    at_a: np.ndarray
    """Those that are labels."""
    mixed: np.ndarray
    """Predictions with k per token."""
    at_k: np.ndarray
    """Those that are labels."""


def label_hits(predictions: np.ndarray, labels: np.ndarray, k: int, num_concepts: int) -> LabelHits:
    """Count predictions and predicted labels.

    Args:
        predictions: (N, K), most probable first.
        labels: (N, A), negative where a token has fewer; tokens without labels do not count.
        k: at most K.
        num_concepts: C.
    """
    has = labels >= 0
    per_token = has.sum(-1, keepdims=True)
    matches = predictions[:, None, :] == np.where(has, labels, -1)[:, :, None]  # (N, A, K)
    ranks = np.where(matches.any(-1), matches.argmax(-1), max(matches.shape[1:]))
    position = np.arange(predictions.shape[1])[None]

    def count(concepts: np.ndarray) -> np.ndarray:
        return np.bincount(concepts, minlength=num_concepts)

    return LabelHits(
        predicted=count(predictions[position < per_token]),
        at_a=count(labels[ranks < per_token]),
        mixed=count(predictions[(position < k) & (per_token > 0)]),
        at_k=count(labels[ranks < k]),
    )


def labeled_batches(blocks: Dataset) -> Iterator[tuple[Tokens, np.ndarray]]:
    """Yield tokens (N,) and labels (N, A) of `BATCH_BLOCKS` blocks at a time."""
    rows = Blocks(blocks, ["input_ids", "concept_ids"])
    for start in range(0, len(blocks), BATCH_BLOCKS):
        batch = rows.batch(start, BATCH_BLOCKS)
        yield Tokens.from_blocks(batch["input_ids"].numpy()), batch["concept_ids"].flatten(0, 1).numpy()


def _sample(blocks: Dataset) -> Dataset:
    return blocks.select(range(min(SAMPLE_BLOCKS, len(blocks))))


def _largest(rows: np.ndarray, concepts: np.ndarray, scores: np.ndarray, k: int) -> np.ndarray:
    """Return the k concepts with the largest scores of each row, which has at least k; ties by position.

    Args:
        rows: (entries,) row of each entry; every row from 0 to the last has entries.
        concepts, scores: (entries,) of each entry.
        k: concepts per row.
    """
    order = np.lexsort((-scores, rows))
    sizes = np.bincount(rows)
    ranks = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return concepts[order][ranks < k].reshape(-1, k)
