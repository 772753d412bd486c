"""Steering: change what a model thinks of while it runs, by editing the logits of the concepts that it mixes.

B sequences, T tokens, C concepts, K concepts mixed per token, z concept logits.

An operation says what becomes of one concept's logit z_i: `add` z_i + s, `scale` z_i · s, `set` s, and `suppress`
that the concept is mixed in no more. Before the choice of the K largest, all C logits can change, so a raised concept
enters and the weakest of the others leaves. After it only the K kept values change: what is not among them stays out.
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
"""Of an operation, either way: logits are of the order of 10, and what is mixed must stay finite."""
ALL = "all"
GENERATED = "generated"
FOREVER = sys.maxsize
"""End of a span of positions that has none."""

Positions = str | range | tuple[int, ...]
"""Tokens counted from 0 at the beginning of their text, without padding: `all`, `generated`, or these."""
Strengths = Mapping[int, float]
PER_ROW = (list, tuple)
"""What holds one steering for each row of a batch."""


def _positions(given: Any) -> Positions:
    """`all`, `generated`, a slice, a range or numbers, as they are kept."""
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
    """What becomes of one concept's logit.

    Attributes:
        kind: add, scale, set or suppress.
        concept: number of the concept.
        value: what is added, multiplied with or set; 0 with suppress.
        positions: where, as in `Positions`.
        after_choice: change the kept values only, after the choice of the K largest logits.

    Raises:
        ValueError: an unknown kind, a concept or position below 0, a value that is no number or beyond
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
        """Whether it leaves every logit what it is, to the last bit."""
        neutral = {"add": 0.0, "scale": 1.0}
        return neutral.get(self.kind) == self.value or (not isinstance(self.positions, str) and not self.positions)

    def applied(self, z: Tensor) -> Tensor:
        """Logits z of the concept, of any shape, as they become."""
        if self.kind == "add":
            return z + self.value
        if self.kind == "scale":
            return z * self.value
        if self.kind == "set":
            return torch.full_like(z, self.value)
        return torch.full_like(z, 0.0 if self.after_choice else -torch.inf)

    def where(self, positions: Tensor) -> Tensor:
        """Mask of the positions, any shape, at which it applies."""
        if self.positions == ALL:
            return torch.ones_like(positions, dtype=torch.bool)
        if isinstance(self.positions, range):
            return (positions >= self.positions.start) & (positions < self.positions.stop)
        assert not isinstance(self.positions, str), "the positions of generated tokens are put in by `generate`"
        return torch.isin(positions, torch.tensor(self.positions, device=positions.device))


@dataclass(frozen=True)
class Steering:
    """Operations on concepts, which take effect one after the other; a suppressed concept stays suppressed.

    `Steering.add({123: 4.0}) + Steering.suppress([7], positions="generated")` is one, too.

    Attributes:
        operations: what to do, in order.
    """

    operations: tuple[Operation, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "operations", tuple(self.operations))

    @classmethod
    def add(cls, strengths: Strengths, *, positions: Any = ALL, after_choice: bool = False) -> Steering:
        """z_i + strength of each concept i of `strengths`."""
        return cls._of("add", strengths, positions, after_choice)

    @classmethod
    def scale(cls, factors: Strengths, *, positions: Any = ALL, after_choice: bool = False) -> Steering:
        """z_i · factor, as the paper steers, by −10 to 10. A concept that stays below the K largest stays out."""
        return cls._of("scale", factors, positions, after_choice)

    @classmethod
    def set(cls, logits: Strengths, *, positions: Any = ALL, after_choice: bool = False) -> Steering:
        """The given logit, whatever was predicted."""
        return cls._of("set", logits, positions, after_choice)

    @classmethod
    def suppress(cls, concepts: Iterable[int], *, positions: Any = ALL, after_choice: bool = False) -> Steering:
        """Not mixed in: before the choice another takes its place, after it nothing does."""
        return cls._of("suppress", dict.fromkeys(concepts, 0.0), positions, after_choice)

    @classmethod
    def _of(cls, kind: str, values: Strengths, positions: Any, after_choice: bool) -> Steering:
        return cls(tuple(Operation(kind, each, value, positions, after_choice) for each, value in values.items()))

    def __add__(self, other: Steering) -> Steering:
        return Steering(self.operations + other.operations)

    def after_prompt(self, tokens: int) -> Steering:
        """The same with `generated` put in numbers: from the end of a prompt of so many tokens on."""
        span = range(tokens, FOREVER)
        return Steering(
            tuple(replace(each, positions=span) if each.positions == GENERATED else each for each in self.operations)
        )


def as_steering(given: Any) -> Steering:
    """A `Steering`, or {concept: strength}, which adds; None is no steering.

    Raises:
        ValueError: it is something else.
    """
    if given is None:
        return Steering()
    if isinstance(given, Mapping):
        return Steering.add(given)
    # Not by its class: a model loaded by `trust_remote_code` has a copy of this module for its own.
    if (operations := getattr(given, "operations", None)) is not None:
        return Steering(operations)
    raise ValueError(
        f"steering is of type {type(given).__name__}; expected {{concept: strength}}, a Steering, or a list of them"
    )


class SteeredBatch(NamedTuple):
    """Steering of the rows of a batch."""

    operations: list[tuple[slice, Operation]]
    """With the rows that each is for; in order, suppressions last."""
    positions: Tensor
    """(B, T) positions of the tokens in their texts."""


def steer_batch(steering: Any, positions: Tensor, batch: int) -> SteeredBatch | None:
    """Steering of a batch; None if it would change nothing.

    Args:
        steering: for all rows, as in `as_steering`, or a list of such with one for each.
        positions: (B, T) or (1, T).
        batch: B.

    Raises:
        ValueError: another number of rows, or positions that only `generate` knows.
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
    """Operations before the choice on z (B, T, C), in place: (B, T, C) is never there twice."""
    for rows, operation in steered.operations:
        if not operation.after_choice:
            of_concept = z[rows, :, operation.concept]  # (rows, T), a view
            where = operation.where(steered.positions[rows])
            of_concept.copy_(torch.where(where, operation.applied(of_concept), of_concept))
    return z


def steer_kept(values: Tensor, indices: Tensor, steered: SteeredBatch) -> Tensor:
    """Kept logits (B, T, K) of the concepts `indices` (B, T, K) after the operations that follow the choice.

    A suppressed concept is kept where fewer than K others are left, and then adds nothing.
    """
    suppressed = values.isneginf()
    kept = values.masked_fill(suppressed, 0.0)
    for rows, operation in steered.operations:
        if operation.after_choice:
            where = operation.where(steered.positions[rows])[..., None] & (indices[rows] == operation.concept)
            kept[rows] = torch.where(where, operation.applied(kept[rows]), kept[rows])
    return kept.masked_fill(suppressed, 0.0)
