"""The command line: the tree of commands, and mistakes and failures in one line each."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, cast

import typer

from cocomix.cli import app, compare, concepts, evaluate, export, inspect, plan, push, recipe, serve
from cocomix.cli.options import HELP, USER_ERROR, Command, Commands, RecipeCommand, command_line
from cocomix.common import starting
from cocomix.common.console import end_progress_bars, prepare_streams, show
from cocomix.common.errors import InputError
from cocomix.common.interruption import Interrupted
from cocomix.common.version import __version__

PIPE_CLOSED = 141
LONGEST_LINE = 300
_RESUME = "; finished work is kept, and the same command resumes from there"
REMEDIES = {
    errno.ENOSPC: f": free some space{_RESUME}",
    errno.EDQUOT: f": free some space{_RESUME}",
    errno.EFBIG: f": raise the limit on the size of a file (ulimit -f){_RESUME}",
    errno.EACCES: ": grant the right to read or write it, or choose another folder",
    errno.EROFS: ": choose a writable output folder",
}
"""What to do about a failure of the system, by its error number."""

WIDTH = 100
COMMANDS: dict[str, dict[str, tuple[type[Command], Callable[..., None]]]] = {
    "Start": {
        "quickstart": (RecipeCommand, recipe.quickstart),
        "run": (RecipeCommand, recipe.run),
        "plan": (plan.PlanCommand, plan.plan),
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
    """Run one command.

    Returns:
        The exit code: 0; 2 for a mistake in the input, a failure of the system or the end of another process, one line
        each on stderr; 130 when interrupted, 143 when terminated, 129 when the terminal closes; 141 when the reader of
        the results has closed the pipe.
    """
    prepare_streams()
    try:
        return _dispatch(list(sys.argv[1:] if arguments is None else arguments))
    except BrokenPipeError:
        return PIPE_CLOSED
    except (InputError, OSError) as error:
        end_progress_bars()
        for line in error_lines(error):
            sys.stderr.write(f"cocomix: {line}\n")
        return USER_ERROR
    except KeyboardInterrupt as interrupted:
        end_progress_bars()
        sys.stderr.write(f"\ncocomix: interrupted; to resume, run: {command_line()}\n")
        return interrupted.exit_code if isinstance(interrupted, Interrupted) else starting.INTERRUPTED
    except RuntimeError as error:
        from cocomix.common import distributed  # not at the top: it imports torch

        if not distributed.is_connection_lost(error):
            raise
        end_progress_bars()
        sys.stderr.write(
            f"cocomix: process {distributed.rank()} lost the connection to another one, which was killed or reports "
            f"why it ended; to resume, run: {command_line()}\n"
        )
        return USER_ERROR


def error_lines(error: InputError | OSError) -> list[str]:
    """Return the lines of an InputError, or one line that names what the system refused."""
    if isinstance(error, InputError):
        return str(error).splitlines()
    if error.errno is None or error.strerror is None:  # raised by a library
        return [" ".join(str(error).split())[:LONGEST_LINE]]
    where = "" if error.filename is None else f"{error.filename}: "
    return [f"{where}{error.strerror}{REMEDIES.get(error.errno, '')}"]


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
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": list(HELP), "max_content_width": WIDTH},
    )
    app.callback(
        cls=Commands,
        epilog="COMMAND --help describes a command. Every recipe key is also an option of the commands that take a "
        "RECIPE: --training.max_tokens 1000000.",
    )(_root)
    for panel, commands in COMMANDS.items():
        for name, (kind, function) in commands.items():
            app.command(name, cls=kind, rich_help_panel=panel)(function)
    return cast(Commands, typer.main.get_command(app))


def _dispatch(arguments: list[str]) -> int:
    try:
        with command_tree().make_context("cocomix", arguments) as context:
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
