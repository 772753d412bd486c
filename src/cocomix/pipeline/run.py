"""Run a recipe up to a stage: check it, lock its stages, and call the maker of each kind of stage."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from statistics import fmean

from cocomix.common import distributed
from cocomix.common.console import status, warn
from cocomix.common.errors import InputError
from cocomix.common.locking import locked
from cocomix.common.units import duration
from cocomix.concepts.label_checks import verify_labels
from cocomix.data.source_state import changed_sources
from cocomix.pipeline import preflight
from cocomix.pipeline.artifacts import Pipeline
from cocomix.pipeline.makers import MAKERS, TEACHER_READS
from cocomix.pipeline.output_folder import check_output
from cocomix.pipeline.recipe import Recipe
from cocomix.pipeline.stage import Stage


def run_stages(pipeline: Pipeline, stages: Sequence[Stage]) -> None:
    """Compute what is missing of `stages`, in order. The teacher is in memory only from its first use to its last."""
    times: dict[str, list[float]] = {}
    for number, stage in enumerate(stages, 1):
        is_done, started = stage.is_done(), time.monotonic()
        if distributed.is_main_process():
            status(f"[{number}/{len(stages)}] {stage.name}{_state(stage)}{_time_left(stages[number - 1 :], times)}")
        if stage.kind == "student" and not pipeline.recipe.runs_teacher(pipeline.recipe.students[stage.arguments[0]]):
            pipeline.release_teacher()
        run_stage(pipeline, stage)
        if not is_done:
            times.setdefault(stage.kind, []).append(time.monotonic() - started)
    pipeline.release_teacher()
    if distributed.is_main_process():
        status(f"Finished in {duration(sum(map(sum, times.values())))}.")


def _state(stage: Stage) -> str:
    if not stage.is_done():
        return ""
    changes = stage.idle_changes()
    return ": already finished" + (f" ({'; '.join(changes)})" if changes else "")


def _time_left(stages: Sequence[Stage], times: Mapping[str, Sequence[float]]) -> str:
    """Return how long `stages` take if each takes the mean time of its kind; nothing while one's is unknown."""
    left = [stage.kind for stage in stages if not stage.is_done()]
    if not left or any(kind not in times for kind in left) or stages[0].kind != left[0]:
        return ""
    return f" (about {duration(sum(fmean(times[kind]) for kind in left))} left)"


def run_stage(pipeline: Pipeline, stage: Stage) -> None:
    """Compute one stage unless it is finished; the stages that it needs must be."""
    maker = MAKERS[stage.kind]
    with pipeline.teacher_products() if stage.kind in TEACHER_READS else nullcontext():
        stage.run(
            lambda folder: maker.make(pipeline, folder, *stage.arguments),
            resumes=maker.resumes,
            on_all_ranks=maker.on_all_ranks,
        )


def is_repairable(stage: Stage) -> bool:
    """Return whether damaged parts of the finished stage can be detected and computed again in place."""
    return MAKERS[stage.kind].is_intact is not None


def repair_stage(pipeline: Pipeline, stage: Stage) -> bool:
    """Compute the damaged shards of a finished stage again, in place; return whether there were any."""
    maker = MAKERS[stage.kind]
    if maker.is_intact is None or maker.is_intact(stage.folder):
        return False
    maker.make(pipeline, stage.folder, *stage.arguments)
    return True


def run_until(recipe: Recipe, until: str, only: tuple[str, ...] = (), replicate: Pipeline | None = None) -> Pipeline:
    """Check a recipe, then run its stages up to `until`: corpus, teacher, sae, labels, catalog or students.

    Args:
        recipe: to run.
        until: the last stage.
        only: train these students only: a name, for all seeds, or the name of a folder, for one.
        replicate: another replicate of the recipe, see `Pipeline`.

    Raises:
        InputError: a line for each problem; nothing was written.
    """
    with prepared(recipe, until, only, replicate) as pipeline:
        run_missing(pipeline, until, only)
    return pipeline


def run_only(recipe: Recipe, name: str, replicate: Recipe | None = None) -> None:
    """Run one stage of a recipe that was checked and whose stages before it are finished.

    Args:
        recipe: of the stage.
        name: of the stage.
        replicate: another replicate of the recipe, see `Pipeline`.
    """
    pipeline = Pipeline(recipe, None if replicate is None else Pipeline(replicate))
    stage = next(stage for stage in pipeline.stages() if stage.name == name)
    with locked(stage.folder):
        run_stage(pipeline, stage)


@contextmanager
def prepared(
    recipe: Recipe, until: str, only: tuple[str, ...] = (), replicate: Pipeline | None = None
) -> Iterator[Pipeline]:
    """Check a recipe, then yield its pipeline with a lock on each stage that will run or may be repaired.

    Other commands may run other stages of the same recipe, such as other students, at the same time.
    """
    if replicate is not None:  # the first was checked while the other processes waited
        distributed.wait_for_main_process()
    recipe.require_known_methods()
    pipeline = Pipeline(recipe, replicate)
    with ExitStack() as stack:
        if distributed.is_main_process():
            wanted = wanted_stages(pipeline, until, only)
            missing = [stage for stage in wanted if not stage.is_done()]
            if missing:
                check_output(pipeline, wanted)
            repairable = [stage for stage in wanted if until == "labels" and is_repairable(stage)]
            for stage in dict.fromkeys([*missing, *repairable]):
                stack.enter_context(locked(stage.folder))
            preflight.check(pipeline, wanted)
            _verify_inputs(missing, repairable)
            _notice_changed_text(pipeline, missing)
        distributed.release_others()
        yield pipeline


def _verify_inputs(missing: list[Stage], repairable: list[Stage]) -> None:
    """Check what `missing` stages read: labels from outside the run, and finished stages that are not repaired now."""
    for stage in dict.fromkeys([*missing, *(needed for reader in missing for needed in reader.needs)]):
        if stage.kind == "external labels":
            (config,) = stage.arguments
            verify_labels(Path(config.source))
        if stage.is_done() and stage not in repairable:
            repair = "run cocomix label RECIPE, which recomputes damaged shards only"
            stage.verify(repair if is_repairable(stage) else f"delete {stage.folder} to compute {stage.name} again")


def _notice_changed_text(pipeline: Pipeline, missing: list[Stage]) -> None:
    """Warn if the text has changed since the corpus was written; InputError if a missing stage streams it."""
    corpus, folder = pipeline.recipe.corpus, pipeline.corpus_stage.folder
    changes = changed_sources(corpus, folder) if pipeline.corpus_stage.is_done() else None
    if changes is None:
        return
    changed = f"the text of corpus.source {corpus.source!r} has changed since {folder} was written: {changes}"
    if corpus.streaming is not None and missing:
        raise InputError(f"{changed}; restore it, or choose another output folder")
    warn(f"Warning: {changed}. The stored corpus is used. To use the new text, choose another output folder.")


def run_missing(pipeline: Pipeline, until: str, only: tuple[str, ...] = ()) -> None:
    """Run the unfinished stages of a `prepared` pipeline, and repair damaged shards if `until` is labels."""
    stages = wanted_stages(pipeline, until, only)
    finished = [stage for stage in stages if stage.is_done()]
    is_complete = len(finished) == len(stages)
    if not is_complete:
        run_stages(pipeline, stages)
    # Verifying checksums takes a while, so only the command that can repair a damaged shard does it.
    repaired = until == "labels" and any([repair_stage(pipeline, stage) for stage in finished])
    if is_complete and not repaired and distributed.is_main_process():
        status(f"Nothing to do: everything is in {pipeline.folder} already.")


def wanted_stages(pipeline: Pipeline, until: str, only: tuple[str, ...]) -> list[Stage]:
    """Return the stages to run; InputError if the recipe lacks one."""
    if not only:
        return pipeline.stages_until(until)
    return list(dict.fromkeys(needed for stage in pipeline.students(only) for needed in stage.with_needs()))
