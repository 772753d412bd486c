"""How a person writes steering down: `123=+4`, `name:website address=x5`, and where it is to apply."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cocomix.catalog.search import Catalog
from cocomix.errors import InputError
from cocomix.models.steering import ALL, FOREVER, GENERATED, Operation, Positions, Steering

NAME = "name:"
DIGITS = 30
"""Of a concept or position; Python refuses to read thousands of them."""
FORMS = "CONCEPT=+4 or =-4 (add), =x5 (scale), ==4 (set), =off (suppress)"
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|nan|inf"
# A number without a sign could be meant to add or to set; so it has to say which.
_WISH = re.compile(
    rf"(?P<concept>.*[^=])=(?:(?P<add>[+-](?:{_NUMBER}))|x(?P<scale>[+-]?(?:{_NUMBER}))"
    rf"|=(?P<set>[+-]?(?:{_NUMBER}))|(?P<suppress>off))",
    re.IGNORECASE | re.ASCII,
)


def parse_steering(
    wishes: Sequence[str], catalog: Catalog | None, positions: str = ALL, after_choice: bool = False
) -> Steering:
    """The steering that a person asks for.

    Args:
        wishes: each as in `FORMS`; CONCEPT is a number, or `name:` and words.
        catalog: where names are looked up.
        positions: `all`, `generated`, or numbers and spans such as `0,3,5-9,12-`.
        after_choice: change kept logits only.

    Raises:
        InputError: a wish or position that cannot be read, a name that no or more than one concept has.
    """
    if not wishes:
        return Steering()
    where = parse_positions(positions)
    operations = []
    for wish in wishes:
        if (read := _WISH.fullmatch(wish.strip())) is None:
            raise InputError(f"cannot read --steer {wish!r}; expected {FORMS}")
        concept = _concept(read["concept"].strip(), wish, catalog)
        kind = next(kind for kind in ("add", "scale", "set", "suppress") if read[kind])
        value = 0.0 if kind == "suppress" else float(read[kind])
        try:
            operations += [Operation(kind, concept, value, span, after_choice) for span in where]
        except ValueError as error:
            raise InputError(f"--steer {wish}: {error}") from None
    return Steering(tuple(operations))


def _concept(written: str, wish: str, catalog: Catalog | None) -> int:
    if written.isdecimal() and written.isascii() and len(written) <= DIGITS:
        return int(written)
    if not written.startswith(NAME):
        raise InputError(f"--steer {wish}: {written!r} is no number of a concept; for a name write {NAME}{written}")
    if catalog is None:
        raise InputError(
            f"--steer {wish}: names need the run's concept catalogue, and there is none; make it with "
            "`cocomix concepts RECIPE`, or give the concept's number"
        )
    return catalog.find(written.removeprefix(NAME))


def parse_positions(written: str) -> list[Positions]:
    """`all`, `generated`, or `0,3,5-9,12-` as numbers and spans, ends included.

    Raises:
        InputError: it is none of these.
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
            raise InputError(f"cannot read positions {written!r}: {part.strip()} ends before it begins")
        spans.append((int(first), end))
    merged: list[Positions] = []
    for first, end in sorted(spans):  # what is said twice is done once
        if merged and isinstance(last_one := merged[-1], range) and first <= last_one.stop:
            merged[-1] = range(last_one.start, max(end, last_one.stop))
        else:
            merged.append(range(first, end))
    return merged
