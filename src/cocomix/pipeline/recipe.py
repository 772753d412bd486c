"""The recipe: all settings of a run, read from YAML and validated together."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch

from cocomix.catalog.building import CatalogConfig
from cocomix.common import distributed, portable, settings
from cocomix.common.errors import InputError, did_you_mean
from cocomix.common.settings import Range, Seed
from cocomix.concepts.labeling import LabelsConfig
from cocomix.concepts.sae import MAX_ACTIVE
from cocomix.concepts.sae_training import SAEConfig
from cocomix.data.corpus import CorpusConfig
from cocomix.data.tokenizer import MIN_VOCAB_SIZE, TokenizerConfig
from cocomix.models.building import BackboneConfig, default_options
from cocomix.models.checking import TRIAL_TOKENS
from cocomix.pipeline.methods import METHODS, StudentConfig, StudentLabels
from cocomix.training.config import PARALLEL, PRECISIONS, TrainingConfig


@dataclass
class TeacherConfig:
    """The model whose concepts become the labels.

    Args:
        source: Hugging Face causal language model, folder or id, to use instead of training one.
        precision: fp32 or bf16, in which teacher and SAE run. By default bf16 on a GPU, and elsewhere the precision in
            which each was saved. On a GPU, fp32 uses TF32 for matrix products,
            except in the training steps of students.
        backbone: sizes of the trained teacher. With a `source`, `cocomix plan` uses them if it cannot be reached.
        training: how the teacher is trained.
        untrained: leave the teacher at its initial weights: a control for what its training contributes to concepts.
    """

    source: str | None = None
    precision: str | None = None
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    untrained: bool = False

    def dtype(self) -> torch.dtype | None:
        """Return the dtype of the running teacher; None for the one in which it was saved."""
        return None if self.precision is None else {"fp32": torch.float32, "bf16": torch.bfloat16}[self.precision]


@dataclass
class Recipe:
    """Settings of a run, from text to compared models.

    Args:
        name: name of the run in its report.
        output: folder for all results.
        seed: seed of every random choice.
        seeds: train every student once with each of these seeds; by default only with `seed`.
        replicates: run everything this many times (teacher, SAE, labels, students), with the seeds `seed`, `seed` + 1,
            and so on, each in a folder `replicate-N` of the output; by default once.
        block_size: context length in tokens.
        corpus: source of the text.
        tokenizer: trained on the corpus, or an existing one.
        teacher: model whose concepts are learned.
        sae: sparse autoencoder that finds the concepts in the teacher.
        labels: how the corpus is labeled with concepts.
        catalog: what `cocomix concepts` shows of each concept.
        backbone: sizes of the students.
        training: how the students are trained.
        parallel: how the processes that torchrun starts share a training: ddp, fsdp or fsdp+cpu-offload.
        students: the models, by name.
    """

    name: str
    output: str
    seed: Seed = 0
    seeds: list[Seed] | None = None
    replicates: Annotated[int, Range(2, 1000)] | None = None
    block_size: Annotated[int, Range(TRIAL_TOKENS, 2**20)] = 256
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    sae: SAEConfig = field(default_factory=SAEConfig)
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    catalog: CatalogConfig = field(default_factory=CatalogConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallel: str = "ddp"
    students: dict[str, StudentConfig] = field(default_factory=dict)

    def student_seeds(self) -> list[int]:
        """Return the seeds that every student is trained with."""
        return [self.seed] if self.seeds is None else self.seeds

    def replicated(self) -> list[Recipe]:
        """Return the recipe of each replicate, a complete recipe with its own seed and output folder.

        Raises:
            InputError: the recipe has replicates and cannot work.
        """
        if self.replicates is None:
            return [self]
        if problems := self.problems():
            raise InputError("\n".join(problems))
        return [
            dataclasses.replace(
                self, replicates=None, seed=self.seed + number, output=f"{self.output}/replicate-{number}"
            )
            for number in range(self.replicates)
        ]

    def require_student(self, name: str) -> None:
        """Raise InputError if there is no student of that name."""
        if name not in self.students:
            known, hint = ", ".join(self.students), did_you_mean(name, self.students)
            raise InputError(f"--only is {name!r}; the recipe's students are {known}{hint}")

    def require_known_methods(self) -> None:
        """Raise InputError if a student's method is unknown."""
        if unknown := self._unknown_methods():
            raise InputError("\n".join(unknown))

    def needs_labels(self) -> bool:
        """Return whether any student learns concepts."""
        return any(student.learns_concepts() for student in self.students.values())

    def asks_teacher(self) -> bool:
        """Return whether any student learns from the teacher's predictions, losses or hidden states."""
        return any(student.asks_teacher() for student in self.students.values())

    def mixes_hidden_states(self) -> bool:
        """Return whether any student predicts the teacher's hidden states."""
        return any(student.mixes_hidden_states() for student in self.students.values())

    def needs_teacher(self) -> bool:
        """Return whether a teacher is needed."""
        return self.asks_teacher() or (self.needs_labels() and self.labels.source is None)

    def trains_teacher(self) -> bool:
        """Return whether a teacher is trained from scratch."""
        return self.needs_teacher() and self.teacher.source is None

    def runs_teacher(self, student: StudentConfig) -> bool:
        """Return whether the teacher runs in every training step of a student."""
        distillation = student.distillation_config()
        return (
            (distillation is not None and distillation.top_k is None)
            or student.mixes_hidden_states()
            or (student.learns_concepts() and self.labels.online)
        )

    def reads_losses(self, student: StudentConfig) -> bool:
        """Return whether a student reads stored losses of the teacher."""
        return student.gate is not None and not self.runs_teacher(student)

    def backbone_of(self, student: StudentConfig) -> BackboneConfig:
        """Return the sizes of a student before widening, or the source of its pretrained weights."""
        return student.backbone or self.backbone

    def training_of(self, student: StudentConfig) -> TrainingConfig:
        """Return the training settings of a student."""
        rate = {} if student.learning_rate is None else {"learning_rate": student.learning_rate}
        return dataclasses.replace(self.training, **{**(student.training or {}), **rate})

    def branch_steps(self, name: str) -> list[int]:
        """Return the steps of a student after which others continue its training."""
        branches = [student for student in self.students.values() if student.branch_from == name]
        return sorted({self.training_of(student).decay_start() for student in branches})

    def trainings(self) -> dict[str, TrainingConfig]:
        """Return the training settings of the students, by the recipe keys that decide them."""
        own = {f"students.{name}.training": each for name, each in self.students.items() if each.training}
        shared = {"training": self.training} if len(own) < len(self.students) else {}
        return {**shared, **{key: self.training_of(student) for key, student in own.items()}}

    def labels_of(self, student: StudentConfig) -> LabelsConfig:
        """Return the label settings of a student."""
        own = {} if student.labels is None else dataclasses.asdict(student.labels)
        return dataclasses.replace(self.labels, **{key: value for key, value in own.items() if value is not None})

    def problems(self) -> list[str]:
        """Return a line for each setting that cannot work. No file is opened."""
        if out_of_range := settings.problems(self):
            return out_of_range
        if unknown := self._unknown_methods():  # the other checks need the methods
            return unknown
        return self.training_problems() + self._other_problems()

    def training_problems(self) -> list[str]:
        """Return a line for each setting of a training that cannot work; the models do not depend on them."""
        found: list[str] = []
        trainings = self.trainings() | ({"teacher.training": self.teacher.training} if self.trains_teacher() else {})
        for key, training in trainings.items():
            found += [f"{key}.{line}" for line in training.problems(self.block_size)]
            if training.optimizer == "muon" and self.parallel != "ddp":
                found.append(f"{key}.optimizer is 'muon', which needs complete matrices; set parallel to ddp")
        return found

    def _other_problems(self) -> list[str]:
        found = self._parallel_problems()
        if self.teacher.untrained and self.teacher.source is not None:
            found.append(
                "teacher.untrained has no effect on teacher.source, which has its weights; leave one of them out"
            )
        if self.needs_teacher() and self.teacher.precision not in (None, *PRECISIONS):
            found.append(f"teacher.precision is {self.teacher.precision!r}; expected {' or '.join(PRECISIONS)}")
        if self.asks_teacher() and self.labels.alignment == "characters" and self.teacher.source is not None:
            found.append(
                "labels.alignment is 'characters', but a student that learns from the teacher itself (kd, gate, "
                "hidden_states) needs a teacher that reads its tokens; leave it out, or set labels.alignment to tokens"
            )
        found += [f"{key}.{line}" for key, sizes in self._built_backbones().items() for line in sizes.problems()]
        found += self._streaming_problems()
        if self.teacher.backbone.source is not None:
            found.append("teacher.backbone.source has no effect; set teacher.source to use that model as the teacher")
        if self.needs_labels():
            found += self._label_problems(self.labels)
            if self.labels.source is None and self.sae.source is None:
                found += self.sae.problems()
        if self.tokenizer.source is None and self.tokenizer.vocab_size < MIN_VOCAB_SIZE:
            found.append(
                f"tokenizer.vocab_size is {self.tokenizer.vocab_size}; expected {MIN_VOCAB_SIZE} or more, "
                "for the 256 bytes and end-of-text"
            )
        if self.seeds is not None and (not self.seeds or len(set(self.seeds)) < len(self.seeds)):
            found.append(f"seeds is {self.seeds}; give one or more, each once, or leave it out")
        if self.replicates is not None and self.seeds is not None:
            found.append("replicates has its own seeds, one for each; leave seeds out")
        if not self.students:
            found.append("students is empty; name at least one, e.g. students: {ntp: {method: ntp}}")
        for name, student in self.students.items():
            lines = (
                student.problems()
                + self._unused_weights(student)
                + self._match_problems(name, student)
                + self._start_problems(student)
                + self._branch_problems(name, student)
            )
            if not name.replace("-", "").replace("_", "").isalnum():
                lines.insert(0, "a name may contain letters, digits, - and _ only, because it becomes a folder")
            if student.labels is not None and student.learns_concepts():
                lines += self._label_problems(self.labels_of(student))
            if self.labels.source is not None and self.labels_of(student) != self.labels:
                lines.append("labels has no effect with labels.source, which is labeled already; leave one of them out")
            found += [f"students.{name}: {line}" for line in lines]
        return found

    def _label_problems(self, labels: LabelsConfig) -> list[str]:
        found = labels.problems()
        if labels.offset >= self.block_size:
            found.append(f"labels.offset is {labels.offset}, in blocks of {self.block_size} tokens; give less")
        return found

    def _unknown_methods(self) -> list[str]:
        return [
            f"students.{name}: method is {student.method!r}; expected one of {', '.join(METHODS)}"
            + did_you_mean(student.method, METHODS)
            for name, student in self.students.items()
            if student.method not in METHODS
        ]

    def _built_backbones(self) -> dict[str, BackboneConfig]:
        """Return the backbones that models are built from, by their keys."""
        found = {f"students.{name}.backbone": each.backbone for name, each in self.students.items()}
        shared = {
            "backbone": self.backbone,
            "teacher.backbone": self.teacher.backbone if self.trains_teacher() else None,
        }
        return {key: sizes for key, sizes in {**shared, **found}.items() if sizes is not None}

    def _streaming_problems(self) -> list[str]:
        """Return a line for each setting that needs stored blocks although the corpus is streamed."""
        if self.corpus.streaming is None:
            return []
        found = []
        if self.needs_labels() and not self.labels.online:
            found.append(
                "corpus.streaming stores no training blocks, so no labels of them either; set labels.online to true"
            )
        for name, student in self.students.items():
            distillation = student.distillation_config()
            if distillation is not None and distillation.top_k is not None:
                found.append(
                    f"students.{name}: corpus.streaming stores no training blocks, so no predictions for them either; "
                    "leave distillation.top_k out"
                )
        return found

    def _parallel_problems(self) -> list[str]:
        if self.parallel not in PARALLEL:
            hint = did_you_mean(self.parallel, PARALLEL)
            return [f"parallel is {self.parallel!r}; expected one of {', '.join(PARALLEL)}{hint}"]
        if self.parallel == "fsdp+cpu-offload" and distributed.world_size() > 1 and not torch.cuda.is_available():
            return ["parallel is 'fsdp+cpu-offload', but there is no GPU from which to offload; use fsdp"]
        return []

    def _unused_weights(self, student: StudentConfig) -> list[str]:
        """Return why ddp would wait for gradients that a scheduled loss does not give, one line at most."""
        mixer = student.mixer
        if not student.mixes_hidden_states() or mixer is None or mixer.concept_loss_schedule is None:
            return []
        if mixer.mixing != "none" or self.parallel != "ddp" or distributed.world_size() == 1:
            return []
        return [
            "mixer.concept_loss_schedule with content hidden_states and mixing none leaves weights without gradients, "
            "which several processes with parallel ddp do not support; use fsdp, or one process"
        ]

    def _match_problems(self, name: str, student: StudentConfig) -> list[str]:
        if student.match is None:
            return []
        if student.match == name or student.match not in self.students:
            others = ", ".join(other for other in self.students if other != name)
            return [f"match is {student.match!r}; expected another student ({others})"]
        if self.students[student.match].match is not None:
            return [f"match is {student.match!r}, which is matched to another itself; match that one"]
        return []

    def _branch_problems(self, name: str, student: StudentConfig) -> list[str]:
        """Return why a student cannot continue the training of another, one line at most."""
        if student.branch_from is None:
            return []
        parent = self.students.get(student.branch_from)
        if parent is None or parent is student or parent.branch_from is not None:
            others = [other for other, each in self.students.items() if other != name and each.branch_from is None]
            known = ", ".join(others)
            return [f"branch_from is {student.branch_from!r}; expected another student, not a branch: {known}"]
        own, other = self.training_of(student), self.training_of(parent)
        if (own.schedule, other.schedule) != ("wsd", "wsd"):
            return [f"branch_from needs the schedule wsd for {name} and {student.branch_from}; set training.schedule"]
        bare = dataclasses.replace(parent, training=None, learning_rate=None)
        if dataclasses.replace(student, branch_from=None, training=None, learning_rate=None) != bare:
            return [f"a branch has the settings of {student.branch_from}, except for its training; make them equal"]
        if _shared_settings(own) != _shared_settings(other):
            free = ", ".join(FREE_IN_BRANCHES)
            return [f"the training of a branch differs from that of {student.branch_from} in {free} at most"]
        if _is_scheduled(student):
            return ["branch_from does not fit a scheduled weight, which depends on the length of the training"]
        start, low, high = own.decay_start(), max(own.warmup_steps(), other.warmup_steps(), 1), other.decay_start()
        if not low <= start <= high:
            size = own.tokens_per_step
            return [
                f"the decay begins after {start * size:,} tokens, outside the stable phase of {student.branch_from}, "
                f"{low * size:,} to {high * size:,} tokens; change max_tokens or decay_ratio"
            ]
        return []

    def _start_problems(self, student: StudentConfig) -> list[str]:
        """Return why a student cannot start from the pretrained weights that it names, a line each."""
        found = []
        if student.match is not None:
            found.append("match has no effect with backbone.source, whose sizes are given; leave one of them out")
        if student.future_tokens() is not None:
            found.append(
                f"the method {student.method} cannot start from backbone.source, because its first head leaves out the "
                "last blocks; give the student its own backbone"
            )
        return found if self.backbone_of(student).source is not None else []

    def resolved(self) -> Recipe:
        """Return the recipe with every default of students, SAE and teacher filled in."""
        teacher = self.teacher
        if teacher.source is None:
            teacher = dataclasses.replace(
                teacher, backbone=_with_options(teacher.backbone), precision=teacher.precision or "fp32"
            )
        return dataclasses.replace(
            self,
            teacher=teacher,
            sae=dataclasses.replace(
                self.sae, max_active=self.sae.max_active or MAX_ACTIVE, learning_rate=self.sae.rate()
            ),
            labels=self.labels.resolved(),
            students={name: self._resolved_student(student) for name, student in self.students.items()},
        )

    def _resolved_student(self, student: StudentConfig) -> StudentConfig:
        if student.method not in METHODS:  # `problems` reports it
            return student
        labels, backbone, mixer = self.labels_of(student), self.backbone_of(student), student.mixer_config()
        own_labels = StudentLabels(
            **{each.name: getattr(labels, each.name) for each in dataclasses.fields(StudentLabels)}
        )
        if mixer is not None and backbone.source is not None:
            mixer = mixer.for_pretrained()
        return dataclasses.replace(
            student,
            backbone=_with_options(backbone, widened=student.match is not None),
            mixer=mixer or student.mixer,
            labels=own_labels if student.learns_concepts() else student.labels,
            distillation=student.distillation_config(),
            num_future_tokens=student.future_tokens() or student.num_future_tokens,
            learning_rate=self.training_of(student).learning_rate,
            training={key: value for key, value in (student.training or {}).items() if key != "learning_rate"} or None,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the resolved recipe as nested dictionaries for records; the home folder is written as `~`."""
        return portable.recipe_record(_without_sizes(dataclasses.asdict(self.resolved())))


FREE_IN_BRANCHES = ("max_tokens", "decay_ratio", "min_learning_rate_ratio")
"""Keys of `training` in which a branch may differ from the training that it continues."""


def _shared_settings(training: TrainingConfig) -> TrainingConfig:
    defaults = TrainingConfig()
    return dataclasses.replace(training, **{key: getattr(defaults, key) for key in FREE_IN_BRANCHES})


def _is_scheduled(student: StudentConfig) -> bool:
    """Return whether the weight of a loss changes during training."""
    mixer, distillation = student.mixer_config(), student.distillation_config()
    return (mixer is not None and mixer.concept_loss_schedule is not None) or (
        distillation is not None and distillation.weight_schedule is not None
    )


def _without_sizes(record: dict[str, Any]) -> dict[str, Any]:
    """Drop the sizes of every backbone that has a source, which defines them."""
    if "model_type" in record and record["source"] is not None:
        return {"source": record["source"]}
    return {key: _without_sizes(value) if isinstance(value, dict) else value for key, value in record.items()}


def _with_options(sizes: BackboneConfig, widened: bool = False) -> BackboneConfig:
    if sizes.source is not None:
        return sizes
    return dataclasses.replace(sizes, options={**default_options(sizes, widened), **sizes.options})
