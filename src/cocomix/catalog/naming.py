"""Names of concepts: from the tokens that they promote, from a file, or from a language model that reads contexts."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from cocomix.catalog.endpoint import API_KEY_VARIABLE, name_by_endpoint
from cocomix.catalog.rows import CATALOG_FILE, SCHEMA, one_line, visible, write_rows
from cocomix.catalog.search import open_catalog
from cocomix.errors import InputError

DEFAULT_NAME_TOKENS = 3


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
    expected = 'expected {"12": "name", ...}, or Neuronpedia\'s objects with "index" and "description"'
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
        pairs = _pairs(text)
    except OSError as error:
        raise InputError(f"names file {path} does not open ({error.strerror or error}); {expected}") from None
    except (ValueError, TypeError, KeyError, EOFError, zlib.error) as error:
        raise InputError(f"{path} holds no names ({type(error).__name__}: {error!s:.80}); {expected}") from None
    names: dict[int, str] = {}
    for concept_id, name in pairs:
        if concept_id < 0:
            raise InputError(f"{path} names the concept {concept_id}; {expected}")
        if line := one_line(name or ""):
            names.setdefault(concept_id, line)
    if not names:
        raise InputError(f"{path} holds no names; {expected}")
    return names


def _pairs(text: str) -> list[tuple[int, str | None]]:
    """Concept and name, as they follow one another in a names file. Raises what parsing raises."""
    try:
        value = json.loads(text)
    except ValueError:
        value = [json.loads(line) for line in text.splitlines() if line.strip()]
    if isinstance(value, dict) and "index" not in value:
        pairs = [(int(concept_id), name) for concept_id, name in value.items()]
    else:
        records = [value] if isinstance(value, dict) else value
        pairs = [(int(record["index"]), record["description"]) for record in records]
    for concept_id, name in pairs:
        if not isinstance(name, str | None):
            raise ValueError(f"the name of concept {concept_id} is {name!r:.40}")
    return pairs


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
        if limit is not None and limit < 1:
            raise InputError(f"limit is {limit}; expected 1 or more")
        catalog, source = open_catalog(folder), f"endpoint {model}"
        most_used = np.argsort(-catalog.table["label_count"].to_numpy(), kind="stable")[:limit].tolist()
        names = name_by_endpoint(catalog, endpoint, model, os.environ.get(API_KEY_VARIABLE), most_used)
    apply_names(folder, names, source)
    sources = open_catalog(folder).table["name_source"].to_pylist()
    return NamingResult(source, sources.count(source), len(sources) - sources.count(source))
