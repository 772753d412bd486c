"""Declare the stages of a recipe, and open what they have computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from cocomix.common import distributed, files, fingerprint, portable
from cocomix.common.errors import InputError
from cocomix.concepts.label_store import LabeledCorpus, check_labels, labels_fingerprint, load_labels, read_labels_info
from cocomix.concepts.labeling import EXTERNAL, LabelsConfig, fitting_blocks
from cocomix.concepts.sae import SparseAutoencoder
from cocomix.concepts.sae_loading import load_sae
from cocomix.concepts.teacher import compile_blocks, freeze, teacher_fingerprint
from cocomix.data.packing import PackedCorpus, load_packed
from cocomix.data.tokenizer import load_tokenizer
from cocomix.models.building import load_pretrained, pretrained_config
from cocomix.models.loading import load_causal_lm, load_config
from cocomix.pipeline.methods import DistillationConfig
from cocomix.pipeline.recipe import Recipe
from cocomix.pipeline.stage import Stage, require_unchanged
from cocomix.pipeline.students import StudentContext


class Pipeline:
    """The stages of one recipe, and their results.

    Args:
        recipe: the recipe.
        replicate: another replicate of it, whose corpora this one shares, because they do not depend on the seed.
    """

    def __init__(self, recipe: Recipe, replicate: Pipeline | None = None) -> None:
        self.recipe, self.replicate = recipe, replicate
        self.folder = files.located(recipe.output)
        self.device = torch.device(distributed.device())
        self._everything = recipe.to_dict()
        self._teacher: PreTrainedModel | None = None
        self._fingerprints: dict[str, str] = {}
        self.corpus_stage = self._stage("corpus", ("corpus", "tokenizer", "block_size"))
        # A teacher with another tokenizer reads the same documents, in blocks of its own tokens.
        self.teacher_corpus_stage = self.corpus_stage
        is_given = recipe.teacher.source is not None
        if recipe.labels.alignment == "characters" and is_given:
            self.teacher_corpus_stage = Stage(
                "teacher corpus",
                "teacher-corpus",
                self.folder / "teacher-corpus",
                self._settings("teacher", "block_size"),
                (self.corpus_stage,),
            )
        read = self.teacher_corpus_stage
        self.teacher_stage = Stage(
            "given teacher" if is_given else "teacher",
            "teacher",
            self.folder / "teacher",
            {**self._settings("teacher", "seed"), **self._stream_settings()},
            (read,),
        )
        self._backbone_stages: dict[str, Stage] = {}
        self.sae_stage = self._stage("sae", ("sae", "seed"), (read, self.teacher_stage))
        self._labels_stages: dict[str, Stage] = {}
        self._predictions_stages: dict[tuple[int, float], Stage] = {}
        self.losses_stage = Stage(
            "teacher losses",
            "teacher-losses",
            self.folder / "teacher-losses",
            {},
            (self.corpus_stage, self.teacher_stage),
        )
        self.labels_stage = self.labels_stage_of(recipe.labels)
        self.catalog_stage = self._stage(
            "catalog", ("catalog",), (read, self.teacher_stage, self.sae_stage, self.labels_stage)
        )
        self.student_stages: dict[tuple[str, int], Stage] = {}
        for name in sorted(recipe.students, key=lambda name: recipe.students[name].branch_from is not None):
            for seed in recipe.student_seeds():  # branches last, because they continue other students
                self.student_stages[name, seed] = self._student_stage(name, seed)

    def shared(self, stage: Stage) -> Stage | None:
        """Return the stage of the other replicate whose result `stage` links; None if it computes its own."""
        if self.replicate is None:
            return None
        pairs = {
            self.corpus_stage: self.replicate.corpus_stage,
            self.teacher_corpus_stage: self.replicate.teacher_corpus_stage,
        }
        return pairs.get(stage)

    def stages(self) -> list[Stage]:
        """Return the stages in order; of teacher, SAE, labels and predictions only those that a student needs."""
        students = self.student_stages.values()
        preparation = [before for student in students for needed in student.needs for before in needed.with_needs()]
        return list(dict.fromkeys([self.corpus_stage, *preparation, *students]))

    def students(self, only: tuple[str, ...] = ()) -> list[Stage]:
        """Return the stages of all students; or of some by name, or of one of their seeds by the folder's name.

        Raises:
            InputError: there is no such student.
        """
        names = {stage: {name, stage.folder.name} for (name, _), stage in self.student_stages.items()}
        for unknown in set(only).difference(*names.values()):
            self.recipe.require_student(unknown)
        return [stage for stage in names if not only or not names[stage].isdisjoint(only)]

    def stages_until(self, name: str) -> list[Stage]:
        """Return the stages up to a goal: corpus, teacher, sae, labels, catalog, students, or catalog and students.

        The goal `labels` includes the labels of every student and the teacher's stored predictions and losses. The goal
        `catalog and students` has the catalog before the students, if it is missing and the recipe has teacher and SAE.

        Raises:
            InputError: none of the recipe's students needs the goal.
        """
        everything = self.stages()
        if name == "students":
            return everything
        if name == "catalog and students":
            inputs = {self.teacher_stage, self.sae_stage, self.labels_stage}
            wanted = [self.catalog_stage] if inputs <= {*everything} and not self.catalog_stage.is_done() else []
            trained = [*self.student_stages.values()]
            return [*(stage for stage in everything if stage not in trained), *wanted, *trained]
        from_teacher = [*self._labels_stages.values(), *self._predictions_stages.values(), self.losses_stage]
        goals = {
            "corpus": [self.corpus_stage],
            "teacher": [self.teacher_stage],
            "sae": [self.sae_stage],
            "labels": [stage for stage in everything if stage in from_teacher],
            "catalog": [self.catalog_stage] if self.labels_stage in everything else [],
        }[name]
        if not goals or not {*goals} <= {*everything, self.catalog_stage}:
            replaced = self.recipe.needs_labels() and self.recipe.labels.source is not None
            reason = "labels.source takes its place" if replaced else "none of its students needs one"
            raise InputError(f"this recipe has no stage {name!r}: {reason}")
        return list(dict.fromkeys(needed for goal in goals for needed in goal.with_needs()))

    def corpus(self) -> PackedCorpus:
        """Open the packed corpus; InputError if it is linked to another run's, which has changed."""
        corpus = load_packed(self.corpus_stage.folder)
        require_unchanged(self.corpus_stage, corpus.info.fingerprint, f"the corpus {self.recipe.corpus.source}")
        return corpus

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer of the corpus."""
        return load_tokenizer(str(self.corpus_stage.folder / "tokenizer"))

    def teacher_corpus(self) -> PackedCorpus:
        """Open the packed corpus in the teacher's tokens."""
        return load_packed(self.teacher_corpus_stage.folder)

    def teacher_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the teacher's tokenizer."""
        return load_tokenizer(str(self.teacher_corpus_stage.folder / "tokenizer"))

    def teacher(self) -> PreTrainedModel:
        """Return the frozen teacher, loaded by the first call; InputError if it is not the one that was recorded.

        Its precision is `teacher.precision`; by default bfloat16 on a GPU, elsewhere that in which it was saved.
        """
        if self._teacher is None:
            teacher = freeze(load_causal_lm(self._teacher_source, self.recipe.teacher.dtype())).to(self.device)
            found = self._fingerprints["teacher"] = teacher_fingerprint(teacher)
            require_unchanged(self.teacher_stage, found, f"the teacher {self._teacher_source}")
            self._teacher = teacher.to(self._running_dtype() or teacher.dtype)
            if self.compiles_teacher:
                compile_blocks(self._teacher)
        return self._teacher

    @property
    def compiles_teacher(self) -> bool:
        """Whether teacher and SAE are compiled: on a GPU, in recipes that compile their students."""
        return self.device.type == "cuda" and self.recipe.training.compile

    def teacher_fingerprint(self) -> str:
        """Return the fingerprint of the teacher's weights as they were loaded, before a default precision."""
        self.teacher()
        return self._fingerprints["teacher"]

    def _running_dtype(self) -> torch.dtype | None:
        """Return the precision in which teacher and SAE run; None for that of their weights."""
        precise = self.recipe.teacher.dtype()
        if precise is None and self.device.type == "cuda" and torch.cuda.is_bf16_supported():
            return torch.bfloat16
        return precise

    @contextmanager
    def teacher_products(self) -> Iterator[None]:
        """Use TF32 within the block if the recipe asks for a float32 teacher on a GPU.

        Students train in separate stages, outside of it, because their float32 stays float32.
        """
        before = torch.backends.cuda.matmul.fp32_precision
        if self.device.type == "cuda" and self.recipe.teacher.precision == "fp32":
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        try:
            yield
        finally:
            torch.backends.cuda.matmul.fp32_precision = before

    def float32_teacher(self) -> PreTrainedModel:
        """Load the teacher in float32, to compare what a lower precision computes."""
        return freeze(load_causal_lm(self._teacher_source, torch.float32)).to(self.device)

    def release_teacher(self) -> None:
        """Free the teacher's memory; the next call of `teacher` loads it again."""
        self._teacher = None

    @property
    def _teacher_source(self) -> str | Path:
        """The recipe's source, or the stage's folder, which is unfinished while the teacher is trained."""
        folder = self.teacher_stage.folder
        is_unfinished = not folder.exists() and files.partial(folder).exists()
        return self.recipe.teacher.source or (files.partial(folder) if is_unfinished else folder)

    @cached_property
    def teacher_model_config(self) -> PretrainedConfig:
        """The teacher's configuration."""
        return load_config(self._teacher_source).get_text_config()

    @cached_property
    def teacher_shapes(self) -> PreTrainedModel:
        """The teacher on the meta device, without weights: FLOPs are counted from its shapes."""
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.teacher_model_config)

    def sae(self) -> SparseAutoencoder:
        """Load the SAE, in the precision of the teacher; InputError if it is not the one that was recorded."""
        source = self.recipe.sae.source or str(self.sae_stage.folder)
        sae = load_sae(source, self.recipe.sae.max_active)
        found = self._fingerprints["sae"] = sae.fingerprint()
        require_unchanged(self.sae_stage, found, f"the SAE {source}")
        return sae.to(self.device, self._running_dtype() or sae.W_enc.dtype)

    def float32_sae(self) -> SparseAutoencoder:
        """Load the SAE in float32."""
        source = self.recipe.sae.source or str(self.sae_stage.folder)
        return load_sae(source, self.recipe.sae.max_active).to(self.device, torch.float32)

    def sae_fingerprint(self) -> str:
        """Return the fingerprint of the SAE's weights as they were loaded, before a default precision."""
        self.sae()
        return self._fingerprints["sae"]

    def with_batch(self, config: LabelsConfig) -> LabelsConfig:
        """Return the settings with `blocks_per_batch`, chosen from the free memory of a GPU unless it is given."""
        teacher, given = self.teacher(), config.blocks_per_batch
        chosen = given or fitting_blocks(teacher.device, teacher, self.recipe.block_size)
        return dataclasses.replace(config, blocks_per_batch=chosen)

    @cached_property
    def num_concepts(self) -> int:
        """C, number of concepts (latents of the SAE); 0 if no student learns concepts."""
        if not self.recipe.needs_labels():
            return 0
        if self.recipe.labels.source is not None:
            return read_labels_info(self.labels_folder()).num_concepts
        sae = self.recipe.sae
        return load_sae(sae.source).d_sae if sae.source else sae.d_sae

    def student_context(self, vocab_size: int, eos_token_id: int) -> StudentContext:
        """Return what the students' sizes depend on; 0 for sizes that no student needs."""
        width = self.teacher_hidden_size if self.recipe.mixes_hidden_states() else 0
        return StudentContext(vocab_size, eos_token_id, self.num_concepts, width)

    @property
    def teacher_hidden_size(self) -> int:
        """d, width of the teacher's residual stream."""
        teacher = self.recipe.teacher
        return self.teacher_model_config.hidden_size if teacher.source else teacher.backbone.hidden_size

    def labels_folder(self) -> Path:
        """Return the folder of the labeled corpus."""
        return Path(self.recipe.labels.source or self.labels_stage.folder)

    def labels(self, config: LabelsConfig | None = None) -> LabeledCorpus:
        """Open the labels of the recipe or of a student; InputError if their inputs or settings differ from it."""
        config = config or self.recipe.labels
        stage = self.labels_stage_of(config)
        folder = Path(config.source or stage.folder)
        labeled = load_labels(folder)
        if self.recipe.labels.source is not None and labeled.train is None:
            raise InputError(
                f"{folder} holds labels of validation text only (labels.online); label the training text too"
            )
        inputs: dict[str, Any] = {
            stage.name: stage.record().fingerprint
            for stage in (self.corpus_stage, self.teacher_stage, self.sae_stage)
            if stage.is_done()
        }
        if self.recipe.labels.source is not None and not stage.is_done():
            # With external labels, the stages of a given teacher and SAE do not run.
            if self.recipe.teacher.source is not None:
                inputs["teacher"] = self.teacher_fingerprint()
            if self.recipe.sae.source is not None:
                inputs["sae"] = self.sae_fingerprint()
        inputs["teacher_layer"] = self.recipe.sae.teacher_layer
        if labeled.info.selection == EXTERNAL:  # of no teacher and SAE
            inputs = {name: value for name, value in inputs.items() if name == "corpus"}
        check_labels(
            labeled.info,
            folder,
            **inputs,
            labels_per_token=config.labels_per_token,
            selection=config.selection,
            offset=config.offset,
            window=config.window,
            control=config.control,
            targets=config.targets,
        )
        require_unchanged(stage, labels_fingerprint(labeled.info), f"the labeled corpus {folder}")
        return labeled

    def backbone(self, source: str) -> PreTrainedModel:
        """Load a pretrained model that students start from; InputError if it is not the one that was recorded."""
        model = load_pretrained(source, pretrained_config(source, self.recipe.block_size))
        found = fingerprint.hash_tensors(model.state_dict().items())
        require_unchanged(self.backbone_stage_of(source), found, f"the backbone {source}")
        return model

    def backbone_stage_of(self, source: str) -> Stage:
        """Return the stage that examines a pretrained model that students start from."""
        if source not in self._backbone_stages:
            number = len(self._backbone_stages)
            name = f"backbone-{number + 1}" if number else "backbone"
            self._backbone_stages[source] = Stage(
                "backbone",
                name,
                self.folder / name,
                portable.recipe_record({"source": source, "block_size": self.recipe.block_size}),
                (self.corpus_stage,),
                (source,),
            )
        return self._backbone_stages[source]

    def labels_stage_of(self, config: LabelsConfig) -> Stage:
        """Return the stage that labels the corpus with these settings, the recipe's or a student's."""
        key = config.suffix()
        if key not in self._labels_stages:
            own = config != self.recipe.labels
            name = f"labels-{key}" if own else "labels"
            if config.base() != config:
                self._labels_stages[key] = self._control_stage(name, config)
                return self._labels_stages[key]
            # The two corpora are the same if the teacher reads the students' tokens.
            concepts = dict.fromkeys((self.corpus_stage, self.teacher_corpus_stage, self.teacher_stage, self.sae_stage))
            self._labels_stages[key] = Stage(
                "labels" if config.source is None else "external labels",
                name,
                self.folder / name,
                # The layer is part of the settings: a given SAE has the same fingerprint at every layer.
                {
                    "labels": portable.recipe_record(dataclasses.asdict(config.resolved())),
                    "teacher_layer": self.recipe.sae.teacher_layer,
                },
                tuple(concepts) if config.source is None else (self.corpus_stage,),
                (config,),
            )
        return self._labels_stages[key]

    def _control_stage(self, name: str, config: LabelsConfig) -> Stage:
        """Return the stage that computes labels from other stored labels."""
        seed = {"seed": self.recipe.seed} if config.control != "none" else {}
        return Stage(
            "control labels",
            name,
            self.folder / name,
            {
                "labels": portable.recipe_record(dataclasses.asdict(config)),
                "teacher_layer": self.recipe.sae.teacher_layer,
                **seed,
            },
            (self.corpus_stage, self.labels_stage_of(config.base())),
            (config,),
        )

    def predictions_stage_of(self, config: DistillationConfig) -> Stage:
        """Return the stage that stores the teacher's predictions with these settings."""
        assert config.top_k is not None
        key = (config.top_k, config.temperature)
        if key not in self._predictions_stages:
            name = f"predictions-top-{config.top_k}-temperature-{config.temperature}"
            self._predictions_stages[key] = Stage(
                "predictions",
                name,
                self.folder / name,
                {"top_k": config.top_k, "temperature": config.temperature},
                (self.corpus_stage, self.teacher_stage),
                (config,),
            )
        return self._predictions_stages[key]

    def _stage(self, kind: str, keys: tuple[str, ...], needs: tuple[Stage, ...] = ()) -> Stage:
        """Return a stage named after its kind, whose settings are keys of the recipe."""
        return Stage(kind, kind, self.folder / kind, self._settings(*keys), needs)

    def _settings(self, *keys: str) -> dict[str, Any]:
        return {key: self._everything[key] for key in keys}

    def _stream_settings(self) -> dict[str, Any]:
        """Return the corpus settings if trainings read the corpus from its source instead of the stored blocks."""
        corpus = self.recipe.corpus
        return {} if corpus.streaming is None else {"corpus": portable.recipe_record(dataclasses.asdict(corpus))}

    def _student_stage(self, name: str, seed: int) -> Stage:
        student, everything = self.recipe.students[name], self._everything
        matched = everything["students"].get(student.match or "")
        settings = {
            # Its training settings are those of `training`, together with the recipe's.
            "student": {**everything["students"][name], "training": None},
            # Only the sizes of the matched student matter, not how it is trained.
            "match": matched and {**matched, **dict.fromkeys(("learning_rate", "training", "branch_from", "gate"))},
            "training": dataclasses.asdict(self.recipe.training_of(student)),
            "seed": seed,
            **self._stream_settings(),
        }
        needs = [self.corpus_stage]
        source = self.recipe.backbone_of(student).source
        if source is not None:
            needs.append(self.backbone_stage_of(source))
        distillation = student.distillation_config()
        if student.learns_concepts():
            needs.append(self.labels_stage_of(self.recipe.labels_of(student)))
        if distillation is not None and distillation.top_k is not None:
            needs.append(self.predictions_stage_of(distillation))
        elif distillation is not None or student.mixes_hidden_states():
            needs.append(self.teacher_stage)
            settings["teacher_layer"] = self.recipe.sae.teacher_layer
        if self.recipe.reads_losses(student):
            needs.append(self.losses_stage)
        if student.branch_from in self.recipe.students:
            needs.append(self.student_stages[student.branch_from, seed])
        label = name if self.recipe.seeds is None else f"{name}-seed-{seed}"
        folder = self.folder / "students" / label
        return Stage("student", f"student {label}", folder, settings, tuple(needs), (name, seed))
