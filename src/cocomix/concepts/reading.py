"""Read the students' blocks as the teacher does.

B blocks of T student tokens; R passages of S teacher tokens, one or more per block.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cocomix.data.documents import DocumentTokens


class Passages(NamedTuple):
    """Blocks as the teacher reads them."""

    input_ids: Tensor
    """(R, S) the teacher's tokens, int64."""
    attention_mask: Tensor | None
    """(R, S) 0 at padding, which is on the right; None if there is none."""
    token_of: Tensor | None
    """(B, T) index among all R · S of the teacher token that labels each student token; None if both read the same
    tokens."""
    documents: np.ndarray | None
    """(R, S) index of the document of each teacher token, −1 for none; None if unknown."""

    def to_students(self, concept_ids: Tensor) -> Tensor:
        """Map labels (R, S, A) of teacher tokens to labels (B, T, A) of student tokens."""
        return concept_ids if self.token_of is None else concept_ids.flatten(0, 1)[self.token_of]


class TeacherReader(Protocol):
    """One split of a corpus, as the teacher reads it."""

    tokenizer: PreTrainedTokenizerBase
    """The teacher's tokenizer."""

    def __len__(self) -> int:
        """Number of blocks."""
        ...

    def __call__(self, start: int, stop: int) -> Passages:
        """Return what the teacher reads for the blocks `start` to `stop` − 1."""
        ...

    def source(self, document: int) -> str:
        """Return where a document was read from, given its index in `Passages.documents`."""
        ...


class SameTokens:
    """Reader for a teacher that shares the students' tokenizer: it reads their blocks unchanged."""

    def __init__(
        self, blocks: Dataset, tokenizer: PreTrainedTokenizerBase, documents: DocumentTokens | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self._ids = blocks.select_columns("input_ids").with_format("numpy")
        self._documents = documents

    def __len__(self) -> int:
        return len(self._ids)

    def __call__(self, start: int, stop: int) -> Passages:
        ids = self._ids[start:stop]["input_ids"].astype(np.int64)
        documents = None
        if self._documents is not None:
            documents = self._documents.number_of(start * ids.shape[1] + np.arange(ids.size)).reshape(ids.shape)
        return Passages(torch.from_numpy(ids), None, None, documents)

    def source(self, document: int) -> str:
        return "" if self._documents is None else self._documents.source(document)
