"""Orders of the concepts of a catalog."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from cocomix.app.opening import Opening, effects
from cocomix.app.predictability import Predictability
from cocomix.common.errors import InputError
from cocomix.inspection.runs import OpenRun

LABELS, FREQUENCY = "how often it is a label", "frequency in the teacher"
EFFECT, PREDICTABILITY = "effect after the example prompt", "predictability (F1)"
ORDERS = (LABELS, FREQUENCY, EFFECT, PREDICTABILITY)


class Sorting:
    """The concepts of a run in each of the `ORDERS`, computed on first use."""

    def __init__(self, run: OpenRun, opening: Opening, predictability: Predictability) -> None:
        self.run, self.opening, self.predictability = run, opening, predictability

    @cached_property
    def effects(self) -> list[int]:
        """The concepts whose steering has the largest effect on the token after the example prompt."""
        return effects(self.run, self.opening)

    def concepts(self, order: str) -> list[int]:
        """Return the concepts that a model can learn, largest first; of `EFFECT`, the most frequent of them.

        Raises:
            InputError: predictions cannot be counted.
        """
        if self.run.catalog is None:
            return []
        if order == EFFECT:
            return self.effects
        concepts = np.array(self.run.catalog.steerable, np.int64)
        if order == LABELS:
            return concepts.tolist()
        if order == FREQUENCY:
            values = self.run.catalog.table["frequency"].to_numpy()
        elif (counts := self.predictability.count()) is None:
            raise InputError(f"predictability is {self.predictability.missing}")
        else:
            values = counts.f1
        return concepts[np.argsort(-values[concepts], kind="stable")].tolist()
