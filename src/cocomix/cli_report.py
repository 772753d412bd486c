"""`cocomix report FOLDER [OUTPUT ...]`: a document of results from what finished recipes found."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from cocomix.cli_options import OptionParser
from cocomix.console import say

COMMAND = "report"
SUMMARY = "write a document of results: tables, curves, and claims held against the figures"


def run(arguments: Sequence[str]) -> int:
    """Write the page of a study; returns the exit code.

    Raises:
        InputError: there is no study, it cannot be read, or an output folder has no results that it can use.
    """
    options = _parser().parse_args(arguments)

    from cocomix.evaluation.study import add_results, load_study
    from cocomix.evaluation.study_page import check_page, write_page

    study = load_study(options.folder)
    check_page(options.folder)
    add_results(study, options.folder, options.outputs)
    say(f"Written: {write_page(study, options.folder)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser(prog=f"cocomix {COMMAND}", description=SUMMARY)
    parser.add_argument(
        "folder", metavar="FOLDER", type=Path, help="with results/study.yaml; results.md is written there"
    )
    parser.add_argument(
        "outputs",
        metavar="OUTPUT",
        nargs="*",
        type=Path,
        help="output folder of a finished recipe, whose results are kept in FOLDER/results",
    )
    return parser
