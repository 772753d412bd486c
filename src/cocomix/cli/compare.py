"""`cocomix compare RUN ...` and `cocomix report RUN`: compare finished runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from cocomix.cli.options import Json, argument, option
from cocomix.common import files
from cocomix.common.console import show


def compare(
    runs: Annotated[list[Path], argument("RUN", "A trained model, an output folder (all students), or a bundle.")],
    output: Annotated[Path | None, option("FOLDER", "Write the report there.")] = None,
    as_json: Json = False,
) -> None:
    """Compare finished runs on the same corpus.

    An output folder and a bundle of `cocomix export --to bundle` stand for all of their finished runs.
    """
    from cocomix.cli import workflow

    results = workflow.compare(runs, output)
    if as_json:
        show(json.dumps(results, indent=2))
        return
    show_tables(results)
    if output:
        show(f"\nReport: {files.located(output) / 'report.html'}")


def report(
    run: Annotated[Path, argument("RUN", "Output folder, or the folder of one of its trained models.")],
    as_json: Json = False,
) -> None:
    """Write the report of a run again.

    Compares the finished students of its output folder and replaces OUTPUT/report.
    """
    from cocomix.cli import workflow

    results, folder = workflow.report_again(run)
    if as_json:
        show(json.dumps(results, indent=2))
        return
    show_tables(results)
    show(f"\nReport: {folder / 'report.html'}")


def show_tables(results: dict[str, Any]) -> None:
    """Print the tables of a comparison, then what they mean in sentences; the answer comes last, above the prompt."""
    from cocomix.common.document import plain_text
    from cocomix.reporting.answer import answer
    from cocomix.reporting.concept_tables import concept_summary
    from cocomix.reporting.envelope import envelope_table, has_envelope
    from cocomix.reporting.report import equal_cost_table, students_table
    from cocomix.reporting.tables import evaluation_tables
    from cocomix.reporting.wording import comparison_sentences, concept_sentences, verdict_note

    note = verdict_note(results)
    for block in (
        students_table(results),
        equal_cost_table(results),
        *([envelope_table(results)] if has_envelope(results) else []),
        *concept_summary(results["students"]),
        *evaluation_tables(results["evaluations"]),
        *concept_sentences(results["students"]),
        *comparison_sentences(results),
        *([note] if note else []),
        *answer(results),
    ):
        show("\n" + plain_text(block))
