"""Check a recipe before anything expensive starts, and report all problems at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from cocomix.common import distributed, settings
from cocomix.common.console import warn
from cocomix.common.errors import InputError
from cocomix.data.corpus import check_corpus, is_packed_folder, is_token_folder
from cocomix.data.datatrove import check_token_files, is_datatrove_folder
from cocomix.data.tokenizer import TokenizerConfig, load_tokenizer, vocabulary_size
from cocomix.models.loading import check_vocabulary, load_config
from cocomix.pipeline.artifacts import Pipeline
from cocomix.pipeline.make_artifacts import check_packed
from cocomix.pipeline.model_checks import (
    check_memory,
    check_start,
    check_teacher,
    forget_loaded,
    is_trained,
    loaded,
    model_problems,
)
from cocomix.pipeline.recipe import Recipe
from cocomix.pipeline.stage import Stage
from cocomix.training.config import TrainingConfig


def check(pipeline: Pipeline, wanted: Sequence[Stage]) -> None:
    """Raise one InputError with a line for each problem.

    Checks settings and sources; sizes are tried on models without memory, unless a setting is wrong that models depend
    on. All of the recipe is checked, although only the stages `wanted` will run.
    """
    forget_loaded()
    recipe = pipeline.recipe
    problems = recipe.problems()
    models_can_be_tried = not problems or (not settings.problems(recipe) and problems == recipe.training_problems())
    if models_can_be_tried:
        problems += _launch_problems(pipeline, wanted)
    if not problems:
        _raise([line for stage in dict.fromkeys([*pipeline.stages(), *wanted]) for line in stage.problems()])
    with_catalog = pipeline.catalog_stage in wanted

    def attempt(check: Callable[[], object]) -> None:
        try:
            check()
        except InputError as error:
            problems.append(str(error))

    if not pipeline.corpus_stage.is_done():
        has_tokens = is_token_folder(recipe.corpus.source) or is_packed_folder(recipe.corpus.source)
        if has_tokens and recipe.tokenizer.source is None:
            problems.append(
                f"{recipe.corpus.source} holds token files; set tokenizer.source to the tokenizer that made them"
            )
        attempt(lambda: check_corpus(recipe.corpus))
        if is_packed_folder(recipe.corpus.source) and recipe.tokenizer.source is not None:
            tokenizer = recipe.tokenizer.source
            attempt(lambda: check_packed(Path(recipe.corpus.source), tokenizer, recipe.block_size))
        if (streaming := recipe.corpus.streaming) is not None:
            what = f"corpus.streaming.shuffle_blocks is {streaming.shuffle_blocks}, which"
            attempt(lambda: check_memory(what, streaming.shuffle_blocks * recipe.block_size))
        if recipe.tokenizer.source is not None:
            attempt(lambda: _check_tokenizer(recipe))
    if not models_can_be_tried:
        _raise(list(dict.fromkeys(problems)))
    if recipe.labels.source is not None and recipe.needs_labels() and not pipeline.labels_stage.is_done():
        attempt(pipeline.labels)
    if recipe.needs_teacher() and not all(stage.is_done() for stage in pipeline.stages()):
        attempt(lambda: check_teacher(recipe, with_sae=recipe.needs_labels() and recipe.labels.source is None))
        if recipe.needs_labels() and recipe.labels.alignment == "characters":
            attempt(lambda: _check_alignment(recipe))
    stage = pipeline.teacher_stage
    if not problems and recipe.teacher.source is not None and stage in wanted and not stage.is_done():
        attempt(pipeline.teacher)  # finds damaged weights before the corpus is built
    if with_catalog and recipe.labels.source is not None:
        if recipe.teacher.source is None or recipe.sae.source is None:
            problems.append(
                "a catalog of external labels (labels.source) needs their teacher and SAE: set teacher.source and "
                "sae.source"
            )
        else:
            attempt(lambda: check_teacher(recipe, with_sae=True))
    problems += model_problems(pipeline)
    if not problems:
        for name, student in recipe.students.items():
            source = recipe.backbone_of(student).source
            if source is not None and not is_trained(pipeline, name):
                attempt(partial(check_start, pipeline, name, source))
    _raise(list(dict.fromkeys(problems)))
    if not pipeline.corpus_stage.is_done():
        _warn_of_idle_vocab_size(recipe)
    if any(stage.kind == "student" and not stage.is_done() for stage in wanted):
        _warn_of_single_evaluations(recipe)
        _warn_of_single_process(recipe)


def _launch_problems(pipeline: Pipeline, wanted: Sequence[Stage]) -> list[str]:
    """Return a line for each training among the missing stages that cannot start."""
    recipe, missing = pipeline.recipe, [stage for stage in wanted if not stage.is_done()]
    trainings: dict[str, TrainingConfig] = {}
    if any(stage in missing for stage in pipeline.student_stages.values()):
        trainings |= recipe.trainings()
    if recipe.trains_teacher() and pipeline.teacher_stage in missing:
        trainings["teacher.training"] = recipe.teacher.training
    return [f"{name}.{line}" for name, each in trainings.items() for line in each.launch_problems(recipe.block_size)]


def _raise(problems: list[str]) -> None:
    if problems:
        raise InputError("\n".join(problems))


def _check_tokenizer(recipe: Recipe) -> None:
    """Check that the tokenizer loads, and that it is the one of token files that name theirs."""
    assert recipe.tokenizer.source is not None
    tokenizer = loaded(load_tokenizer, recipe.tokenizer.source)
    if is_datatrove_folder(recipe.corpus.source):
        check_token_files(recipe.corpus.source, tokenizer)


def _warn_of_idle_vocab_size(recipe: Recipe) -> None:
    """Warn if the recipe gives another size than its tokenizer's, unless a packed corpus decides the tokenizer."""
    source, stated = recipe.tokenizer.source, recipe.tokenizer.vocab_size
    if source is None or is_packed_folder(recipe.corpus.source):
        return
    found = vocabulary_size(loaded(load_tokenizer, source))
    if stated not in (found, TokenizerConfig().vocab_size):
        warn(
            f"Warning: tokenizer.vocab_size is {stated}, which has no effect, because tokenizer.source {source} has "
            f"{found} tokens; leave tokenizer.vocab_size out"
        )


def _warn_of_single_evaluations(recipe: Recipe) -> None:
    """Warn if a student is evaluated only at the end, so that its report has no curve."""
    for key, training in recipe.trainings().items():
        if training.steps() <= training.steps_per_evaluation():
            warn(
                f"Warning: {key}.tokens_per_evaluation is {training.tokens_per_evaluation:,} of "
                f"{training.max_tokens:,} training tokens, so there is one evaluation, at the end; leave it out for ten"
            )


def _warn_of_single_process(recipe: Recipe) -> None:
    """Warn if the recipe shares a model among processes and there is only one."""
    if recipe.parallel != "ddp" and distributed.world_size() == 1:
        warn(
            f"Warning: parallel is {recipe.parallel!r}, which has no effect on a single process; start one per GPU: "
            "torchrun --nproc_per_node GPUS -m cocomix …"
        )


def _check_alignment(recipe: Recipe) -> None:
    """Check that labels can be aligned by characters: the corpus has text, and both tokenizers report offsets."""
    corpus = recipe.corpus.source
    if is_token_folder(corpus) or (is_packed_folder(corpus) and not Path(corpus, "documents").is_dir()):
        raise InputError(
            f"labels.alignment is 'characters', but {corpus} holds token files, which have no text; "
            "give text, or a teacher that reads these tokens"
        )
    sources = {"tokenizer.source": recipe.tokenizer.source, "teacher.source": recipe.teacher.source}
    for name, source in sources.items():
        if source is not None and not loaded(load_tokenizer, source).is_fast:
            raise InputError(
                f"{name} {source} has a tokenizer written in Python, which does not report the character offsets of "
                "its tokens; labels.alignment characters needs a fast tokenizer (tokenizer.json)"
            )
    teacher = recipe.teacher.source
    if teacher is not None:
        check_vocabulary(loaded(load_config, teacher), vocabulary_size(loaded(load_tokenizer, teacher)), teacher)
