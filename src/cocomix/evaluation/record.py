"""Measurements of a trained model, stored next to its weights in `evaluation.json`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cocomix.common import files
from cocomix.common.errors import InputError

EVALUATION_FILE = "evaluation.json"


@dataclass(frozen=True)
class Evaluation:
    """One measurement.

    Attributes:
        kind: `text`, `task`, `concepts` or `steering`.
        name: name of the text or task, or of the steering operation.
        settings: other settings that affect the figures; kind, name and settings identify a measurement.
        figures: the measured figures.
        environment: commit, versions, hardware and date.
    """

    kind: str
    name: str
    settings: dict[str, Any]
    figures: dict[str, Any]
    environment: dict[str, Any]

    def replaces(self, other: Evaluation) -> bool:
        """Return whether the other measurement has the same kind, name and settings."""
        return (self.kind, self.name, self.settings) == (other.kind, other.name, other.settings)


def load_evaluations(folder: Path) -> list[Evaluation]:
    """Load the measurements of the model in `folder`; empty if there is no file.

    Raises:
        InputError: the file does not hold measurements.
    """
    path = folder / EVALUATION_FILE
    if not path.is_file():
        return []
    try:
        return [Evaluation(**each) for each in files.read_json(path)["evaluations"]]
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(f"{path} does not hold evaluations ({error}): delete it and evaluate again") from None


def check_evaluations(folder: Path) -> None:
    """Raise InputError unless measurements can be added to those of the model in `folder`."""
    load_evaluations(folder)
    if not os.access(folder, os.W_OK):
        raise InputError(f"{folder} is not writable, so {EVALUATION_FILE} cannot be saved there; copy the model")


def add_evaluations(folder: Path, found: Iterable[Evaluation]) -> None:
    """Add measurements to the file, replacing earlier ones with the same kind, name and settings."""
    with files.held(folder.resolve()):  # concurrent commands must not lose measurements
        evaluations = load_evaluations(folder)
        for each in found:
            evaluations = [*(other for other in evaluations if not each.replaces(other)), each]
        files.write_json(folder / EVALUATION_FILE, {"evaluations": [asdict(each) for each in evaluations]})
