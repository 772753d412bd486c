"""From a recipe to what it will cost.

B blocks, T tokens of a block, A labels per token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from datasets import Features, List, Value
from torch import Tensor
from transformers import PreTrainedModel

from cocomix import preflight
from cocomix.concepts.attribution import attribution_scores
from cocomix.concepts.label_store import features
from cocomix.concepts.labelling import LabelsConfig
from cocomix.concepts.teacher import residual_stream, tapped_residual
from cocomix.costs import labelling_flops, sae_training_flops, teacher_flops
from cocomix.data.sources import HUB_PREFIX
from cocomix.distillation.predictions import prediction_columns
from cocomix.errors import InputError
from cocomix.evaluation.flops import forward_flops_per_token, training_flops_per_token
from cocomix.learning import OnlineTeacher
from cocomix.methods import DistillationConfig, StudentConfig
from cocomix.models.building import activated_parameters, build_plain
from cocomix.objectives import NextToken, Objective
from cocomix.objectives.base import Batch
from cocomix.planning.costs import Flops, Machines, Plan, PreparationPlan, StudentPlan
from cocomix.planning.memory import Labeller, peak_of_call, training_memory
from cocomix.planning.sizes import PlannedPipeline
from cocomix.recipe import Recipe
from cocomix.stages import Stage
from cocomix.students import build_student, student_config
from cocomix.training.config import TrainingConfig

MakeTeacher = Callable[[], PreTrainedModel]
PUBLISHED_TOKENS = {(f"{HUB_PREFIX}Skylion007/openwebtext", "openai-community/gpt2"): 9_035_582_198}
"""Training tokens of a corpus in the tokens of a tokenizer, as the published code prepares it."""
RECOMPUTED = 4 / 3
"""Computation with gradient checkpointing: two forward passes and a backward one of two, instead of three."""


def plan_recipe(
    recipe: Recipe, on: Machines, corpus_tokens: int | None = None, only: str | None = None, device: str = "cuda"
) -> Plan:
    """Compute what a recipe costs; nothing is made.

    Args:
        recipe: what would be run.
        on: the machines.
        corpus_tokens: training tokens of the corpus, where it is not made yet.
        only: of the students, just this one.
        device: whose memory is planned, cuda or cpu.

    Raises:
        InputError: the recipe cannot work, or sizes are neither known nor stated.
    """
    if problems := recipe.problems():
        raise InputError("\n".join(problems))
    if only is not None:
        recipe.require_student(only)
    planner = _Planner(recipe, on, corpus_tokens, device)
    if problems := preflight.model_problems(planner.pipeline, planner.pipeline.vocab_size):
        raise InputError("\n".join(problems))
    if recipe.mixes_hidden_states() or (recipe.needs_labels() and recipe.labels.source is None):
        with torch.device("meta"):
            preflight.check_reading(recipe, planner.pipeline.teacher())
    students = [planner.student(name) for name in recipe.students if only in (None, name)]
    learners = [recipe.students[student.name] for student in students]
    preparation = planner.preparation(learners)
    return Plan(recipe.name, on, planner.corpus_tokens, preparation, students, planner.pipeline.remarks)


class _Planner:
    """Plans the parts of one recipe."""

    def __init__(self, recipe: Recipe, on: Machines, corpus_tokens: int | None, device: str) -> None:
        self.recipe, self.on, self.device = recipe, on, device
        self.pipeline = PlannedPipeline(recipe)
        self.corpus_tokens = self._corpus_tokens(corpus_tokens)

    def student(self, name: str) -> StudentPlan:
        """What training the student `name` costs."""
        recipe, pipeline, student = self.recipe, self.pipeline, self.recipe.students[name]
        training = recipe.training
        teacher = cache(pipeline.teacher)  # one in memory, as in `student_objective`
        config = student_config(recipe, name, pipeline.student_context(pipeline.vocab_size, eos_token_id=0))
        with torch.device("meta"):
            model = build_student(config)
            per_token = Flops(training_flops_per_token(model, recipe.block_size)) + self._teacher_of(student)
        memory = training_memory(
            lambda: build_student(config),
            lambda: self._objective(student),
            lambda: self._batch(student, training.blocks_per_batch),
            training,
            accumulates=self._accumulates(training),
            make_labeller=self._labeller_of(student, teacher),
            device=self.device,
        )
        tokens = training.steps() * training.tokens_per_step
        flops = per_token.times(tokens * len(recipe.student_seeds()))
        return StudentPlan(
            name=name,
            method=student.method,
            stored_parameters=model.num_parameters(),
            activated_parameters=activated_parameters(model),
            tokens=tokens,
            steps=training.steps(),
            flops_per_token=per_token,
            flops=flops,
            hours=self._hours(flops, training),
            memory={how: memory.peaks(how, self.on.count) for how in dict.fromkeys(("ddp", "fsdp", recipe.parallel))},
        )

    def preparation(self, students: list[StudentConfig]) -> list[PreparationPlan]:
        """What these students need that is made before them."""
        pipeline, recipe = self.pipeline, self.recipe
        found: list[PreparationPlan] = []
        labelled = [student for student in students if student.learns_concepts() and recipe.labels.source is None]
        asking = [student for student in students if student.asks_teacher()]
        if recipe.teacher.source is None and (labelled or asking):
            found.append(self._teacher_training())
        if labelled and recipe.sae.source is None:
            with torch.device("meta"):
                flops = sae_training_flops(recipe.sae, pipeline.teacher(), pipeline.sae_sizes.d_sae, recipe.block_size)
            found.append(self._made(pipeline.sae_stage, Flops(teacher=flops.teacher, sae=flops.sae)))
        kinds = {pipeline.labels_stage_of(own).name: own for own in map(recipe.labels_of, labelled)}
        found += [self._labels(own) for own in kinds.values() if not own.online]
        predicted = [student.distillation_config() for student in students]
        stored = {(each.top_k, each.temperature): each for each in predicted if each is not None and each.top_k}
        found += [self._predictions(each) for each in stored.values()]
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
        flops = Flops(teacher=per_token * training.steps() * training.tokens_per_step)
        hours = self._hours(Flops(student=flops.teacher), training)
        peak = max(peak.total for peak in memory.peaks(self.recipe.parallel, self.on.count))
        stage = self.pipeline.teacher_stage
        return PreparationPlan(stage.name, flops, hours, 0, peak, stage.is_done())

    def _labels(self, config: LabelsConfig) -> PreparationPlan:
        with torch.device("meta"):
            found = labelling_flops(self.pipeline, self.pipeline.teacher(), self.pipeline.sae(), config)
        sizes = self.recipe.block_size, config.labels_per_token, self._token_type(), self.pipeline.num_concepts
        memory = peak_of_call(lambda: self._labeller(config, self.pipeline.teacher()), self.device)
        flops = Flops(teacher=found.teacher, sae=found.sae).times(self._read_tokens())
        return self._made(self.pipeline.labels_stage_of(config), flops, features(*sizes), memory)

    def _read_tokens(self) -> int:
        """Training tokens that the teacher reads to label the corpus, in its own tokenizer."""
        stage = self.pipeline.teacher_corpus_stage
        if stage is self.pipeline.corpus_stage:
            return self.corpus_tokens
        if stage.is_done():
            return self.pipeline.teacher_corpus().info.train_blocks * self.recipe.block_size
        self.pipeline.remarks.append(
            "how many tokens the teacher's own tokenizer makes of the corpus is not known before it is packed: "
            "labeling is planned as if they were as many as the students'"
        )
        return self.corpus_tokens

    def _predictions(self, config: DistillationConfig) -> PreparationPlan:
        assert config.top_k is not None
        with torch.device("meta"):
            per_token = forward_flops_per_token(self.pipeline.teacher(), self.recipe.block_size)
        columns = prediction_columns(List(Value(self._token_type()), length=self.recipe.block_size), config.top_k)
        stage = self.pipeline.predictions_stage_of(config)
        return self._made(stage, Flops(teacher=per_token * self.corpus_tokens), columns)

    def _made(
        self, stage: Stage, flops: Flops, columns: Features | None = None, memory: int | None = None
    ) -> PreparationPlan:
        storage = 0 if columns is None else _bytes_per_row(columns) * self.corpus_tokens // self.recipe.block_size
        return PreparationPlan(stage.name, flops, self._hours(flops), storage, memory, stage.is_done())

    def _teacher_of(self, student: StudentConfig) -> Flops:
        """What teacher and SAE compute for each token of a student's training."""
        found = teacher_flops(self.pipeline, student)
        return Flops(teacher=found.teacher, sae=found.sae)

    def _hours(self, flops: Flops, training: TrainingConfig | None = None) -> float:
        """Of FLOPs of a student, in the precision of its training, and of teacher and SAE in theirs."""
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
        return student.objective(OnlineTeacher(self.pipeline, labels, self.pipeline.vocab_size))

    def _labeller_of(self, student: StudentConfig, teacher: MakeTeacher) -> Callable[[], Labeller] | None:
        """What labels the student's batches in its training, if that is done then."""
        if not student.learns_concepts() or not self.recipe.labels.online:
            return None
        return lambda: self._labeller(self.recipe.labels_of(student), teacher())

    def _labeller(self, config: LabelsConfig, teacher: PreTrainedModel) -> Labeller:
        """Labels as `ConceptExtractor` does; its choice of the A strongest weighs nothing. Logits are not built."""
        sae = self.pipeline.sae()
        head, layer = teacher.get_output_embeddings(), self.recipe.sae.teacher_layer

        def label() -> Tensor:
            ids = self._ids(self.recipe.labels.blocks_per_batch)
            if config.selection == "activation":
                return sae.encode(residual_stream(teacher, ids, layer)).values
            tapped = tapped_residual(teacher, ids, layer, head=head)
            latents = sae.encode(tapped.residual)
            return attribution_scores(latents, tapped.gradient.to(sae.W_dec.dtype), sae.W_dec)

        return label

    def _batch(self, student: StudentConfig, blocks: int) -> Batch:
        """A micro-batch of the student's columns, of zeros."""
        batch = {"input_ids": self._ids(blocks)}
        shape, distillation = batch["input_ids"].shape, student.distillation_config()
        if student.learns_concepts():
            labels = self.recipe.labels_of(student).labels_per_token
            batch["concept_ids"] = torch.zeros(*shape, labels, dtype=torch.long)
        if distillation is not None and distillation.top_k is not None:
            batch["teacher_ids"] = torch.zeros(*shape, distillation.top_k, dtype=torch.long)
            batch["teacher_log_probs"] = torch.zeros(*shape, distillation.top_k)
            batch["teacher_log_rest"] = torch.zeros(shape)
        return batch

    def _ids(self, blocks: int) -> Tensor:
        return torch.zeros(blocks, self.recipe.block_size, dtype=torch.long)

    def _token_type(self) -> str:
        return str(np.min_scalar_type(self.pipeline.vocab_size - 1))

    def _accumulates(self, training: TrainingConfig, section: str = "training") -> bool:
        """Whether a GPU has several micro-batches a step; InputError if they are not of equal size."""
        gpus, rows = self.on.count, training.blocks_per_batch
        batch = rows * self.recipe.block_size * gpus
        if training.tokens_per_step % batch:
            raise InputError(
                f"{section}.tokens_per_step is {training.tokens_per_step}; on {gpus} GPUs it must be a multiple of "
                f"blocks_per_batch × block_size × GPUs = {rows} × {self.recipe.block_size} × {gpus} = {batch}"
            )
        return training.tokens_per_step > batch

    def _corpus_tokens(self, given: int | None) -> int:
        """Training tokens of the corpus: as packed, else as given, else as published, else a guess that is said."""
        recipe, pipeline = self.recipe, self.pipeline
        if pipeline.corpus_stage.is_done():
            if given is not None:
                pipeline.remarks.append("the corpus is packed, so its tokens are known: --corpus-tokens has no effect")
            return pipeline.corpus().info.train_blocks * recipe.block_size
        if given is not None:
            return given
        published = PUBLISHED_TOKENS.get((recipe.corpus.source, str(recipe.tokenizer.source)))
        if published is not None and recipe.corpus.max_documents is None:
            return published
        pipeline.remarks.append(
            "how many tokens the corpus has is not known before it is packed: taken to be training.max_tokens; give "
            "--corpus-tokens, on which what is made once for the corpus depends"
        )
        return recipe.training.max_tokens


def _bytes_per_row(columns: Features) -> int:
    """Of an Arrow row of lists of fixed length."""

    def size(feature: List | Value) -> int:
        if isinstance(feature, List):
            return feature.length * size(feature.feature)
        return np.dtype(feature.dtype).itemsize

    return sum(size(feature) for feature in columns.values())
