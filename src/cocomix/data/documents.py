"""Map the tokens of a packed corpus to their documents."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset


class DocumentTokens:
    """The documents of one split, and the ranges of their tokens in the stream that was cut into blocks.

    Token p of the stream is token p % B of block p // B. The tokens of a document end with end-of-text.

    Attributes:
        ends: (documents,) int64; document i has the tokens ends[i − 1] ≤ p < ends[i].
    """

    def __init__(self, documents: Dataset, lengths: np.ndarray) -> None:
        self._documents = documents
        self.ends = np.cumsum(lengths, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends)

    def number_of(self, positions: np.ndarray) -> np.ndarray:
        """Return the indices of the documents that contain the tokens at `positions`."""
        return np.searchsorted(self.ends, positions, side="right")

    def texts(self, start: int, stop: int) -> list[str]:
        """Return the texts of the documents `start` ≤ i < `stop`."""
        return list(self._documents[start:stop]["text"])

    def source(self, number: int) -> str:
        """Return where a document was read from."""
        return str(self._documents[int(number)]["source"])


def save_document_lengths(folder: Path, side: str, lengths: np.ndarray) -> None:
    """Save the number of tokens, including end-of-text, of each document of a split."""
    np.save(_lengths_file(folder, side), lengths)


def load_documents(folder: Path, side: str, texts: Path | None = None) -> DocumentTokens | None:
    """Open the documents of a split of the packed corpus in `folder`; None if it was packed from token files.

    Their texts are read from `texts` if given (the corpus was packed again from another one), else from `folder`.
    """
    from datasets import load_from_disk

    if not _lengths_file(folder, side).is_file():
        return None
    return DocumentTokens(
        load_from_disk(str((texts or folder) / "documents" / side)), np.load(_lengths_file(folder, side))
    )


def _lengths_file(folder: Path, side: str) -> Path:
    return folder / f"{side}-document-lengths.npy"
