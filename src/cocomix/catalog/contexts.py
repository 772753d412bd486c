"""Extract the tokens around the places where concepts are active.

C concepts (SAE latents), n contexts kept per concept, w tokens per context, B blocks, S teacher tokens per block.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cocomix.catalog.activity import counted_tokens
from cocomix.concepts.reading import Passages, TeacherReader


class Windows(NamedTuple):
    """The tokens around places, cut at the boundaries of the document."""

    ids: np.ndarray
    """(C, n, w) int32 teacher tokens; −1 outside the document and where there is no place."""
    document: np.ndarray
    """(C, n) int64 index of the document; −1 if unknown."""


def document_ids(passages: Passages, end_of_text: int | None) -> np.ndarray:
    """Return (B, S) int64 that identify the document of each token within its passage, −1 for tokens that are not text.

    Where documents are unknown, each end-of-text token ends one.
    """
    numbers = passages.documents
    if numbers is None:
        ends = passages.input_ids.numpy() == (-1 if end_of_text is None else end_of_text)
        numbers = ends.cumsum(-1) - ends
    return np.where(counted_tokens(passages).numpy(), numbers, -1)


def read_windows(reader: TeacherReader, block: np.ndarray, position: np.ndarray, before: int, after: int) -> Windows:
    """Return the tokens around the given places. Each block is read once, in order.

    Args:
        reader: the text as the teacher reads it.
        block, position: (C, n); −1 where there is no place.
        before, after: tokens of context on each side.
    """
    windows = Windows(
        np.full((*block.shape, before + 1 + after), -1, dtype=np.int32), np.full(block.shape, -1, dtype=np.int64)
    )
    order = block.argsort(axis=None, kind="stable")
    order = order[block.flat[order] >= 0]
    needed, starts = np.unique(block.flat[order], return_index=True)
    for row, places in zip(needed.tolist(), np.split(order, starts)[1:], strict=True):
        passages = reader(row, row + 1)
        ids, document = passages.input_ids[0].numpy(), document_ids(passages, reader.tokenizer.eos_token_id)[0]
        at = position.flat[places][:, None]  # (places of this block, 1)
        around = at + np.arange(-before, after + 1)
        within = around.clip(0, len(ids) - 1)
        inside = (around == within) & (document[within] == document[at])
        concept, slot = np.unravel_index(places, block.shape)
        windows.ids[concept, slot] = np.where(inside, ids[within], -1)
        if passages.documents is not None:
            windows.document[concept, slot] = document[at[:, 0]]
    return windows
