"""What the teacher reads for the students' blocks.

B blocks, T tokens of a student; R passages of S tokens of the teacher, one for each block or more.
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
    """Some blocks, as the teacher reads them."""

    input_ids: Tensor
    """(R, S) the teacher's tokens, int64."""
    attention_mask: Tensor | None
    """(R, S) 0 where a shorter passage is padded, on the right; None where none is."""
    token_of: Tensor | None
    """(B, T) the teacher token, of all R · S, whose concepts each student token is labelled with; None where both
    read the same tokens."""
    documents: np.ndarray | None
    """(R, S) number of the document of each teacher token, −1 for none; None where they are not known."""

    def to_students(self, concept_ids: Tensor) -> Tensor:
        """Labels (R, S, A) of the teacher's tokens as labels (B, T, A) of the students'."""
        return concept_ids if self.token_of is None else concept_ids.flatten(0, 1)[self.token_of]


class TeacherReader(Protocol):
    """One side of a corpus, as the teacher reads it."""

    tokenizer: PreTrainedTokenizerBase
    """The teacher's."""

    def __len__(self) -> int:
        """Number of blocks."""
        ...

    def __call__(self, start: int, stop: int) -> Passages:
        """What the teacher reads for the blocks `start` to `stop` − 1."""
        ...

    def source(self, document: int) -> str:
        """Where a document was read from, `documents` of some passages being its number."""
        ...


class SameTokens:
    """The reader of a teacher whose tokenizer is the students': it reads their blocks as they are."""

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
