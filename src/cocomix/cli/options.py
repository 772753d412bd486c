"""How the commands read their arguments: every mistake is one line, and a recipe's keys are options."""

from __future__ import annotations

import os
import re
import shlex
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Annotated, Any, get_origin

import typer
from typer.core import TyperCommand, TyperGroup

from cocomix.common import interruption, portable, settings, starting, strict_yaml
from cocomix.common.console import Verbosity, set_verbosity, verbosity
from cocomix.common.errors import InputError, did_you_mean
from cocomix.common.settings import Range, kind_of

USER_ERROR = 2
OPTION = re.compile(r"--[^\W\d][^\s=]*(=.*)?", re.DOTALL)
"""An option as opposed to a text, which may begin with a dash too."""
HELP = ("--help", "-h")
LEVELS = {
    "--quiet": (Verbosity.QUIET, "Print results, warnings and errors only."),
    "--verbose": (Verbosity.VERBOSE, "Also print the libraries' messages, and where an error was raised."),
}
"""The options of every command that choose how much it prints."""

RUN = "A trained model, or the output folder of a recipe, which stands for its first cocomix student."
Run = Annotated[Path, typer.Argument(metavar="RUN", help=RUN, readable=False)]
QUICKSTART = Path("runs") / "quickstart"
Port = Annotated[int, Range(1, 2**16 - 1)]
Json = Annotated[bool, typer.Option("--json", help="Print the results as JSON.")]


class Command(TyperCommand):
    """A command: a function whose signature and docstring are its help."""

    takes_recipe_keys = False
    """Whether options that the function does not have are keys of a recipe. They are in `ctx.args`."""
    in_several_processes = False
    """Whether torchrun may start it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments.

        Raises:
            InputError: an unknown option, one that is given twice or has no value, too few or too many arguments.
        """
        args = _with_verbosity(args)
        if ctx.resilient_parsing or set(HELP) & set(args):
            return super().parse_args(ctx, [each for each in args if each in HELP][:1])
        params: list[Any] = self.get_params(ctx)
        expected = [each for each in params if each.param_type_name == "argument"]
        options = {name: each for each in params for name in each.opts if name.startswith("--")}
        own, others, texts = _sort(ctx, args, options)
        texts = _with_default_run(ctx, expected, texts)
        if missing := [each.metavar for each in expected if each.required][len(texts) :]:
            raise _usage_error(ctx, f"the following arguments are required: {', '.join(missing)}")
        if all(each.nargs == 1 for each in expected):
            others, texts = [*others, *texts[len(expected) :]], texts[: len(expected)]
        if others and not self.takes_recipe_keys:
            name = others[0].partition("=")[0]
            raise _usage_error(ctx, f"unknown argument {name}{did_you_mean(name, options)}")
        super().parse_args(ctx, [*own, "--", *texts])
        ctx.args = others
        return others

    def invoke(self, ctx: Any) -> Any:
        """Load the libraries, then run the command.

        Raises:
            InputError: torchrun started a command that runs in one process.
        """
        load_libraries()

        from cocomix.common import distributed

        starting.raise_interruptions()
        interruption.raise_on_signals()
        if distributed.world_size() > 1 and not self.in_several_processes:
            if not distributed.is_main_process():
                raise typer.Exit(USER_ERROR)
            raise InputError(f"{ctx.command_path} runs in one process; start it without torchrun")
        return super().invoke(ctx)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return what the usage line has after the command: its arguments, then its options."""
        params: list[Any] = self.get_params(ctx)
        arguments = [each for each in params if each.param_type_name == "argument"]
        names = [f"{each.metavar}{'' if each.nargs == 1 else ' ...'}" for each in arguments]
        return [
            *(name if each.required else f"[{name}]" for name, each in zip(names, arguments, strict=True)),
            "[OPTIONS]",
        ]

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples, a line each."""
        if self.epilog:
            formatter.write("\nExamples:\n" + "".join(f"  {line}\n" for line in self.epilog.splitlines()))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then the options by their panels."""
        params: list[Any] = self.get_params(ctx)
        arguments = [
            ("Arguments", (each.metavar, each.help + (f"  [default: {each.default}]" if each.default else "")))
            for each in params
            if each.param_type_name == "argument"
        ]
        options = [
            (each.rich_help_panel or "Options", each.get_help_record(ctx))
            for each in params
            if each.param_type_name == "option" and not each.hidden
        ]
        levels = [("Options", (name, about)) for name, (_, about) in LEVELS.items()]
        _write_panels(formatter, [*arguments, *options[:-1], *levels, *options[-1:]])


class RecipeCommand(Command):
    """A command that runs a recipe, each key of which is an option too."""

    takes_recipe_keys = True
    in_several_processes = True

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples, then where the keys of a recipe are."""
        super().format_epilog(ctx, formatter)
        formatter.write("\nEvery key of the recipe is an option too: --training.max_tokens 1e6 --seeds 1,2,3\n")
        formatter.write("`cocomix keys` lists them.\n")


class Commands(TyperGroup):
    """The tree of commands, some of which have names of two words, such as `concepts search`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Return the name of a command, the command, and its arguments.

        Raises:
            InputError: there is no such command.
        """
        for words in (2, 1):
            if command := self.commands.get(name := " ".join(args[:words])):
                return name, command, args[words:]
        raise _usage_error(ctx, f"unknown command {args[0]!r}{did_you_mean(args[0], self.commands)}")

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands by their panels."""
        width = max(map(len, self.commands))
        commands: dict[str, Any] = dict(self.commands)
        rows = [
            (command.rich_help_panel, (name.ljust(width), command.get_short_help_str(formatter.width)))
            for name, command in commands.items()
        ]
        _write_panels(formatter, rows)


def argument(metavar: str, about: str, kind: Any = None) -> Any:
    """Return a positional argument; the parameters are those of `option`."""
    return typer.Argument(metavar=metavar, help=about, parser=_parser(kind), readable=False)


def option(metavar: str, about: str, kind: Any = None, panel: str | None = None) -> Any:
    """Return an option with a value. The command itself checks paths and texts.

    Args:
        metavar: placeholder of the value in the help.
        about: the help.
        kind: of numbers, the annotated type with their range: one number, or a tuple written as `1,2,4`. A function
            returns the type when a value is given.
        panel: heading of the option's group in the help.
    """
    return typer.Option(metavar=metavar, help=about, parser=_parser(kind), readable=False, rich_help_panel=panel)


def read_number(kind: Any, written: Any) -> Any:
    """Read a number, or a tuple of numbers, that `option` describes; Typer passes the default through, too."""
    if not isinstance(written, str):
        return written
    wanted = settings.without_none(kind() if isinstance(kind, FunctionType) else kind)
    form = "[{}]" if get_origin(wanted) is tuple else "{}"
    value, problems = settings.read(wanted, strict_yaml.parse(form.format(written), repr(written)))
    if problems:
        raise typer.BadParameter(problems[0].strip())
    return value


def separated(name: str, written: str, example: str) -> list[str]:
    """Return the names in the value of an option, a list separated by commas.

    Raises:
        InputError: there is none.
    """
    if names := [each for part in written.split(",") if (each := part.strip())]:
        return names
    raise InputError(f"{name} is {written!r}, an empty list; give names separated by commas, as in {name} {example}")


def students_only(written: str | None) -> tuple[str, ...]:
    """Return the students that `--only` names; empty without it, for all of them."""
    return () if written is None else tuple(separated("--only", written, "ntp,cocomix"))


def _parser(kind: Any) -> Callable[[Any], Any] | None:
    return None if kind is None else partial(read_number, kind)


CatalogFolder = Annotated[Path | None, option("FOLDER", "Its concept catalog (default: that of its recipe).")]


def setting(module: str, section: str, key: str) -> Callable[[], Any]:
    """Return a function for the type of a key of a settings class, whose module loads torch, so only when needed."""
    return lambda: kind_of(getattr(import_module(module), section), key)


def given(**values: Any) -> dict[str, Any]:
    """Return the options that were given; the others keep the defaults of the settings."""
    return {name: value for name, value in values.items() if value is not None}


def load_libraries() -> None:
    """Import the libraries and models, without progress bars and deprecation warnings unless the command is verbose.

    Warnings, which may concern a figure, are shown.
    """
    import datasets
    import transformers

    from cocomix.models import registration  # noqa: F401

    if verbosity() == Verbosity.VERBOSE:
        transformers.utils.logging.set_verbosity_info()
        return
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)


def _sort(ctx: Any, args: Sequence[str], options: Mapping[str, Any]) -> tuple[list[str], list[str], list[str]]:
    """Sort arguments into known options, unknown options, each with its value, and texts.

    Raises:
        InputError: an option is given twice, of which one would be ignored, or a known one has no value.
    """
    known: list[str] = []
    unknown: list[str] = []
    texts: list[str] = []
    names: Counter[str] = Counter()
    rest = list(args)
    while rest:
        argument = rest.pop(0)
        if argument == "--":
            texts += rest
            break
        if not OPTION.fullmatch(argument):
            texts.append(argument)
            continue
        name, joined, _ = argument.partition("=")
        names[name] += 1
        option = options.get(name)
        group = unknown if option is None else known
        group.append(argument)
        if joined or (option is not None and option.is_flag):
            continue
        if rest and not OPTION.fullmatch(rest[0]):
            group.append(rest.pop(0))
        elif option is not None:
            raise _usage_error(ctx, f"{name} has no value")
    for name, count in names.items():
        if count > 1 and not (name in options and options[name].multiple):
            raise _usage_error(ctx, f"{name} is given {count} times; give it once")
    return known, unknown, texts


def _with_verbosity(args: Sequence[str]) -> list[str]:
    """Choose how much this process prints, and return the other arguments."""
    options = list(args[: args.index("--")] if "--" in args else args)
    set_verbosity(next((LEVELS[name][0] for name in options if name in LEVELS), Verbosity.NORMAL))
    return [name for name in options if name not in LEVELS] + list(args[len(options) :])


def _with_default_run(ctx: Any, expected: Sequence[Any], texts: list[str]) -> list[str]:
    """Complete positional arguments whose first one, RUN, was left out.

    Raises:
        InputError: only RUN was given.
    """
    if not expected or expected[0].required or len(texts) == len(expected):
        return texts
    required = [each.metavar for each in expected if each.required]
    if len(texts) == 1 and required and os.path.isdir(texts[0]):
        raise _usage_error(ctx, f"{texts[0]} is a folder, so it is RUN; give {required[0]} too")
    return [str(expected[0].default), *texts] if len(texts) >= len(required) else texts


def _usage_error(ctx: Any, message: str) -> InputError:
    return InputError(f"{message} (see {ctx.command_path} --help)")


def _write_panels(formatter: Any, rows: Iterable[tuple[str, tuple[str, str]]]) -> None:
    panels: dict[str, list[tuple[str, str]]] = {}
    for panel, row in rows:
        panels.setdefault(panel, []).append(row)
    for panel, inside in panels.items():
        with formatter.section(panel):
            formatter.write_dl(inside)


def command_line() -> str:
    """Return the command line as the user can run it again."""
    return shlex.join([program(), *sys.argv[1:]])


def recorded_command_line() -> str:
    """Return the command line with short paths, for records and reports."""
    return shlex.join([program(), *map(portable.short_argument, sys.argv[1:])])


def program() -> str:
    """Return how the user calls this program: a path inside the working directory, or its name."""
    called = Path(sys.argv[0])
    return str(called) if called.name == "cocomix" and not called.is_absolute() else "cocomix"
