"""Align the tokens of students and a teacher with different tokenizers.

A student token takes the labels of the teacher token that contains its last character.

B blocks, T tokens per student block, S tokens per teacher passage; n student and m teacher tokens of a text.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from cocomix.common.errors import InputError
from cocomix.concepts.reading import Passages
from cocomix.data.documents import DocumentTokens
from cocomix.data.tokenizer import EncodedText, encode_with_ends


def align_tokens(student_ends: np.ndarray, teacher_ends: np.ndarray) -> np.ndarray:
    """Return (n,) the index of the teacher token from which each student token takes its labels, nondecreasing.

    It is the first teacher token that ends at or after the end of the student token. Where several tokens end at the
    same position (for example, the bytes of one character), the j-th of g student tokens takes the ⌈j · h / g⌉-th of
    the h teacher tokens that end there: the last takes the last, and equal ends give the identity.

    Args:
        student_ends: (n,) character position at which each student token ends, nondecreasing.
        teacher_ends: (m,) the same for the teacher's tokens; the last is at or after the students' last.
    """
    first = np.searchsorted(teacher_ends, student_ends, side="left")
    h = np.searchsorted(teacher_ends, student_ends, side="right") - first
    group = np.searchsorted(student_ends, student_ends, side="left")
    g = np.searchsorted(student_ends, student_ends, side="right") - group
    j = np.arange(1, len(student_ends) + 1) - group
    return first + np.maximum(-(-j * h // g) - 1, 0)


class _Document(NamedTuple):
    """A document in both tokenizations, including the end-of-text token."""

    number: int
    student_ids: np.ndarray
    """(n,)"""
    teacher_ids: np.ndarray
    """(m,)"""
    token_of: np.ndarray
    """(n,) index in `teacher_ids` of the teacher token of each student token."""


class OtherTokens:
    """Reader for a teacher with a different tokenizer: it reads the text of the students' blocks.

    The passage of a block begins after the teacher token of the student token before the block, or with that token
    if it extends into the block. It ends with the teacher token of the block's last student token. If the teacher's
    tokenizer starts a text with a BOS token, so does each passage. A passage longer than the teacher's context is
    read in parts of equal length.

    Args:
        blocks: one split of the students' packed corpus.
        block_size: T.
        documents: the documents of that split.
        tokenizer: the students' tokenizer, with which the split was packed.
        teacher_tokenizer: the teacher's tokenizer.
        context: maximum number of tokens that the teacher reads at once; None for no limit.

    Raises:
        InputError: a tokenizer does not report the positions of its tokens, or there are too few documents.
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
                    f"the {whose} tokenizer ({type(given).__name__}) does not report the positions of its tokens, so "
                    "labels cannot be aligned: give one with a tokenizer.json, or the same tokenizer for both"
                )
        found = int(documents.ends[-1]) if len(documents) else 0
        if found < len(blocks) * block_size:
            raise InputError(
                f"the corpus has {len(blocks)} blocks of {block_size} tokens, but its documents have only {found} "
                "tokens: pack it again"
            )
        self.tokenizer = teacher_tokenizer
        self._students = tokenizer
        self._ids = blocks.select_columns("input_ids").with_format("numpy")
        self._block_size = block_size
        self._documents = documents
        self._context = context
        self._bos = leading_bos(teacher_tokenizer)
        self._cached: list[_Document] = []  # the last document read, in which the next blocks may begin

    def __len__(self) -> int:
        return len(self._ids)

    def __call__(self, start: int, stop: int) -> Passages:
        """Return what the teacher reads for the blocks `start` to `stop` − 1.

        Raises:
            InputError: the students' tokenizer does not encode the documents as these blocks.
        """
        ids = self._ids[start:stop]["input_ids"].astype(np.int64)
        position = start * self._block_size
        first, last = self._documents.number_of(np.array([position, position + ids.size - 1])).tolist()
        begin = position - (int(self._documents.ends[first - 1]) if first else 0)  # of the blocks, within the documents
        parts = _between(self._encode(first, last + 1), begin, begin + ids.size)
        if not np.array_equal(np.concatenate([part.student_ids for part in parts]), ids.ravel()):
            raise InputError(
                f"blocks {start} to {start + len(ids) - 1} of the corpus differ from their text as encoded by the "
                "students' tokenizer: give the tokenizer that the corpus was packed with, or pack it again"
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
        """Encode the documents `first` ≤ i < `stop`; cache the last, so that a long one is encoded only once."""
        documents = [document for document in self._cached if document.number == first]
        texts = self._documents.texts(first + len(documents), stop)
        if texts:
            students, teachers = (encode_with_ends(t, texts) for t in (self._students, self.tokenizer))
            for text, student, teacher in zip(texts, students, teachers, strict=True):
                student_ids, student_ends = _with_end_of_text(student, self._students.eos_token_id, text)
                teacher_ids, teacher_ends = _with_end_of_text(teacher, self.tokenizer.eos_token_id, text)
                token_of = align_tokens(student_ends, teacher_ends)
                documents.append(_Document(first + len(documents), student_ids, teacher_ids, token_of))
        self._cached = documents[-1:]
        return documents

    def _passages(self, teacher_ids: np.ndarray, numbers: np.ndarray, token_of: np.ndarray) -> Passages:
        """Cut the blocks' passages out of consecutive documents.

        Args:
            teacher_ids: (m,) the teacher's tokens of the concatenated documents, starting at the first block.
            numbers: (m,) index of the document of each.
            token_of: (B, T) index in `teacher_ids` of the teacher token of each student token.
        """
        ends = token_of[:, -1] + 1
        begins = np.minimum(token_of[:, 0], np.append(0, ends[:-1]))
        bos = len(self._bos)
        lengths = ends - begins
        parts = -(-lengths // (self._context - bos)) if self._context else np.ones_like(lengths)
        size = -(-lengths // parts)  # size of a block's parts; the last may be shorter
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
    """Select, document by document, the student tokens `begin` ≤ i < `stop` of the concatenated documents.

    Only these tokens are copied, so a long document is not copied for each of its blocks.
    """
    parts = []
    for document in documents:
        low, high = max(begin, 0), min(stop, len(document.student_ids))
        if low < high:
            # Start after the last token that was read, or with that token if it extends into this part.
            behind = document.token_of[low - 1] + 1 if low else 0
            first, last = min(document.token_of[low], behind), document.token_of[high - 1]
            token_of = document.token_of[low:high] - first
            student_ids, teacher_ids = document.student_ids[low:high], document.teacher_ids[first : last + 1]
            parts.append(_Document(document.number, student_ids, teacher_ids, token_of))
        begin, stop = begin - len(document.student_ids), stop - len(document.student_ids)
    return parts


def leading_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the BOS token as a list if the tokenizer puts one before a text, else an empty list."""
    start = tokenizer("a", add_special_tokens=True)["input_ids"][:1]
    return start if start == [tokenizer.bos_token_id] else []


def _with_end_of_text(encoded: EncodedText, eos_token_id: int, text: str) -> EncodedText:
    """Append the end-of-text token to a document's tokens, as if it were one more character of the text."""
    return EncodedText(np.append(encoded.ids, eos_token_id), np.append(encoded.ends, len(text) + 1))
