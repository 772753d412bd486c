"""`cocomix inspect TEXT` and `cocomix generate PROMPT`: look into a trained model, and steer it."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cocomix import files
from cocomix.cli_options import OptionParser, number
from cocomix.console import say, show
from cocomix.errors import InputError
from cocomix.settings import Concepts, kind_of

if TYPE_CHECKING:
    from cocomix.models.steering import Steering
    from cocomix.steering.runs import OpenRun

COMMANDS = {
    "inspect": "show which concepts a model mixes while it reads a text, and what they do",
    "generate": "go on after a prompt, with concepts raised or lowered",
}
EVERY = "all"


def run(arguments: Sequence[str]) -> int:
    """Run one of `COMMANDS`; returns the exit code.

    Raises:
        InputError: no such model, text or concept, or a setting out of its range.
    """
    options = _parser().parse_args(arguments)
    return _inspect(options) if options.command == "inspect" else _generate(options)


def _parser() -> argparse.ArgumentParser:
    from cocomix.steering.generation import GenerationSettings

    parser = OptionParser(prog="cocomix")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=COMMANDS[name], description=COMMANDS[name])
        command.add_argument(
            "--run", metavar="FOLDER", type=Path, help="the trained model (default: the quickstart's cocomix student)"
        )
        command.add_argument(
            "--catalog", metavar="FOLDER", type=Path, help="its concept catalogue (default: that of its recipe)"
        )
        command.add_argument("--json", action="store_true", help="print the results as JSON")
        command.add_argument(
            "--steer",
            metavar="WISH",
            action="append",
            default=[],
            help="ID=+4 or ID=-4 adds, ID=x5 scales, ID==4 sets, ID=off suppresses; name:WORDS in place of ID looks "
            "it up; may be repeated",
        )
        command.add_argument(
            "--positions", metavar="WHERE", default="all", help="where to steer: all, generated, or such as 0,3,5-9,12-"
        )
        command.add_argument(
            "--after-choice", action="store_true", help="steer only what is among the strongest concepts anyway"
        )
        return command

    inspect = add("inspect")
    inspect.add_argument("text", metavar="TEXT", help="what the model reads")
    inspect.add_argument(
        "--concepts",
        metavar="N",
        type=_count_or_all,
        default=4,
        help="concepts of each token to show and to ablate, or all (default: 4)",
    )
    inspect.add_argument("--html", metavar="FILE", type=Path, help="write a page")
    generate = add("generate")
    generate.add_argument("prompt", metavar="PROMPT", help="what the text begins with")
    generate.add_argument("--compare", action="store_true", help="print the plain model's text beside the steered one")
    for name, metavar, about in (
        ("max-new-tokens", "N", "tokens to generate at most (default: 40)"),
        ("temperature", "T", "of sampling; 0 takes the most probable token (default: 0)"),
        ("top-p", "P", "sample from the most probable tokens that together have probability P (default: 1)"),
        ("seed", "S", "of sampling (default: 0)"),
        ("num-beams", "N", "of beam search (default: 1)"),
        ("num-samples", "N", "texts to print (default: 1)"),
    ):
        kind = kind_of(GenerationSettings, name.replace("-", "_"))
        generate.add_argument(f"--{name}", metavar=metavar, type=number(kind), help=about)
    return parser


def _count_or_all(written: str) -> int | None:
    """Number of concepts; None for all."""
    return None if written == EVERY else number(Concepts)(written)


def _steering(options: argparse.Namespace, opened: OpenRun) -> Steering:
    from cocomix.steering.notation import parse_steering

    if not options.steer and (options.positions != EVERY or options.after_choice):
        raise InputError("--positions and --after-choice have no effect without --steer; say what to steer")
    steering = parse_steering(options.steer, opened.catalog, options.positions, options.after_choice)
    try:
        opened.model.check_steering(steering)
    except ValueError as error:
        raise InputError(str(error)) from None
    if any("name:" in wish for wish in options.steer):
        concepts = dict.fromkeys(operation.concept for operation in steering.operations)
        say("Steered: " + ", ".join(f"{each} ({opened.names.get(each)})" for each in concepts))
    return steering


def _as_json(options: argparse.Namespace, steering: Steering) -> dict[str, Any]:
    """What was asked for, with the concepts that names came to."""
    read = dict.fromkeys((each.kind, each.concept, each.value) for each in steering.operations)
    operations = [{"kind": kind, "concept": concept, "value": value} for kind, concept, value in read]
    where = {"positions": options.positions, "after_choice": options.after_choice}
    return {"steering": options.steer, "operations": operations, **where}


def _inspect(options: argparse.Namespace) -> int:
    from cocomix.steering.page import trace_page
    from cocomix.steering.runs import open_run
    from cocomix.steering.terminal import trace_text
    from cocomix.steering.tracing import trace

    if options.positions == "generated":
        raise InputError("--positions is generated, but a text that is only read has none; give all, or numbers")
    if options.html is not None:
        _check_page(options.html)
    opened = open_run(options.run, options.catalog)
    mixed = opened.model.config.num_active_concepts
    concepts = mixed if options.concepts is None else min(options.concepts, mixed)
    steering = _steering(options, opened)
    found = trace(
        opened.model,
        opened.tokenizer,
        options.text,
        names=opened.names,
        steering=steering,
        ablate=concepts,
        progress=True,
    )
    if options.html is not None:
        try:
            files.write_output(options.html, trace_page(found, f"What {opened.folder.name} thinks", concepts))
        except OSError as error:
            raise InputError(f"--html {options.html} cannot be written: {error.strerror}") from None
        say(f"Page: {options.html}")
    if options.json:
        show(json.dumps({"run": str(opened.folder), **_as_json(options, steering), **found.to_dict()}, indent=2))
    elif options.html is None:
        show(trace_text(found, concepts))
    return 0


def _check_page(page: Path) -> None:
    """Raise InputError if a page cannot be written there."""
    if page.is_dir():
        raise InputError(f"--html {page} is a folder; give a file")
    if not page.parent.is_dir():
        raise InputError(f"--html {page}: there is no folder {page.parent}")


def _generate(options: argparse.Namespace) -> int:
    from cocomix.models.steering import Steering
    from cocomix.steering.generation import GenerationSettings, continuations
    from cocomix.steering.runs import open_run
    from cocomix.steering.terminal import harmless, side_by_side

    given = {field.name: getattr(options, field.name) for field in fields(GenerationSettings)}
    settings = GenerationSettings(**{name: value for name, value in given.items() if value is not None})
    if options.compare and not options.steer:
        raise InputError("--compare without --steer would print the same text twice; say what to steer")
    opened = open_run(options.run, options.catalog)
    steering = _steering(options, opened)
    steered = continuations(opened, options.prompt, settings, steering)
    plain = continuations(opened, options.prompt, settings, Steering()) if options.compare else None
    if options.json:
        texts: dict[str, Any] = {"steered" if options.steer else "plain": steered}
        texts |= {"plain": plain} if plain is not None else {}
        about = {"run": str(opened.folder), "prompt": options.prompt, **_as_json(options, steering), **asdict(settings)}
        show(json.dumps(about | texts, indent=2))
        return 0
    if plain is None:
        show("\n\n".join(harmless(options.prompt + text) for text in steered))
        return 0
    columns = shutil.get_terminal_size().columns
    titles = ("plain", "steered: " + ", ".join(options.steer))
    pairs = [
        side_by_side(harmless(options.prompt + one), harmless(options.prompt + other), titles, columns)
        for one, other in zip(plain, steered, strict=True)
    ]
    show("\n\n".join(pairs))
    return 0
