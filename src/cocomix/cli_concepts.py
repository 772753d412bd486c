"""`cocomix concepts search | show | name`: use the catalogue that `cocomix concepts RECIPE` made."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cocomix.cli_options import OptionParser, number
from cocomix.console import say, show
from cocomix.errors import InputError
from cocomix.locking import locked
from cocomix.settings import ConceptId, Count

COMMANDS = ("search", "show", "name")


def run(arguments: Sequence[str]) -> int:
    """Run one of `COMMANDS`; returns the exit code.

    Raises:
        InputError: no catalogue, no such concept, names that do not fit, an endpoint that refuses.
    """
    from cocomix.catalog import naming, search

    options = _parser().parse_args(arguments)
    folder = options.catalog or _only_catalog()
    if options.command == "search":
        hits = search.search_catalog(folder, options.text, options.limit)
        show(json.dumps([asdict(hit) for hit in hits], indent=2) if options.json else search.hits_table(hits))
    elif options.command == "show":
        concept = search.show_concept(folder, options.id)
        show(json.dumps(asdict(concept), indent=2) if options.json else search.describe(concept))
    else:
        search.open_catalog(folder)
        with locked(folder):
            result = naming.name_concepts(folder, options.names, options.endpoint, options.model, options.limit)
        if options.json:
            show(json.dumps(asdict(result), indent=2))
        else:
            say(f"{result.named} concepts have a name of {result.source}, {result.unnamed} have another: {folder}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser(prog="cocomix concepts")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("--catalog", metavar="FOLDER", type=Path, help="the catalogue (default: that in runs/)")
        command.add_argument("--json", action="store_true", help="print the results as JSON")
        return command

    search = add("search", "find concepts by their names, promoted tokens and contexts")
    search.add_argument("text", metavar="TEXT", help="words to look for")
    search.add_argument("--limit", metavar="N", type=number(Count), default=10, help="concepts to list (default: 10)")
    one = add("show", "show all that the catalogue has on one concept")
    one.add_argument("id", metavar="ID", type=number(ConceptId), help="number of the concept")
    name = add("name", "name the concepts: from a file, or by a language model that you provide")
    name.add_argument("--names", metavar="FILE", type=Path, help='JSON: {"12": "name"}, or a Neuronpedia export')
    name.add_argument("--endpoint", metavar="URL", help="OpenAI-compatible service; its key in COCOMIX_API_KEY")
    name.add_argument("--model", metavar="NAME", help="what the service calls its model")
    name.add_argument("--limit", metavar="N", type=number(Count), help="name the N concepts that are labels most often")
    return parser


def _only_catalog() -> Path:
    """The one catalogue below runs/."""
    found = sorted(path.parent for path in Path("runs").glob("*/catalog/catalog.json"))
    if len(found) != 1:
        there = f"there are {len(found)} in runs/ ({', '.join(map(str, found))})" if found else "there is none in runs/"
        raise InputError(f"which catalogue? {there}; give --catalog FOLDER, made by: cocomix concepts RECIPE")
    return found[0]
