"""Stream the blocks of a corpus during training, with bounded memory, no disk space, and exact resumption.

Each process reads its share of the documents repeatedly. Their concatenated tokens are cut into windows of N blocks of
B tokens; the blocks of a window are shuffled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from cocomix.common import distributed
from cocomix.common.errors import InputError
from cocomix.data.corpus import CorpusConfig, is_held_out
from cocomix.data.datatrove import TokenDocuments, is_datatrove_folder
from cocomix.data.packing import batches, joined
from cocomix.data.records import numbered
from cocomix.data.sources import HUB_PREFIX, SourceFile, as_document, open_hub, read_file, source_files
from cocomix.data.tokenizer import encode_documents, vocabulary_size

if TYPE_CHECKING:
    from datasets import IterableDataset
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
_BATCH_BYTES = 1 << 20  # size of the documents that are encoded at once
_EPOCHS = 1 << 20  # more epochs than any training has


class Documents(Protocol):
    """The documents of a corpus, as text or tokens."""

    def open(self) -> IterableDataset:
        """Return one record per document; the shards are distributed over the processes."""
        ...

    def content(self, record: dict[str, Any]) -> bytes | None:
        """Return the content of a document, which identifies it; None if it is empty."""
        ...

    def encode(self, contents: Sequence[bytes]) -> np.ndarray:
        """Concatenate the token ids of several documents, each ending with end-of-text."""
        ...


@dataclass(frozen=True)
class TextDocuments:
    """Documents of text in any format that `sources` reads.

    Attributes:
        source: as in the recipe.
        text_field: the field of a record that holds the text.
        tokenizer: used by one thread only.
    """

    source: str
    text_field: str
    tokenizer: PreTrainedTokenizerBase

    def open(self) -> IterableDataset:
        """Return one record per document and one shard per file."""
        from datasets import IterableDataset

        if self.source.startswith(HUB_PREFIX):
            return open_hub(self.source)
        shards = {"files": source_files(self.source), "text_field": self.text_field}
        return IterableDataset.from_generator(_records, gen_kwargs=shards)

    def content(self, record: dict[str, Any]) -> bytes | None:
        """Return the text in UTF-8; None if it is blank or missing."""
        return as_document(record, self.text_field, f"a record of {self.source}", self.source).utf8() or None

    def encode(self, contents: Sequence[bytes]) -> np.ndarray:
        """Concatenate the token ids of several texts, each followed by end-of-text."""
        encoded = encode_documents(self.tokenizer, [text.decode() for text in contents])
        return joined(encoded, self.tokenizer.eos_token_id)


def _records(files: list[SourceFile], text_field: str) -> Iterator[dict[str, Any]]:
    for file in files:
        for document in read_file(file, text_field):
            if document.text is not None:
                yield {text_field: document.text}


@dataclass(frozen=True)
class Position:
    """A position in the endless sequence of a process' tokens.

    Attributes:
        epoch: number of completed passes over its documents.
        documents: state of their `IterableDataset` at a document before the position; None for the first document.
        tokens: number of tokens from the beginning of that document to the position.
    """

    epoch: int = 0
    documents: dict[str, Any] | None = None
    tokens: int = 0


class BlockStream(torch.utils.data.IterableDataset[Tensor]):
    """Endless blocks of this process' training documents.

    Validation documents are excluded. The files are shuffled in each epoch. `state_dict` describes the position after
    the last block that was yielded; blocks that were read ahead are read again after resumption.

    Args:
        documents: all documents of the corpus.
        validation_fraction: share of the documents that is held out by the hash of their content.
        excluded: SHA-256 of further validation documents.
        block_size: B.
        vocab_size: upper bound of the token ids, exclusive.
        shuffle_blocks: N.
        seed: seed of every order.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        validation_fraction: float,
        excluded: frozenset[bytes],
        block_size: int,
        vocab_size: int,
        shuffle_blocks: int,
        seed: int,
    ) -> None:
        self.documents = documents
        self.validation_fraction = validation_fraction
        self.excluded = excluded
        self.block_size = block_size
        self.dtype = np.min_scalar_type(vocab_size - 1)
        self.shuffle_blocks = shuffle_blocks
        self.seed = seed
        self._begin = Position()  # of the window
        self._window = 0
        self._given = 0  # blocks of the window that were yielded

    @cached_property
    def files(self) -> int:
        """Number of files, the shards of its `IterableDataset`."""
        return self.documents.open().num_shards

    def state_dict(self) -> dict[str, Any]:
        """Return the position, as JSON."""
        return {
            "processes": distributed.world_size(),
            "files": self.files,
            "window": self._window,
            "given": self._given,
            "begin": asdict(self._begin),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume the next iteration at the state of a stream with as many processes and files."""
        assert (state["processes"], state["files"]) == (distributed.world_size(), self.files)
        self._window, self._given = state["window"], state["given"]
        self._begin = Position(**state["begin"])

    def __iter__(self) -> Iterator[Tensor]:
        """Yield blocks (B,), int64."""
        for begin, tokens in _prefetched(self._windows(self._begin)):
            self._begin = begin
            blocks = tokens.reshape(self.shuffle_blocks, self.block_size)
            order = np.random.default_rng([self.seed, self._window]).permutation(len(blocks))
            while self._given < len(blocks):
                self._given += 1
                yield torch.from_numpy(blocks[order[self._given - 1]].astype(np.int64))
            self._window += 1
            self._given = 0

    def _windows(self, begin: Position) -> Iterator[tuple[Position, np.ndarray]]:
        """Yield tokens (N · B,) of each window from `begin` on, and the position of its beginning."""
        size = self.shuffle_blocks * self.block_size
        window, filled, unwanted = np.empty(size, self.dtype), 0, begin.tokens
        for position, tokens in self._encoded(begin):
            used = min(unwanted, len(tokens))
            unwanted -= used
            while used < len(tokens):
                taken = tokens[used : used + size - filled]
                window[filled : filled + len(taken)] = taken
                filled += len(taken)
                used += len(taken)
                if filled == size:
                    yield begin, window
                    window, filled = np.empty(size, self.dtype), 0
                    begin = Position(position.epoch, position.documents, used)

    def _encoded(self, begin: Position) -> Iterator[tuple[Position, np.ndarray]]:
        """Yield the tokens of a few documents at a time, with the position of the first; ignore `begin.tokens`."""
        state = begin.documents
        for epoch in count(begin.epoch):
            records = self._open(epoch, state)
            anything = state is not None
            for contents in batches(self._training_contents(records), _BATCH_BYTES):
                anything = True
                yield Position(epoch, state), self.documents.encode(contents)
                state = records.state_dict()
            if not anything:
                raise InputError(
                    f"the streamed corpus has no training documents for one of {distributed.world_size()} process(es): "
                    "give more documents, or start fewer processes"
                )
            state = None

    def _open(self, epoch: int, state: dict[str, Any] | None) -> IterableDataset:
        """Open this process' records of an epoch, starting from `state`."""
        from datasets.distributed import split_dataset_by_node

        records = split_dataset_by_node(self.documents.open(), distributed.rank(), distributed.world_size())
        records.set_epoch(self.seed * _EPOCHS + epoch + 1)  # seed of the order of files
        if state is not None:
            records.load_state_dict(state)
        return records

    def _training_contents(self, records: Iterable[dict[str, Any]]) -> Iterator[bytes]:
        """Yield the contents of the documents that are not for validation."""
        for _, record in numbered(records, "the streamed corpus", "record"):
            content = self.documents.content(record)
            if content is not None and not self._is_held_out(content):
                yield content

    def _is_held_out(self, content: bytes) -> bool:
        digest = hashlib.sha256(content).digest()
        return is_held_out(digest, self.validation_fraction) or digest in self.excluded


def _prefetched(items: Iterator[T]) -> Iterator[T]:
    """Yield endless `items`; a thread computes the next one while the current one is used."""
    with ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(next, items)
        while True:
            item = upcoming.result()
            upcoming = thread.submit(next, items)
            yield item


def open_stream(
    config: CorpusConfig,
    tokenizer: PreTrainedTokenizerBase,
    excluded_texts: Iterable[str],
    *,
    block_size: int,
    seed: int,
) -> BlockStream:
    """Open this process' share of the training blocks of a streamed corpus.

    Args:
        config: configuration with `streaming`.
        tokenizer: a tokenizer for this stream only, because a thread uses it.
        excluded_texts: documents of the `validation_source`, if there is one.
        block_size: tokens per block.
        seed: seed of every order.
    """
    assert config.streaming is not None
    documents: Documents
    if is_datatrove_folder(config.source):
        documents = TokenDocuments(config.source, vocabulary_size(tokenizer))
    else:
        documents = TextDocuments(config.source, config.text_field, tokenizer)
    return BlockStream(
        documents,
        validation_fraction=config.validation_fraction if config.validation_source is None else 0.0,
        excluded=frozenset(hashlib.sha256(text.encode()).digest() for text in excluded_texts),
        block_size=block_size,
        vocab_size=vocabulary_size(tokenizer),
        shuffle_blocks=config.streaming.shuffle_blocks,
        seed=seed,
    )
