"""Names of concepts: from the tokens that they promote, from a file, or from a language model that reads contexts."""

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
from cocomix.catalog.rows import CATALOG_FILE, SCHEMA, one_line, visible, write_rows
from cocomix.catalog.search import open_catalog
from cocomix.data.records import json_lines, reason
from cocomix.errors import InputError

DEFAULT_NAME_TOKENS = 3
_EXPECTED = 'expected {"12": "name", ...}, or Neuronpedia\'s objects with "index" and "description"'


def default_name(promoted: Sequence[str]) -> str:
    """The first three tokens that a concept promotes, distinct but for case, such as `fire · flame · burn`.

    Blanks and control characters are spelt by signs; pieces of characters count only if there is nothing else.
    """
    spelt = [visible(token.strip()) or visible(token).replace(" ", "␣") for token in promoted]
    whole = [token for token in spelt if token.strip("\ufffd")] or spelt
    distinct: dict[str, str] = {}
    for token in whole:
        distinct.setdefault(token.casefold(), token)
    return " · ".join(list(distinct.values())[:DEFAULT_NAME_TOKENS])


# From a file


def read_names(path: Path) -> dict[int, str]:
    """The names in a JSON file, which may be compressed (.gz).

    Either {"12": "name", ...}, or what Neuronpedia exports: a list, or a line each, of objects with `index` and
    `description`. Of several names of a concept the first counts; empty ones do not.

    Raises:
        InputError: no such file, or something else in it.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"names file {path} cannot be read ({reason(error)}); {_EXPECTED}") from None
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
    """Where it stands, concept and name of each entry of a names file."""
    for where, value in _values(content, name):
        if isinstance(value, dict) and "index" not in value:
            yield from ((where, concept, named) for concept, named in value.items())
            continue
        for number, record in enumerate(value if isinstance(value, list) else [value], 1):
            if not (isinstance(record, dict) and {"index", "description"} <= record.keys()):
                raise InputError(
                    f'{where}: entry {number} has not both "index" and "description": {record!r:.60}; {_EXPECTED}'
                )
            yield where, record["index"], record["description"]


def _values(content: bytes, name: str) -> list[tuple[str, Any]]:
    """Where it stands and what it is, of the one JSON value of a names file or of one in each line."""
    try:
        return [(name, json.loads(content.decode("utf-8-sig")))]
    except (ValueError, RecursionError) as error:
        whole = reason(error)
    values: list[tuple[str, Any]] = []
    try:
        values.extend((f"{name}, line {number}", value) for number, value in json_lines(BytesIO(content), name))
    except InputError:
        if values:
            raise
        raise InputError(f"{name} is not JSON that can be read ({whole}); {_EXPECTED}") from None
    return values


def _concept_id(written: object) -> int | None:
    """A concept's number as JSON may hold it; None if it is none."""
    if isinstance(written, int) and not isinstance(written, bool) and written >= 0:
        return written
    if isinstance(written, str) and written.isascii() and written.isdecimal() and len(written) < 12:
        return int(written)
    return None


def apply_names(folder: Path, names: dict[int, str], source: str) -> None:
    """Give concepts of the catalogue in `folder` these names; the others keep theirs.

    Args:
        folder: the catalogue, whose file is replaced as a whole.
        names: by concept.
        source: where they come from, the `name_source` of these concepts.

    Raises:
        InputError: there is no catalogue, or names for concepts that it does not have.
    """
    catalog = open_catalog(folder)
    unknown = [concept_id for concept_id in names if concept_id >= catalog.info.num_concepts]
    if unknown:
        raise InputError(
            f"{len(unknown)} of {len(names)} names from {source} are of concepts that the catalogue {folder} does not "
            f"have, such as {max(unknown)} (it has {catalog.info.num_concepts}): they belong to another SAE"
        )
    columns = {"name": names, "name_source": dict.fromkeys(names, source)}
    table = catalog.table
    for column, new in columns.items():
        values = [new.get(concept_id, old) for concept_id, old in enumerate(table[column].to_pylist())]
        table = table.set_column(SCHEMA.get_field_index(column), SCHEMA.field(column), pa.array(values, pa.string()))
    write_rows(folder / CATALOG_FILE, [table])


# From a language model


@dataclass(frozen=True)
class NamingResult:
    """What became of a catalogue's names.

    Attributes:
        source: where the names come from.
        named: concepts that carry a name of that source now.
        unnamed: other concepts of the catalogue.
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
    """Name the concepts of the catalogue in `folder`, from a file or by a language model.

    Args:
        folder: the catalogue, whose file is replaced.
        names_file: read by `read_names`.
        endpoint: address of an OpenAI-compatible service; its key, if it needs one, is in COCOMIX_API_KEY.
        model: what the service calls its model.
        limit: with an endpoint, the number of concepts to name: those that are labels most often.

    Raises:
        InputError: not one source of names, or what `read_names`, `name_by_endpoint` and `apply_names` raise.
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
            raise InputError("an endpoint needs to be told which model to use: give --model")
        catalog, source = open_catalog(folder), f"endpoint {model}"
        most_used = np.argsort(-catalog.table["label_count"].to_numpy(), kind="stable")[:limit].tolist()
        names = name_by_endpoint(catalog, endpoint, model, os.environ.get(API_KEY_VARIABLE), most_used)
    apply_names(folder, names, source)
    sources = open_catalog(folder).table["name_source"].to_pylist()
    return NamingResult(source, sources.count(source), len(sources) - sources.count(source))
