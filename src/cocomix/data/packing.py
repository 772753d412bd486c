"""Pack documents or token files into blocks of B tokens.

A packed corpus is a folder with the dataset folders `train` and `validation`, whose column `input_ids` holds B token
ids per row, and `corpus.json` with its `PackedInfo`, which is written last.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pyarrow as pa

from cocomix.common.console import progress_bar, status
from cocomix.common.errors import InputError, error_message
from cocomix.common.files import read_json, write_json
from cocomix.data.arrow import dataset_writer, open_dataset
from cocomix.data.corpus import PACKED_FILE, CorpusConfig, is_held_out
from cocomix.data.datatrove import TokenDocuments
from cocomix.data.documents import save_document_lengths
from cocomix.data.pieces import decoded
from cocomix.data.tokenizer import changed_characters, encode_documents, tokenizer_fingerprint, vocabulary_size

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Text = TypeVar("Text", str, bytes)

_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 4 << 20  # an encoded token takes about 100 bytes until it is packed
_FILE_TOKENS = 1 << 20  # tokens of a .bin file read at once
_IDS = 1 << 16  # number of 16-bit ids
_HEADERS = {
    b"\x93NUMPY": "a NumPy array (.npy)",
    (20240520).to_bytes(4, "little"): "llm.c's token files",
    (20240801).to_bytes(4, "little"): "llm.c's token files of 32 bits",
}


@dataclass(frozen=True)
class PackedInfo:
    """Description of a packed corpus.

    Attributes:
        block_size: tokens per block.
        vocab_size: upper bound of the token ids, exclusive.
        train_blocks, validation_blocks: number of blocks of each split.
        train_tokens, validation_tokens: number of tokens before cutting into blocks, including end-of-text.
        train_dropped_tokens, validation_dropped_tokens: size of the remainder, which is shorter than a block.
        bytes_per_token: UTF-8 bytes of the validation text per validation token, including end-of-text; converts nats
            per token to bits per byte.
        tokenizer_fingerprint: fingerprint of the tokenizer that encoded the text.
        fingerprint: SHA-256 over the block size and the token ids of train and validation blocks.
        validation_fingerprint: the same for validation alone.
        text_changed: share of characters of the validation text that decoding its tokens does not restore. If it is
            above 0, bits per byte are not comparable with other tokenizers. None if not measured (token files).
    """

    block_size: int
    vocab_size: int
    train_blocks: int
    validation_blocks: int
    train_tokens: int
    validation_tokens: int
    train_dropped_tokens: int
    validation_dropped_tokens: int
    bytes_per_token: float
    tokenizer_fingerprint: str
    fingerprint: str
    validation_fingerprint: str
    text_changed: float | None = None


@dataclass(frozen=True)
class PackedCorpus:
    """A memory-mapped packed corpus; both datasets have one column `input_ids` of B unsigned integers."""

    train: Dataset
    validation: Dataset
    info: PackedInfo


def pack_documents(documents: Path, tokenizer: PreTrainedTokenizerBase, block_size: int, folder: Path) -> PackedInfo:
    """Encode the documents that `write_documents` wrote to `documents`, and pack them into `folder`.

    The tokens of all documents, each followed by end-of-text, are concatenated and cut into blocks; the remainder is
    dropped. The number of tokens of each document is saved with the blocks (`load_documents`).

    Raises:
        InputError: a split has less than one block.
    """
    from datasets import load_from_disk

    train, validation = (load_from_disk(str(documents / side))["text"] for side in ("train", "validation"))
    lengths = {"train": array("q"), "validation": array("q")}
    text_changed = _text_changed(tokenizer, validation)
    if text_changed:
        status(text_changed_note(text_changed, "the validation text"))
    info = _pack(
        train=_encode(tokenizer, progress_bar(train, desc="Packing train", unit=" documents"), lengths["train"]),
        validation=_encode(tokenizer, validation, lengths["validation"]),
        validation_bytes=sum(len(text.encode()) for text in validation),
        text_changed=text_changed,
        tokenizer=tokenizer,
        block_size=block_size,
        folder=folder,
    )
    for side, found in lengths.items():
        save_document_lengths(folder, side, np.array(found))
    return info


def pack_token_files(source: Path, tokenizer: PreTrainedTokenizerBase, block_size: int, folder: Path) -> PackedInfo:
    """Pack nanoGPT's `train.bin` and `val.bin` (16-bit little-endian token ids) from `source` into `folder`.

    Raises:
        InputError: a file has another format, an id outside the tokenizer's vocabulary, or less than one block.
    """
    vocab_size = vocabulary_size(tokenizer)
    train, validation = (_token_file(source / name, vocab_size) for name in ("train.bin", "val.bin"))
    return _pack(
        train=progress_bar(_chunks(train), desc="Packing train", unit=" chunks"),
        validation=_chunks(validation),
        validation_bytes=_text_bytes(tokenizer, validation),
        tokenizer=tokenizer,
        block_size=block_size,
        folder=folder,
    )


def pack_token_documents(
    config: CorpusConfig, tokenizer: PreTrainedTokenizerBase, block_size: int, folder: Path
) -> PackedInfo:
    """Pack the sample of datatrove's token files that `corpus.streaming` stores, from their beginning, into `folder`.

    Raises:
        InputError: a file is incomplete or has an id outside the tokenizer's vocabulary, or a split has less than one
            block.
    """
    assert config.streaming is not None
    documents = TokenDocuments(config.source, vocabulary_size(tokenizer))
    limits = config.streaming
    train = _token_documents(documents, config.validation_fraction, False, limits.sample_megabytes)
    held_out = _token_documents(documents, config.validation_fraction, True, limits.validation_megabytes)
    validation = np.concatenate([np.empty(0, np.uint32), *held_out])
    return _pack(
        train=progress_bar(train, desc="Packing the sample", unit=" batches"),
        validation=[validation],
        validation_bytes=_text_bytes(tokenizer, validation),
        tokenizer=tokenizer,
        block_size=block_size,
        folder=folder,
    )


def _token_documents(
    documents: TokenDocuments, validation_fraction: float, held_out: bool, megabytes: float
) -> Iterator[np.ndarray]:
    """Yield the tokens of one split, a few documents at a time, up to `megabytes` at 4 bytes per token."""

    def contents() -> Iterator[bytes]:
        for record in documents.open():
            content = documents.content(record)
            if content and is_held_out(hashlib.sha256(content).digest(), validation_fraction) == held_out:
                yield content

    missing = megabytes * 1e6
    for batch in batches(contents()):
        tokens = documents.encode(batch)
        yield tokens
        missing -= tokens.nbytes
        if missing <= 0:
            return


def load_packed(folder: str | Path) -> PackedCorpus:
    """Open a packed corpus; raise `InputError` if `folder` does not hold a complete one."""
    folder = Path(folder)
    try:
        info = PackedInfo(**read_json(folder / PACKED_FILE))
        train, validation = (open_dataset(folder / side) for side in ("train", "validation"))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{str(folder)!r} is not a packed corpus ({error_message(error)}): "
            f"give a folder with train, validation and {PACKED_FILE}"
        ) from error
    if (len(train), len(validation)) != (info.train_blocks, info.validation_blocks):
        raise InputError(
            f"packed corpus {str(folder)!r} has {len(train)} train and {len(validation)} validation blocks, but its "
            f"{PACKED_FILE} states {info.train_blocks} and {info.validation_blocks}: pack it again"
        )
    return PackedCorpus(train, validation, info)


def _pack(
    *,
    train: Iterable[np.ndarray],
    validation: Iterable[np.ndarray],
    validation_bytes: int,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    folder: Path,
    text_changed: float | None = None,
) -> PackedInfo:
    """Cut two streams of token arrays into blocks; `validation_bytes` is the size of the validation text."""
    if block_size < 2:
        raise InputError(f"block_size is {block_size}: give at least 2, for a token and the next one")
    vocab_size = vocabulary_size(tokenizer)
    train_side = _write_blocks(train, block_size, vocab_size, folder / "train")
    validation_side = _write_blocks(validation, block_size, vocab_size, folder / "validation")
    content = hashlib.sha256(f"{block_size} ".encode() + train_side.digest + validation_side.digest)
    validation_content = hashlib.sha256(f"{block_size} ".encode() + validation_side.digest)
    info = PackedInfo(
        block_size=block_size,
        vocab_size=vocab_size,
        train_blocks=train_side.tokens // block_size,
        validation_blocks=validation_side.tokens // block_size,
        train_tokens=train_side.tokens,
        validation_tokens=validation_side.tokens,
        train_dropped_tokens=train_side.tokens % block_size,
        validation_dropped_tokens=validation_side.tokens % block_size,
        bytes_per_token=validation_bytes / validation_side.tokens,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        fingerprint=content.hexdigest(),
        validation_fingerprint=validation_content.hexdigest(),
        text_changed=text_changed,
    )
    write_json(folder / PACKED_FILE, asdict(info))
    return info


@dataclass(frozen=True)
class _Written:
    tokens: int  # before cutting
    digest: bytes  # SHA-256 of the token ids of the blocks


def _write_blocks(stream: Iterable[np.ndarray], block_size: int, vocab_size: int, folder: Path) -> _Written:
    """Concatenate the tokens of `stream` and write them as blocks to the dataset folder `folder`."""
    dtype = np.min_scalar_type(vocab_size - 1)
    # The length is part of the type, so readers know that all rows have the same shape.
    schema = pa.schema({"input_ids": pa.list_(pa.from_numpy_dtype(dtype), block_size)})
    tokens, digest, rest = 0, hashlib.sha256(), np.empty(0, dtype)
    with dataset_writer(folder, schema) as writer:
        for piece in stream:
            tokens += len(piece)
            joined = np.concatenate([rest, piece.astype(dtype, copy=False)])
            end = len(joined) - len(joined) % block_size
            blocks, rest = joined[:end], joined[end:]
            if end:
                digest.update(blocks.astype(dtype.newbyteorder("<"), copy=False).data)
                column = pa.FixedSizeListArray.from_arrays(pa.array(blocks), block_size)
                writer.write_batch(pa.record_batch([column], schema=schema))
        if tokens < block_size:
            raise InputError(
                f"the {folder.name} split has {tokens} tokens, which is less than one block of {block_size}: "
                "give more text for it, or lower block_size"
            )
    return _Written(tokens, digest.digest())


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], lengths: array[int]) -> Iterator[np.ndarray]:
    """Yield the tokens of `texts`, each followed by end-of-text, in batches; append each one's length to `lengths`."""
    for batch in batches(texts):
        encoded = encode_documents(tokenizer, batch)
        lengths.extend(len(tokens) + 1 for tokens in encoded)
        yield joined(encoded, tokenizer.eos_token_id)


def _text_changed(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> float:
    """Return the share of characters that decoding the tokens of `texts` does not restore."""
    characters = changed = 0
    for batch in batches(texts):
        characters += sum(map(len, batch))
        changed += changed_characters(tokenizer, batch, encode_documents(tokenizer, batch))
    return changed / characters


def text_changed_note(share: float, text: str) -> str:
    """Explain the consequence of a tokenizer that does not restore a share of the characters of a text."""
    return (
        f"Decoding the tokens does not restore {share:.2%} of the characters of {text}. Its bits per byte refer to the "
        "characters that the tokenizer preserves, and are not comparable with another tokenizer's."
    )


def joined(encoded: Iterable[list[int]], eos_token_id: int) -> np.ndarray:
    """Concatenate the tokens of several documents, each followed by end-of-text; int64."""
    return np.fromiter(chain.from_iterable(chain(tokens, (eos_token_id,)) for tokens in encoded), np.int64)


def batches(texts: Iterable[Text], max_length: int = _BATCH_CHARACTERS) -> Iterator[list[Text]]:
    """Group `texts` into lists of bounded number and length; each is yielded before the next text is read."""
    batch: list[Text] = []
    length = 0
    for text in texts:
        batch.append(text)
        length += len(text)
        if len(batch) == _BATCH_DOCUMENTS or length >= max_length:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def _token_file(path: Path, vocab_size: int) -> np.ndarray:
    """Memory-map the 16-bit token ids in `path`, and check that they are below `vocab_size`.

    Raises:
        InputError: the file is missing, or its size or content shows another format.
    """
    if not path.is_file():
        raise InputError(f"there is no token file {str(path)!r}: a token folder holds train.bin and val.bin")
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise InputError(
            f"token file {str(path)!r} has {size} bytes; expected 16-bit token ids, that is, an even number above 0"
        )
    if vocab_size > _IDS:
        raise InputError(
            f"token file {str(path)!r} holds 16-bit token ids, but the tokenizer's ids go up to {vocab_size - 1}: "
            "give the text or datatrove's token files instead"
        )
    tokens = np.memmap(path, dtype="<u2", mode="r")
    if (other := _other_form(tokens)) is not None:
        raise InputError(
            f"token file {str(path)!r} {other}: write only token ids, with ids.astype(numpy.uint16).tofile(file)"
        )
    largest = max(int(chunk.max()) for chunk in _chunks(tokens))
    if largest >= vocab_size:
        raise InputError(
            f"token file {str(path)!r} holds token id {largest}, but the tokenizer's ids are below "
            f"{vocab_size}: give the tokenizer that the file was written with"
        )
    return tokens


def _other_form(tokens: np.ndarray) -> str | None:
    """Detect another format than 16-bit token ids by the content of a file; None if there is no sign of one."""
    beginning = tokens[:4].tobytes()
    for magic, header in _HEADERS.items():
        if beginning.startswith(magic):
            return f"begins with the header of {header}"
    # If ids below 2**16 are stored in 32 or 64 bits, every second 16-bit word is 0.
    if len(tokens) % 2 == 0 and not any(chunk.any() for chunk in _chunks(tokens[1::2])):
        return "holds token ids of 32 or 64 bits, or every second token is 0"
    return None


def _chunks(tokens: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(tokens), _FILE_TOKENS):
        yield np.asarray(tokens[start : start + _FILE_TOKENS])


def _text_bytes(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> int:
    """Count the UTF-8 bytes of the text of `tokens`, without end-of-text."""
    return sum(len(text.encode()) for text in _texts(tokenizer, tokens))


def validation_texts(source: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Decode the documents in nanoGPT's `val.bin`; raise `InputError` as `pack_token_files` does."""
    return _texts(tokenizer, _token_file(source / "val.bin", vocabulary_size(tokenizer)))


def _texts(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> Iterator[str]:
    """Decode the documents between end-of-text tokens."""
    ends = np.flatnonzero(tokens == tokenizer.eos_token_id).tolist()
    start = 0
    for end in [*ends, len(tokens)]:
        yield decoded(tokenizer, tokens[start:end].tolist())
        start = end + 1
