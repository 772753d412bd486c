"""The text around the places where concepts are active.

C concepts (SAE latents), n contexts kept per concept, w tokens of a context, B blocks, S teacher tokens of a block.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cocomix.catalog.activity import counted_tokens
from cocomix.concepts.reading import Passages, TeacherReader


class Windows(NamedTuple):
    """The tokens around places, cut where the document begins and ends."""

    ids: np.ndarray
    """(C, n, w) int32 the teacher's tokens; −1 outside the document, and where there is no place."""
    document: np.ndarray
    """(C, n) int64 number of the document; −1 where it is not known."""


def document_of(passages: Passages, end_of_text: int | None) -> np.ndarray:
    """(B, S) numbers that tell the documents of a passage apart, −1 for what is not text.

    Where documents are not known, each ends with its end-of-text token.
    """
    numbers = passages.documents
    if numbers is None:
        ends = passages.input_ids.numpy() == (-1 if end_of_text is None else end_of_text)
        numbers = ends.cumsum(-1) - ends
    return np.where(counted_tokens(passages).numpy(), numbers, -1)


def read_windows(reader: TeacherReader, block: np.ndarray, position: np.ndarray, before: int, after: int) -> Windows:
    """The tokens around the places block, position (C, n); −1 is no place. Reads each block once, in order."""
    windows = Windows(
        np.full((*block.shape, before + 1 + after), -1, dtype=np.int32), np.full(block.shape, -1, dtype=np.int64)
    )
    order = block.argsort(axis=None, kind="stable")
    order = order[block.flat[order] >= 0]
    needed, starts = np.unique(block.flat[order], return_index=True)
    for row, places in zip(needed.tolist(), np.split(order, starts[1:]), strict=True):
        passages = reader(row, row + 1)
        ids, document = passages.input_ids[0].numpy(), document_of(passages, reader.tokenizer.eos_token_id)[0]
        at = position.flat[places][:, None]  # (places of this block, 1)
        around = at + np.arange(-before, after + 1)
        within = around.clip(0, len(ids) - 1)
        inside = (around == within) & (document[within] == document[at])
        concept, slot = np.unravel_index(places, block.shape)
        windows.ids[concept, slot] = np.where(inside, ids[within], -1)
        if passages.documents is not None:
            windows.document[concept, slot] = document[at[:, 0]]
    return windows
