"""Run a recipe's stages in order: skip what is done, go on with what was interrupted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from cocomix import making, processes
from cocomix.concepts.label_store import LabelledCorpus, check_labels, labels_fingerprint, load_labels, read_labels_info
from cocomix.concepts.sae import SparseAutoencoder
from cocomix.concepts.sae_loading import load_sae
from cocomix.concepts.teacher import freeze, teacher_fingerprint
from cocomix.console import say
from cocomix.data.packing import PackedCorpus, load_packed
from cocomix.data.tokenizer import load_tokenizer
from cocomix.errors import InputError
from cocomix.recipe import Recipe
from cocomix.stages import Made, Stage, require_unchanged


class Pipeline:
    """The stages of one recipe, in order: corpus, teacher, SAE, labels, students."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.folder = Path(recipe.output)
        self.device = torch.device(processes.device())
        self.corpus_stage = self._stage("corpus", ("corpus", "tokenizer", "block_size"), (), making.make_corpus)
        # A teacher with a tokenizer of its own reads the same documents in its own blocks.
        self.teacher_corpus_stage = self.corpus_stage
        if recipe.labels.alignment == "characters" and recipe.teacher.source is not None:
            self.teacher_corpus_stage = self._stage(
                "teacher-corpus", ("teacher", "block_size"), (self.corpus_stage,), making.make_teacher_corpus
            )
        read = self.teacher_corpus_stage
        self.teacher_stage = self._stage("teacher", ("teacher", "seed"), (read,), making.make_teacher)
        self.sae_stage = self._stage("sae", ("sae", "seed"), (read, self.teacher_stage), making.make_sae)
        # One corpus where the teacher reads the students'.
        concepts = dict.fromkeys((self.corpus_stage, read, self.teacher_stage, self.sae_stage))
        self.labels_stage = self._stage(
            "labels",
            ("labels",),
            tuple(concepts) if recipe.labels.source is None else (self.corpus_stage,),
            making.make_labels,
            together=True,
            # A given SAE is the same one at every layer, so its fingerprint does not tell.
            more={"teacher_layer": recipe.sae.teacher_layer},
        )
        self.catalog_stage = self._stage(
            "catalog", ("catalog",), (read, self.teacher_stage, self.sae_stage, self.labels_stage), making.make_catalog
        )
        self.student_stages = {name: self._student_stage(name) for name in recipe.students}

    def stages(self) -> list[Stage]:
        """What this recipe makes, in order; teacher, SAE and labels only if a student needs them."""
        concepts: list[Stage] = []
        if self.recipe.needs_labels():
            concepts = [self.labels_stage]
            if self.recipe.labels.source is None:
                concepts = self.labels_stage.with_needs()
        return list(dict.fromkeys([self.corpus_stage, *concepts, *self.student_stages.values()]))

    def stages_until(self, name: str) -> list[Stage]:
        """The stages up to `name`: corpus, teacher, sae, labels, catalog, students.

        Raises:
            InputError: none of the recipe's students needs such a stage.
        """
        stages = self.stages()
        if name == "students":
            return stages
        if name == "catalog" and self.labels_stage in stages:
            return self.catalog_stage.with_needs()
        names = [stage.name for stage in stages]
        if name not in names:
            replaced = self.recipe.needs_labels() and self.recipe.labels.source is not None
            reason = "labels.source takes its place" if replaced else "none of its students needs one"
            raise InputError(f"this recipe has no stage {name!r}: {reason}")
        return stages[: names.index(name) + 1]

    def run(self, stages: list[Stage]) -> None:
        """Make what is missing of `stages`."""
        for number, stage in enumerate(stages, 1):
            if processes.is_first():
                say(f"[{number}/{len(stages)}] {stage.name}{': done before' if stage.is_done() else ''}")
            stage.run()

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
        """The frozen teacher; InputError if it is not the one that the stage recorded."""
        source = self.recipe.teacher.source or str(self.teacher_stage.folder)
        dtype = self.recipe.teacher.dtype()
        teacher = freeze(AutoModelForCausalLM.from_pretrained(source, dtype=dtype)).to(self.device)
        require_unchanged(self.teacher_stage, teacher_fingerprint(teacher), f"the teacher {source}")
        return teacher

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

    def labels_folder(self) -> Path:
        """Where the labelled corpus is."""
        return Path(self.recipe.labels.source or self.labels_stage.folder)

    def labels(self) -> LabelledCorpus:
        """The labelled corpus; InputError if it was made from something else than the recipe's."""
        folder = self.labels_folder()
        labelled = load_labels(folder)
        if self.recipe.labels.source is not None and labelled.train is None:
            raise InputError(f"{folder} holds labels of validation text only (labels.online); label the corpus whole")
        made_here = {
            stage.name: stage.record().fingerprint
            for stage in (self.corpus_stage, self.teacher_stage, self.sae_stage)
            if stage.is_done()
        }
        if self.recipe.labels.source is not None and not self.labels_stage.is_done():
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
            labels_per_token=self.recipe.labels.labels_per_token,
            selection=self.recipe.labels.selection,
        )
        require_unchanged(self.labels_stage, labels_fingerprint(labelled.info), f"the labelled corpus {folder}")
        return labelled

    # How they are made.

    def _stage(
        self,
        name: str,
        keys: tuple[str, ...],
        needs: tuple[Stage, ...],
        make: Callable[[Pipeline], Made],
        together: bool = False,
        more: dict[str, Any] | None = None,
    ) -> Stage:
        everything = self.recipe.to_dict()
        settings = {key: everything[key] for key in keys} | (more or {})
        return Stage(name, self.folder / name, settings, needs, lambda: make(self), together)

    def _student_stage(self, name: str) -> Stage:
        student = self.recipe.students[name]
        matched = self.recipe.students.get(student.match or "")
        settings = {
            "student": dataclasses.asdict(student),
            "match": matched and dataclasses.asdict(matched),
            "backbone": dataclasses.asdict(self.recipe.backbone),
            "training": dataclasses.asdict(self.recipe.training),
            "seed": self.recipe.seed,
        }
        needs = (self.corpus_stage, self.labels_stage) if student.method == "cocomix" else (self.corpus_stage,)
        folder = self.folder / "students" / name
        return Stage(f"student {name}", folder, settings, needs, lambda: making.make_student(self, name))
