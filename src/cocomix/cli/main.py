"""The command line: the tree of commands, and mistakes and failures in one line each."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, cast

import typer

from cocomix.cli import app, compare, concepts, doctor, evaluate, export, inspect, plan, push, recipe, serve
from cocomix.cli.examples import EXAMPLES
from cocomix.cli.options import HELP, Command, Commands, RecipeCommand
from cocomix.cli.outcome import exit_code_of
from cocomix.common.console import prepare_streams, show
from cocomix.common.errors import InputError
from cocomix.common.version import __version__

WIDTH = 100
COMPLETE = "_COCOMIX_COMPLETE"
"""Environment variable with which a shell asks for completions."""
COMMANDS: dict[str, dict[str, tuple[type[Command], Callable[..., None]]]] = {
    "Start": {
        "quickstart": (RecipeCommand, recipe.quickstart),
        "run": (RecipeCommand, recipe.run),
        "keys": (Command, recipe.keys),
        "plan": (plan.PlanCommand, plan.plan),
        "doctor": (Command, doctor.doctor),
    },
    "Prepare": {
        "data": (RecipeCommand, recipe.data),
        "teacher": (RecipeCommand, recipe.teacher),
        "sae": (RecipeCommand, recipe.sae),
        "label": (RecipeCommand, recipe.label),
        "concepts": (RecipeCommand, recipe.concepts),
        "concepts search": (Command, concepts.search),
        "concepts show": (Command, concepts.show_concept),
        "concepts name": (Command, concepts.name),
        "concepts export": (Command, concepts.export_concepts),
    },
    "Train and compare": {
        "train": (RecipeCommand, recipe.train),
        "evaluate": (Command, evaluate.evaluate),
        "evaluate concepts": (Command, evaluate.evaluate_concepts),
        "evaluate steering": (Command, evaluate.evaluate_steering),
        "compare": (Command, compare.compare),
        "report": (Command, compare.report),
        "export": (Command, export.export),
        "push": (Command, push.push),
    },
    "Look and steer": {
        "inspect": (Command, inspect.inspect),
        "generate": (Command, inspect.generate),
        "app": (Command, app.app),
        "serve": (Command, serve.serve),
    },
}
"""The commands by their panels in the help, in the order of work."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; see `exit_code_of`."""
    prepare_streams()
    given = list(sys.argv[1:] if arguments is None else arguments)
    return exit_code_of(lambda: _dispatch(given))


def help_texts() -> dict[str, str]:
    """Return the help of `cocomix` and of each command by its full name, 100 columns wide, without recipe keys."""
    tree = command_tree()
    context = tree.make_context("cocomix", [], resilient_parsing=True, terminal_width=WIDTH)
    texts = {"cocomix": tree.get_help(context)}
    for name, command in tree.commands.items():
        inner = command.make_context(name, [], parent=context, resilient_parsing=True)
        texts[inner.command_path] = command.get_help(inner)
    return texts


def command_tree() -> Commands:
    """Return the tree of commands, built from their functions."""
    app = typer.Typer(
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": list(HELP), "max_content_width": WIDTH},
    )
    app.callback(cls=Commands)(_root)
    for panel, commands in COMMANDS.items():
        for name, (kind, function) in commands.items():
            app.command(name, cls=kind, rich_help_panel=panel, epilog="\n".join(EXAMPLES.get(name, ())))(function)
    return cast(Commands, typer.main.get_command(app))


def _dispatch(arguments: list[str]) -> int:
    tree = command_tree()
    if COMPLETE in os.environ:
        tree.main(prog_name="cocomix")
    try:
        with tree.make_context("cocomix", arguments) as context:
            context.command.invoke(context)
        return 0
    except typer.Exit as ended:
        return ended.exit_code
    except typer.TyperException as error:
        raise InputError(_usage_line(error)) from None


def _usage_line(error: Any) -> str:
    """Return a mistake that Typer found as one line."""
    message = error.message.removeprefix("Value error, ").removesuffix(".")
    if (param := getattr(error, "param", None)) is not None:
        name = param.metavar if param.param_type_name == "argument" else param.opts[0]
        joint = "" if message.startswith("[") else " " if message.startswith("is ") else ": "
        message = f"{name}{joint}{message}"
    return f"{message} (see {error.ctx.command_path} --help)"


def _show_version(wanted: bool) -> None:
    if wanted:
        show(f"cocomix {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Pretrain language models that think in continuous concepts."""
