"""`cocomix concepts search | show | name | export [RUN]`: use the catalog that `cocomix concepts RUN` built."""

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

RUNS = Path("runs")
Run = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="A trained model, its output folder, or a catalog. A folder of output folders has one catalog.",
        readable=False,
    ),
]
CatalogOption = Annotated[Path | None, typer.Option("--catalog", hidden=True, readable=False)]
"""The former spelling of the argument RUN."""


def search(
    *,
    run: Run = RUNS,
    text: Annotated[str, argument("TEXT", "Words to look for.")],
    limit: Annotated[int, option("N", "Number of concepts to list.", Count)] = 10,
    catalog: CatalogOption = None,
    as_json: Json = False,
) -> None:
    """Find concepts by name, promoted tokens and contexts."""
    from cocomix.catalog.search import hits_table, search_catalog

    hits = search_catalog(catalog_folder(catalog or run), text, limit)
    show(json.dumps([asdict(hit) for hit in hits], indent=2) if as_json else hits_table(hits))


def show_concept(
    *,
    run: Run = RUNS,
    number: Annotated[int, argument("ID", "Number of the concept.", ConceptId)],
    catalog: CatalogOption = None,
    as_json: Json = False,
) -> None:
    """Show everything that the catalog has on one concept."""
    from cocomix.catalog import search

    concept = search.show_concept(catalog_folder(catalog or run), number)
    show(json.dumps(asdict(concept), indent=2) if as_json else search.describe(concept))


def name(
    *,
    run: Run = RUNS,
    names: Annotated[Path | None, option("FILE", 'JSON: {"12": "name"}, or a Neuronpedia export.')] = None,
    endpoint: Annotated[
        str | None, option("URL", "OpenAI-compatible service; its key is read from COCOMIX_API_KEY.")
    ] = None,
    model: Annotated[str | None, option("NAME", "The service's name of the model.")] = None,
    limit: Annotated[int | None, option("N", "Name only the N concepts that are labels most often.", Count)] = None,
    catalog: CatalogOption = None,
    as_json: Json = False,
) -> None:
    """Name concepts from a file or with a language model.

    The model is any OpenAI-compatible service that you provide.
    """
    from cocomix.catalog.naming import name_concepts
    from cocomix.catalog.search import open_catalog

    folder = catalog_folder(catalog or run)
    open_catalog(folder)
    with locked(folder):
        result = name_concepts(folder, names, endpoint, model, limit)
    if as_json:
        show(json.dumps(asdict(result), indent=2))
    else:
        concepts = "concept" if result.named == 1 else "concepts"
        status(f"{result.named:,} {concepts} named from {result.source}; {result.unnamed:,} unchanged")


def export_concepts(
    *,
    run: Run = RUNS,
    target: Annotated[Path, argument("TARGET", "Folder to create.")],
    to: Annotated[Literal["neuronpedia", "saedashboard"], typer.Option(help="Whose form.")] = "neuronpedia",
    model: Annotated[str, option("NAME", "Name of the teacher there.")] = "teacher",
    source_set: Annotated[str, typer.Option("--set", metavar="NAME", help="Name of the SAE there.")] = "res-cocomix",
    catalog: CatalogOption = None,
) -> None:
    """Export the catalog to Neuronpedia or SAEDashboard.

    They show a token with an activation each; the catalog knows that of the strongest token of each context only.
    """
    from cocomix.catalog.exporting import export_catalog
    from cocomix.catalog.search import open_catalog

    count = export_catalog(open_catalog(catalog_folder(catalog or run)), target, to, model, source_set)
    show(f"{target}: {count} concepts")


def catalog_folder(run: Path) -> Path:
    """Return the folder of the catalog of a model, of an output folder or of the only output folder, and print it.

    Raises:
        InputError: there is none, or more than one.
    """
    from cocomix.catalog.rows import INFO_FILE
    from cocomix.training.run import output_folder

    near = [run, run / "catalog", output_folder(run) / "catalog"]
    found = [folder for folder in near if (folder / INFO_FILE).is_file()][:1]
    found = found or sorted(path.parent for path in run.glob(f"*/catalog/{INFO_FILE}"))
    if len(found) != 1:
        build = f"cocomix concepts {run}" if run != RUNS else "cocomix concepts RUN"
        there = f"{run} has {len(found)} ({', '.join(map(str, found))})" if found else f"there is none in {run}"
        raise InputError(f"which concept catalog? {there}; give RUN, whose catalog `{build}` builds")
    status(f"Catalog: {found[0]}")
    return found[0]
