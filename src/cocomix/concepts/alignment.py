"""Students whose tokenizer is not the teacher's: which teacher token labels which student token.

Labels move by characters: a student token takes those of the teacher token in which its last character lies.

B blocks, T tokens of a student's block, S tokens of the teacher's passage; n student and m teacher tokens of a text.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from cocomix.concepts.reading import Passages
from cocomix.data.documents import DocumentTokens
from cocomix.data.tokenizer import EncodedText, encode_with_ends
from cocomix.errors import InputError


def teacher_token_of(student_ends: np.ndarray, teacher_ends: np.ndarray) -> np.ndarray:
    """(n,) the index of the teacher token from which each student token takes its labels; it never decreases.

    It is the first teacher token that ends where the student token ends, or later. Where several tokens end at
    one place (the bytes of one character, say), the j-th of g student tokens takes the ⌈j · h / g⌉-th of the h
    teacher tokens that end there: the last takes the last, and equal ends give the identity.

    Args:
        student_ends: (n,) the character position at which each student token ends, not decreasing.
        teacher_ends: (m,) the same of the teacher's tokens; the last is not before the students' last.
    """
    first = np.searchsorted(teacher_ends, student_ends, side="left")
    h = np.searchsorted(teacher_ends, student_ends, side="right") - first
    group = np.searchsorted(student_ends, student_ends, side="left")
    g = np.searchsorted(student_ends, student_ends, side="right") - group
    j = np.arange(1, len(student_ends) + 1) - group
    return first + np.maximum(-(-j * h // g) - 1, 0)


class _Document(NamedTuple):
    """A document in both tokenizers, end-of-text included."""

    number: int
    student_ids: np.ndarray
    """(n,)"""
    teacher_ids: np.ndarray
    """(m,)"""
    token_of: np.ndarray
    """(n,) index in `teacher_ids` of each student token's teacher token."""


class OtherTokens:
    """The reader of a teacher with a tokenizer of its own: it reads the text behind the students' blocks.

    A block's passage begins after the teacher token of the student token before the block, or with that token
    where it reaches into the block, and ends with the teacher token of the block's last student token. Where the
    teacher's tokenizer puts a bos token before a text, each passage begins with one. A passage that is longer than
    the teacher's context is read in parts of equal length.

    Args:
        blocks: one side of the students' packed corpus.
        block_size: T.
        documents: the documents of that side.
        tokenizer: the students', with which the side was packed.
        teacher_tokenizer: the teacher's.
        context: how many tokens the teacher can read at once; None for any number.

    Raises:
        InputError: a tokenizer does not say where its tokens lie, or the documents are fewer than the blocks need.
    """

    def __init__(
        self,
        blocks: Dataset,
        block_size: int,
        documents: DocumentTokens,
        tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase,
        context: int | None = None,
    ) -> None:
        for whose, given in (("students'", tokenizer), ("teacher's", teacher_tokenizer)):
            if not given.is_fast:
                raise InputError(
                    f"the {whose} tokenizer ({type(given).__name__}) does not say where in a text its tokens lie, so "
                    "labels cannot be moved between tokenizers: give one with a tokenizer.json, or the same for both"
                )
        found = int(documents.ends[-1]) if len(documents) else 0
        if found < len(blocks) * block_size:
            raise InputError(
                f"the corpus has {len(blocks)} blocks of {block_size} tokens, its documents only {found} tokens: "
                "pack it anew"
            )
        self.tokenizer = teacher_tokenizer
        self._students = tokenizer
        self._ids = blocks.select_columns("input_ids").with_format("numpy")
        self._block_size = block_size
        self._documents = documents
        self._context = context
        self._bos = bos_of(teacher_tokenizer)
        self._kept: list[_Document] = []  # the last one read: the next blocks may begin in it

    def __len__(self) -> int:
        return len(self._ids)

    def __call__(self, start: int, stop: int) -> Passages:
        """What the teacher reads for the blocks `start` to `stop` − 1.

        Raises:
            InputError: the blocks are not what the students' tokenizer makes of the documents.
        """
        ids = self._ids[start:stop]["input_ids"].astype(np.int64)
        position = start * self._block_size
        first, last = self._documents.number_of(np.array([position, position + ids.size - 1])).tolist()
        begin = position - (int(self._documents.ends[first - 1]) if first else 0)  # of the blocks, in the documents
        parts = _between(self._encode(first, last + 1), begin, begin + ids.size)
        if not np.array_equal(np.concatenate([part.student_ids for part in parts]), ids.ravel()):
            raise InputError(
                f"blocks {start} to {start + len(ids) - 1} of the corpus are not what the students' tokenizer makes "
                "of their text: give the tokenizer that the corpus was packed with, or pack it anew"
            )
        lengths = np.array([len(part.teacher_ids) for part in parts])
        shifts = np.cumsum(lengths) - lengths
        token_of = np.concatenate([part.token_of + shift for part, shift in zip(parts, shifts, strict=True)])
        return self._passages(
            teacher_ids=np.concatenate([part.teacher_ids for part in parts]),
            numbers=np.repeat([part.number for part in parts], lengths),
            token_of=token_of.reshape(ids.shape),
        )

    def source(self, document: int) -> str:
        return self._documents.source(document)

    def _encode(self, first: int, stop: int) -> list[_Document]:
        """The documents `first` ≤ i < `stop`; the last is kept, so that a long one is not encoded for each batch."""
        documents = [document for document in self._kept if document.number == first]
        texts = self._documents.texts(first + len(documents), stop)
        if texts:
            students, teachers = (encode_with_ends(t, texts) for t in (self._students, self.tokenizer))
            for text, student, teacher in zip(texts, students, teachers, strict=True):
                student_ids, student_ends = _with_end_of_text(student, self._students.eos_token_id, text)
                teacher_ids, teacher_ends = _with_end_of_text(teacher, self.tokenizer.eos_token_id, text)
                token_of = teacher_token_of(student_ends, teacher_ends)
                documents.append(_Document(first + len(documents), student_ids, teacher_ids, token_of))
        self._kept = documents[-1:]
        return documents

    def _passages(self, teacher_ids: np.ndarray, numbers: np.ndarray, token_of: np.ndarray) -> Passages:
        """Cut the blocks' passages out of consecutive documents.

        Args:
            teacher_ids: (m,) the teacher's tokens of the documents, end to end, from the first block's first on.
            numbers: (m,) the document of each.
            token_of: (B, T) index in `teacher_ids` of each student token's teacher token.
        """
        ends = token_of[:, -1] + 1
        begins = np.minimum(token_of[:, 0], np.append(0, ends[:-1]))
        bos = len(self._bos)
        lengths = ends - begins
        parts = -(-lengths // (self._context - bos)) if self._context else np.ones_like(lengths)
        size = -(-lengths // parts)  # of a block's parts, the last of which may be shorter
        block = np.repeat(np.arange(len(lengths)), parts)  # (R,) of each row
        first_row = np.cumsum(parts) - parts
        row_begins = begins[block] + (np.arange(len(block)) - first_row[block]) * size[block]
        row_lengths = np.minimum(size[block], ends[block] - row_begins)
        column = np.arange(bos + row_lengths.max()) - bos  # 0 is the first token of the text
        present = column < row_lengths[:, None]  # (R, S)
        from_text = present & (column >= 0)
        index = np.where(from_text, row_begins[:, None] + column, 0)
        input_ids = np.where(from_text, teacher_ids[index], self.tokenizer.eos_token_id)
        input_ids[:, :bos] = self._bos
        part, place = np.divmod(token_of - begins[:, None], size[:, None])  # (B, T)
        return Passages(
            input_ids=torch.from_numpy(input_ids),
            attention_mask=None if present.all() else torch.from_numpy(present.astype(np.int64)),
            token_of=torch.from_numpy((first_row[:, None] + part) * len(column) + bos + place),
            documents=np.where(from_text, numbers[index], -1),
        )


def _between(documents: list[_Document], begin: int, stop: int) -> list[_Document]:
    """What the student tokens `begin` ≤ i < `stop` of the documents, end to end, are made of, document by document.

    Only that is worked on: a long document is not copied for each of its blocks.
    """
    parts = []
    for document in documents:
        low, high = max(begin, 0), min(stop, len(document.student_ids))
        if low < high:
            # From the token behind the last one that was read, or from that one where it reaches into this.
            behind = document.token_of[low - 1] + 1 if low else 0
            first, last = min(document.token_of[low], behind), document.token_of[high - 1]
            token_of = document.token_of[low:high] - first
            student_ids, teacher_ids = document.student_ids[low:high], document.teacher_ids[first : last + 1]
            parts.append(_Document(document.number, student_ids, teacher_ids, token_of))
        begin, stop = begin - len(document.student_ids), stop - len(document.student_ids)
    return parts


def bos_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that the tokenizer puts before a text, if it does."""
    start = tokenizer("a", add_special_tokens=True)["input_ids"][:1]
    return start if start == [tokenizer.bos_token_id] else []


def _with_end_of_text(encoded: EncodedText, eos_token_id: int, text: str) -> EncodedText:
    """A document's tokens with end-of-text behind them, which is as one more character of its text."""
    return EncodedText(np.append(encoded.ids, eos_token_id), np.append(encoded.ends, len(text) + 1))
