"""`cocomix concepts search | show | name | export`: use the catalog that `cocomix concepts RECIPE` built."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from cocomix.cli.options import Json, argument, option
from cocomix.common.console import show, status
from cocomix.common.errors import InputError
from cocomix.common.locking import locked
from cocomix.common.settings import ConceptId, Count

CatalogFolder = Annotated[Path | None, option("FOLDER", "The catalog (default: the only one in runs/).")]


def search(
    text: Annotated[str, argument("TEXT", "Words to look for.")],
    limit: Annotated[int, option("N", "Number of concepts to list.", Count)] = 10,
    catalog: CatalogFolder = None,
    as_json: Json = False,
) -> None:
    """Find concepts by name, promoted tokens and contexts."""
    from cocomix.catalog.search import hits_table, search_catalog

    hits = search_catalog(catalog or _only_catalog(), text, limit)
    show(json.dumps([asdict(hit) for hit in hits], indent=2) if as_json else hits_table(hits))


def show_concept(
    number: Annotated[int, argument("ID", "Number of the concept.", ConceptId)],
    catalog: CatalogFolder = None,
    as_json: Json = False,
) -> None:
    """Show everything that the catalog has on one concept."""
    from cocomix.catalog import search

    concept = search.show_concept(catalog or _only_catalog(), number)
    show(json.dumps(asdict(concept), indent=2) if as_json else search.describe(concept))


def name(
    names: Annotated[Path | None, option("FILE", 'JSON: {"12": "name"}, or a Neuronpedia export.')] = None,
    endpoint: Annotated[
        str | None, option("URL", "OpenAI-compatible service; its key is read from COCOMIX_API_KEY.")
    ] = None,
    model: Annotated[str | None, option("NAME", "The service's name of the model.")] = None,
    limit: Annotated[int | None, option("N", "Name only the N concepts that are labels most often.", Count)] = None,
    catalog: CatalogFolder = None,
    as_json: Json = False,
) -> None:
    """Name concepts from a file or with a language model.

    The model is any OpenAI-compatible service that you provide.
    """
    from cocomix.catalog.naming import name_concepts
    from cocomix.catalog.search import open_catalog

    folder = catalog or _only_catalog()
    open_catalog(folder)
    with locked(folder):
        result = name_concepts(folder, names, endpoint, model, limit)
    if as_json:
        show(json.dumps(asdict(result), indent=2))
    else:
        status(f"{result.named} concepts are named by {result.source}, {result.unnamed} by others: {folder}")


def export_concepts(
    target: Annotated[Path, argument("TARGET", "Folder to create.")],
    to: Annotated[Literal["neuronpedia", "saedashboard"], typer.Option(help="Whose form.")] = "neuronpedia",
    model: Annotated[str, option("NAME", "Name of the teacher there.")] = "teacher",
    source_set: Annotated[str, typer.Option("--set", metavar="NAME", help="Name of the SAE there.")] = "res-cocomix",
    catalog: CatalogFolder = None,
) -> None:
    """Export the catalog to Neuronpedia or SAEDashboard.

    They show a token with an activation each; the catalog knows that of the strongest token of each context only.
    """
    from cocomix.catalog.exporting import export_catalog
    from cocomix.catalog.search import open_catalog

    count = export_catalog(open_catalog(catalog or _only_catalog()), target, to, model, source_set)
    show(f"{target}: {count} concepts")


def _only_catalog() -> Path:
    """Return the folder of the one catalog below runs/."""
    found = sorted(path.parent for path in Path("runs").glob("*/catalog/catalog.json"))
    if len(found) != 1:
        there = f"there are {len(found)} in runs/ ({', '.join(map(str, found))})" if found else "there is none in runs/"
        raise InputError(f"which catalog? {there}; give --catalog FOLDER, built by: cocomix concepts RECIPE")
    return found[0]
