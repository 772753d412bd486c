"""Stream documents from the standard library, files and folders, and Hugging Face datasets."""

from __future__ import annotations

import glob
import io
import os
import sysconfig
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from cocomix.common.errors import InputError, error_message
from cocomix.common.portable import HUB_PREFIX as HUB_PREFIX
from cocomix.data.records import json_lines, numbered

if TYPE_CHECKING:
    from datasets import IterableDataset

PYTHON_STDLIB = "python-stdlib"
TEXT_ENDINGS = (".txt", ".md", ".py")
JSONL_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
PARQUET_ENDINGS = (".parquet",)
KNOWN_ENDINGS = TEXT_ENDINGS + JSONL_ENDINGS + PARQUET_ENDINGS

MAX_DOCUMENT_BYTES = 1 << 28
"""Size of the largest document, of which a few copies must fit into memory."""
_TOO_LONG = f"is larger than {MAX_DOCUMENT_BYTES >> 20} MiB, too large for one document: split it"
_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__", "test", "tests"}
_FIELDS_SHOWN = 24
_PARQUET_ROWS = 256  # rows held in memory at once; a row can be an entire book


class Document(NamedTuple):
    """A document as read."""

    text: str | None  # None if not UTF-8 text, or not a regular file
    source: str  # the record's field "source", else the file name relative to the corpus, or the dataset name

    def utf8(self) -> bytes | None:
        """Return the text in UTF-8, empty if it is blank; None if there is none, or if it is not valid Unicode."""
        if self.text is None:
            return None
        try:
            return b"" if self.text.isspace() else self.text.encode("utf-8")
        except UnicodeEncodeError:  # JSON can contain half of a surrogate pair, which is not text
            return None


class SourceFile(NamedTuple):
    """A file of a corpus."""

    name: str  # relative to the source, with forward slashes
    path: Path


def read_documents(source: str, text_field: str) -> Iterator[Document]:
    """Yield the documents of `source`, in an order that depends only on the source.

    Raises:
        InputError: the source does not exist, has no file of a known type, or has a record without a string in
            `text_field`.
    """
    if source.startswith(HUB_PREFIX):
        yield from _read_hub(source, text_field)
    else:
        for file in source_files(source):
            yield from read_file(file, text_field)


def source_files(source: str) -> list[SourceFile]:
    """List the supported files of `source`, sorted by relative name; raise `InputError` if there is none."""
    if source == PYTHON_STDLIB:
        # Not every installation includes the tests, so the corpus would differ between machines.
        return walk_files(Path(sysconfig.get_path("stdlib")), (".py",), _NOT_STDLIB)
    path = Path(source)
    if path.is_dir():
        files = walk_files(path, KNOWN_ENDINGS)
    elif path.is_file():
        files = [SourceFile(path.name, path)] if path.name.lower().endswith(KNOWN_ENDINGS) else []
    elif path.exists():
        raise InputError(f"corpus source {source!r} is neither a regular file nor a folder: give one of these")
    else:
        raise InputError(
            f"corpus source {source!r} does not exist: give {PYTHON_STDLIB}, a file, a folder, "
            f"or {HUB_PREFIX}NAME for a Hugging Face dataset"
        )
    if not files:
        raise InputError(
            f"corpus source {source!r} has no file of a known type: the supported endings are "
            f"{', '.join(KNOWN_ENDINGS)} (hidden files are ignored)"
        )
    return files


def ignored_files(source: str) -> Counter[str]:
    """Count the files of other types in a folder by their endings, or names without one, but for hidden files."""
    path = Path(source)
    if source == PYTHON_STDLIB or source.startswith(HUB_PREFIX) or not path.is_dir():
        return Counter()
    names = [file.path.name for file in walk_files(path, ("",)) if not file.name.lower().endswith(KNOWN_ENDINGS)]
    return Counter(Path(name).suffix.lower() or name for name in names)


def walk_files(root: Path, endings: tuple[str, ...], skipped: Iterable[str] = ()) -> list[SourceFile]:
    """Find the files below `root` that have one of these endings, sorted by name; hidden files are ignored.

    Linked folders are followed. Each folder is searched once, so links cannot form a cycle. A folder that is reached
    both directly and through a link keeps its real name.

    Raises:
        InputError: a folder cannot be listed.
    """
    found: list[SourceFile] = []
    visited: set[Path] = set()
    starts = deque([root])
    while starts:
        start = starts.popleft()
        for folder, subfolders, names in os.walk(start, onerror=_refuse_folder):
            real = Path(folder).resolve()
            if real in visited:
                subfolders.clear()
                continue
            visited.add(real)
            # In place, so that os.walk does not descend into the others.
            subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name not in skipped)
            links = (path for name in subfolders if (path := Path(folder, name)).is_symlink())
            starts.extend(path for path in links if not _leads_back(path))
            for name in names:
                if not name.startswith(".") and name.lower().endswith(endings):
                    path = Path(folder, name)
                    found.append(SourceFile(_printable(path.relative_to(root).as_posix()), path))
    return sorted(found)


def _leads_back(link: Path) -> bool:
    """Check whether a link points to a folder that contains it."""
    return link.parent.resolve().is_relative_to(link.resolve())


def _refuse_folder(error: OSError) -> None:
    raise InputError(f"corpus folder {error.filename!r} cannot be listed ({error.strerror}): make it readable")


def _printable(name: str) -> str:
    """Return a name in valid Unicode; file names may contain arbitrary bytes."""
    return name.encode("utf-8", "replace").decode()


def is_record_file(file: SourceFile) -> bool:
    """Check whether the file holds documents as records with fields (jsonl, parquet)."""
    return file.name.lower().endswith(JSONL_ENDINGS + PARQUET_ENDINGS)


def require_records(file: SourceFile) -> None:
    """Raise `InputError` for a file of records that is not a regular file: many documents would be missing."""
    if is_record_file(file) and not file.path.is_file():
        raise InputError(
            f"{file.name} is not a regular file, but a link without a target, a pipe or a device: "
            "restore it, or remove it from the corpus"
        )


def read_file(file: SourceFile, text_field: str) -> Iterator[Document]:
    """Yield the documents of a file: one for a text file, one per record for jsonl and parquet.

    Files that are not regular, such as pipes and links without a target, are never opened. In place of a text file
    they yield one document without text.

    Raises:
        InputError: the file cannot be read, or holds a record without text in `text_field`.
    """
    name = file.name.lower()
    if not file.path.is_file():
        require_records(file)
        yield Document(None, file.name)
    elif name.endswith(JSONL_ENDINGS):
        yield from _read_jsonl(file, text_field)
    elif name.endswith(PARQUET_ENDINGS):
        yield from _read_parquet(file, text_field)
    else:
        yield _read_text(file)


def _read_text(file: SourceFile) -> Document:
    try:
        if file.path.stat().st_size > MAX_DOCUMENT_BYTES:
            raise InputError(f"{file.name} {_TOO_LONG}")
        content = file.path.read_bytes()
    except OSError as error:
        raise InputError(f"{file.name} cannot be read ({error.strerror}): make it readable, or remove it") from error
    return Document(None if b"\0" in content else _decoded(content), file.name)


def _decoded(content: bytes) -> str | None:
    """Decode UTF-8 without a byte-order mark; None if the content is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _read_jsonl(file: SourceFile, text_field: str) -> Iterator[Document]:
    # Each line is parsed separately: table readers fail if other fields of two records differ in type. Arrow's
    # decompression detects truncated files, unlike zstandard's.
    for number, record in json_lines(_lines(file), file.name):
        if not isinstance(record, dict):
            raise InputError(f"{file.name}, line {number} is a {type(record).__name__}; expected an object with fields")
        yield as_document(record, text_field, f"{file.name}, line {number}", file.name)


def _lines(file: SourceFile) -> Iterator[bytes]:
    compression = COMPRESSIONS.get(file.path.suffix.lower())
    with pa.input_stream(str(file.path), compression) as stream, io.BufferedReader(stream) as lines:
        for number, line in enumerate(iter(lambda: lines.readline(MAX_DOCUMENT_BYTES + 1), b""), 1):
            if len(line) > MAX_DOCUMENT_BYTES:
                raise InputError(f"{file.name}, line {number} {_TOO_LONG}")
            yield line


def _read_parquet(file: SourceFile, text_field: str) -> Iterator[Document]:
    try:
        table = pq.ParquetFile(file.path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file.name} is not a readable parquet file ({error_message(error)})") from error
    with table:
        schema = table.schema_arrow
        _require_field(schema.names, text_field, file.name)
        columns = [name for name in dict.fromkeys((text_field, "source")) if name in schema.names]
        for name in columns:
            if schema.names.count(name) > 1:
                raise InputError(f"{file.name} has the column {name!r} more than once: give each column its own name")
        for number, record in numbered(_rows(table, columns), file.name, "row"):
            yield as_document(record, text_field, f"{file.name}, row {number}", file.name)


def _rows(table: pq.ParquetFile, columns: list[str]) -> Iterator[dict[str, Any]]:
    for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
        values = [_as_bytes(batch.column(name)).to_pylist() for name in columns]
        for row in zip(*values, strict=True):
            yield dict(zip(columns, row, strict=True))


def _as_bytes(column: pa.Array) -> pa.Array:
    """Convert text to bytes, which need not be valid UTF-8; leave columns of other types unchanged."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return column.cast(pa.large_binary())
    return column


def open_hub(source: str) -> IterableDataset:
    """Stream the records of a Hugging Face dataset; raise `InputError` if it does not open."""
    from datasets import load_dataset

    name, _, split = source.removeprefix(HUB_PREFIX).partition(":")
    if Path(name).exists() and (resolved := str(Path(name).resolve())) != glob.escape(resolved):
        raise InputError(
            f"corpus source {source!r} cannot be opened through {HUB_PREFIX}, where the special characters * ? [ of "
            f"{resolved!r} select files: rename the folder, or give it without {HUB_PREFIX}"
        )
    # A streamed dataset leaves only a lock file, which is deleted with the temporary cache.
    with TemporaryDirectory() as cache:
        try:
            return load_dataset(name, split=split or "train", streaming=True, cache_dir=cache)
        except Exception as error:  # unreachable, no such split, requires a script, damaged first file
            if "zstd not supported" in str(error):
                raise InputError(
                    f"corpus source {source!r} holds .zst files, which `datasets` cannot read without zstandard: "
                    "pip install zstandard"
                ) from error
            raise InputError(
                f"corpus source {source!r} cannot be opened as a Hugging Face dataset "
                f"({error_message(error)}): give {HUB_PREFIX}NAME or {HUB_PREFIX}NAME:SPLIT"
            ) from error


def _read_hub(source: str, text_field: str) -> Iterator[Document]:
    name = source.removeprefix(HUB_PREFIX).partition(":")[0]
    for number, record in numbered(open_hub(source), source, "record"):
        yield as_document(record, text_field, f"{source}, record {number}", name)


def as_document(record: Mapping[str, Any], text_field: str, where: str, name: str) -> Document:
    """Convert a record to a document; null becomes an empty text, and bytes are decoded as UTF-8.

    Raises:
        InputError: `text_field` is missing or is not text; the message contains `where`.
    """
    _require_field(record, text_field, where)
    text, source = record[text_field], record.get("source")
    if text is None:
        text = ""
    if isinstance(text, bytes):
        text = _decoded(text)
    elif not isinstance(text, str):
        raise InputError(
            f"{where}: the field {text_field!r} holds {text!r:.40}, which is a {type(text).__name__}, not a string: "
            "set text_field to a field of strings"
        )
    if isinstance(source, bytes):
        source = _decoded(source)
    return Document(text, _printable(source) if isinstance(source, str) else name)


def _require_field(fields: Iterable[str], text_field: str, where: str) -> None:
    if text_field not in fields:
        names = [*map(repr, fields)]
        listed = ", ".join([*names[:_FIELDS_SHOWN], *(["…"] if len(names) > _FIELDS_SHOWN else [])])
        raise InputError(
            f"{where} has no field {text_field!r}; it has {listed or 'no fields'}: "
            "set text_field to the field that holds the text"
        )
