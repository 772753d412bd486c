"""Documents, or token files, to blocks of equal length; B is the block size in tokens.

A packed corpus is a folder with the dataset folders `train` and `validation`, whose column
`input_ids` holds B token ids a row, and `corpus.json`, written last, with its `PackedInfo`.
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
from tqdm import tqdm

from cocomix.console import status
from cocomix.data.arrow import dataset_writer
from cocomix.data.corpus import CorpusConfig, is_held_out
from cocomix.data.datatrove import TokenDocuments
from cocomix.data.documents import save_document_lengths
from cocomix.data.pieces import decoded
from cocomix.data.tokenizer import changed_characters, encode_documents, tokenizer_fingerprint, vocabulary_size
from cocomix.errors import InputError
from cocomix.files import read_json, write_json

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Text = TypeVar("Text", str, bytes)
INFO_FILE = "corpus.json"

_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 4 << 20  # an encoded token takes about 100 bytes until it is packed
_FILE_TOKENS = 1 << 20  # tokens of a .bin file read at once
_IDS = 1 << 16  # that 16 bits tell apart
_HEADERS = {
    b"\x93NUMPY": "a NumPy array (.npy)",
    (20240520).to_bytes(4, "little"): "llm.c's token files",
    (20240801).to_bytes(4, "little"): "llm.c's token files of 32 bits",
}


@dataclass(frozen=True)
class PackedInfo:
    """What a packed corpus holds.

    Attributes:
        block_size: tokens per block.
        vocab_size: token ids are below it.
        train_blocks, validation_blocks: number of blocks on either side.
        train_tokens, validation_tokens: tokens before cutting into blocks, end-of-text included.
        train_dropped_tokens, validation_dropped_tokens: those of the remainder, too few for a block.
        bytes_per_token: UTF-8 bytes of the validation text per validation token, end-of-text
            included; turns nats per token into bits per byte.
        tokenizer_fingerprint: of the tokenizer that made the tokens.
        fingerprint: SHA-256 over block size and token ids of train and validation blocks.
        validation_fingerprint: the same of validation alone.
        text_changed: share of the validation text's characters that its tokens do not give back; above 0, bits per
            byte do not compare with those of other tokenizers. None where it was not measured, as of token files.
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
    """A packed corpus, memory-mapped; both datasets have the one column `input_ids`, B unsigned integers."""

    train: Dataset
    validation: Dataset
    info: PackedInfo


def pack_documents(documents: Path, tokenizer: PreTrainedTokenizerBase, block_size: int, folder: Path) -> PackedInfo:
    """Encode what `write_documents` wrote to `documents` and pack it into `folder`.

    The tokens of all documents, each followed by end-of-text, are cut into blocks; the remainder is
    dropped. How many tokens each document has is recorded beside the blocks (`load_documents`). Raises
    `InputError` if a side has less than one block.
    """
    from datasets import load_from_disk

    train, validation = (load_from_disk(str(documents / side))["text"] for side in ("train", "validation"))
    lengths = {"train": array("q"), "validation": array("q")}
    text_changed = _text_changed(tokenizer, validation)
    if text_changed:
        status(text_changed_note(text_changed, "the validation text"))
    info = _pack(
        train=_encode(tokenizer, tqdm(train, desc="Packing train", unit=" documents", disable=None), lengths["train"]),
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

    Raises `InputError` if a file is not of that form, holds an id outside the tokenizer's
    vocabulary, or has less than one block.
    """
    vocab_size = vocabulary_size(tokenizer)
    train, validation = (_token_file(source / name, vocab_size) for name in ("train.bin", "val.bin"))
    return _pack(
        train=tqdm(_chunks(train), desc="Packing train", unit=" chunks", disable=None),
        validation=_chunks(validation),
        validation_bytes=_text_bytes(tokenizer, validation),
        tokenizer=tokenizer,
        block_size=block_size,
        folder=folder,
    )


def pack_token_documents(
    config: CorpusConfig, tokenizer: PreTrainedTokenizerBase, block_size: int, folder: Path
) -> PackedInfo:
    """Pack what `corpus.streaming` wants stored of datatrove's token files, from their beginning, into `folder`.

    Raises `InputError` if a file is not whole, holds an id outside the tokenizer's vocabulary, or if a
    side has less than one block.
    """
    assert config.streaming is not None
    documents = TokenDocuments(config.source, vocabulary_size(tokenizer))
    limits = config.streaming
    train = _token_documents(documents, config.validation_fraction, False, limits.sample_megabytes)
    held_out = _token_documents(documents, config.validation_fraction, True, limits.validation_megabytes)
    validation = np.concatenate([np.empty(0, np.uint32), *held_out])
    return _pack(
        train=tqdm(train, desc="Packing the sample", unit=" batches", disable=None),
        validation=[validation],
        validation_bytes=_text_bytes(tokenizer, validation),
        tokenizer=tokenizer,
        block_size=block_size,
        folder=folder,
    )


def _token_documents(
    documents: TokenDocuments, validation_fraction: float, held_out: bool, megabytes: float
) -> Iterator[np.ndarray]:
    """The tokens of one side, 4 bytes each, a few documents at a time, until they are that many megabytes."""

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


def load_packed(folder: Path) -> PackedCorpus:
    """Open a packed corpus; `InputError` if `folder` is not a whole one."""
    from datasets import load_from_disk

    try:
        info = PackedInfo(**read_json(folder / INFO_FILE))
        train, validation = (load_from_disk(str(folder / side)) for side in ("train", "validation"))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{str(folder)!r} is not a packed corpus ({' '.join(str(error).split())}): "
            f"give a folder with train, validation and {INFO_FILE}"
        ) from error
    if (len(train), len(validation)) != (info.train_blocks, info.validation_blocks):
        raise InputError(
            f"packed corpus {str(folder)!r} holds {len(train)} train and {len(validation)} validation blocks "
            f"where its {INFO_FILE} says {info.train_blocks} and {info.validation_blocks}: make it anew"
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
    """Cut two streams of token arrays into blocks; `validation_bytes` is the text behind the second."""
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
    write_json(folder / INFO_FILE, asdict(info))
    return info


@dataclass(frozen=True)
class _Written:
    tokens: int  # before cutting
    digest: bytes  # SHA-256 of the token ids of the blocks


def _write_blocks(stream: Iterable[np.ndarray], block_size: int, vocab_size: int, folder: Path) -> _Written:
    """Write the tokens of `stream`, end to end, as blocks into the dataset folder `folder`."""
    dtype = np.min_scalar_type(vocab_size - 1)
    # The length is part of the type: no reader has to wonder whether the rows are of one shape.
    schema = pa.schema({"input_ids": pa.list_(pa.from_numpy_dtype(dtype), block_size)})
    tokens, digest, rest = 0, hashlib.sha256(), np.empty(0, dtype)
    with dataset_writer(folder, schema) as writer:
        for piece in stream:
            tokens += len(piece)
            joined = np.concatenate([rest, piece.astype(dtype, copy=False)])
            whole = len(joined) - len(joined) % block_size
            blocks, rest = joined[:whole], joined[whole:]
            if whole:
                digest.update(blocks.astype(dtype.newbyteorder("<"), copy=False).data)
                column = pa.FixedSizeListArray.from_arrays(pa.array(blocks), block_size)
                writer.write_batch(pa.record_batch([column], schema=schema))
        if tokens < block_size:
            raise InputError(
                f"the {folder.name} side has {tokens} tokens, which is less than one block of {block_size}: "
                "give more text on that side, or lower block_size"
            )
    return _Written(tokens, digest.digest())


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], lengths: array[int]) -> Iterator[np.ndarray]:
    """The tokens of `texts`, end-of-text after each, in arrays of many documents; `lengths` gets each one's number."""
    for batch in batches(texts):
        encoded = encode_documents(tokenizer, batch)
        lengths.extend(len(tokens) + 1 for tokens in encoded)
        yield joined(encoded, tokenizer.eos_token_id)


def _text_changed(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> float:
    """The share of the characters of some texts that their tokens do not give back."""
    characters = changed = 0
    for batch in batches(texts):
        characters += sum(map(len, batch))
        changed += changed_characters(tokenizer, batch, encode_documents(tokenizer, batch))
    return changed / characters


def text_changed_note(share: float, text: str) -> str:
    """What it means that a tokenizer does not give back a share of the characters of a text."""
    return (
        f"The tokens do not give back {share:.2%} of the characters of {text}: its bits per byte are those of what the "
        "tokenizer keeps, and cannot be compared with another tokenizer's."
    )


def joined(encoded: Iterable[list[int]], eos_token_id: int) -> np.ndarray:
    """The tokens of several documents, end to end, end-of-text after each; int64."""
    return np.fromiter(chain.from_iterable(chain(tokens, (eos_token_id,)) for tokens in encoded), np.int64)


def batches(texts: Iterable[Text], max_length: int = _BATCH_CHARACTERS) -> Iterator[list[Text]]:
    """`texts` in lists that are bounded in number and in length, each given before the next text is asked for."""
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
    """Map the 16-bit token ids in `path`, all of them known to be below `vocab_size`.

    Raises:
        InputError: the file holds something else, as far as its size and content show.
    """
    if not path.is_file():
        raise InputError(f"there is no token file {str(path)!r}: a token folder holds train.bin and val.bin")
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise InputError(
            f"token file {str(path)!r} has {size} bytes: expected 16-bit token ids, so an even number above 0"
        )
    if vocab_size > _IDS:
        raise InputError(
            f"token file {str(path)!r} holds 16-bit token ids, while the tokenizer's go up to {vocab_size - 1}: "
            "16 bits cannot hold all of them, give the text or datatrove's token files"
        )
    tokens = np.memmap(path, dtype="<u2", mode="r")
    if (other := _other_form(tokens)) is not None:
        raise InputError(
            f"token file {str(path)!r} {other}: write nothing but token ids, with ids.astype(numpy.uint16).tofile(file)"
        )
    largest = max(int(chunk.max()) for chunk in _chunks(tokens))
    if largest >= vocab_size:
        raise InputError(
            f"token file {str(path)!r} holds token id {largest}, but the tokenizer's ids are below "
            f"{vocab_size}: give the tokenizer that made the file"
        )
    return tokens


def _other_form(tokens: np.ndarray) -> str | None:
    """What the content of a file shows it to hold instead of 16-bit token ids; None if it shows nothing."""
    beginning = tokens[:4].tobytes()
    for magic, header in _HEADERS.items():
        if beginning.startswith(magic):
            return f"begins with the header of {header}"
    # Of ids below 2**16 in 32 or 64 bits, every second half-word is 0.
    if len(tokens) % 2 == 0 and not any(chunk.any() for chunk in _chunks(tokens[1::2])):
        return "holds token ids of 32 or 64 bits, or every second token is 0"
    return None


def _chunks(tokens: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(tokens), _FILE_TOKENS):
        yield np.asarray(tokens[start : start + _FILE_TOKENS])


def _text_bytes(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> int:
    """UTF-8 bytes of the text behind `tokens`, without what stands for end-of-text."""
    return sum(len(text.encode()) for text in _texts(tokenizer, tokens))


def validation_texts(source: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The texts of the documents in nanoGPT's `val.bin`; raises `InputError` as `pack_token_files` does."""
    return _texts(tokenizer, _token_file(source / "val.bin", vocabulary_size(tokenizer)))


def _texts(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> Iterator[str]:
    """What lies between the end-of-text tokens, decoded."""
    ends = np.flatnonzero(tokens == tokenizer.eos_token_id).tolist()
    start = 0
    for end in [*ends, len(tokens)]:
        yield decoded(tokenizer, tokens[start:end].tolist())
        start = end + 1
