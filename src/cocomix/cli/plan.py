"""`cocomix plan RECIPE`: what a recipe will cost."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from cocomix.cli.options import Json, RecipeCommand, option
from cocomix.cli.recipe import RecipeFile
from cocomix.common.console import show
from cocomix.common.settings import Batch, Count, Range

Utilization = Annotated[float, Range(0, 1, open_low=True)]


class PlanCommand(RecipeCommand):
    """`plan` takes the keys of a recipe and runs in one process."""

    in_several_processes = False


def plan(
    ctx: typer.Context,
    recipe: RecipeFile,
    gpu: Annotated[str, option("NAME", "Kind of GPU.")] = "h100",
    gpus: Annotated[int, option("N", "Number of GPUs.", Batch)] = 8,
    utilization: Annotated[float, option("SHARE", "Assumed share of their peak.", Utilization)] = 0.4,
    corpus_tokens: Annotated[
        int | None, option("N", "Training tokens of a corpus that is not packed yet.", Count)
    ] = None,
    only: Annotated[str | None, option("NAME", "Plan just this student.")] = None,
    as_json: Json = False,
) -> None:
    """Compute a recipe's cost: FLOPs, memory, storage, hours.

    Nothing is trained or written.
    """
    from cocomix.pipeline.recipe_file import load_recipe
    from cocomix.planning.costs import machines
    from cocomix.planning.plan import plan_recipe
    from cocomix.planning.tables import describe

    on = machines(gpu, gpus, utilization)
    computed = plan_recipe(load_recipe(recipe, ctx.args), on, corpus_tokens, only)
    show(json.dumps(asdict(computed), indent=2) if as_json else describe(computed))
