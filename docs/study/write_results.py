"""Write docs/results.md from docs/results: python docs/study/write_results.py [RUN ...]

Each RUN is the output folder of a finished recipe, or a bundle of it. Its results are first copied to docs/results.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from cocomix.common.console import status
from cocomix.common.errors import InputError
from cocomix.reporting.bundles import opened
from study import add_results, load_study
from study_page import check_page, write_page

DOCS = Path(__file__).resolve().parents[1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Copy the results of the given runs, then write the page."""
    parser = argparse.ArgumentParser(description="Write a page of results: tables, curves and verdicts on claims.")
    parser.add_argument(
        "runs", metavar="RUN", nargs="*", type=Path, help="output folder or bundle of a finished recipe"
    )
    parser.add_argument(
        "--folder", type=Path, default=DOCS, help="folder with results/study.yaml, for results.md (default: docs)"
    )
    options = parser.parse_args(arguments)
    try:
        study = load_study(options.folder)
        check_page(options.folder)
        with opened(options.runs) as outputs:
            add_results(study, options.folder, outputs)
        status(f"Wrote {write_page(study, options.folder)}")
    except InputError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
