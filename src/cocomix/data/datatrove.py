"""Read the token files of datatrove's `DocumentTokenizer`, document by document.

A file NAME.ds holds token ids (little-endian, 2 or 4 bytes each). NAME.ds.index in the same folder holds the end of
each document, counted in tokens (little-endian, 8 bytes each). The format follows `pipeline/tokens/tokenizer.py` of
datatrove 0.10.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cocomix.common.errors import InputError
from cocomix.data.tokenizer import vocabulary_size

if TYPE_CHECKING:
    from datasets import IterableDataset
    from transformers import PreTrainedTokenizerBase

CHUNKS = "chunk_shuffled.ds"
"""Suffix of files whose documents were split into chunks and shuffled (`shuffle_chunk_size`)."""
_END = np.dtype("<u8")
_ENDS = 1 << 16  # document ends read at once


def token_files(source: str) -> list[Path]:
    """List the token files of a folder, sorted."""
    return sorted(Path(source).glob("*.ds"))


def is_datatrove_folder(source: str) -> bool:
    """Check whether `source` is a folder with datatrove token files."""
    return Path(source).is_dir() and bool(token_files(source))


def read_token_file(path: Path) -> Iterator[np.ndarray]:
    """Yield the token ids of each document of a file; raise `InputError` if the file is incomplete."""
    index = path.with_name(path.name + ".index")
    if not path.is_file():
        raise InputError(
            f"token file {str(path)!r} is not a regular file (perhaps a link without a target): restore it"
        )
    if not index.is_file():
        raise InputError(f"token file {str(path)!r} has no {index.name} next to it: tokenize with save_index=True")
    if index.stat().st_size == path.stat().st_size == 0:
        return
    dtype = _token_type(path, index)
    begin, total = 0, path.stat().st_size // dtype.itemsize
    with path.open("rb") as tokens, index.open("rb") as ends:
        while len(chunk := np.frombuffer(ends.read(_ENDS * _END.itemsize), _END)):
            for end in chunk.tolist():
                if not begin <= end <= total:
                    raise InputError(
                        f"according to the index of token file {str(path)!r}, a document begins at token {begin} and "
                        f"ends at {end} of {total}: is it damaged?"
                    )
                yield np.frombuffer(tokens.read((end - begin) * dtype.itemsize), dtype)
                begin = end


def _token_type(path: Path, index: Path) -> np.dtype:
    """Determine the size of a token id, 2 or 4 bytes, from the length of the file and its index."""
    if index.stat().st_size == 0 or index.stat().st_size % _END.itemsize:
        raise InputError(f"{str(index)!r} has {index.stat().st_size} bytes, not 8 per document: is it truncated?")
    with index.open("rb") as ends:
        ends.seek(-_END.itemsize, 2)
        tokens = int(np.frombuffer(ends.read(), _END)[0])
    size = path.stat().st_size
    for dtype in (np.dtype("<u2"), np.dtype("<u4")):
        if size == tokens * dtype.itemsize:
            return dtype
    raise InputError(
        f"token file {str(path)!r} has {size} bytes, but its index counts {tokens} tokens of 2 or 4 bytes: "
        "is it damaged or truncated?"
    )


def check_token_files(source: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `InputError` unless every file is complete and its first document fits the tokenizer."""
    for path in token_files(source):
        if path.name.endswith(CHUNKS):
            raise InputError(
                f"token file {str(path)!r} holds pieces of documents, which cannot be split into training and "
                "validation: tokenize without shuffle_chunk_size"
            )
        first = next(filter(len, read_token_file(path)), None)
        if first is None:
            continue
        _require_known(first, path, vocabulary_size(tokenizer))
        if first[-1] != tokenizer.eos_token_id:
            raise InputError(
                f"the first document of {str(path)!r} ends with token {first[-1]}, not with the tokenizer's "
                f"end-of-text, {tokenizer.eos_token_id}: tokenize with its eos_token, or give the tokenizer that "
                "the file was written with"
            )


def _require_known(tokens: np.ndarray, source: str | Path, vocab_size: int) -> None:
    if len(tokens) and (largest := int(tokens.max())) >= vocab_size:
        raise InputError(
            f"{str(source)!r} holds token id {largest}, but the tokenizer's ids are below {vocab_size}: "
            "give the tokenizer that the files were written with"
        )


def _records(files: list[str]) -> Iterator[dict[str, Any]]:
    for file in files:
        for tokens in read_token_file(Path(file)):
            yield {"tokens": tokens}


@dataclass(frozen=True)
class TokenDocuments:
    """Tokenized documents for `streaming.BlockStream`; each ends with end-of-text.

    Attributes:
        source: folder of token files.
        vocab_size: upper bound of the token ids, exclusive.
    """

    source: str
    vocab_size: int

    def open(self) -> IterableDataset:
        """Return one record per document and one shard per file."""
        from datasets import IterableDataset

        files = [str(path) for path in token_files(self.source)]
        return IterableDataset.from_generator(_records, gen_kwargs={"files": files})

    def content(self, record: dict[str, Any]) -> bytes | None:
        """Return the token ids of a document as 32-bit integers, which identify it; None if there are none."""
        return record["tokens"].astype("<u4").tobytes() or None

    def encode(self, contents: Sequence[bytes]) -> np.ndarray:
        """Concatenate the token ids of several documents."""
        tokens = np.frombuffer(b"".join(contents), "<u4")
        _require_known(tokens, self.source, self.vocab_size)
        return tokens
