"""Compute the cost of a recipe.

B blocks, T tokens of a block, A labels per token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from datasets import Features, List, Value
from torch import Tensor
from transformers import PreTrainedModel

from cocomix.common.errors import InputError
from cocomix.concepts.attribution import attribution_scores
from cocomix.concepts.label_store import features
from cocomix.concepts.labeling import LabelsConfig
from cocomix.concepts.predictions import prediction_columns
from cocomix.concepts.teacher import residual_stream, tapped_residual
from cocomix.concepts.teacher_losses import loss_columns
from cocomix.data.corpus import is_packed_folder
from cocomix.data.packing import load_packed
from cocomix.data.sources import HUB_PREFIX
from cocomix.models.building import activated_parameters, build_plain
from cocomix.models.flops import forward_flops_per_token, training_flops_per_token
from cocomix.objectives import NextToken, Objective
from cocomix.objectives.base import Batch
from cocomix.pipeline.artifacts import Pipeline
from cocomix.pipeline.costs import labeling_flops, sae_training_flops, teacher_flops
from cocomix.pipeline.methods import DistillationConfig, StudentConfig
from cocomix.pipeline.model_checks import check_reading, model_problems
from cocomix.pipeline.recipe import Recipe
from cocomix.pipeline.stage import RECORD_FILE, Stage
from cocomix.pipeline.student_inputs import OnlineTeacher
from cocomix.pipeline.students import build_student, student_config
from cocomix.planning.costs import Flops, Machines, Plan, PreparationPlan, StudentPlan
from cocomix.planning.memory import Labeler, labeling_memory, training_memory
from cocomix.planning.sizes import PlannedPipeline
from cocomix.training.config import TrainingConfig

BuildTeacher = Callable[[], PreTrainedModel]
PUBLISHED_TOKENS = {(f"{HUB_PREFIX}Skylion007/openwebtext", "openai-community/gpt2"): 9_035_582_198}
"""Training tokens by corpus and tokenizer, as prepared by the published code."""
RECOMPUTED = 4 / 3
"""Relative cost of a step with gradient checkpointing: two forward passes and a backward pass that costs two."""


def plan_recipe(recipe: Recipe, on: Machines, corpus_tokens: int | None = None, only: tuple[str, ...] = ()) -> Plan:
    """Compute the cost of a recipe without running it.

    Args:
        recipe: the recipe.
        on: the machines.
        corpus_tokens: training tokens of a corpus that is not packed yet.
        only: plan only these students; by default all.

    Raises:
        InputError: the recipe cannot work, or sizes are neither known nor stated in it.
    """
    if problems := recipe.problems():
        raise InputError("\n".join(problems))
    for name in only:
        recipe.require_student(name)
    first, *others = recipe.replicated()
    planner = _Planner(first, on, corpus_tokens, [Pipeline(other) for other in others])
    if problems := model_problems(planner.pipeline, planner.pipeline.vocab_size):
        raise InputError("\n".join(problems))
    if recipe.mixes_hidden_states() or (recipe.needs_labels() and recipe.labels.source is None):
        with torch.device("meta"):
            check_reading(recipe, planner.pipeline.teacher())
    students = [planner.student(name) for name in recipe.students if not only or name in only]
    learners = [recipe.students[student.name] for student in students]
    preparation = planner.preparation(learners)
    if recipe.replicates is not None:
        planner.pipeline.remarks.append(f"FLOPs, hours and storage are those of all {recipe.replicates} replicates")
    return Plan(recipe.name, on, planner.corpus_tokens, preparation, students, planner.pipeline.remarks)


class _Planner:
    """Plans the parts of a recipe.

    Args:
        recipe: of one replicate.
        on: the machines.
        corpus_tokens: training tokens of a corpus that is not packed yet.
        replicates: the other replicates, which cost the same.
    """

    def __init__(
        self, recipe: Recipe, on: Machines, corpus_tokens: int | None, replicates: Sequence[Pipeline] = ()
    ) -> None:
        self.recipe, self.on, self.device, self.replicates = recipe, on, on.device, replicates
        self.pipeline = PlannedPipeline(recipe)
        self.corpus_tokens = self._corpus_tokens(corpus_tokens)

    def student(self, name: str) -> StudentPlan:
        """Plan the training of the student `name`."""
        recipe, pipeline, student = self.recipe, self.pipeline, self.recipe.students[name]
        training = recipe.training_of(student)
        teacher = cache(pipeline.teacher)  # one in memory, as in training
        config = student_config(recipe, name, pipeline.student_context(pipeline.vocab_size, eos_token_id=0))
        with torch.device("meta"):
            model = build_student(config)
            per_token = Flops(training_flops_per_token(model, recipe.block_size)) + self._teacher_flops(student)
        memory = training_memory(
            lambda: build_student(config),
            lambda: self._objective(student),
            lambda: self._batch(student, training.blocks_per_batch),
            training,
            accumulates=self._accumulates(training, f"students.{name}.training" if student.training else "training"),
            build_labeler=self._online_labeler(student, teacher),
            device=self.device,
        )
        shared_steps = training.decay_start() if student.branch_from is not None else 0  # another student's
        own_tokens = (training.steps() - shared_steps) * training.tokens_per_step
        flops = per_token.times(own_tokens * len(recipe.student_seeds()) * (1 + len(self.replicates)))
        return StudentPlan(
            name=name,
            method=student.method,
            stored_parameters=model.num_parameters(),
            activated_parameters=activated_parameters(model),
            tokens=training.steps() * training.tokens_per_step,
            steps=training.steps(),
            flops_per_token=per_token,
            flops=flops,
            hours=self._hours(flops, training),
            memory={how: memory.peaks(how, self.on.count) for how in dict.fromkeys(("ddp", "fsdp", recipe.parallel))},
        )

    def preparation(self, students: list[StudentConfig]) -> list[PreparationPlan]:
        """Plan the artifacts that these students learn from."""
        pipeline, recipe = self.pipeline, self.recipe
        found: list[PreparationPlan] = []
        labeled = [student for student in students if student.learns_concepts() and recipe.labels.source is None]
        with_teacher = [student for student in students if student.asks_teacher()]
        if recipe.teacher.source is None and (labeled or with_teacher):
            found.append(self._teacher_training())
        if labeled and recipe.sae.source is None:
            with torch.device("meta"):
                flops = sae_training_flops(recipe.sae, pipeline.teacher(), pipeline.sae_sizes.d_sae, recipe.block_size)
            found.append(self._artifact(pipeline.sae_stage, Flops(teacher=flops.teacher, sae=flops.sae)))
        wanted = [each for own in map(recipe.labels_of, labeled) for each in (own.base(), own)]
        kinds = {pipeline.labels_stage_of(own).name: own for own in wanted}
        found += [self._labels(own) for own in kinds.values() if not own.online]
        predicted = [student.distillation_config() for student in students]
        stored = {(each.top_k, each.temperature): each for each in predicted if each is not None and each.top_k}
        found += [self._predictions(each) for each in stored.values()]
        found += [self._losses()] if any(map(recipe.reads_losses, students)) else []
        return found

    def _teacher_training(self) -> PreparationPlan:
        training = self.recipe.teacher.training
        with torch.device("meta"):
            per_token = training_flops_per_token(self.pipeline.teacher(), self.recipe.block_size)
        memory = training_memory(
            lambda: build_plain(self.pipeline.teacher_model_config),
            NextToken,
            lambda: {"input_ids": self._ids(training.blocks_per_batch)},
            training,
            accumulates=self._accumulates(training, "teacher.training"),
            device=self.device,
        )
        steps = 0 if self.recipe.teacher.untrained else training.steps()
        flops = Flops(teacher=per_token * steps * training.tokens_per_step)
        hours = self._hours(Flops(student=flops.teacher), training)
        peak = max(peak.total for peak in memory.peaks(self.recipe.parallel, self.on.count))
        return self._prepared(self.pipeline.teacher_stage, flops, hours, 0, peak)

    def _labels(self, config: LabelsConfig) -> PreparationPlan:
        sizes = self.recipe.block_size, config.labels_per_token, self._token_type(), self.pipeline.num_concepts
        columns = features(*sizes, has_weights=config.targets == "activation")
        if config.base() != config:  # computed from stored labels
            return self._artifact(self.pipeline.labels_stage_of(config), Flops(), columns)
        with torch.device("meta"):
            found = labeling_flops(self.pipeline, self.pipeline.teacher(), self.pipeline.sae(), config)
        memory = labeling_memory(lambda: self._labeler(config, self.pipeline.teacher()), self.device)
        flops = Flops(teacher=found.teacher, sae=found.sae).times(self._read_tokens())
        return self._artifact(self.pipeline.labels_stage_of(config), flops, columns, memory)

    def _read_tokens(self) -> int:
        """Return the tokens that the teacher reads to label the training corpus, in its own tokenizer."""
        stage = self.pipeline.teacher_corpus_stage
        if stage is self.pipeline.corpus_stage:
            return self.corpus_tokens
        if stage.is_done():
            return self.pipeline.teacher_corpus().info.train_blocks * self.recipe.block_size
        self.pipeline.remarks.append(
            "the number of corpus tokens in the teacher's tokenizer is unknown until the corpus is packed; the plan "
            "assumes as many as in the students' tokenizer"
        )
        return self.corpus_tokens

    def _predictions(self, config: DistillationConfig) -> PreparationPlan:
        assert config.top_k is not None
        columns = prediction_columns(self._ids_type(), config.top_k)
        return self._artifact(self.pipeline.predictions_stage_of(config), self._reading(), columns)

    def _losses(self) -> PreparationPlan:
        return self._artifact(self.pipeline.losses_stage, self._reading(), loss_columns(self._ids_type()))

    def _reading(self) -> Flops:
        """Return the FLOPs of one pass of the teacher over the corpus."""
        with torch.device("meta"):
            per_token = forward_flops_per_token(self.pipeline.teacher(), self.recipe.block_size)
        return Flops(teacher=per_token * self.corpus_tokens)

    def _ids_type(self) -> List:
        return List(Value(self._token_type()), length=self.recipe.block_size)

    def _artifact(
        self, stage: Stage, flops: Flops, columns: Features | None = None, memory: int | None = None
    ) -> PreparationPlan:
        storage = 0 if columns is None else _bytes_per_row(columns) * self.corpus_tokens // self.recipe.block_size
        return self._prepared(stage, flops, self._hours(flops), storage, memory)

    def _prepared(self, stage: Stage, flops: Flops, hours: float, storage: int, memory: int | None) -> PreparationPlan:
        """Return the cost of an artifact in the replicates that lack it; if none does, in all."""
        folders = [stage.folder, *(each.folder / stage.folder.name for each in self.replicates)]
        missing = sum(not (folder / RECORD_FILE).is_file() for folder in folders)
        count = missing or len(folders)
        return PreparationPlan(stage.name, flops.times(count), hours * count, storage * count, memory, missing == 0)

    def _teacher_flops(self, student: StudentConfig) -> Flops:
        """Return the FLOPs of teacher and SAE per token of a student's training."""
        found = teacher_flops(self.pipeline, student)
        return Flops(teacher=found.teacher, sae=found.sae)

    def _hours(self, flops: Flops, training: TrainingConfig | None = None) -> float:
        """Return the hours of FLOPs: a student's in the precision of `training`, the teacher's and SAE's in theirs."""
        hours = self.on.hours(flops.sae, "fp32")
        if flops.teacher:
            low = self.pipeline.teacher_dtype != torch.float32
            hours += self.on.hours(flops.teacher, "bf16" if low else "fp32")
        if training is not None:
            recomputed = RECOMPUTED if training.gradient_checkpointing else 1
            hours += self.on.hours(flops.student * recomputed, training.precision)
        return hours

    def _objective(self, student: StudentConfig) -> Objective:
        # Online labels are computed before the micro-batches, so that their memory is planned separately.
        labels = dataclasses.replace(self.recipe.labels_of(student), online=False)
        stored = self.recipe.reads_losses(student)
        return student.objective(OnlineTeacher(self.pipeline, labels, self.pipeline.vocab_size, stored))

    def _online_labeler(self, student: StudentConfig, teacher: BuildTeacher) -> Callable[[], Labeler] | None:
        """Return a builder of the labeler that runs during training; None if labels are stored."""
        if not student.learns_concepts() or not self.recipe.labels.online:
            return None
        return lambda: self._labeler(self.recipe.labels_of(student), teacher())

    def _labeler(self, config: LabelsConfig, teacher: PreTrainedModel) -> Labeler:
        """Return the costly part of `ConceptExtractor`: everything but the choice of the A strongest concepts."""
        sae = self.pipeline.sae()
        head, layer = teacher.get_output_embeddings(), self.recipe.sae.teacher_layer

        def label() -> Tensor:
            ids = self._ids(self.recipe.labels.batch())
            if config.selection == "activation":
                return sae.encode(residual_stream(teacher, ids, layer)).values
            tapped = tapped_residual(teacher, ids, layer, head=head)
            latents = sae.encode(tapped.residual)
            return attribution_scores(latents, tapped.gradient.to(sae.W_dec.dtype), sae.W_dec)

        return label

    def _batch(self, student: StudentConfig, blocks: int) -> Batch:
        """Build a micro-batch of the student's columns, filled with zeros."""
        batch = {"input_ids": self._ids(blocks)}
        shape, distillation = batch["input_ids"].shape, student.distillation_config()
        if student.learns_concepts():
            labels = self.recipe.labels_of(student)
            batch["concept_ids"] = torch.zeros(*shape, labels.labels_per_token, dtype=torch.long)
            if labels.targets == "activation":
                batch["concept_weights"] = torch.ones(*shape, labels.labels_per_token, dtype=torch.half)
        if distillation is not None and distillation.top_k is not None:
            batch["teacher_ids"] = torch.zeros(*shape, distillation.top_k, dtype=torch.long)
            batch["teacher_log_probs"] = torch.zeros(*shape, distillation.top_k)
            batch["teacher_log_rest"] = torch.zeros(shape)
        if self.recipe.reads_losses(student):
            batch["teacher_losses"] = torch.zeros(shape, dtype=torch.half)
        return batch

    def _ids(self, blocks: int) -> Tensor:
        return torch.zeros(blocks, self.recipe.block_size, dtype=torch.long)

    def _token_type(self) -> str:
        return str(np.min_scalar_type(self.pipeline.vocab_size - 1))

    def _accumulates(self, training: TrainingConfig, section: str) -> bool:
        """Return whether a GPU has several micro-batches per step; InputError unless they have equal size."""
        gpus, rows = self.on.count, training.blocks_per_batch
        batch = rows * self.recipe.block_size * gpus
        if training.tokens_per_step % batch:
            per_gpu = rows * self.recipe.block_size
            fitting = next(count for count in range(gpus, 0, -1) if training.tokens_per_step % (per_gpu * count) == 0)
            raise InputError(
                f"{section}.tokens_per_step is {training.tokens_per_step}; on {gpus} GPUs it must be a multiple of "
                f"blocks_per_batch × block_size × GPUs = {rows} × {self.recipe.block_size} × {gpus} = {batch}; give "
                f"--gpus {fitting} or change {section}.tokens_per_step"
            )
        return training.tokens_per_step > batch

    def _corpus_tokens(self, given: int | None) -> int:
        """Return the training tokens of the corpus: as packed, given, published, or assumed, with a remark."""
        recipe, pipeline = self.recipe, self.pipeline
        if pipeline.corpus_stage.is_done():
            if given is not None:
                pipeline.remarks.append("the corpus is already packed: --corpus-tokens has no effect")
            return pipeline.corpus().info.train_blocks * recipe.block_size
        if is_packed_folder(recipe.corpus.source):
            return load_packed(Path(recipe.corpus.source)).info.train_blocks * recipe.block_size
        if given is not None:
            return given
        published = PUBLISHED_TOKENS.get((recipe.corpus.source, str(recipe.tokenizer.source)))
        if published is not None and recipe.corpus.max_documents is None:
            return published
        pipeline.remarks.append(
            "the number of corpus tokens is unknown until the corpus is packed; the plan assumes training.max_tokens. "
            "The cost of the preparation depends on it: give --corpus-tokens"
        )
        return recipe.training.max_tokens


def _bytes_per_row(columns: Features) -> int:
    """Return the bytes of an Arrow row of lists of fixed length."""

    def size(feature: List | Value) -> int:
        if isinstance(feature, List):
            return feature.length * size(feature.feature)
        return np.dtype(feature.dtype).itemsize

    return sum(size(feature) for feature in columns.values())
