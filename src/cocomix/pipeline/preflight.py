"""Everything about a recipe that can be wrong, found before anything expensive starts, all at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import TypeVar, cast

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from cocomix.common import distributed, settings
from cocomix.common.console import warn
from cocomix.common.errors import InputError
from cocomix.concepts.attribution import check_tap
from cocomix.concepts.sae import SparseAutoencoder
from cocomix.concepts.sae_loading import load_sae
from cocomix.data.corpus import check_corpus, is_packed_folder, is_token_folder
from cocomix.data.datatrove import check_token_files, is_datatrove_folder
from cocomix.data.tokenizer import MIN_VOCAB_SIZE, TokenizerConfig, load_tokenizer, same_tokenizer, vocabulary_size
from cocomix.models.building import BackboneConfig, backbone_config, build_plain
from cocomix.models.checking import check_backbone
from cocomix.models.loading import check_vocabulary, load_config
from cocomix.pipeline.artifacts import Pipeline
from cocomix.pipeline.make_artifacts import check_packed
from cocomix.pipeline.recipe import Recipe
from cocomix.pipeline.stage import Stage
from cocomix.pipeline.students import StudentContext, build_student, start_from, student_config
from cocomix.training.config import TrainingConfig

Loaded = TypeVar("Loaded")
BYTES_PER_NUMBER = 4
MAX_PLANNED_TRIAL = 2**26
"""Weights of two blocks that a plan tries out; more take longer than a plan may."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def check(pipeline: Pipeline, wanted: Sequence[Stage]) -> None:
    """Raise one InputError with a line for each problem.

    Checks settings and sources; sizes are tried on models without memory, unless a setting is wrong that models depend
    on. All of the recipe is checked, although only the stages `wanted` will run.
    """
    _outcome.cache_clear()
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
            attempt(lambda: _check_memory(what, streaming.shuffle_blocks * recipe.block_size))
        if recipe.tokenizer.source is not None:
            attempt(lambda: _check_tokenizer(recipe))
    if not models_can_be_tried:
        _raise(list(dict.fromkeys(problems)))
    if recipe.labels.source is not None and recipe.needs_labels() and not pipeline.labels_stage.is_done():
        attempt(pipeline.labels)
    if recipe.needs_teacher() and not all(stage.is_done() for stage in pipeline.stages()):
        attempt(lambda: _check_teacher(recipe, with_sae=recipe.needs_labels() and recipe.labels.source is None))
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
            attempt(lambda: _check_teacher(recipe, with_sae=True))
    problems += model_problems(pipeline)
    if not problems:
        for name, student in recipe.students.items():
            source = recipe.backbone_of(student).source
            if source is not None and not _is_trained(pipeline, name):
                attempt(partial(_check_start, pipeline, name, source))
    _raise(list(dict.fromkeys(problems)))
    if not pipeline.corpus_stage.is_done():
        _warn_of_idle_vocab_size(recipe)
    if any(stage.kind == "student" and not stage.is_done() for stage in wanted):
        _warn_of_single_evaluations(recipe)
        _warn_of_single_process(recipe)


def _loaded(load: Callable[[str], Loaded], source: str) -> Loaded:
    """Return what `load` returns for `source`, or raise its InputError; it is called once in a check.

    Without a network, each call would wait for the Hub again.
    """
    found = _outcome(load, source)
    if isinstance(found, InputError):
        raise found
    return cast(Loaded, found)


@cache
def _outcome(load: Callable[[str], object], source: str) -> object:
    try:
        return load(source)
    except InputError as error:
        return error


def model_problems(pipeline: Pipeline, planned_vocab_size: int | None = None) -> list[str]:
    """Return a line for each model of the recipe that cannot be built; unless in a plan, only for untrained ones.

    Args:
        pipeline: of the recipe.
        planned_vocab_size: vocabulary size in a plan, whose models need not fit into this machine; without it, the
            vocabulary size of the recipe's tokenizer.
    """
    is_planned = planned_vocab_size is not None
    found = _refusals(
        partial(_check_backbone, pipeline.recipe, sizes, is_split, is_planned)
        for sizes, is_split in _backbones(pipeline, trained_too=is_planned)
    )
    if found:  # the students that use the backbone would repeat it
        return found
    return _refusals(partial(_check_student, pipeline, name, planned_vocab_size) for name in pipeline.recipe.students)


def _refusals(checks: Iterable[Callable[[], object]]) -> list[str]:
    """Return the message of each check that fails."""
    found = []
    for check_one in checks:
        try:
            check_one()
        except InputError as error:
            found.append(str(error))
    return found


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
    tokenizer = _loaded(load_tokenizer, recipe.tokenizer.source)
    if is_datatrove_folder(recipe.corpus.source):
        check_token_files(recipe.corpus.source, tokenizer)


def _warn_of_idle_vocab_size(recipe: Recipe) -> None:
    """Warn if the recipe gives another size than its tokenizer's, unless a packed corpus decides the tokenizer."""
    source, stated = recipe.tokenizer.source, recipe.tokenizer.vocab_size
    if source is None or is_packed_folder(recipe.corpus.source):
        return
    found = vocabulary_size(_loaded(load_tokenizer, source))
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


def _check_teacher(recipe: Recipe, with_sae: bool) -> None:
    """Check the teacher and, with `with_sae`, its SAE."""
    teacher = recipe.teacher
    if teacher.source is None:
        config = backbone_config(
            teacher.backbone,
            vocab_size=recipe.tokenizer.vocab_size,
            block_size=recipe.block_size,
            eos_token_id=0,
        )
    else:
        config = _loaded(load_config, teacher.source).get_text_config()
        if recipe.labels.alignment == "tokens":
            _check_same_tokenizer(recipe, "teacher", teacher.source, config, ", or labels.alignment to characters")
        context = getattr(config, "max_position_embeddings", recipe.block_size)
        if context < recipe.block_size:
            raise InputError(
                f"block_size is {recipe.block_size}; the teacher {teacher.source} reads at most {context} tokens"
            )
    sae = None
    if with_sae and recipe.sae.source is None:
        _check_memory(f"sae.d_sae is {recipe.sae.d_sae}, which", 2 * recipe.sae.d_sae * config.hidden_size)
        _check_memory(
            f"sae.buffer_tokens is {recipe.sae.buffer_tokens}, which", recipe.sae.buffer_tokens * config.hidden_size
        )
    elif with_sae and recipe.sae.source is not None:
        sae = load_sae(recipe.sae.source, recipe.sae.max_active)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise InputError(
            f"the teacher {teacher.source} is not a causal language model: {' '.join(str(error).split())[:160]}"
        ) from None
    if with_sae or recipe.mixes_hidden_states():
        check_reading(recipe, model, sae)


def check_reading(recipe: Recipe, teacher: PreTrainedModel, sae: SparseAutoencoder | None = None) -> None:
    """Raise InputError if the recipe's teacher layer cannot be read; the teacher may be on the meta device."""
    try:
        check_tap(teacher, recipe.sae.teacher_layer, sae)
    except InputError as error:
        raise InputError(f"sae: {error}") from None


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
        if source is not None and not _loaded(load_tokenizer, source).is_fast:
            raise InputError(
                f"{name} {source} has a tokenizer written in Python, which does not report the character offsets of "
                "its tokens; labels.alignment characters needs a fast tokenizer (tokenizer.json)"
            )
    teacher = recipe.teacher.source
    if teacher is not None:
        check_vocabulary(_loaded(load_config, teacher), vocabulary_size(_loaded(load_tokenizer, teacher)), teacher)


def _check_same_tokenizer(recipe: Recipe, role: str, source: str, config: PretrainedConfig, instead: str = "") -> None:
    """Check that the pretrained model at `source` uses the tokenizer of the corpus."""
    remedy = f"set tokenizer.source to the {role}'s, e.g. {source}{instead}"
    if recipe.tokenizer.source is None:
        raise InputError(f"the {role} {source} has its own tokenizer, but the recipe trains another one; {remedy}")
    ours = _loaded(load_tokenizer, recipe.tokenizer.source)
    check_vocabulary(config, vocabulary_size(ours), source, recipe.tokenizer.source)
    if Path(source).is_dir() and not any((Path(source) / name).exists() for name in TOKENIZER_FILES):
        return  # saved without a tokenizer: only its size can be compared
    if not same_tokenizer(ours, _loaded(load_tokenizer, source)):
        raise InputError(f"the tokenizer {recipe.tokenizer.source} is not that of the {role} {source}; {remedy}")


def _backbones(pipeline: Pipeline, trained_too: bool) -> list[tuple[BackboneConfig, bool]]:
    """Return the backbones of the models that are not trained yet, or of all, and whether any of these splits it."""
    recipe = pipeline.recipe
    found: list[tuple[BackboneConfig, bool]] = []
    if recipe.trains_teacher() and (trained_too or not pipeline.teacher_stage.is_done()):
        found.append((recipe.teacher.backbone, False))
    for name, student in recipe.students.items():
        if recipe.backbone_of(student).source is None and (trained_too or not _is_trained(pipeline, name)):
            found.append((recipe.backbone_of(student), student.splits_backbone()))
    once = [each for index, each in enumerate(found) if each not in found[:index]]
    return [(sizes, is_split) for sizes, is_split in once if is_split or (sizes, True) not in once]


def _is_trained(pipeline: Pipeline, name: str) -> bool:
    """Return whether the student is trained with every seed."""
    return all(pipeline.student_stages[name, seed].is_done() for seed in pipeline.recipe.student_seeds())


def _check_backbone(recipe: Recipe, sizes: BackboneConfig, is_split: bool, is_planned: bool) -> None:
    # The blocks do not depend on the vocabulary, so a small one suffices.
    config = backbone_config(sizes, vocab_size=MIN_VOCAB_SIZE, block_size=recipe.block_size, eos_token_id=0)
    with torch.device("meta"):
        weights = build_plain(config).num_parameters()
    if not is_planned:
        _check_memory(f"the {sizes.model_type} backbone", weights)
    if not is_planned or 2 * weights / sizes.num_hidden_layers < MAX_PLANNED_TRIAL:
        check_backbone(config, is_split)


def _check_memory(what: str, numbers: int) -> None:
    """Raise InputError if `numbers` float32 values exceed this machine's memory, where models are built first."""
    size, memory = numbers * BYTES_PER_NUMBER, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise InputError(
            f"{what} takes {size / 1e9:,.0f} GB, and this machine has {memory / 1e9:,.0f} GB of memory; give less"
        )


def _context(pipeline: Pipeline, vocab_size: int | None = None) -> StudentContext:
    """Return what the students' sizes depend on, before the corpus exists."""
    source = pipeline.recipe.tokenizer.source
    if vocab_size is None:
        vocab_size = pipeline.recipe.tokenizer.vocab_size
        if source is not None:
            with suppress(InputError):  # `_check_tokenizer` reports it
                vocab_size = vocabulary_size(_loaded(load_tokenizer, source))
    return pipeline.student_context(vocab_size, eos_token_id=0)


def _check_student(pipeline: Pipeline, name: str, planned_vocab_size: int | None) -> None:
    recipe, context = pipeline.recipe, _context(pipeline, planned_vocab_size)
    vocab_size = context.vocab_size
    distillation = recipe.students[name].distillation_config()
    if distillation is not None and (distillation.top_k or 0) >= vocab_size:
        raise InputError(
            f"students.{name}: distillation.top_k is {distillation.top_k}, of {vocab_size} tokens; "
            "give fewer, or leave it out"
        )
    labels_per_token = recipe.labels_of(recipe.students[name]).labels_per_token
    if recipe.students[name].learns_concepts() and labels_per_token > context.num_concepts:
        raise InputError(
            f"students.{name}: labels.labels_per_token is {labels_per_token}, of {context.num_concepts} concepts; "
            "give fewer"
        )
    config = student_config(recipe, name, context)
    start = recipe.backbone_of(recipe.students[name]).source
    if start is not None and distillation is not None and config.get_text_config().vocab_size != vocab_size:
        raise InputError(
            f"students.{name}: the backbone {start} has {config.get_text_config().vocab_size} embeddings for the "
            f"{vocab_size} tokens that the teacher predicts; resize it to them (resize_token_embeddings) and save it, "
            "or leave distillation out"
        )
    if planned_vocab_size is not None:
        return
    with torch.device("meta"):
        _check_memory(f"students.{name}", build_student(config).num_parameters())
    if start is not None:
        _check_same_tokenizer(recipe, "backbone", start, config)


def _check_start(pipeline: Pipeline, name: str, source: str) -> None:
    """Check that the pretrained model at `source` loads, and that the student predicts the same."""
    config = student_config(pipeline.recipe, name, _context(pipeline))
    start_from(config, pipeline.backbone(source), name)
