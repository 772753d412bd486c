"""Name concepts: by the tokens they promote, from a file, or by a language model that reads their contexts."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cocomix.catalog.endpoint import API_KEY_VARIABLE, name_by_endpoint
from cocomix.catalog.rows import CATALOG_FILE, SCHEMA, write_rows
from cocomix.catalog.search import open_catalog
from cocomix.common import integrity
from cocomix.common.console import one_line, visible
from cocomix.common.errors import InputError, error_message
from cocomix.data.records import json_lines

DEFAULT_NAME_TOKENS = 3
_EXPECTED = 'expected {"12": "name", ...}, or Neuronpedia\'s objects with "index" and "description"'


def default_name(promoted: Sequence[str]) -> str:
    """Join the first three promoted tokens that differ by more than case, such as `fire · flame · burn`.

    Whitespace and control characters are shown as visible symbols. Incomplete characters are used only if there is
    nothing else.
    """
    shown = [visible(token.strip()) or visible(token).replace(" ", "␣") for token in promoted]
    complete = [token for token in shown if token.strip("\ufffd")] or shown
    distinct: dict[str, str] = {}
    for token in complete:
        distinct.setdefault(token.casefold(), token)
    return " · ".join(list(distinct.values())[:DEFAULT_NAME_TOKENS])


def read_names(path: Path) -> dict[int, str]:
    """Read the names of concepts from a JSON file, which may be compressed (.gz).

    The file holds {"12": "name", ...}, or a Neuronpedia export: objects with `index` and `description`, in a list or
    one per line. If a concept has several names, the first counts. Empty names are ignored.

    Raises:
        InputError: the file is missing, unreadable, or in another format.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"names file {path} cannot be read ({error_message(error)}); {_EXPECTED}") from None
    names: dict[int, str] = {}
    for where, concept, name in _entries(content, str(path)):
        concept_id = _concept_id(concept)
        if concept_id is None:
            raise InputError(f"{where}: the concept is {concept!r:.40}, not a number from 0 on; {_EXPECTED}")
        if not isinstance(name, str | None):
            raise InputError(f"{where}: the name of concept {concept_id} is {name!r:.40}; {_EXPECTED}")
        if line := one_line(name or ""):
            names.setdefault(concept_id, line)
    if not names:
        raise InputError(f"{path} holds no names; {_EXPECTED}")
    return names


def _entries(content: bytes, name: str) -> Iterator[tuple[str, object, object]]:
    """Yield location, concept and name of each entry of a names file."""
    for where, value in _values(content, name):
        if isinstance(value, dict) and "index" not in value:
            yield from ((where, concept, named) for concept, named in value.items())
            continue
        for number, record in enumerate(value if isinstance(value, list) else [value], 1):
            if not (isinstance(record, dict) and {"index", "description"} <= record.keys()):
                raise InputError(f'{where}: entry {number} lacks "index" or "description": {record!r:.60}; {_EXPECTED}')
            yield where, record["index"], record["description"]


def _values(content: bytes, name: str) -> list[tuple[str, Any]]:
    """Return location and content of the JSON value in a names file, or of the one on each line."""
    try:
        return [(name, json.loads(content.decode("utf-8-sig")))]
    except (ValueError, RecursionError) as error:
        problem = error_message(error)
    values: list[tuple[str, Any]] = []
    try:
        values.extend((f"{name}, line {number}", value) for number, value in json_lines(BytesIO(content), name))
    except InputError:
        if values:
            raise
        raise InputError(f"{name} is not readable JSON ({problem}); {_EXPECTED}") from None
    return values


def _concept_id(written: object) -> int | None:
    """Parse a concept id as it may appear in JSON; None if invalid."""
    if isinstance(written, int) and not isinstance(written, bool) and written >= 0:
        return written
    if isinstance(written, str) and written.isascii() and written.isdecimal() and len(written) < 12:
        return int(written)
    return None


def apply_names(folder: Path, names: dict[int, str], source: str) -> None:
    """Rename concepts of the catalog in `folder`; the others keep their names.

    Args:
        folder: folder of the catalog, whose file is replaced atomically.
        names: new name by concept.
        source: where the names come from, the new `name_source`.

    Raises:
        InputError: there is no catalog, or it lacks one of the concepts.
    """
    catalog = open_catalog(folder)
    unknown = [concept_id for concept_id in names if concept_id >= catalog.info.num_concepts]
    if unknown:
        raise InputError(
            f"{len(unknown)} of {len(names)} names from {source} are of concepts that the catalog {folder} does not "
            f"have, such as {max(unknown)} (it has {catalog.info.num_concepts}): they belong to another SAE"
        )
    columns = {"name": names, "name_source": dict.fromkeys(names, source)}
    table = catalog.table
    for column, new in columns.items():
        values = [new.get(concept_id, old) for concept_id, old in enumerate(table[column].to_pylist())]
        table = table.set_column(SCHEMA.get_field_index(column), SCHEMA.field(column), pa.array(values, pa.string()))
    with integrity.replaced(folder, CATALOG_FILE):
        write_rows(folder / CATALOG_FILE, [table])


@dataclass(frozen=True)
class NamingResult:
    """Result of naming.

    Attributes:
        source: where the names come from.
        named: number of concepts with a name from that source.
        unnamed: number of other concepts in the catalog.
    """

    source: str
    named: int
    unnamed: int


def name_concepts(
    folder: Path,
    names_file: Path | None = None,
    endpoint: str | None = None,
    model: str | None = None,
    limit: int | None = None,
) -> NamingResult:
    """Name the concepts of the catalog in `folder`, from a file or by a language model.

    Args:
        folder: folder of the catalog, whose file is replaced.
        names_file: file for `read_names`.
        endpoint: base URL of an OpenAI-compatible service. If it needs a key, set COCOMIX_API_KEY.
        model: name of the model at that service.
        limit: number of concepts that the endpoint names, those that are labels most often first; all by default.

    Raises:
        InputError: not exactly one source of names is given, or as `read_names`, `name_by_endpoint` and `apply_names`.
    """
    if (names_file is None) == (endpoint is None):
        raise InputError("names come from a file or from an endpoint: give one of --names and --endpoint")
    if names_file is not None:
        if model is not None or limit is not None:
            raise InputError("--model and --limit go with --endpoint, not with --names")
        source, names = names_file.name, read_names(names_file)
    else:
        assert endpoint is not None
        if model is None:
            raise InputError("--endpoint needs the name of a model: give --model")
        catalog, source = open_catalog(folder), f"endpoint {model}"
        most_used = np.argsort(-catalog.table["label_count"].to_numpy(), kind="stable")[:limit].tolist()
        names = name_by_endpoint(catalog, endpoint, model, os.environ.get(API_KEY_VARIABLE), most_used)
    apply_names(folder, names, source)
    sources = open_catalog(folder).table["name_source"].to_pylist()
    return NamingResult(source, sources.count(source), len(sources) - sources.count(source))
