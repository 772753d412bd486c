"""`cocomix plan RECIPE`: what a recipe will cost."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from cocomix.cli.options import Json, RecipeCommand, option, students_only
from cocomix.cli.recipe import RecipeFile
from cocomix.common.console import show
from cocomix.common.errors import InputError
from cocomix.common.settings import Batch, Count, Range

Utilization = Annotated[float, Range(0, 1, open_low=True)]


class PlanCommand(RecipeCommand):
    """`plan` takes the keys of a recipe and runs in one process."""

    in_several_processes = False


def plan(
    ctx: typer.Context,
    recipe: RecipeFile,
    gpu: Annotated[str | None, option("NAME", "Plan for this kind of GPU instead of this machine.")] = None,
    gpus: Annotated[int | None, option("N", "Number of GPUs, of h100 unless --gpu names another.", Batch)] = None,
    utilization: Annotated[
        float | None, option("SHARE", "Assumed share of the GPUs' peak (default: 0.4).", Utilization)
    ] = None,
    corpus_tokens: Annotated[
        int | None, option("N", "Training tokens of a corpus that is not packed yet.", Count)
    ] = None,
    only: Annotated[str | None, option("NAMES", "Plan just these students, separated by commas.")] = None,
    as_json: Json = False,
) -> None:
    """Compute a recipe's FLOPs, memory, storage and time.

    Plans for this machine unless GPUs are given. Nothing is trained or written.
    """
    from cocomix.pipeline.recipe_file import load_recipe
    from cocomix.planning.costs import machines
    from cocomix.planning.plan import plan_recipe
    from cocomix.planning.tables import describe

    names = students_only(only)
    loaded = load_recipe(recipe, ctx.args)
    if gpu is None and gpus is None:
        if utilization is not None:
            raise InputError("--utilization is for GPUs; this machine is measured: give --gpu or --gpus too")
        from cocomix.planning.calibration import this_machine

        on = this_machine()
    else:
        on = machines(gpu or "h100", gpus or 1, utilization or 0.4)
    computed = plan_recipe(loaded, on, corpus_tokens, names)
    show(json.dumps(asdict(computed), indent=2) if as_json else describe(computed))
