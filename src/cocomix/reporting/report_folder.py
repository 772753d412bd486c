"""Recognize the folder of a report, and replace its files."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from cocomix.common import files
from cocomix.common.document import to_html, to_markdown
from cocomix.common.errors import InputError
from cocomix.reporting.curves import CURVES, curves_picture
from cocomix.reporting.envelope import ENVELOPE, envelope_picture, has_envelope
from cocomix.reporting.figures import variants
from cocomix.reporting.report import report

RESULTS = "results.json"
FORM = 5
"""Format version of `results.json`. Increase it when the format changes; earlier reports are then rewritten."""
CLAIM = "begun.json"
"""Marker file that a report folder contains until the report is complete."""
KEYS = {"name", "students", "groups", "comparisons", "equal_cost"}
"""Keys of every `results.json`; they identify a folder as a report."""


def check_report_folder(folder: Path) -> None:
    """Raise InputError unless a report can be written to `folder`: a new or empty folder, or an earlier report's."""
    folder = folder.resolve()
    files.check_creatable(folder)
    if folder.exists():
        with files.held(folder) as opened:
            _require_report(opened)


def load_results(folder: Path) -> dict[str, Any] | None:
    """Return the results of the finished report in `folder`; None if there is none."""
    if not (folder / RESULTS).is_file() or (folder / CLAIM).exists():
        return None
    with files.held(folder.resolve()) as opened:
        _require_report(opened)
        return opened.read_json(RESULTS)


def write_report(results: dict[str, Any], folder: Path) -> None:
    """Write the files of a report into `folder`. Replaces only the files of an earlier report.

    Args:
        results: results of `compare_runs` with a `name`, and with `corpus`, `teacher`, `sae`, `labels`, `showcase` and
            `environment` where available.
        folder: the report's folder.

    Raises:
        InputError: the folder has other contents and no report.
    """
    document, pictures = report(results), {CURVES: variants(partial(curves_picture, results))}
    if has_envelope(results):
        pictures[ENVELOPE] = variants(partial(envelope_picture, results))
    contents = {
        **{name: picture[""] for name, picture in pictures.items()},
        "report.md": to_markdown(document).encode(),
        "report.html": to_html(document, results["name"], pictures).encode(),
        RESULTS: files.to_json(results).encode(),
    }
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with files.held(folder) as opened:
        _require_report(opened)
        opened.write({CLAIM: files.to_json({"report": results["name"]}).encode()})
        opened.write(contents)
        opened.remove(CLAIM)


def _require_report(folder: files.Folder) -> None:
    names = folder.names()
    try:
        ours = not names - {files.partial(Path(CLAIM)).name}
        ours = ours or (CLAIM in names and "report" in folder.read_json(CLAIM))
        ours = ours or (RESULTS in names and {*folder.read_json(RESULTS)} >= KEYS)
    except InputError as error:
        raise InputError(f"{error}; if {folder.path} is a report, delete it and repeat the command") from None
    except (TypeError, OSError):  # not a JSON object, or not a file
        ours = False
    if not ours:
        raise InputError(f"{folder.path} exists and is not a report; choose another output folder")
