"""Read the documents of a corpus, drop duplicates, and split them into train and validation by their content."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Annotated

import pyarrow as pa

from cocomix.common import portable
from cocomix.common.console import progress_bar, status
from cocomix.common.errors import InputError
from cocomix.common.settings import Count, Range
from cocomix.data.arrow import dataset_writer
from cocomix.data.datatrove import is_datatrove_folder
from cocomix.data.mixture import TextSource, mixed
from cocomix.data.sources import (
    HUB_PREFIX,
    PYTHON_STDLIB,
    ignored_files,
    is_record_file,
    read_documents,
    read_file,
    require_records,
    source_files,
)
from cocomix.data.summary import EXAMPLES, CorpusSummary, skipped

# 64-bit offsets, because the texts of one batch can exceed 2 GiB.
_SCHEMA = pa.schema({"text": pa.large_string(), "source": pa.string()})
_BATCH_BYTES = 8 << 20  # text held in memory before it is written
PACKED_FILE = "corpus.json"
"""Description of a packed corpus, in its folder."""
Megabytes = Annotated[float, Range(0, 10**9, open_low=True)]


@dataclass
class StreamingConfig:
    """The `corpus.streaming` section of a recipe, for a corpus that does not fit on the disk.

    Students train on its documents while they are read.

    Attributes:
        sample_megabytes: amount of training text to store, from the beginning of the source. The tokenizer, the sparse
            autoencoder, and the catalog are built from it. (For token files: of ids at 4 bytes each.)
        validation_megabytes: amount of validation text to store; a `validation_source` is stored completely.
        shuffle_blocks: number of blocks that each process holds in memory and shuffles.
    """

    sample_megabytes: Megabytes = 256
    validation_megabytes: Megabytes = 8
    shuffle_blocks: Count = 2048


@dataclass
class CorpusConfig:
    """The `corpus` section of a recipe.

    Attributes:
        source: `python-stdlib` (the modules of Python's standard library, without their tests); a file or folder of
            text (.txt, .md, .py: one document each) or of records (.jsonl, .jsonl.gz, .jsonl.zst, .parquet); a folder
            with nanoGPT's train.bin and val.bin, or with datatrove's token files (.ds); the packed corpus of another
            run, such as `runs/quickstart/corpus`, which is used with its tokenizer and is not copied; or `hf:NAME` or
            `hf:NAME:SPLIT`, a streamed Hugging Face dataset (default split: `train`).
        validation_source: a second source of the same kinds, all of whose documents form the validation set. By
            default, validation is a share of `source`.
        text_field: the field of a record that holds the text.
        sources: several sources of text in place of `source`, each with its own `text_field` and `weight`. With
            weights, the corpus has text (UTF-8 bytes) of each in proportion to its weight, and ends where the first of
            them ends; without, all text of each, one source after another.
        validation_fraction: share of the documents used for validation, between 0 and 1. Ignored with a
            `validation_source`.
        max_documents: maximum number of documents of `source` or `sources`, not counting empty ones and duplicates.
        streaming: store only a sample, and train on the documents while they are read. By default, all are stored.
    """

    source: str = "python-stdlib"
    validation_source: str | None = None
    text_field: str = "text"
    sources: list[TextSource] | None = None
    validation_fraction: Annotated[float, Range(0, 1, open_low=True, open_high=True)] = 0.05
    max_documents: Count | None = None
    streaming: StreamingConfig | None = None

    def texts(self) -> list[TextSource]:
        """Return the sources of text."""
        return self.sources or [TextSource(self.source, self.text_field)]

    def named(self) -> str:
        """Return the source or sources for messages and reports."""
        return ", ".join(portable.short(each.source) for each in self.texts())


def is_token_folder(source: str) -> bool:
    """Check whether `source` holds tokens rather than text: nanoGPT's train.bin and val.bin, or datatrove's files."""
    return is_nanogpt_folder(source) or is_datatrove_folder(source)


def is_packed_folder(source: str) -> bool:
    """Check whether `source` is a packed corpus with its tokenizer."""
    return Path(source, PACKED_FILE).is_file() and Path(source, "tokenizer").is_dir()


def is_nanogpt_folder(source: str) -> bool:
    """Check whether `source` is a folder with nanoGPT's train.bin and val.bin."""
    return all(Path(source, name).is_file() for name in ("train.bin", "val.bin"))


def check_corpus(config: CorpusConfig) -> None:
    """Raise `InputError` for problems that can be detected without reading the corpus.

    Checks numbers, paths, and the first record of a jsonl or parquet source. The Hugging Face Hub is not contacted.
    """
    if config.streaming is not None and config.max_documents is not None:
        raise InputError("corpus.max_documents has no effect with corpus.streaming: leave one of them out")
    if config.sources is not None:
        _check_sources(config)
    if is_packed_folder(config.source):
        given = ("validation_source", "max_documents", "streaming")
        if idle := [f"corpus.{name}" for name in given if getattr(config, name) is not None]:
            raise InputError(
                f"corpus source {config.source!r} is a packed corpus, on which {' and '.join(idle)} has no effect: "
                "leave it out"
            )
        return
    if is_nanogpt_folder(config.source):
        if config.max_documents is not None:
            raise InputError(
                f"corpus source {config.source!r} holds train.bin, which is read as a whole: leave "
                "corpus.max_documents out"
            )
        if config.validation_source is not None:
            raise InputError(
                f"corpus source {config.source!r} has its own validation tokens in val.bin: leave validation_source out"
            )
        if config.streaming is not None:
            raise InputError(
                f"corpus source {config.source!r} holds train.bin, which cannot be streamed: leave corpus.streaming out"
            )
        return
    if is_datatrove_folder(config.source):
        if config.streaming is None:
            raise InputError(
                f"corpus source {config.source!r} holds datatrove's token files, which can only be streamed: "
                "set corpus.streaming (to {} for its defaults)"
            )
        if config.validation_source is not None:
            raise InputError(
                f"corpus source {config.source!r} holds token files, which are split by validation_fraction: "
                "leave validation_source out"
            )
        return
    validation = [] if config.validation_source is None else [TextSource(config.validation_source, config.text_field)]
    problems = []
    for each in [*config.texts(), *validation]:
        try:
            check_source(each.source, each.text_field)
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))


def _check_sources(config: CorpusConfig) -> None:
    """Raise `InputError` for settings of several sources that cannot work."""
    sources = config.texts()
    if not config.sources:
        raise InputError("corpus.sources is empty: name at least one, or leave it out for corpus.source")
    if config.source != PYTHON_STDLIB:
        raise InputError(f"corpus.source {config.source!r} has no effect with corpus.sources: leave one of them out")
    if config.streaming is not None:
        raise InputError("corpus.sources cannot be streamed: give one corpus.source, or leave corpus.streaming out")
    if len({each.weight is None for each in sources}) > 1:
        raise InputError("only some of corpus.sources have a weight: give one to each, or to none")
    for each in sources:
        if is_token_folder(each.source) or is_packed_folder(each.source):
            raise InputError(f"corpus.sources names {each.source}, which holds tokens: give text")


def check_source(source: str, text_field: str) -> None:
    """Raise `InputError` for a source of text that does not exist, or files whose first record lacks the text field."""
    if source.startswith(HUB_PREFIX):
        if not source.removeprefix(HUB_PREFIX).partition(":")[0]:
            raise InputError(f"corpus source {source!r} names no dataset: give {HUB_PREFIX}NAME")
        return
    files = source_files(source)
    for file in files:
        require_records(file)
    for file in filter(is_record_file, files):
        next(read_file(file, text_field), None)


def write_documents(config: CorpusConfig, folder: Path) -> CorpusSummary:
    """Write the corpus as two dataset folders, `folder/train` and `folder/validation`.

    The columns are `text` (large string) and `source` (string: the field `source` of the record, else the relative
    name of the file). Documents with the same text count as one: they are stored once, and never in both splits. The
    split of a document depends only on its text. Memory grows with the number of documents by a 16-byte digest each.
    For a streamed corpus, reading ends as soon as both splits are large enough.

    Raises:
        InputError: as `check_corpus`, for unreadable documents, and if a split is empty.
    """
    check_corpus(config)
    sieve = _Sieve()
    with (
        dataset_writer(folder / "train", _SCHEMA) as train_writer,
        dataset_writer(folder / "validation", _SCHEMA) as validation_writer,
    ):
        train, validation = _Side(train_writer), _Side(validation_writer)
        if config.streaming is not None:
            train.limit = round(config.streaming.sample_megabytes * 1e6)
            validation.limit = round(config.streaming.validation_megabytes * 1e6)
        if config.validation_source is not None:
            for document in sieve.distinct(config.validation_source, config.text_field):
                validation.add(document)
            validation.limit = 0  # all of `source` is for training
        for document in islice(_documents(config, sieve), config.max_documents):
            held_out = config.validation_source is None and is_held_out(document.digest, config.validation_fraction)
            side = validation if held_out else train
            if not side.is_full():
                side.add(document)
            elif train.is_full() and validation.is_full():
                break
        _require_both_sides(config, train.documents, validation.documents)
        train.flush()
        validation.flush()
    ignored = sum((ignored_files(each.source) for each in config.texts()), Counter[str]())
    summary = CorpusSummary(
        train_documents=train.documents,
        validation_documents=validation.documents,
        train_bytes=train.bytes,
        validation_bytes=validation.bytes,
        duplicates_dropped=sieve.duplicates,
        empty_dropped=sieve.empty,
        unreadable_files=sieve.unreadable,
        unreadable_examples=sieve.unreadable_examples,
        fingerprint=hashlib.sha256(train.digests.digest() + validation.digests.digest()).hexdigest(),
        ignored_files=ignored.total(),
        ignored_endings=[ending for ending, _ in ignored.most_common(EXAMPLES)],
    )
    if left_out := skipped(asdict(summary)):
        status(f"Skipped in {config.named()}: {left_out}.")
    return summary


def _documents(config: CorpusConfig, sieve: _Sieve) -> Iterator[_Document]:
    """Yield the distinct documents of all sources in the order of the corpus."""
    sources = [sieve.distinct(each.source, each.text_field) for each in config.texts()]
    weights = [each.weight for each in config.texts() if each.weight is not None]
    return mixed(sources, weights, lambda document: len(document.text)) if weights else chain.from_iterable(sources)


def distinct_texts(source: str, text_field: str) -> Iterator[str]:
    """Yield the distinct nonempty texts of `source`, as a corpus would hold them.

    Raises:
        InputError: as `check_corpus`, for unreadable documents, and if there is no text.
    """
    return (document.text.decode() for document in _Sieve().distinct(source, text_field))


def _require_both_sides(config: CorpusConfig, train: int, validation: int) -> None:
    if train and validation:
        return
    if config.validation_source is not None:
        raise InputError(
            f"every document of corpus source {config.named()!r} is also in validation_source "
            f"{config.validation_source!r}, so no training data remains: give another validation_source"
        )
    side, change = ("validation", "raise") if train else ("train", "lower")
    raise InputError(
        f"the {side} split is empty: corpus source {config.named()!r} has {train + validation} documents, split with "
        f"validation_fraction {config.validation_fraction}; {change} validation_fraction, raise max_documents if it "
        "is set, or give more documents (a document is never divided)"
    )


@dataclass(frozen=True)
class _Document:
    """A distinct document with text."""

    text: bytes  # UTF-8
    source: str
    digest: bytes  # SHA-256 of the text


def is_held_out(digest: bytes, fraction: float) -> bool:
    """Check whether the document with this SHA-256 belongs to the `fraction` for validation."""
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction


@dataclass
class _Sieve:
    """Filter for distinct texts over all sources, which counts the documents that it drops."""

    duplicates: int = 0
    empty: int = 0
    unreadable: int = 0
    unreadable_examples: list[str] = field(default_factory=list)
    _seen: set[bytes] = field(default_factory=set)

    def distinct(self, source: str, text_field: str) -> Iterator[_Document]:
        """Yield the documents of `source` not seen before; raise `InputError` if the source holds no text at all."""
        any_text, last_unreadable = False, None
        for document in progress_bar(read_documents(source, text_field), desc=f"Reading {source}", unit=" documents"):
            text = document.utf8()
            if text is None:
                if not self.unreadable:
                    status(
                        f"Skipping {document.source}: not a regular file of UTF-8 text; convert it to UTF-8 if it is "
                        "text. Further such files are counted, not listed."
                    )
                self.unreadable += 1
                last_unreadable = document.source
                if len(self.unreadable_examples) < EXAMPLES:
                    self.unreadable_examples.append(document.source)
            elif not text:
                self.empty += 1
            else:
                any_text = True
                digest = hashlib.sha256(text).digest()
                if digest[:16] in self._seen:
                    self.duplicates += 1
                else:
                    self._seen.add(digest[:16])
                    yield _Document(text, document.source, digest)
        if not any_text:
            why = f"binary, not UTF-8 or not regular files, such as {last_unreadable}" if last_unreadable else "empty"
            raise InputError(f"corpus source {source!r} has no document with text ({why}): give UTF-8 text")


class _Side:
    """Writer of one split, which counts its documents and writes them in batches of bounded size."""

    def __init__(self, writer: pa.RecordBatchStreamWriter) -> None:
        self.documents = 0
        self.bytes = 0
        self.limit: float = math.inf  # bytes after which the split is full
        self.digests = hashlib.sha256()  # over the documents' digests, in order
        self._writer = writer
        self._pending: list[_Document] = []
        self._pending_bytes = 0

    def is_full(self) -> bool:
        return self.bytes >= self.limit

    def add(self, document: _Document) -> None:
        self.documents += 1
        self.bytes += len(document.text)
        self.digests.update(document.digest)
        self._pending.append(document)
        self._pending_bytes += len(document.text)
        if self._pending_bytes >= _BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        texts = pa.array([document.text for document in self._pending], pa.large_binary())
        sources = [document.source for document in self._pending]
        self._writer.write_batch(pa.record_batch([texts.cast(pa.large_string()), sources], schema=_SCHEMA))
        self._pending, self._pending_bytes = [], 0
