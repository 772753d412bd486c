"""What was measured of a trained model, beside its weights: `evaluation.json`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cocomix import files
from cocomix.errors import InputError

EVALUATION_FILE = "evaluation.json"


@dataclass(frozen=True)
class Evaluation:
    """One measurement.

    Attributes:
        kind: `text`, `task`, `concepts` or `steering`.
        name: of the text or task, or of the operation that steers.
        settings: what else decides the figures; with kind and name, what tells one measurement from another.
        figures: what was measured.
        environment: code, versions, hardware, date.
    """

    kind: str
    name: str
    settings: dict[str, Any]
    figures: dict[str, Any]
    environment: dict[str, Any]

    def replaces(self, other: Evaluation) -> bool:
        """Whether the other is an earlier measurement of the same."""
        return (self.kind, self.name, self.settings) == (other.kind, other.name, other.settings)


def load_evaluations(folder: Path) -> list[Evaluation]:
    """The measurements of the model in `folder`; none if there is no file.

    Raises:
        InputError: the file holds something else.
    """
    path = folder / EVALUATION_FILE
    if not path.is_file():
        return []
    try:
        return [Evaluation(**each) for each in files.read_json(path)["evaluations"]]
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(f"{path} does not hold evaluations ({error}): delete it and evaluate again") from None


def check_evaluations(folder: Path) -> None:
    """Raise InputError if measurements could not be added to those of the model in `folder`."""
    load_evaluations(folder)
    if not os.access(folder, os.W_OK):
        raise InputError(f"{folder} cannot be written to, so no {EVALUATION_FILE} be kept there: copy the model")


def add_evaluations(folder: Path, found: Iterable[Evaluation]) -> None:
    """Put measurements into the file, in place of earlier ones of the same; the others stay."""
    with files.held(folder.resolve()):  # two commands that evaluate one model lose nothing
        kept = load_evaluations(folder)
        for each in found:
            kept = [*(other for other in kept if not each.replaces(other)), each]
        files.write_json(folder / EVALUATION_FILE, {"evaluations": [asdict(each) for each in kept]})
