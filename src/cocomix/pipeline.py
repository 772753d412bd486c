"""Run a recipe's stages in order: skip what is done, go on with what was interrupted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from cocomix import files, fingerprint, making, portable, processes
from cocomix.concepts.label_store import LabelledCorpus, check_labels, labels_fingerprint, load_labels, read_labels_info
from cocomix.concepts.labelling import LabelsConfig
from cocomix.concepts.sae import SparseAutoencoder
from cocomix.concepts.sae_loading import load_sae
from cocomix.concepts.teacher import freeze, teacher_fingerprint
from cocomix.console import say
from cocomix.data.packing import PackedCorpus, load_packed
from cocomix.data.tokenizer import load_tokenizer
from cocomix.errors import InputError
from cocomix.methods import DistillationConfig
from cocomix.models.building import load_pretrained, pretrained_config
from cocomix.models.loading import load_causal_lm, load_config
from cocomix.recipe import Recipe
from cocomix.stages import Made, Stage, require_unchanged
from cocomix.students import StudentContext


class Pipeline:
    """The stages of one recipe, in order: corpus, teacher, SAE, labels, students."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.folder = files.located(recipe.output)
        self.device = torch.device(processes.device())
        self._teacher: PreTrainedModel | None = None
        self.corpus_stage = self._stage(
            "corpus", ("corpus", "tokenizer", "block_size"), (), making.make_corpus, resumes=False
        )
        # A teacher with a tokenizer of its own reads the same documents in its own blocks.
        self.teacher_corpus_stage = self.corpus_stage
        if recipe.labels.alignment == "characters" and recipe.teacher.source is not None:
            self.teacher_corpus_stage = self._stage(
                "teacher-corpus", ("teacher", "block_size"), (self.corpus_stage,), making.make_teacher_corpus
            )
        read = self.teacher_corpus_stage
        self.teacher_stage = self._stage("teacher", ("teacher", "seed"), (read,), making.make_teacher, together=True)
        self._backbone_stages: dict[str, Stage] = {}
        self.sae_stage = self._stage("sae", ("sae", "seed"), (read, self.teacher_stage), making.make_sae)
        self._labels_stages: dict[tuple[str, int], Stage] = {}
        self._predictions_stages: dict[tuple[int, float], Stage] = {}
        self.labels_stage = self.labels_stage_of(recipe.labels)
        self.catalog_stage = self._stage(
            "catalog", ("catalog",), (read, self.teacher_stage, self.sae_stage, self.labels_stage), making.make_catalog
        )
        self.student_stages = {
            (name, seed): self._student_stage(name, seed) for name in recipe.students for seed in recipe.student_seeds()
        }

    def stages(self) -> list[Stage]:
        """What this recipe makes, in order; of teacher, SAE, labels and predictions only what a student needs."""
        students = self.student_stages.values()
        preparation = [before for student in students for needed in student.needs for before in needed.with_needs()]
        return list(dict.fromkeys([self.corpus_stage, *preparation, *students]))

    def stages_until(self, name: str) -> list[Stage]:
        """What has to be made for `name`: corpus, teacher, sae, labels, catalog or students.

        What the teacher says of the corpus, labels of every kind and predictions, goes by the name of labels.

        Raises:
            InputError: none of the recipe's students needs it.
        """
        everything = self.stages()
        if name == "students":
            return everything
        said_by_teacher = [*self._labels_stages.values(), *self._predictions_stages.values()]
        goals = {
            "corpus": [self.corpus_stage],
            "teacher": [self.teacher_stage],
            "sae": [self.sae_stage],
            "labels": [stage for stage in everything if stage in said_by_teacher],
            "catalog": [self.catalog_stage] if self.labels_stage in everything else [],
        }[name]
        if not goals or not {*goals} <= {*everything, self.catalog_stage}:
            replaced = self.recipe.needs_labels() and self.recipe.labels.source is not None
            reason = "labels.source takes its place" if replaced else "none of its students needs one"
            raise InputError(f"this recipe has no stage {name!r}: {reason}")
        return list(dict.fromkeys(needed for goal in goals for needed in goal.with_needs()))

    def run(self, stages: list[Stage]) -> None:
        """Make what is missing of `stages`; the teacher is in memory only from its first use to its last."""
        alone = {
            stage
            for (name, _), stage in self.student_stages.items()
            if not self.recipe.runs_teacher(self.recipe.students[name])
        }
        for number, stage in enumerate(stages, 1):
            if processes.is_first():
                say(f"[{number}/{len(stages)}] {stage.name}{': done before' if stage.is_done() else ''}")
            if stage in alone:
                self._teacher = None
            stage.run()
        self._teacher = None

    # What each stage leaves, opened again.

    def corpus(self) -> PackedCorpus:
        """The packed corpus."""
        return load_packed(self.corpus_stage.folder)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the corpus."""
        return load_tokenizer(str(self.corpus_stage.folder / "tokenizer"))

    def teacher_corpus(self) -> PackedCorpus:
        """The packed corpus in the teacher's tokens."""
        return load_packed(self.teacher_corpus_stage.folder)

    def teacher_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the teacher's corpus."""
        return load_tokenizer(str(self.teacher_corpus_stage.folder / "tokenizer"))

    def teacher(self) -> PreTrainedModel:
        """The frozen teacher, loaded at the first call; InputError if it is not the one that the stage recorded."""
        if self._teacher is None:
            teacher = freeze(load_causal_lm(self._teacher_source, self.recipe.teacher.dtype())).to(self.device)
            require_unchanged(self.teacher_stage, teacher_fingerprint(teacher), f"the teacher {self._teacher_source}")
            self._teacher = teacher
        return self._teacher

    @property
    def _teacher_source(self) -> str | Path:
        """Where the teacher is: the recipe's source, or the stage's folder under the name that it has by now."""
        folder = self.teacher_stage.folder
        is_being_made = not folder.exists() and files.partial(folder).exists()
        return self.recipe.teacher.source or (files.partial(folder) if is_being_made else folder)

    @cached_property
    def teacher_model_config(self) -> PretrainedConfig:
        """The teacher's configuration."""
        return load_config(self._teacher_source).get_text_config()

    @cached_property
    def teacher_shapes(self) -> PreTrainedModel:
        """The teacher on the meta device: its shapes, from which FLOPs are counted, without its weights."""
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.teacher_model_config)

    def sae(self) -> SparseAutoencoder:
        """The SAE; InputError if it is not the one that the stage recorded."""
        source = self.recipe.sae.source or str(self.sae_stage.folder)
        sae = load_sae(source, self.recipe.sae.max_active)
        require_unchanged(self.sae_stage, sae.fingerprint(), f"the SAE {source}")
        return sae.to(self.device)

    @cached_property
    def num_concepts(self) -> int:
        """C, the concepts of the labels: latents of the SAE; 0 if no student needs any."""
        if not self.recipe.needs_labels():
            return 0
        if self.recipe.labels.source is not None:
            return read_labels_info(self.labels_folder()).num_concepts
        sae = self.recipe.sae
        return load_sae(sae.source).d_sae if sae.source else sae.d_sae

    def student_context(self, vocab_size: int, eos_token_id: int) -> StudentContext:
        """What students' sizes depend on; 0 for what none of them needs."""
        width = self.teacher_hidden_size if self.recipe.mixes_hidden_states() else 0
        return StudentContext(vocab_size, eos_token_id, self.num_concepts, width)

    @property
    def teacher_hidden_size(self) -> int:
        """d, width of the teacher's residual stream."""
        teacher = self.recipe.teacher
        return self.teacher_model_config.hidden_size if teacher.source else teacher.backbone.hidden_size

    def labels_folder(self) -> Path:
        """Where the labelled corpus is."""
        return Path(self.recipe.labels.source or self.labels_stage.folder)

    def labels(self, config: LabelsConfig | None = None) -> LabelledCorpus:
        """The recipe's labelled corpus, or a student's; InputError if it was made from something else."""
        config = config or self.recipe.labels
        stage = self.labels_stage_of(config)
        folder = Path(config.source or stage.folder)
        labelled = load_labels(folder)
        if self.recipe.labels.source is not None and labelled.train is None:
            raise InputError(f"{folder} holds labels of validation text only (labels.online); label the corpus whole")
        made_here = {
            stage.name: stage.record().fingerprint
            for stage in (self.corpus_stage, self.teacher_stage, self.sae_stage)
            if stage.is_done()
        }
        if self.recipe.labels.source is not None and not stage.is_done():
            # The stages of what the recipe names are not run then.
            if self.recipe.teacher.source is not None:
                made_here["teacher"] = teacher_fingerprint(self.teacher())
            if self.recipe.sae.source is not None:
                made_here["sae"] = self.sae().fingerprint()
        check_labels(
            labelled.info,
            folder,
            **made_here,
            teacher_layer=self.recipe.sae.teacher_layer,
            labels_per_token=config.labels_per_token,
            selection=config.selection,
        )
        require_unchanged(stage, labels_fingerprint(labelled.info), f"the labelled corpus {folder}")
        return labelled

    def backbone(self, source: str) -> PreTrainedModel:
        """A pretrained model from which students start; InputError if it is not the one that the stage recorded."""
        model = load_pretrained(source, pretrained_config(source, self.recipe.block_size))
        found = fingerprint.of_tensors(model.state_dict().items())
        require_unchanged(self.backbone_stage_of(source), found, f"the backbone {source}")
        return model

    # How they are made.

    def backbone_stage_of(self, source: str) -> Stage:
        """The look at pretrained weights from which students start."""
        if source not in self._backbone_stages:
            number = len(self._backbone_stages)
            name = f"backbone-{number + 1}" if number else "backbone"
            self._backbone_stages[source] = Stage(
                name,
                self.folder / name,
                portable.recipe_record({"source": source, "block_size": self.recipe.block_size}),
                (self.corpus_stage,),
                lambda: making.make_backbone(self, source),
            )
        return self._backbone_stages[source]

    def labels_stage_of(self, config: LabelsConfig) -> Stage:
        """The labelling with these settings: the recipe's, or a student's own."""
        key = (config.selection, config.labels_per_token)
        if key not in self._labels_stages:
            own = config != self.recipe.labels
            name = f"labels-{config.selection}-{config.labels_per_token}" if own else "labels"
            # One corpus where the teacher reads the students'.
            concepts = dict.fromkeys((self.corpus_stage, self.teacher_corpus_stage, self.teacher_stage, self.sae_stage))
            self._labels_stages[key] = Stage(
                name,
                self.folder / name,
                # A given SAE is the same one at every layer, so its fingerprint does not tell.
                {
                    "labels": portable.recipe_record(dataclasses.asdict(config)),
                    "teacher_layer": self.recipe.sae.teacher_layer,
                },
                tuple(concepts) if config.source is None else (self.corpus_stage,),
                lambda: making.make_labels(self, config),
                together=True,
                repair=None if config.source else lambda: making.repair_labels(self, config),
            )
        return self._labels_stages[key]

    def predictions_stage_of(self, config: DistillationConfig) -> Stage:
        """The teacher's stored predictions of that temperature and number."""
        assert config.top_k is not None
        key = (config.top_k, config.temperature)
        if key not in self._predictions_stages:
            name = f"predictions-top-{config.top_k}-temperature-{config.temperature}"
            self._predictions_stages[key] = Stage(
                name,
                self.folder / name,
                {"top_k": config.top_k, "temperature": config.temperature},
                (self.corpus_stage, self.teacher_stage),
                lambda: making.make_predictions(self, config),
                together=True,
                repair=lambda: making.repair_predictions(self, config),
            )
        return self._predictions_stages[key]

    def _stage(
        self,
        name: str,
        keys: tuple[str, ...],
        needs: tuple[Stage, ...],
        make: Callable[[Pipeline], Made],
        resumes: bool = True,
        together: bool = False,
    ) -> Stage:
        everything = self.recipe.to_dict()
        settings = {key: everything[key] for key in keys}
        if name == "teacher":
            settings |= self._stream_settings()
        return Stage(name, self.folder / name, settings, needs, lambda: make(self), resumes, together)

    def _stream_settings(self) -> dict[str, Any]:
        """What a training depends on, beside the stored sample, where it reads the corpus itself."""
        corpus = self.recipe.corpus
        return {} if corpus.streaming is None else {"corpus": portable.recipe_record(dataclasses.asdict(corpus))}

    def _student_stage(self, name: str, seed: int) -> Stage:
        student, everything = self.recipe.students[name], self.recipe.to_dict()
        matched = everything["students"].get(student.match or "")
        settings = {
            "student": everything["students"][name],
            # Its sizes are taken over; how it is trained is its own affair.
            "match": matched and {**matched, "learning_rate": None},
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
        elif student.asks_teacher():
            needs.append(self.teacher_stage)
            settings["teacher_layer"] = self.recipe.sae.teacher_layer
        called = name if self.recipe.seeds is None else f"{name}-seed-{seed}"
        folder = self.folder / "students" / called
        return Stage(
            f"student {called}",
            folder,
            settings,
            tuple(needs),
            lambda: making.make_student(self, name, seed),
            together=True,
        )
