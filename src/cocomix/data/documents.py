"""Which document each token of a packed corpus comes from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset


class DocumentTokens:
    """The documents of one side, and where their tokens lie in the stream that its blocks were cut from.

    Token p of that stream is token p % B of block p // B. A document's tokens end with end-of-text.

    Attributes:
        ends: (documents,) int64; document i holds the tokens ends[i − 1] ≤ p < ends[i].
    """

    def __init__(self, documents: Dataset, lengths: np.ndarray) -> None:
        self._documents = documents
        self.ends = np.cumsum(lengths, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends)

    def number_of(self, positions: np.ndarray) -> np.ndarray:
        """Numbers of the documents that hold the tokens at `positions`."""
        return np.searchsorted(self.ends, positions, side="right")

    def texts(self, start: int, stop: int) -> list[str]:
        """Texts of the documents `start` ≤ i < `stop`."""
        return list(self._documents[start:stop]["text"])

    def source(self, number: int) -> str:
        """Where a document was read from."""
        return str(self._documents[int(number)]["source"])


def save_document_lengths(folder: Path, side: str, lengths: np.ndarray) -> None:
    """Record how many tokens, end-of-text included, each document of a side has."""
    np.save(_lengths_file(folder, side), lengths)


def load_documents(folder: Path, side: str, texts: Path | None = None) -> DocumentTokens | None:
    """The documents behind a side of the packed corpus in `folder`; None if it was packed from token files.

    Their texts are in the same folder, unless they were packed once more from those of the corpus in `texts`.
    """
    from datasets import load_from_disk

    if not _lengths_file(folder, side).is_file():
        return None
    return DocumentTokens(
        load_from_disk(str((texts or folder) / "documents" / side)), np.load(_lengths_file(folder, side))
    )


def _lengths_file(folder: Path, side: str) -> Path:
    return folder / f"{side}-document-lengths.npy"
