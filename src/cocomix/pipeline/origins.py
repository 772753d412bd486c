"""Reopen what a finished run learned its concepts from: labels, teacher and SAE, verified against the run's record."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cocomix.common.errors import InputError
from cocomix.concepts.alignment import leading_bos
from cocomix.concepts.label_store import LabeledCorpus, labels_fingerprint
from cocomix.concepts.reading import SameTokens
from cocomix.concepts.sae import SparseAutoencoder
from cocomix.data.tokenizer import load_tokenizer
from cocomix.inspection.runs import OpenRun
from cocomix.pipeline.artifacts import Pipeline
from cocomix.pipeline.recipe_file import recipe_of_run
from cocomix.training.run import RUN_FILE, output_folder


class ConceptSource(NamedTuple):
    """The teacher and SAE that define a run's concepts, and what the teacher reads.

    Attributes:
        teacher: frozen teacher.
        sae: SAE whose latents are the concepts.
        layer: number of the teacher's block whose output the SAE encodes.
        tokenizer: the teacher's tokenizer.
        prefix: token ids that the teacher reads before each text: a bos token, or nothing.
        validation: blocks of validation text in the teacher's tokens.
        blocks_per_batch: blocks that the teacher reads at once.
    """

    teacher: PreTrainedModel
    sae: SparseAutoencoder
    layer: int
    tokenizer: PreTrainedTokenizerBase
    prefix: list[int]
    validation: SameTokens
    blocks_per_batch: int


def learned_labels(run: OpenRun) -> LabeledCorpus:
    """Open the labels that a run learned.

    Raises:
        InputError: the run learned no concepts, or its labels are gone or have changed.
    """
    return _labels(run, _pipeline(run))


def concept_source(run: OpenRun) -> ConceptSource | None:
    """Load the teacher and SAE of a run; None if its labels came ready-made and its recipe names neither.

    Raises:
        InputError: the run learned no concepts, or its teacher, SAE or corpus is gone or has changed.
    """
    pipeline = _pipeline(run)
    recipe = pipeline.recipe
    if recipe.labels.source is not None and None in (recipe.teacher.source, recipe.sae.source):
        return None
    try:
        teacher = pipeline.teacher()
    except InputError as error:
        raise InputError(f"the teacher of {run.folder}: {error}") from None
    _check(run, pipeline, "teacher", pipeline.teacher_fingerprint())
    sae = pipeline.sae()
    _check(run, pipeline, "sae", pipeline.sae_fingerprint())
    if pipeline.teacher_corpus_stage is pipeline.corpus_stage:
        tokenizer = run.tokenizer
    else:
        tokenizer = load_tokenizer(str(recipe.teacher.source))
    return ConceptSource(
        teacher=teacher,
        sae=sae,
        layer=recipe.sae.teacher_layer,
        tokenizer=tokenizer,
        prefix=[] if recipe.labels.alignment == "tokens" else leading_bos(tokenizer),
        validation=SameTokens(pipeline.teacher_corpus().validation, tokenizer),
        blocks_per_batch=recipe.labels.batch(),
    )


def _pipeline(run: OpenRun) -> Pipeline:
    """Return the pipeline of the run's recipe, with the output folder in which the run now lies."""
    if run.record is None:
        raise InputError(f"no finished run in {run.folder}: it has no {RUN_FILE}; give a run of method cocomix")
    recipe = recipe_of_run(run.record.recipe, run.folder)
    student = recipe.students.get(run.record.name)
    if student is None or not student.learns_concepts():
        raise InputError(
            f"the model in {run.folder} learned no concepts: its method is {run.record.method}; give a run of method "
            "cocomix"
        )
    return Pipeline(dataclasses.replace(recipe, output=str(output_folder(run.folder))))


def _labels(run: OpenRun, pipeline: Pipeline) -> LabeledCorpus:
    assert run.record is not None
    config = pipeline.recipe.labels_of(pipeline.recipe.students[run.record.name])
    # The record of a run has the fingerprint of the labels that the teacher computed.
    _check(run, pipeline, "labels", labels_fingerprint(pipeline.labels(config.base()).info))
    return pipeline.labels(config)


def _check(run: OpenRun, pipeline: Pipeline, what: str, found: str) -> None:
    """Raise InputError if `found` is not the fingerprint that the run, or else its labels, recorded."""
    assert run.record is not None
    recorded = run.record.preparation.get(what, {}).get("fingerprint")
    if recorded is None and what != "labels":  # the teacher and SAE of ready-made labels
        recorded = getattr(_labels(run, pipeline).info, what)
    if recorded is not None and recorded != found:
        raise InputError(
            f"the {what} of {run.folder} in {pipeline.folder}, or where its recipe says, changed since it "
            "was trained; restore it, or train it again"
        )
