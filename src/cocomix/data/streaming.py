"""Blocks of a corpus that is read while a model trains on it: bounded memory, no disk, and an exact position.

A process reads its own share of the documents, over and over. Their tokens, in a row, are cut into windows of N
blocks of B tokens; within a window the blocks come in random order.
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

from cocomix import processes
from cocomix.data.corpus import CorpusConfig, is_held_out
from cocomix.data.datatrove import TokenDocuments, is_datatrove_folder
from cocomix.data.packing import batches, joined
from cocomix.data.records import numbered
from cocomix.data.sources import HUB_PREFIX, SourceFile, as_document, open_hub, read_file, source_files
from cocomix.data.tokenizer import encode_documents, vocabulary_size
from cocomix.errors import InputError

if TYPE_CHECKING:
    from datasets import IterableDataset
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
_BATCH_BYTES = 1 << 20  # of documents that are encoded at once
_EPOCHS = 1 << 20  # more than any training has


class Documents(Protocol):
    """What the documents of a corpus are, text or tokens."""

    def open(self) -> IterableDataset:
        """A record for each document; its shards are what is shared out among processes."""
        ...

    def content(self, record: dict[str, Any]) -> bytes | None:
        """What makes a document this one and no other; None if there is nothing to learn from it."""
        ...

    def encode(self, contents: Sequence[bytes]) -> np.ndarray:
        """The token ids of several documents, end to end, each with end-of-text."""
        ...


@dataclass(frozen=True)
class TextDocuments:
    """Documents of text in any form that `sources` reads.

    Attributes:
        source: as in the recipe.
        text_field: the field that holds the text, where documents are records.
        tokenizer: used by one thread.
    """

    source: str
    text_field: str
    tokenizer: PreTrainedTokenizerBase

    def open(self) -> IterableDataset:
        """A record for each document, a shard for each file."""
        from datasets import IterableDataset

        if self.source.startswith(HUB_PREFIX):
            return open_hub(self.source)
        shards = {"files": source_files(self.source), "text_field": self.text_field}
        return IterableDataset.from_generator(_records, gen_kwargs=shards)

    def content(self, record: dict[str, Any]) -> bytes | None:
        """Its text in UTF-8; None if it is blank or none."""
        return as_document(record, self.text_field, f"a record of {self.source}", self.source).utf8() or None

    def encode(self, contents: Sequence[bytes]) -> np.ndarray:
        """The token ids of several texts, end to end, with end-of-text after each."""
        encoded = encode_documents(self.tokenizer, [text.decode() for text in contents])
        return joined(encoded, self.tokenizer.eos_token_id)


def _records(files: list[SourceFile], text_field: str) -> Iterator[dict[str, Any]]:
    for file in files:
        for document in read_file(file, text_field):
            if document.text is not None:
                yield {text_field: document.text}


@dataclass(frozen=True)
class Position:
    """A place in the endless row of a process' tokens.

    Attributes:
        epoch: times that its documents have been read.
        documents: state of their `IterableDataset` at some document before that place; None for the first.
        tokens: tokens from that document's beginning to that place.
    """

    epoch: int = 0
    documents: dict[str, Any] | None = None
    tokens: int = 0


class BlockStream(torch.utils.data.IterableDataset[Tensor]):
    """Blocks of this process' training documents, without end.

    Documents that are held out are left out. In each epoch the files come in another order. `state_dict` says where
    it stands after the last block that it gave: what is read ahead is read again.

    Args:
        documents: of the whole corpus.
        validation_fraction: share of the documents that is held out by the hash of their content.
        excluded: SHA-256 of documents that are validation beside those.
        block_size: B.
        vocab_size: token ids are below it.
        shuffle_blocks: N.
        seed: of every order.
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
        self._given = 0  # blocks of the window

    @cached_property
    def files(self) -> int:
        """Files of the corpus, what its `IterableDataset` calls shards."""
        return self.documents.open().num_shards

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, as JSON."""
        return {
            "processes": processes.count(),
            "files": self.files,
            "window": self._window,
            "given": self._given,
            "begin": asdict(self._begin),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on, when next iterated over, where a stream of as many processes and files stood."""
        assert (state["processes"], state["files"]) == (processes.count(), self.files)
        self._window, self._given = state["window"], state["given"]
        self._begin = Position(**state["begin"])

    def __iter__(self) -> Iterator[Tensor]:
        """Blocks (B,), int64."""
        for begin, tokens in _made_ahead(self._windows(self._begin)):
            self._begin = begin
            blocks = tokens.reshape(self.shuffle_blocks, self.block_size)
            order = np.random.default_rng([self.seed, self._window]).permutation(len(blocks))
            while self._given < len(blocks):
                self._given += 1
                yield torch.from_numpy(blocks[order[self._given - 1]].astype(np.int64))
            self._window += 1
            self._given = 0

    def _windows(self, begin: Position) -> Iterator[tuple[Position, np.ndarray]]:
        """Tokens (N · B,) of each window from `begin` on, and where it begins."""
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
        """Tokens of some documents at a time, and where the first of these begins; `begin.tokens` are not left out."""
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
                    f"the streamed corpus has no training document for one of {processes.count()} process(es): "
                    "give more documents, or start fewer processes"
                )
            state = None

    def _open(self, epoch: int, state: dict[str, Any] | None) -> IterableDataset:
        """This process' records of an epoch, from where they were in `state` on."""
        from datasets.distributed import split_dataset_by_node

        records = split_dataset_by_node(self.documents.open(), processes.rank(), processes.count())
        records.set_epoch(self.seed * _EPOCHS + epoch + 1)  # the seed of the order of the files
        if state is not None:
            records.load_state_dict(state)
        return records

    def _training_contents(self, records: Iterable[dict[str, Any]]) -> Iterator[bytes]:
        """What the documents that are not validation contain."""
        for _, record in numbered(records, "the streamed corpus", "record"):
            content = self.documents.content(record)
            if content is not None and not self._is_held_out(content):
                yield content

    def _is_held_out(self, content: bytes) -> bool:
        digest = hashlib.sha256(content).digest()
        return is_held_out(digest, self.validation_fraction) or digest in self.excluded


def _made_ahead(items: Iterator[T]) -> Iterator[T]:
    """Endless `items`, each made by a thread while the one before is used."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items)
        while True:
            item = coming.result()
            coming = thread.submit(next, items)
            yield item


def open_stream(
    config: CorpusConfig,
    tokenizer: PreTrainedTokenizerBase,
    excluded_texts: Iterable[str],
    *,
    block_size: int,
    seed: int,
) -> BlockStream:
    """The training blocks of a streamed corpus, this process' share of them.

    Args:
        config: with `streaming`.
        tokenizer: the stream's own, as it is used by a thread.
        excluded_texts: documents of the `validation_source`, if there is one.
        block_size: tokens per block.
        seed: of every order.
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
