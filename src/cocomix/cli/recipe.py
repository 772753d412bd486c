"""The commands that run a recipe up to one of its stages."""

from __future__ import annotations

import json
import shlex
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer

from cocomix.cli.compare import show_tables
from cocomix.cli.next_steps import next_steps
from cocomix.cli.options import Json, argument, option, program, students_only
from cocomix.common import files
from cocomix.common.console import show, status
from cocomix.common.errors import InputError, did_you_mean
from cocomix.common.settings import Batch

Jobs = Annotated[
    int, option("N", "Run N stages at a time, such as students, each in a process on the same device.", Batch)
]
RecipeFile = Annotated[Path, argument("RECIPE", "Recipe file (YAML).")]


def quickstart(ctx: typer.Context, as_json: Json = False) -> None:
    """Run a small comparison on Python's standard library."""
    _run(["quickstart"], quickstart_recipe(), ctx.args, as_json, until="catalog and students")


def keys(
    section: Annotated[str, argument("SECTION", "Only of this section, such as training or corpus.streaming.")] = "",
) -> None:
    """List the keys of a recipe, each of which is an option too."""
    from cocomix.common.settings_help import describe
    from cocomix.pipeline.recipe import Recipe

    texts = {text.split("\n")[0].strip(" -").partition(":")[0]: text for text in describe(Recipe)}
    chosen = {key: text for key, text in texts.items() if f"{key}.".startswith(f"{section}." if section else "")}
    if not chosen:
        raise InputError(f"a recipe has no section {section!r}{did_you_mean(section, texts)}")
    show("\n".join(chosen.values()))


def run(ctx: typer.Context, recipe: RecipeFile, jobs: Jobs = 1, as_json: Json = False) -> None:
    """Run a recipe: from text to compared models."""
    _in_jobs(recipe, ctx.args, jobs)
    _run(["run", str(recipe)], recipe, ctx.args, as_json)


def data(ctx: typer.Context, recipe: RecipeFile, as_json: Json = False) -> None:
    """Run a recipe up to the tokenizer and the packed corpus."""
    _run_until("corpus", recipe, ctx.args, as_json)


def teacher(ctx: typer.Context, recipe: RecipeFile, as_json: Json = False) -> None:
    """Run a recipe up to the teacher."""
    _run_until("teacher", recipe, ctx.args, as_json)


def sae(ctx: typer.Context, recipe: RecipeFile, as_json: Json = False) -> None:
    """Run a recipe up to the sparse autoencoder."""
    _run_until("sae", recipe, ctx.args, as_json)


def label(
    ctx: typer.Context,
    recipe: Annotated[
        Path, argument("RECIPE", "Recipe file (YAML), or with --inspect the folder of a labeled corpus.")
    ],
    inspect: Annotated[
        bool, typer.Option("--inspect", help="Print and plot how often each concept is a label.")
    ] = False,
    student_tokenizer: Annotated[
        str | None, option("SOURCE", "Label for students with this tokenizer instead of the teacher's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a recipe up to the concept labels."""
    if recipe.is_dir():
        if not inspect or ctx.args or student_tokenizer:
            raise InputError(
                f"{recipe} is a folder; give a recipe, or to inspect a labeled corpus just: "
                f"cocomix label {recipe} --inspect"
            )
        _show_labels([recipe], as_json)
        return
    overrides = list(ctx.args)
    if student_tokenizer is not None:
        overrides += ["--tokenizer.source", student_tokenizer, "--labels.alignment", "characters"]
    if not inspect:
        _run_until("labels", recipe, overrides, as_json)
        return
    _show_labels([pipeline.labels_folder() for pipeline in _pipelines("labels", recipe, overrides)], as_json)


def concepts(
    ctx: typer.Context,
    recipe: Annotated[
        Path, argument("RECIPE", "Recipe file (YAML), or a trained model or output folder, whose recipe is recorded.")
    ],
    as_json: Json = False,
) -> None:
    """Run a recipe up to the concept catalog.

    A trained model or output folder stands for the recipe that it recorded.

    `concepts search`, `concepts show` and `concepts name` use the catalog.
    """
    _run_until("catalog", recipe, ctx.args, as_json)


def train(
    ctx: typer.Context,
    recipe: RecipeFile,
    only: Annotated[
        str | None,
        option("NAMES", "Train just these students, separated by commas; NAME-seed-N is one of a student's seeds."),
    ] = None,
    jobs: Jobs = 1,
    as_json: Json = False,
) -> None:
    """Run a recipe up to the students, without the report."""
    names = students_only(only)
    _in_jobs(recipe, ctx.args, jobs, names)
    _run_until("students", recipe, ctx.args, as_json, names)


def _in_jobs(recipe: Path, overrides: list[str], jobs: int, only: tuple[str, ...] = ()) -> None:
    """Run a recipe up to its students, several stages at a time, unless `jobs` is 1; exit if a stage fails."""
    if jobs == 1:
        return
    loaded = _load(recipe, overrides)

    from cocomix.cli.jobs import run_in_jobs

    if code := run_in_jobs(loaded, jobs, only):
        raise typer.Exit(code)


def _run(command: list[str], recipe: Path, overrides: list[str], as_json: bool, until: str = "students") -> None:
    """Run a recipe and its report, and show the results."""
    loaded = _load(recipe, overrides)

    from cocomix.cli import workflow

    results = workflow.run_recipe(loaded, until)
    if results is not None:
        _show_results(results, loaded, [*command, *overrides], as_json)


def _run_until(stage: str, recipe: Path, overrides: list[str], as_json: bool, only: tuple[str, ...] = ()) -> None:
    """Run a recipe up to a stage, and show where its output is, or what each finished stage recorded."""
    pipelines = _pipelines(stage, recipe, overrides, only)
    if as_json and pipelines:
        records = [
            {stage.name: stage.record().summary for stage in pipeline.stages() if stage.is_done()}
            for pipeline in pipelines
        ]
        show(json.dumps(records[0] if len(records) == 1 else records, indent=2))
        return
    for pipeline in pipelines:
        status(f"Done: {pipeline.folder}")
    if stage == "catalog" and pipelines:
        status(f"Next: {program()} {shlex.join(['concepts', 'search', str(pipelines[0].folder), 'WORDS'])}")


def _pipelines(stage: str, recipe: Path, overrides: list[str], only: tuple[str, ...] = ()) -> list[Any]:
    """Run a recipe, or each of its replicates, up to a stage; return the pipelines on rank 0, else []."""
    recorded = stage == "catalog" and recipe.is_dir()
    loaded = _load_recorded(recipe, overrides) if recorded else _load(recipe, overrides)

    from cocomix.common import distributed
    from cocomix.pipeline.run import run_until

    pipelines: list[Any] = []
    for replicate in loaded.replicated():
        pipelines.append(run_until(replicate, stage, only, pipelines[0] if pipelines else None))
    return pipelines if distributed.is_main_process() else []


def _load(recipe: Path, overrides: list[str]) -> Any:
    from cocomix.common import distributed
    from cocomix.pipeline.recipe_file import load_recipe

    distributed.wait_for_main_process()
    return load_recipe(recipe, overrides)


def _load_recorded(run: Path, overrides: list[str]) -> Any:
    """Return the recipe of a run whose labels are still there."""
    from cocomix.common import distributed
    from cocomix.pipeline.artifacts import Pipeline
    from cocomix.pipeline.recipe_file import recorded_recipe

    distributed.wait_for_main_process()
    loaded = recorded_recipe(run, overrides)
    if not (stage := Pipeline(loaded).labels_stage).is_done():
        raise InputError(f"{run} was trained from labels in {stage.folder}, which are gone; give its recipe file")
    return loaded


def _show_labels(folders: list[Path], as_json: bool) -> None:
    from cocomix.cli import workflow

    found = {folder: workflow.inspect_labels(folder) for folder in folders}
    if as_json:
        figures = [{side: counted.figures() for side, counted in sides.items()} for sides in found.values()]
        show(json.dumps(figures[0] if len(figures) == 1 else figures, indent=2))
        return
    for folder, sides in found.items():
        for side, counted in sides.items():
            show(f"\n{side}\n{counted.table()}")
        show(f"\n{workflow.labeling_remarks(folder)}")
        if (folder / workflow.CURVE_FILE).is_file():
            show(f"\nCurve: {folder / workflow.CURVE_FILE}")


def quickstart_recipe() -> Path:
    """Return the path of the quickstart recipe in the checkout or in the installed package."""
    recipe = Path(__file__).parents[3] / "recipes" / "quickstart.yaml"
    if not recipe.is_file():
        recipe = Path(str(resources.files("cocomix") / "recipes" / "quickstart.yaml"))
    return recipe.relative_to(Path.cwd()) if recipe.is_relative_to(Path.cwd()) else recipe


def _show_results(results: dict[str, Any], recipe: Any, command: list[str], as_json: bool) -> None:
    """Print results as JSON, or as tables with what to try after `command`."""
    if as_json:
        show(json.dumps(results, indent=2))
        return

    from cocomix.common.document import plain_text
    from cocomix.reporting.wording import caveats

    folder = files.located(recipe.output)
    show_tables(results)
    show("\n" + plain_text(caveats(results)[0]))
    show(f"\nReport:  {folder / 'report' / 'report.html'}\nFigures: {folder / 'report' / 'results.json'}")
    show(f"Models:  {folder / ('replicate-*/students' if results['recipe']['replicates'] else 'students')}")
    show(next_steps(results, recipe, command))
