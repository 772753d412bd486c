"""Steering: edit the logits of a model's concepts while it runs.

An operation changes the logit z_i of one concept: `add` to z_i + s, `scale` to z_i · s, `set` to s; `suppress` keeps
the concept from being mixed in. Operations before the choice of the K largest logits act on all C logits: a raised
concept can enter and displace the weakest. Operations after the choice act on the K active concepts only.

Dimensions: B sequences, T tokens, C concepts, K concepts mixed per token.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

KINDS = ("add", "scale", "set", "suppress")
LARGEST_VALUE = 1e4
"""Largest absolute value of an operation. Logits are of the order of 10, and what is mixed must stay finite."""
ALL = "all"
GENERATED = "generated"
FOREVER = sys.maxsize
"""End of an open span of positions."""

Positions = str | range | tuple[int, ...]
"""`all`, `generated`, or token positions, counted from 0 at the start of each text, without padding."""
Strengths = Mapping[int, float]
PER_ROW = (list, tuple)
"""Types that hold one steering per row of a batch."""


def _positions(given: Any) -> Positions:
    """Normalize `all`, `generated`, a slice, a range or numbers to `Positions`."""
    if isinstance(given, str):
        if given not in (ALL, GENERATED):
            raise ValueError(f"positions are {given!r}; expected 'all', 'generated', numbers, or slice(first, end)")
        return given
    if isinstance(given, slice):
        first, end = (0 if bound is None else _whole("a position", bound) for bound in (given.start, given.stop))
        if given.step not in (None, 1) or end < 0:
            raise ValueError(f"positions are {given}; expected slice(first, end) without a step, counted from 0")
        given = range(first, FOREVER if given.stop is None else end)
    if isinstance(given, range) and given.step == 1:
        given = range(_whole("a position", given.start), _whole("a position", given.stop))
    else:
        try:
            given = tuple(sorted({_whole("a position", each) for each in given}))
        except TypeError:
            raise ValueError(f"positions are {given!r}; expected numbers in a list, even if it is one") from None
    if given and given[0] < 0:
        raise ValueError(f"position {given[0]} is negative; positions count from 0 at the beginning of the text")
    return given


def _whole(what: str, given: Any) -> int:
    try:
        if isinstance(given, bool):
            raise TypeError
        number = operator.index(given)
        if abs(number) > FOREVER:
            raise TypeError
        return number
    except TypeError:
        raise ValueError(f"{what} is {given!r}; expected a whole number") from None


@dataclass(frozen=True)
class Operation:
    """An edit of one concept's logit.

    Attributes:
        kind: add, scale, set or suppress.
        concept: concept id.
        value: summand, factor or new logit; 0 for suppress.
        positions: where it applies, as `Positions`.
        after_choice: act after the choice of the K largest logits, on active concepts only.

    Raises:
        ValueError: an unknown kind, a negative concept or position, or a value that is not a number or beyond
            `LARGEST_VALUE`.
    """

    kind: str
    concept: int
    value: float = 0.0
    positions: Positions = ALL
    after_choice: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"steering operation {self.kind!r}; expected one of {', '.join(KINDS)}")
        concept = _whole("a concept to steer", self.concept)
        if concept < 0:
            raise ValueError(f"concept {concept} is negative; concepts count from 0")
        try:
            value = float(self.value)
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if not abs(value) <= LARGEST_VALUE:
            raise ValueError(
                f"concept {concept} is to be steered by {self.value!r}; "
                f"expected a number from {-LARGEST_VALUE:g} to {LARGEST_VALUE:g}"
            )
        for name, given in (("concept", concept), ("value", value), ("positions", _positions(self.positions))):
            object.__setattr__(self, name, given)

    @property
    def changes_nothing(self) -> bool:
        """Whether it leaves every logit bit-identical."""
        neutral = {"add": 0.0, "scale": 1.0}
        return neutral.get(self.kind) == self.value or (not isinstance(self.positions, str) and not self.positions)

    def apply(self, z: Tensor) -> Tensor:
        """Return the edited logits of the concept; z has any shape."""
        if self.kind == "add":
            return z + self.value
        if self.kind == "scale":
            return z * self.value
        if self.kind == "set":
            return torch.full_like(z, self.value)
        return torch.full_like(z, 0.0 if self.after_choice else -torch.inf)

    def where(self, positions: Tensor) -> Tensor:
        """Return a mask of the positions, of any shape, at which it applies."""
        if self.positions == ALL:
            return torch.ones_like(positions, dtype=torch.bool)
        if isinstance(self.positions, range):
            return (positions >= self.positions.start) & (positions < self.positions.stop)
        assert not isinstance(self.positions, str), "`generate` resolves `generated`"
        return torch.isin(positions, torch.tensor(self.positions, device=positions.device))


@dataclass(frozen=True)
class Steering:
    """A sequence of operations on concepts; suppression always wins.

    Combine them with `+`: `Steering.add({123: 4.0}) + Steering.suppress([7], positions="generated")`.

    Attributes:
        operations: operations in order.
    """

    operations: tuple[Operation, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "operations", tuple(self.operations))

    @classmethod
    def add(cls, strengths: Strengths, *, positions: Any = ALL, after_choice: bool = False) -> Steering:
        """Add a strength to the logit of each concept."""
        return cls._build("add", strengths, positions, after_choice)

    @classmethod
    def scale(cls, factors: Strengths, *, positions: Any = ALL, after_choice: bool = False) -> Steering:
        """Multiply the logit of each concept by a factor, as the paper does with −10 to 10."""
        return cls._build("scale", factors, positions, after_choice)

    @classmethod
    def set(cls, logits: Strengths, *, positions: Any = ALL, after_choice: bool = False) -> Steering:
        """Replace the logit of each concept."""
        return cls._build("set", logits, positions, after_choice)

    @classmethod
    def suppress(cls, concepts: Iterable[int], *, positions: Any = ALL, after_choice: bool = False) -> Steering:
        """Keep concepts from being mixed in. Before the choice, another takes the place; after it, none does."""
        return cls._build("suppress", dict.fromkeys(concepts, 0.0), positions, after_choice)

    @classmethod
    def _build(cls, kind: str, values: Strengths, positions: Any, after_choice: bool) -> Steering:
        return cls(tuple(Operation(kind, each, value, positions, after_choice) for each, value in values.items()))

    def __repr__(self) -> str:
        """Return the expression that builds it."""
        return " + ".join(map(_expression, self.operations)) or "Steering()"

    def __add__(self, other: Steering) -> Steering:
        return Steering(self.operations + other.operations)

    def after_prompt(self, tokens: int) -> Steering:
        """Resolve `generated` to the positions after a prompt of that many tokens."""
        span = range(tokens, FOREVER)
        return Steering(
            tuple(replace(each, positions=span) if each.positions == GENERATED else each for each in self.operations)
        )


def _expression(operation: Operation) -> str:
    """Return the Python expression that builds the steering of one operation."""
    concept = operation.concept
    what = f"[{concept}]" if operation.kind == "suppress" else f"{{{concept}: {operation.value:g}}}"
    where = "" if operation.positions == ALL else f", positions={operation.positions!r}"
    return f"Steering.{operation.kind}({what}{where}{', after_choice=True' if operation.after_choice else ''})"


def as_steering(given: Any) -> Steering:
    """Convert {concept: strength}, which adds, or None, which does nothing, to a `Steering`.

    Raises:
        ValueError: `given` is of another type.
    """
    if given is None:
        return Steering()
    if isinstance(given, Mapping):
        return Steering.add(given)
    # Not isinstance: a model loaded with `trust_remote_code` has its own copy of this module.
    if (operations := getattr(given, "operations", None)) is not None:
        return Steering(operations)
    raise ValueError(
        f"steering is of type {type(given).__name__}; expected {{concept: strength}}, a Steering, or a list of them"
    )


class SteeredBatch(NamedTuple):
    """Steering of a batch."""

    operations: list[tuple[slice, Operation]]
    """Operations and the rows that each applies to, in order, suppressions last."""
    positions: Tensor
    """(B, T) positions of the tokens in their texts."""


def steer_batch(steering: Any, positions: Tensor, batch: int) -> SteeredBatch | None:
    """Convert steering for a batch; None if it changes nothing.

    Args:
        steering: steering of all rows, as in `as_steering`, or a list with one per row.
        positions: (B, T) or (1, T).
        batch: B.

    Raises:
        ValueError: a wrong number of rows, or unresolved positions `generated`.
    """
    per_row = isinstance(steering, PER_ROW)
    if per_row and len(steering) != batch:
        raise ValueError(f"steering has {len(steering)} entries for a batch of {batch}; give one for each row")
    rows = [slice(row, row + 1) for row in range(batch)] if per_row else [slice(None)]
    operations = [
        (row, operation)
        for row, given in zip(rows, steering if per_row else [steering], strict=True)
        for operation in as_steering(given).operations
    ]
    for _, operation in operations:
        if operation.positions == GENERATED:
            raise ValueError("steering positions are 'generated', which only generate() knows; give numbers or a slice")
    operations = [each for each in operations if not each[1].changes_nothing]
    operations.sort(key=lambda each: each[1].kind == "suppress")
    return SteeredBatch(operations, positions.expand(batch, -1)) if operations else None


def steer_logits_(z: Tensor, steered: SteeredBatch) -> Tensor:
    """Apply the operations before the choice to z (B, T, C) in place, so that (B, T, C) is never copied."""
    for rows, operation in steered.operations:
        if not operation.after_choice:
            logits = z[rows, :, operation.concept]  # (rows, T), a view
            where = operation.where(steered.positions[rows])
            logits.copy_(torch.where(where, operation.apply(logits), logits))
    return z


def steer_active(values: Tensor, indices: Tensor, steered: SteeredBatch) -> Tensor:
    """Apply the operations after the choice to the logits (B, T, K) of the active concepts `indices` (B, T, K).

    A suppressed concept stays active with value 0 where fewer than K others are left.
    """
    suppressed = values.isneginf()
    values = values.masked_fill(suppressed, 0.0)
    for rows, operation in steered.operations:
        if operation.after_choice:
            where = operation.where(steered.positions[rows])[..., None] & (indices[rows] == operation.concept)
            values[rows] = torch.where(where, operation.apply(values[rows]), values[rows])
    return values.masked_fill(suppressed, 0.0)
