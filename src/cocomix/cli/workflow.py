"""Workflows behind the commands: run a recipe up to a stage, report, compare."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cocomix.catalog.search import Catalog, open_catalog
from cocomix.cli.options import recorded_command_line
from cocomix.common import distributed, environment, files, fingerprint
from cocomix.common.console import status
from cocomix.concepts.label_statistics import CURVE_FILE, LabelStatistics, label_statistics, plot_concept_frequency
from cocomix.concepts.label_store import load_labels, precision_remark, read_labels_info
from cocomix.evaluation.record import load_evaluations
from cocomix.pipeline.artifacts import Pipeline
from cocomix.pipeline.recipe import Recipe
from cocomix.pipeline.recipe_file import recipe_of_run
from cocomix.pipeline.run import prepared, run_missing
from cocomix.pipeline.stage import Stage
from cocomix.reporting.bundles import opened
from cocomix.reporting.compare import compare_runs
from cocomix.reporting.report_folder import FORM, check_report_folder, load_results, write_report
from cocomix.training.run import RUN_FILE, Run, load_run, output_folder, run_folders


def inspect_labels(folder: Path) -> dict[str, LabelStatistics]:
    """Count the labels of each side of a labeled corpus, and plot the frequency of each concept into its folder.

    Raises:
        InputError: there is no labeled corpus, or it is damaged.
    """
    labeled = load_labels(folder)
    sides = {"train": labeled.train, "validation": labeled.validation}
    found = {
        name: label_statistics(blocks, labeled.info.num_concepts)
        for name, blocks in sides.items()
        if blocks is not None
    }
    try:
        plot_concept_frequency(next(iter(found.values())), folder / CURVE_FILE)
    except OSError as error:  # the labels may be read-only
        status(f"Skipped the plot: {folder / CURVE_FILE} cannot be written ({error.strerror}).")
    return found


def labeling_remarks(folder: Path) -> str:
    """Return the statistics that were collected during labeling and cannot be computed from the labels."""
    info = read_labels_info(folder)
    lines = [f"Labeled with selection {info.selection}, teacher layer {info.teacher_layer}."]
    if info.selection in ("attribution", "attribution_negative"):
        lines.append(
            f"{info.fewer_positive_share:.4%} of the labeled tokens have fewer than {info.labels_per_token} concepts "
            "with a positive score."
        )
    if info.cut_tokens:
        lines.append(f"{info.cut_tokens:,} labeled tokens had more active latents than sae.max_active.")
    if remark := precision_remark(info):
        lines.append(remark)
    return "\n".join(lines)


def run_recipe(recipe: Recipe, until: str = "students") -> dict[str, Any] | None:
    """Run a recipe and write its report unless it is up to date. Return the results on rank 0, else None.

    Args:
        recipe: to run.
        until: `students`, or `catalog and students`.
    """
    report = files.located(recipe.output) / "report"
    if distributed.is_main_process() and load_results(report) is None:
        check_report_folder(report)
    with ExitStack() as stack:  # the locks are held until the report is written
        pipelines: list[Pipeline] = []
        for replicate in recipe.replicated():
            if recipe.replicates is not None and distributed.is_main_process():
                status(f"Replicate {len(pipelines) + 1} of {recipe.replicates}: {replicate.output}")
            first = pipelines[0] if pipelines else None
            pipelines.append(stack.enter_context(prepared(replicate, until, replicate=first)))
            run_missing(pipelines[-1], until)
        return _reported(recipe, pipelines, report) if distributed.is_main_process() else None


def report_again(run: Path) -> tuple[dict[str, Any], Path]:
    """Write the report of an output folder from its finished students.

    Args:
        run: the output folder, or the folder of one of its students.

    Returns:
        The results, and the folder of the report.

    Raises:
        InputError: there is no finished student, or the folder of the report holds something else.
    """
    output = files.located(_output_of(files.located(run).resolve()))
    check_report_folder(output / "report")
    found: dict[Path, list[Run]] = {}
    for each in run_folders(output):
        found.setdefault(output_folder(each), []).append(load_run(each))
    pipelines = []
    for folder, runs in found.items():
        longest = max(runs, key=lambda each: len(each.recipe["students"]))
        students = {each.name: each.recipe["students"][each.name] for each in runs}
        recipe = recipe_of_run({**longest.recipe, "students": {**longest.recipe["students"], **students}}, folder)
        pipelines.append(Pipeline(replace(recipe, output=str(folder))))
    several = len(pipelines) if pipelines[0].folder != output else None
    recipe = replace(pipelines[0].recipe, output=str(output), replicates=several)
    return _reported(recipe, pipelines, output / "report", again=True), output / "report"


def _output_of(run: Path) -> Path:
    """Return the output folder of a student's folder; other folders are returned as they are."""
    if not (run / RUN_FILE).is_file() or run.parent.name != "students":
        return run
    output = run.parent.parent
    return output.parent if output.name.startswith("replicate-") else output


def _reported(recipe: Recipe, pipelines: list[Pipeline], report: Path, again: bool = False) -> dict[str, Any]:
    """Return the results of the finished students; write the report unless it is up to date, or `again`.

    Corpus, teacher, SAE and labels are described by those of the first replicate.
    """
    pipeline, *others = pipelines
    folders = [stage.folder for each in pipelines for stage in each.student_stages.values() if stage.is_done()]
    inputs: dict[str, Any] = _fingerprints(pipeline)
    for other in others:
        inputs |= {f"{other.folder.name} {name}": each for name, each in _fingerprints(other).items()}
    evaluations = [asdict(each) for folder in folders for each in load_evaluations(folder)]
    inputs |= {"form": FORM, "evaluations": fingerprint.hash_json(evaluations)}
    catalog = _catalog(pipeline)
    if catalog is not None:
        inputs["catalog"] = fingerprint.hash_json(catalog.names)
    results = load_results(report)
    # The order matters: tables follow it, and the first ntp student is the baseline.
    if not again and results is not None and list(results.get("inputs", {}).items()) == list(inputs.items()):
        return results
    results = {
        "name": recipe.name,
        **compare_runs(folders),
        **{stage.name: stage.record().summary for stage in _preparation(pipeline)},
        "showcase": _showcase(pipeline, catalog),
        "recipe": recipe.to_dict(),
        "inputs": inputs,
        "environment": _measured_in(folders[0], results) if again else _environment(),
    }
    write_report(results, report)
    return results


def _environment() -> dict[str, Any]:
    return {"command": recorded_command_line(), **environment.describe()}


def _measured_in(run: Path, earlier: dict[str, Any] | None) -> dict[str, Any]:
    """Return where a finished run was measured, with the command of the earlier report if there is one."""
    command = ((earlier or {}).get("environment") or {}).get("command") or recorded_command_line()
    return {"command": command, **load_run(run).environment}


def _fingerprints(pipeline: Pipeline) -> dict[str, Any]:
    """Return the fingerprints of the finished stages by name."""
    return {stage.name: stage.record().fingerprint for stage in pipeline.stages() if stage.is_done()}


def _catalog(pipeline: Pipeline) -> Catalog | None:
    """Open the recipe's concept catalog; None if it does not exist or does not match the labels."""
    stage = pipeline.catalog_stage
    return open_catalog(stage.folder) if stage.is_done() and not stage.problems() else None


def _showcase(pipeline: Pipeline, catalog: Catalog | None) -> dict[str, Any] | None:
    """Return the showcase of the first student that mixes concepts."""
    from cocomix.reporting.showcase import showcase

    for (name, _), stage in pipeline.student_stages.items():
        student = pipeline.recipe.students[name]
        if student.learns_concepts() and stage.is_done() and (found := showcase(stage.folder, catalog)) is not None:
            return asdict(found)
    return None


def _preparation(pipeline: Pipeline) -> list[Stage]:
    students = list(pipeline.student_stages.values())
    return [stage for stage in pipeline.stages() if stage not in students and stage.is_done()]


def compare(paths: list[Path], output: Path | None) -> dict[str, Any]:
    """Compare finished runs, of folders and of bundles, and write a report to `output` if it is given.

    Raises:
        InputError: the runs cannot be compared, or `output` exists and is not a report.
    """
    if output is not None:
        output = files.located(output)
        check_report_folder(output)
    with opened(paths) as found:
        compared = compare_runs([run for each in found for run in run_folders(each)])
    results = {
        "name": " and ".join(path.resolve().name for path in paths),
        **compared,
        "environment": _environment(),
    }
    if output is not None:
        write_report(results, output)
    return results
