"""A stage: a folder made from settings and from other stages, finished or absent.

Each finished folder holds `stage.json`: the settings it was made with, the fingerprints of the stages it
was made from, its own fingerprint, and figures for the report.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cocomix import files, older_records, processes
from cocomix.errors import InputError

RECORD_FILE = "stage.json"
CLAIM_FILE = "begun.json"


@dataclass(frozen=True)
class Made:
    """What making a stage leaves to be recorded.

    Attributes:
        fingerprint: of the stage's contents.
        summary: figures for the report.
    """

    fingerprint: str
    summary: dict[str, Any]


@dataclass(frozen=True)
class Record:
    """The `stage.json` of a finished stage."""

    settings: dict[str, Any]
    inputs: dict[str, str]
    fingerprint: str
    summary: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Stage:
    """One step of a recipe.

    Attributes:
        name: what it makes, also the name that messages use.
        folder: where it makes it.
        settings: the part of the recipe that decides the result.
        needs: stages whose contents it reads.
        make: writes everything into `files.partial(folder)`, where its folders `checkpoint-*` are deleted once the
            result is recorded.
        resumes: whether `make` continues what an interrupted attempt left; otherwise it starts from an empty folder.
        together: whether all processes call `make`, each for its share or all as one; otherwise the first makes the
            stage while the others wait.
        repair: makes anew, in place, what is damaged of the finished folder; whether anything was.
    """

    name: str
    folder: Path
    settings: dict[str, Any]
    needs: tuple[Stage, ...]
    make: Callable[[], Made]
    resumes: bool = True
    together: bool = False
    repair: Callable[[], bool] | None = None

    def with_needs(self) -> list[Stage]:
        """This stage and all that it is made from, those first."""
        return list(dict.fromkeys([*(before for needed in self.needs for before in needed.with_needs()), self]))

    def is_done(self) -> bool:
        """Whether the folder is finished."""
        return (self.folder / RECORD_FILE).is_file()

    def record(self) -> Record:
        """Return the record of the finished folder; InputError if it is damaged."""
        path = self.folder / RECORD_FILE
        try:
            record = Record(**files.read_json(path))
            if not all(isinstance(part, dict) for part in (record.settings, record.inputs, record.summary)):
                raise TypeError
        except InputError as error:
            raise InputError(f"{error}; delete {self.folder} to make {self.name} again") from None
        except TypeError:
            raise InputError(
                f"{path} does not describe a stage; delete {self.folder} to make {self.name} again"
            ) from None
        return record

    def problems(self) -> list[str]:
        """Return why what is already there cannot be this stage's result, or become it; a line each."""
        if not self.is_done():
            return self._unfinished_problems()
        record = self.record()
        changed = _changes(older_records.complete_settings(record.settings, self.settings), self.settings)
        if changed:
            return [
                f"{self.folder} was made by a different recipe: {'; '.join(changed)}; "
                "choose another output folder, or delete this one to make it anew"
            ]
        return [
            f"{self.folder} was made from another {needed.name} than the one in {needed.folder}; "
            f"delete {self.folder} to make it anew"
            for needed in self.needs
            if needed.name not in record.inputs
            or (needed.is_done() and needed.record().fingerprint != record.inputs[needed.name])
        ]

    def _unfinished_problems(self) -> list[str]:
        unfinished = files.partial(self.folder)
        if os.path.lexists(self.folder):
            return [f"{self.folder} exists and was not made by cocomix; choose another output folder"]
        if os.path.lexists(unfinished):
            if unfinished.is_symlink() or not unfinished.is_dir():
                return [f"{unfinished} is not a folder; move it away, or choose another output folder"]
            if not self._marker() and {path.name for path in unfinished.iterdir()} - {f"{CLAIM_FILE}.partial"}:
                return [f"{unfinished} exists and was not made by cocomix; choose another output folder"]
            self._claimed()
        return []

    def is_begun(self) -> bool:
        """Return whether an earlier attempt to make the folder left something."""
        return self._marker() is not None

    def _marker(self) -> str | None:
        """Return the name of the file that shows that the unfinished folder is ours; None if there is none."""
        unfinished = files.partial(self.folder)
        return next((name for name in (CLAIM_FILE, RECORD_FILE) if (unfinished / name).is_file()), None)

    def _claimed(self) -> dict[str, Any] | None:
        """Return the claim of an earlier attempt, with all settings that this version's claims hold, or None.

        Raises:
            InputError: it is damaged.
        """
        path = files.partial(self.folder) / CLAIM_FILE
        try:
            claim = files.read_json(path) if path.is_file() else {}
        except InputError as error:
            raise InputError(f"{error}; delete {path.parent} to make {self.name} from the beginning") from None
        if not isinstance(claim, dict) or not isinstance(claim.get("settings"), dict):
            return None
        return {**claim, "settings": older_records.complete_settings(claim["settings"], self.settings)}

    def run(self) -> None:
        """Make the folder, unless it is finished; every process leaves when it is."""
        if not self.is_done() and (self.together or processes.is_first()):
            self._make()
        processes.wait_for_all()

    def _make(self) -> None:
        inputs = {needed.name: needed.record().fingerprint for needed in self.needs}
        if processes.is_first():
            self._claim({"settings": self.settings, "inputs": inputs})
        self._meet()
        if (files.partial(self.folder) / RECORD_FILE).is_file():  # killed when all was made
            self._meet()
            if processes.is_first():
                self._name()
            return
        try:
            made = self.make()
        except InputError:
            raise
        except Exception as error:
            failure = files.system_failure(error)
            if failure is None or failure.errno is None:
                raise
            where = failure.filename or str(self.folder)
            raise OSError(failure.errno, f"{self.name} cannot be made: {failure.strerror}", where) from None
        self._meet()
        if processes.is_first():
            self._finish(inputs, made)

    def _meet(self) -> None:
        """Those who make it go on together."""
        if self.together:
            processes.wait_for_all()

    def _finish(self, inputs: dict[str, str], made: Made) -> None:
        record = Record(self.settings, inputs, made.fingerprint, made.summary)
        files.write_json(files.partial(self.folder) / RECORD_FILE, asdict(record))
        self._name()

    def _name(self) -> None:
        """Rename the recorded folder into place. Remove the claim last: without it, the folder is not ours."""
        for checkpoint in files.checkpoints(files.partial(self.folder)):
            shutil.rmtree(checkpoint)
        files.finish(self.folder)
        (self.folder / CLAIM_FILE).unlink(missing_ok=True)

    def _claim(self, claim: dict[str, Any]) -> None:
        """Keep what an interrupted attempt left only if it was to make the same from the same."""
        unfinished = files.partial(self.folder)
        marker = self._marker()
        recorded = (unfinished / RECORD_FILE).is_file()
        if marker and not (self._claimed() == claim and (self.resumes or recorded)):
            with files.held(unfinished) as folder:
                folder.delete(marker)
        unfinished.mkdir(parents=True, exist_ok=True)
        files.write_json(unfinished / CLAIM_FILE, claim)


def _changes(made_with: Any, wanted: Any, key: str = "") -> list[str]:
    """`key is A there, B here` for each setting that differs."""
    if isinstance(made_with, dict) and isinstance(wanted, dict):
        return [
            line
            for name in dict.fromkeys((*made_with, *wanted))
            for line in _changes(made_with.get(name), wanted.get(name), f"{key}.{name}" if key else name)
        ]
    return [] if made_with == wanted else [f"{key} is {made_with!r} there, {wanted!r} here"]


def require_unchanged(stage: Stage, fingerprint: str, source: str) -> None:
    """Raise InputError if what `source` now holds is not what the finished `stage` recorded."""
    if stage.is_done() and stage.record().fingerprint != fingerprint:
        raise InputError(
            f"{source} has changed since {stage.folder} was made; use the old one again, or another output folder"
        )
