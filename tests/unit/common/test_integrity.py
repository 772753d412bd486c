"""A changed, shortened or missing file of a finished folder is found and named."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from cocomix.common import files, integrity
from cocomix.common.errors import InputError

REMEDY = "delete the folder"


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    unfinished = files.partial(folder)
    (unfinished / "train").mkdir(parents=True)
    (unfinished / "train" / "data.arrow").write_bytes(b"tokens")
    (unfinished / "info.json").write_text("{}")
    (unfinished / "claim").touch()
    files.finish(folder, exclude=("claim",))
    (folder / "claim").unlink()
    return folder


def test_a_finished_folder_passes_also_for_sha256sum(finished: Path) -> None:
    integrity.verify(finished, REMEDY)
    subprocess.run(["sha256sum", "--check", "--quiet", "--strict", integrity.SUMS_FILE], cwd=finished, check=True)
    (finished / "added-later").touch()
    integrity.verify(finished, REMEDY)


@pytest.mark.parametrize("how", ["changed", "shortened", "empty", "missing", "a folder"])
def test_a_damaged_file_is_named(finished: Path, how: str) -> None:
    file = finished / "train" / "data.arrow"
    file.unlink()
    if how == "a folder":
        file.mkdir()
    elif how != "missing":
        file.write_bytes({"changed": b"tokenS", "shortened": b"token", "empty": b""}[how])
    with pytest.raises(InputError, match=r"out/train/data\.arrow is damaged: .*; delete the folder$"):
        integrity.verify(finished, REMEDY)
    integrity.verify(finished, REMEDY, names=("info.json",))


def test_a_file_replaced_on_purpose_passes(finished: Path) -> None:
    with integrity.replaced(finished, "info.json"):
        (finished / "info.json").write_text("[]")
        integrity.verify(finished, REMEDY)  # as a kill would leave it
    integrity.verify(finished, REMEDY)
    (finished / "info.json").write_text("[1]")
    with pytest.raises(InputError, match="is damaged"):
        integrity.verify(finished, REMEDY)


@pytest.mark.parametrize("line", ["", "00  info.json", f"{'0' * 64}  ../secret", f"{'0' * 64}  /etc/passwd", "\xff"])
def test_a_damaged_record_is_named_and_leads_nowhere_else(finished: Path, line: str) -> None:
    (finished / integrity.SUMS_FILE).write_text(line + "\n", encoding="latin-1")
    with pytest.raises(InputError, match=r"SHA256SUMS is damaged; delete the folder"):
        integrity.verify(finished, REMEDY)
    (finished / integrity.SUMS_FILE).unlink()
    integrity.verify(finished, REMEDY)  # as written before checksums were recorded
