"""`cocomix plan RECIPE`: what a recipe will cost."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

from cocomix.cli_options import OptionParser, number
from cocomix.console import show
from cocomix.settings import Batch, Count, Range

Utilisation = Annotated[float, Range(0, 1, open_low=True)]

OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--gpu", {"metavar": "NAME", "default": "h100", "help": "kind of GPU (default: h100)"}),
    ("--gpus", {"metavar": "N", "type": number(Batch), "default": 8, "help": "how many (default: 8)"}),
    (
        "--utilisation",
        {
            "metavar": "SHARE",
            "type": number(Utilisation),
            "default": 0.4,
            "help": "assumed share of their peak (default: 0.4)",
        },
    ),
    (
        "--corpus-tokens",
        {"metavar": "N", "type": number(Count), "help": "training tokens of a corpus that is not packed yet"},
    ),
    ("--only", {"metavar": "NAME", "help": "plan just this student"}),
    ("--json", {"action": "store_true", "help": "print the plan as JSON"}),
)


def run(arguments: Sequence[str]) -> int:
    """Plan a recipe; returns the exit code.

    Raises:
        InputError: the recipe, or an option, cannot work.
    """
    options, overrides = _parser().parse_known_args(arguments)

    from cocomix.planning.costs import machines
    from cocomix.planning.plan import plan_recipe
    from cocomix.planning.tables import describe
    from cocomix.recipe import load_recipe

    on = machines(options.gpu, options.gpus, options.utilisation)
    plan = plan_recipe(load_recipe(options.recipe, overrides), on, options.corpus_tokens, options.only)
    show(json.dumps(asdict(plan), indent=2) if options.json else describe(plan))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser(
        prog="cocomix plan",
        description="What a recipe will cost: parameters, FLOPs, memory, storage, hours. Nothing is made.",
        epilog="Every recipe key is an option too: --training.blocks_per_batch 16; cocomix run --help lists them.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="recipe file (YAML)")
    for name, about in OPTIONS:
        parser.add_argument(name, **about)
    return parser
