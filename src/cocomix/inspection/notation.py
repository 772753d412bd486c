"""Parse the command-line notation of steering, such as `123=+4` or `name:website address=x5`, and of positions."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cocomix.catalog.search import Catalog
from cocomix.common.errors import InputError
from cocomix.models.steering import ALL, FOREVER, GENERATED, Operation, Positions, Steering

NAME = "name:"
DIGITS = 30
"""Maximum number of digits of a concept or position; Python refuses to parse thousands."""
FORMS = "CONCEPT=+4 or =-4 (add), =x5 (scale), ==4 (set), =off (suppress)"
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|nan|inf"
# A number without a sign is ambiguous between add and set, so it is not accepted.
_SPEC = re.compile(
    rf"(?P<concept>.*[^=])=(?:(?P<add>[+-](?:{_NUMBER}))|x(?P<scale>[+-]?(?:{_NUMBER}))"
    rf"|=(?P<set>[+-]?(?:{_NUMBER}))|(?P<suppress>off))",
    re.IGNORECASE | re.ASCII,
)


def parse_steering(
    specs: Sequence[str],
    catalog: Catalog | None,
    positions: str = ALL,
    after_choice: bool = False,
    source: str = "--steer",
    catalog_command: str = "cocomix concepts RUN",
) -> Steering:
    """Parse steering.

    Args:
        specs: operations in the notation of `FORMS`; CONCEPT is a number, or `name:` and words.
        catalog: catalog for names.
        positions: `all`, `generated`, or numbers and spans such as `0,3,5-9,12-`.
        after_choice: act after the choice, on active concepts only.
        source: where the operations are written, for error messages.
        catalog_command: the command that builds the catalog, for an error message.

    Raises:
        InputError: an operation or position is invalid, or a name matches no concept or several.
    """
    if not specs:
        return Steering()
    where = parse_positions(positions)
    operations = []
    for spec in specs:
        if (read := _SPEC.fullmatch(spec.strip())) is None:
            raise InputError(f"cannot read {source} {spec!r}; expected {FORMS}")
        concept = _concept(read["concept"].strip(), f"{source} {spec}", catalog, catalog_command)
        kind = next(kind for kind in ("add", "scale", "set", "suppress") if read[kind])
        value = 0.0 if kind == "suppress" else float(read[kind])
        try:
            operations += [Operation(kind, concept, value, span, after_choice) for span in where]
        except ValueError as error:
            raise InputError(f"{source} {spec}: {error}") from None
    return Steering(tuple(operations))


def write_operation(operation: Operation) -> str:
    """Write an operation in the notation that `parse_steering` reads, without its positions."""
    value = f"{operation.value:.12g}"
    forms = {"add": f"{operation.value:+.12g}", "scale": f"x{value}", "set": f"={value}", "suppress": "off"}
    return f"{operation.concept}={forms[operation.kind]}"


def _concept(written: str, where: str, catalog: Catalog | None, catalog_command: str) -> int:
    if written.isdecimal() and written.isascii() and len(written) <= DIGITS:
        return int(written)
    if not written.startswith(NAME):
        raise InputError(f"{where}: {written!r} is not a concept number; for a name write {NAME}{written}")
    if catalog is None:
        raise InputError(
            f"{where}: names need the run's concept catalog, and there is none; create it with "
            f"`{catalog_command}`, or give the concept's number"
        )
    return catalog.find(written.removeprefix(NAME))


def parse_positions(written: str) -> list[Positions]:
    """Parse positions: `all`, `generated`, or numbers and spans such as `0,3,5-9,12-`, whose ends are included.

    Raises:
        InputError: they are none of these.
    """
    if written in (ALL, GENERATED):
        return [written]
    spans: list[tuple[int, int]] = []
    for part in written.split(","):
        if (read := re.fullmatch(rf"\s*(\d{{1,{DIGITS}}})\s*(?:(-)\s*(\d{{0,{DIGITS}}}))?\s*", part, re.ASCII)) is None:
            raise InputError(f"cannot read positions {written!r}; expected all, generated, or such as 0,3,5-9,12-")
        first, dash, last = read.groups()
        end = int(last) + 1 if last else FOREVER if dash else int(first) + 1
        if end <= int(first):
            raise InputError(f"cannot read positions {written!r}: {part.strip()} ends before it starts")
        spans.append((int(first), end))
    merged: list[Positions] = []
    for first, end in sorted(spans):  # overlapping spans apply once
        if merged and isinstance(last_one := merged[-1], range) and first <= last_one.stop:
            merged[-1] = range(last_one.start, max(end, last_one.stop))
        else:
            merged.append(range(first, end))
    return merged
