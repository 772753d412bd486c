"""datatrove's token files: documents that its `DocumentTokenizer` has turned into tokens, read one after another.

Beside a file NAME.ds of token ids (little-endian, 2 or 4 bytes each) lies NAME.ds.index: where each document ends,
counted in tokens (little-endian, 8 bytes each). Read from datatrove 0.10's source, `pipeline/tokens/tokenizer.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cocomix.data.tokenizer import vocabulary_size
from cocomix.errors import InputError

if TYPE_CHECKING:
    from datasets import IterableDataset
    from transformers import PreTrainedTokenizerBase

CHUNKS = "chunk_shuffled.ds"
"""How the names of files end whose documents were cut up and shuffled (`shuffle_chunk_size`)."""
_END = np.dtype("<u8")
_ENDS = 1 << 16  # document ends read at once


def token_files(source: str) -> list[Path]:
    """The token files of a folder, sorted."""
    return sorted(Path(source).glob("*.ds"))


def is_datatrove_folder(source: str) -> bool:
    """Whether `source` is a folder with token files of datatrove."""
    return Path(source).is_dir() and bool(token_files(source))


def read_token_file(path: Path) -> Iterator[np.ndarray]:
    """The token ids of each document of a file; `InputError` if the file is not whole."""
    index = path.with_name(path.name + ".index")
    if not path.is_file():
        raise InputError(
            f"token file {str(path)!r} is not a regular file, but perhaps a link without a target: restore it"
        )
    if not index.is_file():
        raise InputError(f"token file {str(path)!r} has no {index.name} beside it: tokenise with save_index=True")
    if index.stat().st_size == 0:
        return
    dtype = _token_type(path, index)
    begin, total = 0, path.stat().st_size // dtype.itemsize
    with path.open("rb") as tokens, index.open("rb") as ends:
        while len(chunk := np.frombuffer(ends.read(_ENDS * _END.itemsize), _END)):
            for end in chunk.tolist():
                if not begin <= end <= total:
                    raise InputError(
                        f"in the index of token file {str(path)!r} a document begins at token {begin} and ends at "
                        f"{end} of {total}: is it damaged?"
                    )
                yield np.frombuffer(tokens.read((end - begin) * dtype.itemsize), dtype)
                begin = end


def _token_type(path: Path, index: Path) -> np.dtype:
    """2 or 4 bytes, whichever makes the file as long as its index says."""
    if index.stat().st_size % _END.itemsize:
        raise InputError(f"{str(index)!r} has {index.stat().st_size} bytes, not 8 for each document: is it cut short?")
    with index.open("rb") as ends:
        ends.seek(-_END.itemsize, 2)
        tokens = int(np.frombuffer(ends.read(), _END)[0])
    size = path.stat().st_size
    for dtype in (np.dtype("<u2"), np.dtype("<u4")):
        if size == tokens * dtype.itemsize:
            return dtype
    raise InputError(
        f"token file {str(path)!r} has {size} bytes where its index counts {tokens} tokens of 2 or 4 bytes: "
        "is it damaged or cut short?"
    )


def check_token_files(source: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `InputError` unless every file is whole and its first document is one of that tokenizer's."""
    for path in token_files(source):
        if path.name.endswith(CHUNKS):
            raise InputError(
                f"token file {str(path)!r} holds pieces of documents, which cannot be split into training and "
                "validation: tokenise without shuffle_chunk_size"
            )
        first = next(filter(len, read_token_file(path)), None)
        if first is None:
            continue
        _require_known(first, path, vocabulary_size(tokenizer))
        if first[-1] != tokenizer.eos_token_id:
            raise InputError(
                f"the first document of {str(path)!r} ends with token {first[-1]}, not with the tokenizer's "
                f"end-of-text, {tokenizer.eos_token_id}: tokenise with its eos_token, or give the tokenizer that "
                "made the file"
            )


def _require_known(tokens: np.ndarray, source: str | Path, vocab_size: int) -> None:
    if len(tokens) and (largest := int(tokens.max())) >= vocab_size:
        raise InputError(
            f"{str(source)!r} holds token id {largest}, but the tokenizer's ids are below {vocab_size}: "
            "give the tokenizer that made the files"
        )


def _records(files: list[str]) -> Iterator[dict[str, Any]]:
    for file in files:
        for tokens in read_token_file(Path(file)):
            yield {"tokens": tokens}


@dataclass(frozen=True)
class TokenDocuments:
    """Documents that are tokens already, for `streaming.BlockStream`; each ends with end-of-text.

    Attributes:
        source: folder of token files.
        vocab_size: ids must be below it.
    """

    source: str
    vocab_size: int

    def open(self) -> IterableDataset:
        """A record for each document, a shard for each file."""
        from datasets import IterableDataset

        files = [str(path) for path in token_files(self.source)]
        return IterableDataset.from_generator(_records, gen_kwargs={"files": files})

    def content(self, record: dict[str, Any]) -> bytes | None:
        """What makes it this document: its token ids as 32-bit integers; None if there are none."""
        return record["tokens"].astype("<u4").tobytes() or None

    def encode(self, contents: Sequence[bytes]) -> np.ndarray:
        """The token ids of several documents, end to end."""
        tokens = np.frombuffer(b"".join(contents), "<u4")
        _require_known(tokens, self.source, self.vocab_size)
        return tokens
