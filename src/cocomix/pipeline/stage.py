"""A stage: a folder computed from settings and from other stages. It is either finished or absent.

A finished folder holds `stage.json`: its settings, the fingerprints of its input stages, its own fingerprint, and
figures for the report. `makers.py` maps each kind of stage to what computes it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cocomix.common import distributed, files, integrity
from cocomix.common.errors import InputError
from cocomix.training import older_records

RECORD_FILE = "stage.json"
CLAIM_FILE = "begun.json"
STAGE_FILES = (RECORD_FILE, CLAIM_FILE, integrity.SUMS_FILE)
"""Files of a finished folder that concern this folder, not its contents."""
IDLE_SETTINGS = ("blocks_per_batch", "gradient_checkpointing", "compile", "keep_checkpoints", "report_to")
"""Settings that decide how a result is computed, with which memory and speed, but not what it is (up to rounding).

Records hold those that were used. If the recipe now has others, a finished stage stays finished; an unfinished one
starts again, so that resuming is exact.
"""


@dataclass(frozen=True)
class StageResult:
    """What a maker returns for the record.

    Attributes:
        fingerprint: of the folder's contents.
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
        kind: of its contents; decides how it is computed.
        name: that messages use; unique within a recipe.
        folder: of the finished result.
        settings: the part of the recipe that decides the result.
        needs: stages whose contents it reads.
        arguments: that distinguish stages of one kind, such as a student's name and seed.
    """

    kind: str
    name: str
    folder: Path
    settings: dict[str, Any]
    needs: tuple[Stage, ...] = ()
    arguments: tuple[Any, ...] = ()

    def with_needs(self) -> list[Stage]:
        """Return this stage and every stage that it depends on, dependencies first."""
        return list(dict.fromkeys([*(before for needed in self.needs for before in needed.with_needs()), self]))

    def is_done(self) -> bool:
        """Return whether the folder is finished."""
        return (self.folder / RECORD_FILE).is_file()

    def record(self) -> Record:
        """Read the record of the finished folder; InputError if it is damaged."""
        path = self.folder / RECORD_FILE
        self.verify(f"delete {self.folder} to compute {self.name} again", names=(RECORD_FILE,))
        try:
            record = Record(**files.read_json(path))
            if not all(isinstance(part, dict) for part in (record.settings, record.inputs, record.summary)):
                raise TypeError
        except InputError as error:
            raise InputError(f"{error}; delete {self.folder} to compute {self.name} again") from None
        except TypeError:
            raise InputError(
                f"{path} does not describe a stage; delete {self.folder} to compute {self.name} again"
            ) from None
        return record

    def verify(self, remedy: str, names: Collection[str] | None = None) -> None:
        """Check that the files of the finished folder are those that were written; see `integrity.verify`."""
        integrity.verify(self.folder, remedy, names)

    def problems(self) -> list[str]:
        """Return one line for each reason why the existing folder cannot be, or become, this stage's result."""
        if not self.is_done():
            return self._unfinished_problems()
        record = self.record()
        changed = _changes(_decisive(self._recorded(record)), _decisive(self.settings))
        if changed:
            return [
                f"{self.folder} was written by a different recipe: {'; '.join(changed)}; "
                "choose another output folder, or delete this one to compute it again"
            ]
        return [
            f"{self.folder} was computed from another {needed.name} than the one in {needed.folder}; "
            f"delete {self.folder} to compute it again"
            for needed in self.needs
            if needed.name not in record.inputs
            or (needed.is_done() and needed.record().fingerprint != record.inputs[needed.name])
        ]

    def idle_changes(self) -> list[str]:
        """Return one line for each of the `IDLE_SETTINGS` with which the finished folder was computed differently."""
        return _changes(self._recorded(self.record()), self.settings)

    def _recorded(self, record: Record) -> dict[str, Any]:
        return older_records.complete_settings(record.settings, self.settings)

    def _unfinished_problems(self) -> list[str]:
        unfinished = files.partial(self.folder)
        if os.path.lexists(self.folder):
            return [f"{self.folder} exists and was not created by cocomix; choose another output folder"]
        if os.path.lexists(unfinished):
            if unfinished.is_symlink() or not unfinished.is_dir():
                return [f"{unfinished} is not a folder; move it away, or choose another output folder"]
            if not self._marker() and {path.name for path in unfinished.iterdir()} - {f"{CLAIM_FILE}.partial"}:
                return [f"{unfinished} exists and was not created by cocomix; choose another output folder"]
            self._claimed()
        return []

    def is_begun(self) -> bool:
        """Return whether an interrupted attempt left an unfinished folder."""
        return self._marker() is not None

    def _marker(self) -> str | None:
        """Return the name of the file that shows that the unfinished folder is ours; None if there is none."""
        unfinished = files.partial(self.folder)
        return next((name for name in (CLAIM_FILE, RECORD_FILE) if (unfinished / name).is_file()), None)

    def _claimed(self) -> dict[str, Any] | None:
        """Return the claim of an interrupted attempt, completed with this version's settings, or None.

        Raises:
            InputError: the claim is damaged.
        """
        path = files.partial(self.folder) / CLAIM_FILE
        try:
            claim = files.read_json(path) if path.is_file() else {}
        except InputError as error:
            raise InputError(f"{error}; delete {path.parent} to compute {self.name} from the beginning") from None
        if not isinstance(claim, dict) or not isinstance(claim.get("settings"), dict):
            return None
        return {**claim, "settings": older_records.complete_settings(claim["settings"], self.settings)}

    def run(self, make: Callable[[Path], StageResult], *, resumes: bool = True, on_all_ranks: bool = False) -> None:
        """Compute the folder unless it is finished. Every rank returns once it is.

        Args:
            make: writes everything into the unfinished folder that it is given. Subfolders `checkpoint-*` are deleted
                once the result is recorded.
            resumes: whether `make` continues from what an interrupted attempt left; otherwise it starts from an empty
                folder.
            on_all_ranks: whether every rank calls `make`; otherwise rank 0 does while the others wait.
        """
        if not self.is_done() and (on_all_ranks or distributed.is_main_process()):
            self._compute(make, resumes, distributed.barrier if on_all_ranks else lambda: None)
        distributed.barrier()

    def _compute(self, make: Callable[[Path], StageResult], resumes: bool, meet: Callable[[], None]) -> None:
        unfinished = files.partial(self.folder)
        inputs = self.input_fingerprints()
        if distributed.is_main_process():
            self._claim({"settings": self.settings, "inputs": inputs}, resumes)
        meet()
        if (unfinished / RECORD_FILE).is_file():  # an earlier attempt was killed between the record and the rename
            meet()
            if distributed.is_main_process():
                self._rename_into_place()
            return
        try:
            result = make(unfinished)
        except InputError:
            raise
        except Exception as error:
            failure = files.system_failure(error)
            if failure is None or failure.errno is None:
                raise
            where = failure.filename2 or failure.filename or str(self.folder)
            raise OSError(failure.errno, f"{self.name} cannot be computed: {failure.strerror}", where) from None
        meet()
        if distributed.is_main_process():
            record = Record(self.settings, inputs, result.fingerprint, result.summary)
            files.write_json(unfinished / RECORD_FILE, asdict(record))
            self._rename_into_place()

    def input_fingerprints(self) -> dict[str, str]:
        """Return the fingerprints of the stages that this one reads, by name; they must be finished."""
        return {needed.name: needed.record().fingerprint for needed in self.needs}

    def _rename_into_place(self) -> None:
        """Rename the finished folder into place. Delete the claim last: it marks the folder as ours."""
        for checkpoint in files.checkpoints(files.partial(self.folder)):
            shutil.rmtree(checkpoint)
        files.finish(self.folder, exclude=(CLAIM_FILE,))
        (self.folder / CLAIM_FILE).unlink(missing_ok=True)

    def _claim(self, claim: dict[str, Any], resumes: bool) -> None:
        """Keep what an interrupted attempt left only if its settings and inputs were the same."""
        unfinished = files.partial(self.folder)
        marker = self._marker()
        recorded = (unfinished / RECORD_FILE).is_file()
        if marker and not (self._claimed() == claim and (resumes or recorded)):
            with files.held(unfinished) as folder:
                folder.delete(marker)
        unfinished.mkdir(parents=True, exist_ok=True)
        files.write_json(unfinished / CLAIM_FILE, claim)


def _decisive(settings: Any) -> Any:
    """Return settings without the `IDLE_SETTINGS` on any level."""
    if not isinstance(settings, dict):
        return settings
    return {name: _decisive(value) for name, value in settings.items() if name not in IDLE_SETTINGS}


def _changes(recorded: Any, wanted: Any, key: str = "") -> list[str]:
    """Return `key is A there, B here` for each setting that differs."""
    if isinstance(recorded, dict) and isinstance(wanted, dict):
        return [
            line
            for name in dict.fromkeys((*recorded, *wanted))
            for line in _changes(recorded.get(name), wanted.get(name), f"{key}.{name}" if key else name)
        ]
    return [] if recorded == wanted else [f"{key} is {recorded!r} there, {wanted!r} here"]


def require_unchanged(stage: Stage, fingerprint: str, source: str) -> None:
    """Raise InputError if what `source` now holds is not what the finished `stage` recorded."""
    if stage.is_done() and stage.record().fingerprint != fingerprint:
        raise InputError(
            f"{source} has changed since {stage.folder} was computed; restore the old one, or choose another output "
            "folder"
        )
