"""Where a trained model's concepts came from: the labels, teacher and SAE of its run, opened again and checked."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cocomix.concepts.alignment import bos_of
from cocomix.concepts.label_store import LabelledCorpus, labels_fingerprint
from cocomix.concepts.sae import SparseAutoencoder
from cocomix.concepts.teacher import teacher_fingerprint
from cocomix.data.tokenizer import load_tokenizer
from cocomix.errors import InputError
from cocomix.pipeline import Pipeline
from cocomix.recipe import recipe_of_run
from cocomix.training.run import Run


class Origins:
    """What the run in OUTPUT/students/NAME learnt concepts from: of OUTPUT, or where its recipe says.

    Args:
        folder: of the run.
        run: its `run.json`.

    Raises:
        InputError: everywhere: something is not there any more, or is not what the run was made from.
    """

    def __init__(self, folder: Path, run: Run) -> None:
        recipe = recipe_of_run(run.recipe, folder)
        if run.name not in recipe.students or not recipe.students[run.name].learns_concepts():
            raise InputError(f"the model in {folder} learnt no concepts, but by {run.method}; give a run of cocomix")
        self.folder = folder
        self.run = run
        self.student = recipe.students[run.name]
        self.pipeline = Pipeline(dataclasses.replace(recipe, output=str(folder.resolve().parents[1])))

    @property
    def teacher_layer(self) -> int:
        """The tapped block."""
        return self.pipeline.recipe.sae.teacher_layer

    @property
    def has_teacher(self) -> bool:
        """Whether the recipe says where teacher and SAE are; with labels made elsewhere, it need not."""
        recipe = self.pipeline.recipe
        return recipe.labels.source is None or (recipe.teacher.source is not None and recipe.sae.source is not None)

    def labels(self) -> LabelledCorpus:
        """The labels that it learnt."""
        labelled = self.pipeline.labels(self.pipeline.recipe.labels_of(self.student))
        self._check("labels", labels_fingerprint(labelled.info))
        return labelled

    def teacher(self) -> PreTrainedModel:
        """The teacher, frozen."""
        try:
            teacher = self.pipeline.teacher()
        except InputError as error:
            raise InputError(f"the teacher of {self.folder}: {error}") from None
        self._check("teacher", teacher_fingerprint(teacher))
        return teacher

    def sae(self) -> SparseAutoencoder:
        """The SAE whose latents the concepts are."""
        sae = self.pipeline.sae()
        self._check("sae", sae.fingerprint())
        return sae

    def teacher_tokenizer(self) -> PreTrainedTokenizerBase:
        """What the teacher reads text with."""
        if self.pipeline.teacher_corpus_stage is self.pipeline.corpus_stage:
            return load_tokenizer(str(self.folder))
        return load_tokenizer(str(self.pipeline.recipe.teacher.source))

    def beginning(self) -> list[int]:
        """The tokens that the teacher read before each text when it was labelled: a bos token, or nothing."""
        same = self.pipeline.recipe.labels.alignment == "tokens"
        return [] if same else bos_of(self.teacher_tokenizer())

    def _check(self, what: str, found: str) -> None:
        """Raise InputError unless it is what the run was made from, as far as that is on record."""
        recorded = self.run.preparation.get(what, {}).get("fingerprint")
        if recorded is None and what != "labels":  # labels made elsewhere say what they were made from
            recorded = getattr(self.labels().info, what)
        if recorded is not None and recorded != found:
            raise InputError(
                f"the {what} of {self.folder} in {self.pipeline.folder}, or where its recipe says, changed since it "
                "was trained; put the old one back, or train it anew"
            )
