"""What was read for a corpus, used, and left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

EXAMPLES = 5
"""Names of unreadable files, and endings of ignored ones, to record."""


@dataclass(frozen=True)
class CorpusSummary:
    """Counts of the documents that were read, used, and dropped.

    Attributes:
        train_documents, validation_documents: number of documents of each split.
        train_bytes, validation_bytes: size of their text in UTF-8 bytes.
        duplicates_dropped: documents whose text had occurred before, including those of `source` that are also in
            `validation_source`.
        empty_dropped: documents without text: null, empty, or only whitespace.
        unreadable_files: text files that are not UTF-8 or not regular files, and records whose text is not valid
            Unicode.
        unreadable_examples: names of the first few of them.
        fingerprint: SHA-256 over the digests of all documents of train and validation, in order.
        ignored_files: files of other types in the folders of the corpus.
        ignored_endings: the most frequent of their endings.
    """

    train_documents: int
    validation_documents: int
    train_bytes: int
    validation_bytes: int
    duplicates_dropped: int
    empty_dropped: int
    unreadable_files: int
    unreadable_examples: list[str]
    fingerprint: str
    ignored_files: int = 0
    ignored_endings: list[str] = field(default_factory=list)


def skipped(documents: Mapping[str, Any]) -> str:
    """Describe what a `CorpusSummary`, as a dictionary, counts as left out besides duplicates; empty if nothing was.

    Older records lack the files of other types.
    """
    kinds = {
        "empty_dropped": ("empty document", "empty documents", None),
        "unreadable_files": ("not UTF-8 text", "not UTF-8 text", "unreadable_examples"),
        "ignored_files": ("file of another type", "files of other types", "ignored_endings"),
    }
    found = []
    for key, (one, many, named) in kinds.items():
        if count := documents.get(key, 0):
            examples = documents.get(named or "", [])
            such = f" ({', '.join(examples)}{', …' if len(examples) == EXAMPLES else ''})" if examples else ""
            found.append(f"{count:,} {one if count == 1 else many}{such}")
    return ", ".join(found)
