"""A report replaces the files of an earlier report, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cocomix.cli import workflow
from cocomix.common import files, fingerprint
from cocomix.common.document import Heading, Picture
from cocomix.common.errors import InputError
from cocomix.reporting import report_folder
from cocomix.reporting.report_folder import CLAIM, FORM, KEYS, RESULTS, check_report_folder, load_results, write_report

RESULT: dict[str, Any] = {key: {} for key in sorted(KEYS)} | {"name": "first"}
PICTURE = Picture("curves.png", "curves")
OWN = {"curves.png", "report.html", "report.md", "results.json"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a report goes, of results without figures."""
    monkeypatch.setattr(
        report_folder, "report", lambda results: [Heading(1, results["name"]), Picture("curves.png", "")]
    )
    monkeypatch.setattr(report_folder, "curves_picture", lambda *_, **__: b"a picture")
    return tmp_path / "a" / "b" / "report"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_a_person_adds_to_a_report_stays(folder: Path) -> None:
    write_report(RESULT, folder)
    assert names(folder) == OWN and "data:image/png;base64,YSBwaWN0dXJl" in (folder / "report.html").read_text()
    (folder / "notes").mkdir()
    (folder / "notes" / "thesis.tex").write_text("years of work")
    write_report(RESULT | {"name": "second"}, folder)
    assert names(folder) == OWN | {"notes"} and (folder / "notes" / "thesis.tex").exists()
    assert load_results(folder) == RESULT | {"name": "second"}
    assert "# second" in (folder / "report.md").read_text()


@pytest.mark.parametrize(
    "content",
    [
        {"thesis.tex": "years of work"},
        {"report.md": "# The user's own"},
        {"results.json": '{"accuracy": 1}', "thesis.tex": "years of work"},
        {"results.json": "[1]"},
        {"begun.json": '{"settings": {}}', "stage.json": "{}"},
    ],
)
def test_a_folder_of_something_else_is_refused(folder: Path, content: dict[str, str]) -> None:
    folder.mkdir(parents=True)
    for name, text in content.items():
        (folder / name).write_text(text)
    for refused in (lambda: check_report_folder(folder / "new" / ".."), lambda: write_report(RESULT, folder)):
        with pytest.raises(InputError, match="report exists and is not a report; choose another output folder"):
            refused()
    assert {path.name: path.read_text() for path in folder.iterdir()} == content


@pytest.mark.parametrize("there", ["a file", "a file above"])
def test_a_file_in_place_of_the_folder_is_refused(folder: Path, there: str) -> None:
    blocking = folder if there == "a file" else folder.parent
    blocking.parent.mkdir(parents=True)
    blocking.write_text("years of work")
    with pytest.raises(InputError, match=re.escape(f"{blocking} is not a folder; choose another output folder")):
        check_report_folder(folder)


def test_a_damaged_report_is_named_and_kept(folder: Path) -> None:
    write_report(RESULT, folder)
    (folder / RESULTS).write_text("{")
    for refused in (check_report_folder, load_results):
        with pytest.raises(InputError, match=r"results\.json is damaged: .*; if .*report is a report, delete it"):
            refused(folder)
    assert names(folder) == OWN


@pytest.mark.parametrize("before", [None, RESULT | {"name": "before"}], ids=["first", "another"])
@pytest.mark.parametrize("replaced", range(5))
def test_an_interrupted_report_is_not_taken_for_finished(
    folder: Path, monkeypatch: pytest.MonkeyPatch, before: dict[str, Any] | None, replaced: int
) -> None:
    if before is not None:
        write_report(before, folder)
    replace, calls = files.os.replace, []

    def kill(*paths: Any, **at: Any) -> None:
        if len(calls) == replaced:
            raise KeyboardInterrupt
        calls.append(replace(*paths, **at))

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(files.os, "replace", kill)
        write_report(RESULT, folder)
    assert load_results(folder) == (before if replaced == 0 else None)  # the claim comes first
    check_report_folder(folder)
    write_report(RESULT, folder)
    assert names(folder) == OWN and json.loads((folder / RESULTS).read_text()) == RESULT


def test_a_report_in_a_linked_folder_keeps_the_link(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder.parent / "link").symlink_to("report")
    write_report(RESULT, folder.parent / "link")
    assert (folder.parent / "link").is_symlink() and names(folder) == OWN


def test_a_folder_swapped_while_a_report_is_written_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(RESULT, folder)
    write = files.Folder.write

    def swapping(opened: files.Folder, contents: dict[str, bytes]) -> None:
        if CLAIM in contents:
            folder.rename(folder.parent / "moved")
            folder.mkdir()
            (folder / "report.md").write_text("# The user's own")
        write(opened, contents)

    monkeypatch.setattr(files.Folder, "write", swapping)
    write_report(RESULT | {"name": "second"}, folder)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"report.md": "# The user's own"}
    assert names(folder.parent / "moved") == OWN


@pytest.mark.parametrize("form", [FORM, FORM - 1])
def test_a_report_of_an_earlier_form_is_written_again(monkeypatch: pytest.MonkeyPatch, form: int) -> None:
    written = []
    found = {"inputs": {"form": form, "evaluations": fingerprint.hash_json([])}}
    monkeypatch.setattr(workflow, "load_results", lambda _: found)
    monkeypatch.setattr(workflow, "compare_runs", lambda _: {})
    monkeypatch.setattr(workflow, "write_report", lambda results, _: written.append(results["inputs"]["form"]))
    finished: Any = SimpleNamespace(
        recipe=SimpleNamespace(name="tiny", to_dict=dict),
        stages=list,
        student_stages={},
        catalog_stage=SimpleNamespace(is_done=lambda: False),
    )
    results = workflow._reported(finished.recipe, [finished], Path("report"))
    assert (results is found, written) == ((True, []) if form == FORM else (False, [FORM]))
