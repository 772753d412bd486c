"""`cocomix evaluate steering RUN`: measure the effect of steering against its cost in fluency."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from cocomix.catalog.activity import read_activity
from cocomix.catalog.building import promoted_tokens
from cocomix.common import environment, files
from cocomix.common.console import progress_bar
from cocomix.common.errors import InputError
from cocomix.concepts.label_store import labels_fingerprint
from cocomix.evaluation.prediction import training_frequencies
from cocomix.evaluation.record import Evaluation
from cocomix.evaluation.steering_arms import Arm, NamingPrompt, SteeredStudent, SteeredTeacher, Writer
from cocomix.evaluation.steering_curve import Line, picture
from cocomix.evaluation.steering_judge import Judge
from cocomix.evaluation.steering_score import (
    ScoreSettings,
    choose_concepts,
    choose_prompts,
    logit_deviation,
    measure,
    residual_length,
    texts_to_write,
)
from cocomix.inspection.runs import OpenRun
from cocomix.pipeline.origins import concept_source, learned_labels

KIND = "steering"
PICTURES = {"add": "steering.png", "scale": "steering-scale.png"}
"""File name of the plot, by operation."""
SURVEYED_TOKENS = 100_000
"""Number of validation tokens over which typical activations are measured."""


def score_steering(run: OpenRun, settings: ScoreSettings) -> Evaluation:
    """Score three ways of turning concepts up, and save their plot to the run's folder.

    Args:
        run: run of a model that mixes concepts.
        settings: settings of the measurement.

    Raises:
        InputError: the run's corpus, labels, teacher or SAE is gone or has changed; too few concepts or prompts.
    """
    labeled = learned_labels(run)
    frequencies = training_frequencies(labeled)
    choose_concepts(frequencies, frequencies > 0, settings.concepts, settings.seed)  # fail early
    source = concept_source(run)
    if source is None:
        raise InputError(f"the recipe of {run.folder} names no teacher and SAE; set teacher.source and sae.source")
    teacher, sae, layer = source.teacher, source.sae, source.layer
    if not source.tokenizer.is_fast:
        raise InputError(
            f"the teacher's tokenizer ({type(source.tokenizer).__name__}) does not return character offsets, without "
            "which a prompt cannot be told from its continuation; give a teacher with a tokenizer.json"
        )
    model, tokenizer = run.model, run.tokenizer
    settings = _within(settings, model, teacher)
    prompts = choose_prompts(labeled.validation, tokenizer, settings.prompts, settings.prompt_tokens, settings.seed)

    assert run.record is not None
    surveyed = min(len(source.validation), -(-SURVEYED_TOKENS // run.record.block_size))
    survey = read_activity(teacher, sae, layer, source.validation, surveyed, source.blocks_per_batch, contexts=1)
    count, total = survey.count.cpu().numpy(), survey.total.cpu().numpy()
    pairs = choose_concepts(frequencies, (frequencies > 0) & (count > 0), settings.concepts, settings.seed)
    concepts = [pair.concept for pair in pairs]
    typical = total[concepts] / count[concepts]

    student = Writer(model, tokenizer, prompts, settings.new_tokens, settings.seed)
    unsteered_teacher = Writer(teacher, source.tokenizer, prompts, settings.new_tokens, settings.seed, source.prefix)
    named = sorted({concept for pair in pairs for concept in pair})
    promoted = promoted_tokens(teacher, sae.W_dec[named], max(settings.named_tokens), source.tokenizer)
    arms: list[Arm] = [
        SteeredStudent(student, settings.strengths, settings.operation, logit_deviation(model, tokenizer, prompts)),
        SteeredTeacher(
            unsteered_teacher,
            settings.teacher_strengths,
            layer,
            sae.W_dec,
            residual_length(teacher, source.tokenizer, prompts, layer, source.prefix),
        ),
        NamingPrompt(student, settings.named_tokens, dict(zip(named, promoted, strict=True))),
    ]
    judge = Judge(teacher, source.tokenizer, sae, layer, concepts, source.prefix)
    with progress_bar(total=texts_to_write(settings), desc="steering", unit="text") as progress:
        measured = [measure(arm, judge, prompts, pairs, typical, settings.batch_size, progress) for arm in arms]
    lines = [Line(arm.name, found.points) for arm, found in zip(arms, measured, strict=True)]
    _draw(run.folder / PICTURES[settings.operation], lines, settings, run.name)
    return Evaluation(
        kind=KIND,
        name=settings.operation,
        settings={**settings.to_dict(), "labels": labels_fingerprint(labeled.info)},
        figures={
            "arms": [
                {"name": arm.name, "unit": arm.unit, "points": [asdict(each) for each in found.points]}
                for arm, found in zip(arms, measured, strict=True)
            ],
            "concepts": [
                {
                    **pair._asdict(),
                    "frequency": float(frequencies[pair.concept]),
                    "typical_activation": float(typical[number]),
                    "promoted": promoted[named.index(pair.concept)],
                    "gains": {
                        arm.name: _column(found.gains, number) for arm, found in zip(arms, measured, strict=True)
                    },
                }
                for number, pair in enumerate(pairs)
            ],
        },
        environment=environment.describe(),
    )


def _column(gains: np.ndarray, concept: int) -> list[float]:
    return [float(gain) for gain in gains[:, concept]]


def _within(settings: ScoreSettings, *models: PreTrainedModel) -> ScoreSettings:
    """Shorten prompts and texts to a quarter of each context, which leaves half for tokens named before a prompt."""
    contexts = [getattr(model.config.get_text_config(), "max_position_embeddings", None) for model in models]
    quarter = min((context // 4 for context in contexts if context is not None), default=settings.new_tokens)
    return replace(
        settings,
        prompt_tokens=min(settings.prompt_tokens, max(1, quarter)),
        new_tokens=min(settings.new_tokens, max(1, quarter)),
    )


def _draw(path: Path, lines: list[Line], settings: ScoreSettings, name: str) -> None:
    title = (
        f"{name}: {settings.concepts} concepts, {settings.prompts} prompts, {settings.new_tokens} tokens each; "
        "bars: 95 % over concepts;\nnumbers: strength; dotted: another concept of similar frequency steered instead"
    )
    files.write_bytes(path, picture(lines, title))
