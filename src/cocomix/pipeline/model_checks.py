"""Check the models of a recipe before anything is trained: whether they can be built, and read the same tokens."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import TypeVar, cast

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from cocomix.common.errors import InputError, error_message
from cocomix.concepts.attribution import check_tap
from cocomix.concepts.sae import SparseAutoencoder
from cocomix.concepts.sae_loading import load_sae
from cocomix.data.tokenizer import MIN_VOCAB_SIZE, load_tokenizer, same_tokenizer, vocabulary_size
from cocomix.models.building import BackboneConfig, backbone_config, build_plain
from cocomix.models.checking import check_backbone
from cocomix.models.loading import check_vocabulary, load_config
from cocomix.pipeline.artifacts import Pipeline
from cocomix.pipeline.recipe import Recipe
from cocomix.pipeline.students import StudentContext, build_student, start_from, student_config

Loaded = TypeVar("Loaded")
BYTES_PER_NUMBER = 4
MAX_PLANNED_TRIAL = 2**26
"""Weights of two blocks that a plan tries out; more take longer than a plan may."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


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


def loaded(load: Callable[[str], Loaded], source: str) -> Loaded:
    """Return what `load` returns for `source`, or raise its InputError; it is called once per check.

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


def forget_loaded() -> None:
    """Let the next check load everything again."""
    _outcome.cache_clear()


def _refusals(checks: Iterable[Callable[[], object]]) -> list[str]:
    """Return the message of each check that fails."""
    found = []
    for check_one in checks:
        try:
            check_one()
        except InputError as error:
            found.append(str(error))
    return found


def check_teacher(recipe: Recipe, with_sae: bool) -> None:
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
        config = loaded(load_config, teacher.source).get_text_config()
        if recipe.labels.alignment == "tokens":
            _check_same_tokenizer(recipe, "teacher", teacher.source, config, ", or labels.alignment to characters")
        context = getattr(config, "max_position_embeddings", recipe.block_size)
        if context < recipe.block_size:
            raise InputError(
                f"block_size is {recipe.block_size}; the teacher {teacher.source} reads at most {context} tokens"
            )
    sae = None
    if with_sae and recipe.sae.source is None:
        check_memory(f"sae.d_sae is {recipe.sae.d_sae}, which", 2 * recipe.sae.d_sae * config.hidden_size)
        check_memory(
            f"sae.buffer_tokens is {recipe.sae.buffer_tokens}, which", recipe.sae.buffer_tokens * config.hidden_size
        )
    elif with_sae and recipe.sae.source is not None:
        sae = load_sae(recipe.sae.source, recipe.sae.max_active)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        problem = error_message(error)
        raise InputError(f"the teacher {teacher.source} is not a causal language model: {problem}") from None
    if with_sae or recipe.mixes_hidden_states():
        check_reading(recipe, model, sae)


def check_reading(recipe: Recipe, teacher: PreTrainedModel, sae: SparseAutoencoder | None = None) -> None:
    """Raise InputError if the recipe's teacher layer cannot be read; the teacher may be on the meta device."""
    try:
        check_tap(teacher, recipe.sae.teacher_layer, sae)
    except InputError as error:
        raise InputError(f"sae: {error}") from None


def check_start(pipeline: Pipeline, name: str, source: str) -> None:
    """Check that the pretrained model at `source` loads, and that the student predicts the same."""
    config = student_config(pipeline.recipe, name, _context(pipeline))
    start_from(config, pipeline.backbone(source), name)


def _backbones(pipeline: Pipeline, trained_too: bool) -> list[tuple[BackboneConfig, bool]]:
    """Return the backbones of the models that are not trained yet, or of all, and whether any of these splits it."""
    recipe = pipeline.recipe
    found: list[tuple[BackboneConfig, bool]] = []
    if recipe.trains_teacher() and (trained_too or not pipeline.teacher_stage.is_done()):
        found.append((recipe.teacher.backbone, False))
    for name, student in recipe.students.items():
        if recipe.backbone_of(student).source is None and (trained_too or not is_trained(pipeline, name)):
            found.append((recipe.backbone_of(student), student.splits_backbone()))
    once = [each for index, each in enumerate(found) if each not in found[:index]]
    return [(sizes, is_split) for sizes, is_split in once if is_split or (sizes, True) not in once]


def is_trained(pipeline: Pipeline, name: str) -> bool:
    """Return whether the student is trained with every seed."""
    return all(pipeline.student_stages[name, seed].is_done() for seed in pipeline.recipe.student_seeds())


def _check_backbone(recipe: Recipe, sizes: BackboneConfig, is_split: bool, is_planned: bool) -> None:
    # The blocks do not depend on the vocabulary, so a small one suffices.
    config = backbone_config(sizes, vocab_size=MIN_VOCAB_SIZE, block_size=recipe.block_size, eos_token_id=0)
    with torch.device("meta"):
        weights = build_plain(config).num_parameters()
    if not is_planned:
        check_memory(f"the {sizes.model_type} backbone", weights)
    if not is_planned or 2 * weights / sizes.num_hidden_layers < MAX_PLANNED_TRIAL:
        check_backbone(config, is_split)


def check_memory(what: str, numbers: int) -> None:
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
                vocab_size = vocabulary_size(loaded(load_tokenizer, source))
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
        check_memory(f"students.{name}", build_student(config).num_parameters())
    if start is not None:
        _check_same_tokenizer(recipe, "backbone", start, config)


def _check_same_tokenizer(recipe: Recipe, role: str, source: str, config: PretrainedConfig, instead: str = "") -> None:
    """Check that the pretrained model at `source` uses the tokenizer of the corpus."""
    remedy = f"set tokenizer.source to the {role}'s, e.g. {source}{instead}"
    if recipe.tokenizer.source is None:
        raise InputError(f"the {role} {source} has its own tokenizer, but the recipe trains another one; {remedy}")
    ours = loaded(load_tokenizer, recipe.tokenizer.source)
    check_vocabulary(config, vocabulary_size(ours), source, recipe.tokenizer.source)
    if Path(source).is_dir() and not any((Path(source) / name).exists() for name in TOKENIZER_FILES):
        return  # saved without a tokenizer: only its size can be compared
    if not same_tokenizer(ours, loaded(load_tokenizer, source)):
        raise InputError(f"the tokenizer {recipe.tokenizer.source} is not that of the {role} {source}; {remedy}")
