"""Read plain values into typed dataclasses, with a range for every number.

A field declares its range in its type: `heads: Annotated[int, Range(1, 64)] = 4`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import reprlib
import types
import typing
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NewType

from yaml.constructor import SafeConstructor

from cocomix.common import strict_yaml
from cocomix.common.errors import InputError, did_you_mean

BOOLEANS = SafeConstructor.bool_values
"""The spellings of true and false in YAML."""
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxlong, _SHORT.maxother = 2, 80, 40, 80


@dataclass(frozen=True)
class Range:
    """The valid numbers of a setting.

    Attributes:
        low: smallest number.
        high: largest number.
        open_low: exclude `low` itself.
        open_high: exclude `high` itself.
    """

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, number: float) -> bool:
        above = self.low < number if self.open_low else self.low <= number
        return above and (number < self.high if self.open_high else number <= self.high)

    def __str__(self) -> str:
        low = f"above {self.low:,}" if self.open_low else f"from {self.low:,}"
        return f"{low} to {'below ' if self.open_high else ''}{self.high:,}"


@dataclass(frozen=True)
class Partial:
    """Mark a dictionary that holds some keys of a section: `Annotated[dict[str, Any], Partial(TrainingConfig)]`.

    Attributes:
        section: the dataclass.
    """

    section: Any


SEED = Range(0, 2**32 - 1)
"""The seeds that NumPy accepts."""
Seed = Annotated[int, SEED]
Count = Annotated[int, Range(1, 10**15)]
"""Number of tokens, documents or blocks."""
Batch = Annotated[int, Range(1, 2**20)]
"""Number of items in a batch."""
Blocks = Annotated[int, Range(1, 1024)]
"""Number of blocks of a decoder."""
BlockIndex = Annotated[int, Range(0, 1023)]
Vocabulary = Annotated[int, Range(1, 2**22)]
Concepts = Annotated[int, Range(1, 2**24)]
ConceptId = Annotated[int, Range(0, 2**24 - 1)]
LearningRate = Annotated[float, Range(0, 100, open_low=True)]
LossWeight = Annotated[float, Range(0, 10**6)]
LabelsPerToken = Annotated[int, Range(1, 4096)]
Share = Annotated[float, Range(0, 1)]
Prose = NewType("Prose", str)
"""Text of any number of lines."""


def short_repr(value: Any) -> str:
    """Return the `repr` of a value, shortened for an error message."""
    return _SHORT.repr(value)


def read(kind: Any, value: Any, key: str = "") -> tuple[Any, list[str]]:
    """Read a plain value, as in YAML or JSON, as the annotated type `kind`.

    Args:
        kind: a dataclass, a list or dict of a type, an optional type, int, float, str, bool or Any.
        value: the plain value.
        key: name of the value in error messages.

    Returns:
        The typed value, and one line for each problem. With problems, ignore the value.
    """
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        if value is None:
            return None, []
        kind = without_none(kind)
    if (partial := _partial(kind)) is not None:
        return _read_fields(partial.section, value, key)
    if _is_section(kind):
        return _read_section(kind, value, key)
    if typing.get_origin(kind) in (dict, list, tuple) or kind is Any:
        return _read_collection(kind, value, key)
    return _read_scalar(kind, value, key)


def expected(kind: Any) -> str:
    """Describe the valid values of an annotated type in words."""
    kind = without_none(kind)
    if _partial(kind) is not None:
        return "some keys with their values"
    if typing.get_origin(kind) in (list, tuple):
        inside = typing.get_args(kind)[0]
        return f"a list{'' if _is_section(inside) else ' such as a,b,c'}, each {expected(inside)}"
    if typing.get_origin(kind) is dict:
        return "names with their settings"
    if _is_section(kind):
        return f"with keys such as {', '.join(list(_hints(kind))[:3])}"
    limits = _range(kind)
    return f"{_SCALARS[getattr(kind, '__origin__', kind)][0]}{'' if limits is None else f' {limits}'}"


def problems(settings: Any) -> list[str]:
    """Return one line for each field of a settings dataclass that is outside its type or range."""
    return _read_fields(type(settings), dataclasses.asdict(settings), "")[1]


def require(settings: Any) -> None:
    """Raise InputError unless every field of a settings dataclass has its type and is in its range."""
    if found := problems(settings):
        raise InputError("\n".join(found))


def kind_of(section: Any, key: str) -> Any:
    """Return the annotated type of the dotted `key` of a dataclass, or None for an unknown key."""
    kind = section
    for part in key.split("."):
        kind = without_none(kind)
        if (partial := _partial(kind)) is not None:
            kind = partial.section
        if _is_section(kind):
            kind = _hints(kind).get(part)
        else:
            kind = typing.get_args(kind)[1] if typing.get_origin(kind) is dict else None
    return kind


def accepts_text(kind: Any) -> bool:
    """Return whether values of a type are text, which needs no YAML parsing."""
    return without_none(kind) is str


@functools.cache
def _hints(section: Any) -> dict[str, Any]:
    return typing.get_type_hints(section, include_extras=True)


def _is_section(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind)


def without_none(kind: Any) -> Any:
    """Return the type inside an optional type, or the type itself."""
    if typing.get_origin(kind) not in (typing.Union, types.UnionType):
        return kind
    return next(each for each in typing.get_args(kind) if each is not types.NoneType)


def _read_section(section: Any, value: Any, key: str) -> tuple[Any, list[str]]:
    found, lines = _read_fields(section, value, key)
    return (None if lines else section(**found)), lines


def _read_fields(section: Any, value: Any, key: str) -> tuple[dict[str, Any], list[str]]:
    """Read the given fields of a dataclass, and report missing and unknown ones."""
    if not isinstance(value, Mapping):
        return {}, [f"{key} is {short_repr(value)}; expected keys such as {', '.join(list(_hints(section))[:3])}"]
    found: dict[str, Any] = {}
    lines: list[str] = []
    for name, item in value.items():
        full = _joined(key, name)
        if name not in _hints(section):
            lines.append(f"unknown key {full}{did_you_mean(str(name), _hints(section))}")
            continue
        found[name], wrong = read(_hints(section)[name], item, full)
        lines += wrong
    for each in dataclasses.fields(section):
        required = each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
        if required and each.name not in value:
            lines.append(f"{key}.{each.name} is missing".removeprefix("."))
    return found, lines


def _joined(key: str, name: Any) -> str:
    """Return the dotted key of `name` below `key`; control characters in it are escaped."""
    shown = str(name) if str(name).isprintable() else short_repr(name)
    return f"{key}.{shown}" if key else shown


def _read_collection(kind: Any, value: Any, key: str) -> tuple[Any, list[str]]:
    """Read a list, a dictionary with text keys, or, as Any, any nesting of both with scalars inside."""
    accepted, inside = typing.get_origin(kind), (typing.get_args(kind) or (Any,))
    if accepted is list and isinstance(value, str) and getattr(inside[0], "__origin__", inside[0]) in _SCALARS:
        value = [_written(inside[0], item.strip()) for item in value.split(",")]
    if isinstance(value, dict) and accepted in (dict, None):
        lines = [f"{key} has the key {short_repr(name)}; expected text" for name in value if not isinstance(name, str)]
        read_items = {name: read(inside[-1], item, _joined(key, name)) for name, item in value.items()}
        lines += [line for _, wrong in read_items.values() for line in wrong]
        return {name: item for name, (item, _) in read_items.items()}, lines
    if isinstance(value, (list, tuple)) and accepted in (list, tuple, None):
        items = [read(inside[0], item, f"{key}[{index}]") for index, item in enumerate(value)]
        return (accepted or list)(item for item, _ in items), [line for _, wrong in items for line in wrong]
    if accepted is not None:
        return None, [f"{key} is {short_repr(value)}; expected {expected(kind)}"]
    if type(value) in (str, float):
        return _read_scalar(type(value), value, key)
    return (
        (value, [])
        if value is None or isinstance(value, (bool, int))
        else (None, [f"{key} is {short_repr(value)}; expected a number, text, true or false"])
    )


def _written(kind: Any, item: str) -> Any:
    """Return an item of a list that was written as `1,2,3`."""
    return item if accepts_text(kind) else strict_yaml.parse(item, repr(item))


def _range(kind: Any) -> Range | None:
    return next((each for each in getattr(kind, "__metadata__", ()) if isinstance(each, Range)), None)


def _partial(kind: Any) -> Partial | None:
    return next((each for each in getattr(kind, "__metadata__", ()) if isinstance(each, Partial)), None)


def _read_scalar(kind: Any, value: Any, key: str) -> tuple[Any, list[str]]:
    limits, (_, convert) = _range(kind), _SCALARS[getattr(kind, "__origin__", kind)]
    try:
        if limits is not None and (isinstance(value, bool) or value not in limits):
            raise ValueError
        return convert(value), []
    except (TypeError, ValueError, KeyError, AttributeError):
        hint = ", in quotes" if kind is str and isinstance(value, (bool, int, float)) else ""
        return None, [f"{key} is {short_repr(value)}; expected {expected(kind)}{hint}"]


def _integer(value: Any) -> int:
    """Return a whole number, which may be written as 1e6."""
    if isinstance(value, (str, bool)) or int(value) != value:
        raise ValueError
    return int(value)


def _prose(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError
    return value


def _text(value: Any) -> str:
    if any(unicodedata.category(each) in ("Cc", "Cs") for each in _prose(value)):
        raise ValueError
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(value):
        raise ValueError
    return float(value)


def _boolean(value: Any) -> bool:
    return value if isinstance(value, bool) else BOOLEANS[value.lower()]


_SCALARS: dict[Any, tuple[str, Callable[[Any], Any]]] = {
    int: ("a whole number", _integer),
    float: ("a number", _number),
    str: ("text of one line", _text),
    Prose: ("text", _prose),
    bool: ("true or false", _boolean),
    Path: ("a path", Path),
}
