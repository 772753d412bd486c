"""Run a recipe up to a stage: check it, lock its stages, and call the maker of each kind of stage."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from datasets import Dataset

from cocomix.common import distributed, fingerprint
from cocomix.common.console import status, warn
from cocomix.common.errors import InputError
from cocomix.common.locking import locked
from cocomix.common.units import duration
from cocomix.concepts.alignment import OtherTokens
from cocomix.concepts.label_checks import check_contents, verify_labels
from cocomix.concepts.label_controls import control_labels
from cocomix.concepts.label_store import labels_fingerprint, labels_whole
from cocomix.concepts.labeling import LabelsConfig
from cocomix.concepts.predictions import Predictions
from cocomix.concepts.reading import SameTokens, TeacherReader
from cocomix.concepts.teacher_losses import TeacherLosses
from cocomix.concepts.window import WindowExtractor, inverse_frequencies
from cocomix.data.documents import load_documents
from cocomix.data.source_state import changed_sources
from cocomix.pipeline import make_artifacts, make_models, preflight, student_inputs
from cocomix.pipeline.artifacts import Pipeline
from cocomix.pipeline.methods import DistillationConfig
from cocomix.pipeline.model_card import write_card
from cocomix.pipeline.output_folder import check_output
from cocomix.pipeline.recipe import Recipe
from cocomix.pipeline.stage import Stage, StageResult
from cocomix.pipeline.students import student_config
from cocomix.training.checkpoints import branch_point


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


class Maker(NamedTuple):
    """How stages of one kind are computed."""

    make: Callable[..., StageResult]
    """Takes the pipeline, the folder to write into, and the stage's arguments."""
    resumes: bool = True
    """See `Stage.run`."""
    on_all_ranks: bool = False
    """See `Stage.run`."""
    is_intact: Callable[[Path], bool] | None = None
    """Verifies the checksums of a finished folder, in which `make` keeps every intact shard."""


def _corpus(pipeline: Pipeline, folder: Path) -> StageResult:
    recipe = pipeline.recipe
    if (shared := pipeline.shared(pipeline.corpus_stage)) is not None:
        return make_artifacts.share_corpus(shared, folder)
    trainings = recipe.trainings()
    if recipe.trains_teacher():
        trainings["teacher.training"] = recipe.teacher.training
    return make_artifacts.make_corpus(recipe.corpus, recipe.tokenizer, recipe.block_size, trainings, folder)


def _teacher_corpus(pipeline: Pipeline, folder: Path) -> StageResult:
    source = pipeline.recipe.teacher.source
    assert source is not None
    if (shared := pipeline.shared(pipeline.teacher_corpus_stage)) is not None:
        return make_artifacts.share_corpus(shared, folder)
    documents = pipeline.corpus_stage.folder / "documents"
    return make_artifacts.make_teacher_corpus(source, documents, pipeline.recipe.block_size, folder)


def _teacher(pipeline: Pipeline, folder: Path) -> StageResult:
    recipe, corpus = pipeline.recipe, pipeline.teacher_corpus()
    settings = make_models.RunSettings(
        "teacher", "ntp", recipe.teacher.training, recipe.seed, recipe.parallel, recipe.to_dict()
    )
    data = student_inputs.training_data(pipeline, corpus, recipe.seed)
    final = pipeline.teacher_stage.folder
    figures = make_models.make_teacher(recipe.teacher.backbone, data, settings, final, recipe.teacher.untrained)
    # Read back from the file, which is complete however the ranks shared the training.
    return StageResult(pipeline.teacher_fingerprint(), figures)


def _given_teacher(pipeline: Pipeline, folder: Path) -> StageResult:
    config, teacher = pipeline.recipe.teacher, pipeline.teacher()
    assert config.source is not None
    summary = make_models.examine_pretrained(
        teacher, "teacher", config.source, pipeline.teacher_corpus().validation, config.training.blocks_per_batch
    )
    return StageResult(pipeline.teacher_fingerprint(), {**summary, "dtype": str(teacher.dtype)})


def _backbone(pipeline: Pipeline, folder: Path, source: str) -> StageResult:
    model, training = pipeline.backbone(source).to(pipeline.device), pipeline.recipe.training
    summary = make_models.examine_pretrained(
        model, "backbone", source, pipeline.corpus().validation, training.blocks_per_batch
    )
    found = fingerprint.hash_tensors(model.state_dict().items())
    return StageResult(found, {**summary, "stored_parameters": model.num_parameters()})


def _sae(pipeline: Pipeline, folder: Path) -> StageResult:
    recipe = pipeline.recipe
    return make_artifacts.make_sae(
        pipeline.teacher(),
        pipeline.teacher_corpus(),
        recipe.sae,
        seed=recipe.seed,
        blocks_per_batch=pipeline.with_batch(recipe.labels).batch(),
        folder=folder,
    )


def _labels(pipeline: Pipeline, folder: Path, config: LabelsConfig) -> StageResult:
    corpus, inputs = pipeline.corpus(), pipeline.labels_stage_of(config).input_fingerprints()
    sides = {"train": corpus.train, "validation": corpus.validation}
    readers = {name: _reader(pipeline, name, blocks) for name, blocks in sides.items()}
    extractor = student_inputs.concept_extractor(pipeline, config, pipeline.teacher())
    reference = None
    if extractor.teacher.dtype != torch.float32 and not config.window:
        reference = partial(student_inputs.float32_extractor, pipeline, config)
    config = pipeline.with_batch(config)
    if config.window:
        extractor = WindowExtractor(
            extractor.teacher,
            extractor.sae,
            extractor.teacher_layer,
            config.labels_per_token,
            window=config.window,
            inverse_frequency=inverse_frequencies(extractor, readers["train"], config.batch()),
            eos_token_id=pipeline.tokenizer().eos_token_id,
        )
    return make_artifacts.make_labels(corpus, extractor, readers, config, inputs, folder, reference)


def _reader(pipeline: Pipeline, side: str, blocks: Dataset) -> TeacherReader:
    documents = load_documents(pipeline.corpus_stage.folder, side)
    if pipeline.recipe.labels.alignment == "tokens":
        return SameTokens(blocks, pipeline.tokenizer(), documents)
    assert documents is not None, "preflight refuses token files here"
    context = getattr(pipeline.teacher_model_config, "max_position_embeddings", None)
    return OtherTokens(
        blocks, pipeline.recipe.block_size, documents, pipeline.tokenizer(), pipeline.teacher_tokenizer(), context
    )


def _external_labels(pipeline: Pipeline, folder: Path, config: LabelsConfig) -> StageResult:
    labeled = pipeline.labels(config)
    assert config.source is not None
    check_contents(labeled, pipeline.corpus(), Path(config.source))
    return StageResult(labels_fingerprint(labeled.info), dataclasses.asdict(labeled.info))


def _control_labels(pipeline: Pipeline, folder: Path, config: LabelsConfig) -> StageResult:
    base, corpus = pipeline.labels(config.base()), pipeline.corpus()
    eos_token_id = pipeline.tokenizer().eos_token_id
    info = control_labels(base, config, corpus.info.vocab_size, eos_token_id, pipeline.recipe.seed, folder)
    return StageResult(labels_fingerprint(info), dataclasses.asdict(info))


def _predictions(pipeline: Pipeline, folder: Path, config: DistillationConfig) -> StageResult:
    inputs = pipeline.predictions_stage_of(config).input_fingerprints()
    return make_artifacts.make_predictions(
        pipeline.teacher(), pipeline.corpus(), config, pipeline.with_batch(pipeline.recipe.labels), inputs, folder
    )


def _losses(pipeline: Pipeline, folder: Path) -> StageResult:
    inputs = pipeline.losses_stage.input_fingerprints()
    return make_artifacts.make_losses(
        pipeline.teacher(), pipeline.corpus(), pipeline.with_batch(pipeline.recipe.labels), inputs, folder
    )


def _catalog(pipeline: Pipeline, folder: Path) -> StageResult:
    recipe = pipeline.recipe
    documents = load_documents(pipeline.teacher_corpus_stage.folder, "train", texts=pipeline.corpus_stage.folder)
    reader = SameTokens(pipeline.teacher_corpus().train, pipeline.teacher_tokenizer(), documents)
    labeled = pipeline.labels()
    extractor = student_inputs.concept_extractor(pipeline, recipe.labels, pipeline.teacher())
    return make_artifacts.make_catalog(
        extractor, reader, labeled, recipe.catalog, pipeline.with_batch(recipe.labels).batch(), folder
    )


def _branch(pipeline: Pipeline, name: str, seed: int) -> Path | None:
    """Return the checkpoint that a student continues, if it is a branch; InputError if it was not kept."""
    recipe, student = pipeline.recipe, pipeline.recipe.students[name]
    if student.branch_from is None:
        return None
    training, parent = recipe.training_of(student), pipeline.student_stages[student.branch_from, seed].folder
    checkpoint = branch_point(parent, training.decay_start())
    if not checkpoint.is_dir():
        raise InputError(
            f"{parent} kept no checkpoint after {training.decay_start() * training.tokens_per_step:,} tokens for "
            f"{name}, because the recipe had no such branch when it was trained; delete it to train it again"
        )
    return checkpoint


def _student(pipeline: Pipeline, folder: Path, name: str, seed: int) -> StageResult:
    recipe, student = pipeline.recipe, pipeline.recipe.students[name]
    inputs = student_inputs.student_inputs(pipeline, student, seed)
    corpus, tokenizer = inputs.data.corpus, inputs.data.tokenizer
    config = student_config(recipe, name, pipeline.student_context(corpus.vocab_size, tokenizer.eos_token_id))
    source = recipe.backbone_of(student).source
    pretrained = None if source is None else pipeline.backbone(source)
    training = recipe.training_of(student)
    settings = make_models.RunSettings(
        name,
        student.method,
        training,
        seed,
        recipe.parallel,
        recipe.to_dict(),
        branch_steps=recipe.branch_steps(name),
        branch=_branch(pipeline, name, seed),
    )
    result = make_models.make_student(config, pretrained, inputs, settings, pipeline.student_stages[name, seed].folder)
    if distributed.is_main_process():
        write_card(folder)
    return result


MAKERS = {
    "corpus": Maker(_corpus, resumes=False),
    "teacher corpus": Maker(_teacher_corpus),
    "teacher": Maker(_teacher, on_all_ranks=True),
    "given teacher": Maker(_given_teacher, on_all_ranks=True),
    "backbone": Maker(_backbone),
    "sae": Maker(_sae, on_all_ranks=True),
    "labels": Maker(_labels, on_all_ranks=True, is_intact=labels_whole),
    "control labels": Maker(_control_labels, on_all_ranks=True, is_intact=labels_whole),
    "external labels": Maker(_external_labels, on_all_ranks=True),
    "predictions": Maker(_predictions, on_all_ranks=True, is_intact=Predictions.is_whole),
    "teacher losses": Maker(_losses, on_all_ranks=True, is_intact=TeacherLosses.is_whole),
    "catalog": Maker(_catalog),
    "student": Maker(_student, on_all_ranks=True),
}
"""The maker of each kind of stage."""
TEACHER_READS = ("sae", "labels", "predictions", "teacher losses", "catalog")
"""Kinds of stages in which the teacher reads text and no student trains."""


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
            repair = "cocomix label with its recipe recomputes only what is damaged"
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
