"""Options of commands: numbers with a range, and mistakes in one line."""

from __future__ import annotations

import argparse
import typing
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from cocomix import settings, strict_yaml
from cocomix.errors import InputError
from cocomix.suggest import did_you_mean

REPEATABLE = ("--steer",)


class OptionParser(argparse.ArgumentParser):
    """A parser that raises InputError, with a suggestion for an unknown option, and knows no abbreviations."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **arguments})

    def error(self, message: str) -> NoReturn:
        """Raise the one line of an InputError."""
        unknown = message.removeprefix("unrecognized arguments: ").split(" ")[0]
        if unknown != message.split(" ")[0]:
            message = f"unknown argument {unknown}{did_you_mean(unknown.partition('=')[0], self._known_options())}"
        message = message.removeprefix("argument ").replace(": is ", " is ", 1)
        raise InputError(f"{message} (see {self.prog} --help)")

    def _known_options(self) -> Iterator[str]:
        for action in self._actions:
            yield from action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    yield from parser._known_options()


def require_once(arguments: Sequence[str]) -> None:
    """Raise InputError for an option that is given twice; of two values one would be ignored."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    names = Counter(each.partition("=")[0] for each in arguments[:end] if each.startswith("--"))
    for name, count in names.items():
        if count > 1 and name not in REPEATABLE:
            raise InputError(f"{name} is given {count} times; give it once")


def number(kind: Any) -> Callable[[str], Any]:
    """A converter for argparse: an annotated number, or a tuple of them written as `1,2,4`, within its range."""
    kind = settings.without_none(kind)
    form = "[{}]" if typing.get_origin(kind) is tuple else "{}"

    def convert(written: str) -> Any:
        value, problems = settings.read(kind, strict_yaml.parse(form.format(written), repr(written)))
        if problems:
            raise argparse.ArgumentTypeError(problems[0].strip())
        return value

    return convert
