"""Reading documents: the standard library, files and folders, and Hugging Face datasets, all streamed."""

from __future__ import annotations

import io
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from cocomix.errors import InputError

if TYPE_CHECKING:
    from datasets import IterableDataset

PYTHON_STDLIB = "python-stdlib"
HUB_PREFIX = "hf:"
TEXT_ENDINGS = (".txt", ".md", ".py")
JSONL_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET_ENDINGS = (".parquet",)
KNOWN_ENDINGS = TEXT_ENDINGS + JSONL_ENDINGS + PARQUET_ENDINGS

_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__", "test", "tests"}
_PARQUET_ROWS = 256  # rows held in memory at once; a row can be a whole book


class Document(NamedTuple):
    """One document as read."""

    text: str | None  # None: the file is not UTF-8 text
    source: str  # the record's own "source", else the file's name relative to the corpus, or the dataset's

    def utf8(self) -> bytes | None:
        """The text in UTF-8; None if there is none, or if it cannot be written so."""
        try:
            return None if self.text is None else self.text.encode("utf-8")
        except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which is no text
            return None


class SourceFile(NamedTuple):
    """One file of a corpus."""

    name: str  # relative to the source, with forward slashes
    path: Path


def read_documents(source: str, text_field: str) -> Iterator[Document]:
    """The documents of `source`, in an order that depends on nothing but the source.

    Raises `InputError` if the source does not exist, holds no file of a known type, or holds a
    record without a string in `text_field`.
    """
    if source.startswith(HUB_PREFIX):
        yield from _read_hub(source, text_field)
    else:
        for file in source_files(source):
            yield from read_file(file, text_field)


def source_files(source: str) -> list[SourceFile]:
    """The files of `source` that can be read, sorted by relative name; `InputError` if there is none."""
    if source == PYTHON_STDLIB:
        # The tests are not part of every installation, so that they would make the corpus differ.
        return _list_files(Path(sysconfig.get_path("stdlib")), (".py",), _NOT_STDLIB)
    path = Path(source)
    if path.is_dir():
        files = _list_files(path, KNOWN_ENDINGS)
    elif path.is_file():
        files = [SourceFile(path.name, path)] if path.name.lower().endswith(KNOWN_ENDINGS) else []
    else:
        raise InputError(
            f"corpus source {source!r} does not exist: give {PYTHON_STDLIB}, a file, a folder, "
            f"or {HUB_PREFIX}NAME for a Hugging Face dataset"
        )
    if not files:
        raise InputError(
            f"corpus source {source!r} has no file of a known type: the endings read are "
            f"{', '.join(KNOWN_ENDINGS)} (hidden files are left out)"
        )
    return files


def _list_files(root: Path, endings: tuple[str, ...], skipped: Iterable[str] = ()) -> list[SourceFile]:
    found = []
    for folder, subfolders, names in os.walk(root):
        # In place, so that os.walk does not descend into them.
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in skipped]
        for name in names:
            if not name.startswith(".") and name.lower().endswith(endings):
                path = Path(folder, name)
                found.append(SourceFile(path.relative_to(root).as_posix(), path))
    return sorted(found)


def is_record_file(file: SourceFile) -> bool:
    """Whether the file holds many documents as records with fields (jsonl, parquet)."""
    return file.name.lower().endswith(JSONL_ENDINGS + PARQUET_ENDINGS)


def read_file(file: SourceFile, text_field: str) -> Iterator[Document]:
    """The documents of one file: all of it for text, one per record for jsonl and parquet."""
    name = file.name.lower()
    if name.endswith(JSONL_ENDINGS):
        return _read_jsonl(file, text_field)
    if name.endswith(PARQUET_ENDINGS):
        return _read_parquet(file, text_field)
    return _read_text(file)


def _read_text(file: SourceFile) -> Iterator[Document]:
    content = file.path.read_bytes()
    try:
        text = None if b"\0" in content else content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = None
    yield Document(text, file.name)


def _read_jsonl(file: SourceFile, text_field: str) -> Iterator[Document]:
    # Each line is parsed by itself: a reader of whole tables gives up when the other fields of two
    # records disagree in type. Arrow's decompression notices a file that was cut short; zstandard's does not.
    number = 0
    try:
        with pa.input_stream(str(file.path)) as stream, io.BufferedReader(stream) as lines:
            for number, line in enumerate(lines, 1):
                if line.isspace():
                    continue
                record = json.loads(line.decode("utf-8-sig"))
                if not isinstance(record, dict):
                    raise InputError(
                        f"{file.name}, line {number} is a {type(record).__name__}, not an object with fields"
                    )
                yield as_document(record, text_field, f"{file.name}, line {number}", file.name)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"{file.name}, line {number} is not JSON ({error}): a jsonl file has one JSON object on each line"
        ) from None
    except OSError as error:
        raise InputError(
            f"{file.name} cannot be read after line {number} ({error}): is it damaged or cut short?"
        ) from None


def _read_parquet(file: SourceFile, text_field: str) -> Iterator[Document]:
    try:
        table = pq.ParquetFile(file.path)
    except pa.ArrowInvalid as error:
        raise InputError(f"{file.name} is not a parquet file ({_one_line(error)})") from None
    with table:
        fields = table.schema_arrow.names
        _require_field(fields, text_field, file.name)
        columns = [field for field in dict.fromkeys((text_field, "source")) if field in fields]
        row = 0
        for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
            for record in batch.to_pylist():
                row += 1
                yield as_document(record, text_field, f"{file.name}, row {row}", file.name)


def open_hub(source: str) -> IterableDataset:
    """The records of a Hugging Face dataset, streamed; `InputError` if it does not open."""
    from datasets import load_dataset

    name, _, split = source.removeprefix(HUB_PREFIX).partition(":")
    # Streamed, a dataset leaves nothing but a lock file behind; that goes with the temporary cache.
    with TemporaryDirectory() as cache:
        try:
            return load_dataset(name, split=split or "train", streaming=True, cache_dir=cache)
        except (OSError, ValueError, RuntimeError) as error:  # unreachable, no such split, needs a script
            raise InputError(
                f"corpus source {source!r} cannot be opened as a Hugging Face dataset "
                f"({_one_line(error)}): give {HUB_PREFIX}NAME or {HUB_PREFIX}NAME:SPLIT"
            ) from error


def _read_hub(source: str, text_field: str) -> Iterator[Document]:
    name = source.removeprefix(HUB_PREFIX).partition(":")[0]
    for number, record in enumerate(open_hub(source), 1):
        yield as_document(record, text_field, f"{source}, record {number}", name)


def as_document(record: Mapping[str, Any], text_field: str, where: str, name: str) -> Document:
    """The document of a record; `InputError`, which says `where` it is, unless `text_field` holds a string."""
    _require_field(record, text_field, where)
    text, source = record[text_field], record.get("source")
    if not isinstance(text, str):
        raise InputError(
            f"{where}: the field {text_field!r} holds {text!r:.40}, which is not a string: "
            "set text_field to the field that holds the text"
        )
    return Document(text, source if isinstance(source, str) else name)


def _require_field(fields: Iterable[str], text_field: str, where: str) -> None:
    if text_field not in fields:
        raise InputError(
            f"{where} has no field {text_field!r}; it has {', '.join(map(repr, fields)) or 'no field'}: "
            "set text_field to the field that holds the text"
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
