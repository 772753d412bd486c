"""Measure whether steering a concept makes it more active in generated text. Protocol: docs/steering.md.

Dimensions: C concepts, N scored concepts, P prompts, S strengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import islice, zip_longest
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cocomix.common.console import ProgressBar
from cocomix.common.errors import InputError
from cocomix.common.settings import Batch, Count, Range, Seed, require
from cocomix.concepts.teacher import residual_stream
from cocomix.evaluation.concepts import band_of
from cocomix.evaluation.steering_arms import Arm, Request
from cocomix.evaluation.steering_curve import Point, outcome, point
from cocomix.evaluation.steering_judge import Judge, Readings
from cocomix.inspection.sampling import in_tokens

CONTROLS = 10
"""Number of concepts nearest in frequency from which the control is drawn."""
STRONGEST = 100
Strength = Annotated[float, Range(0, STRONGEST, open_low=True)]


@dataclass(frozen=True)
class ScoreSettings:
    """Settings of the measurement.

    Attributes:
        concepts: N, number of scored concepts.
        prompts: P, number of prompts.
        strengths: strengths on the student's concept logits: standard deviations for `add`, factors for `scale`.
        operation: add or scale.
        teacher_strengths: strengths of the decoder direction, as fractions of the residual stream's length.
        named_tokens: numbers of tokens that the prompt names.
        prompt_tokens: tokens per prompt, at most a quarter of the context.
        new_tokens: tokens generated after it, at most a quarter of the context.
        seed: seed of concepts, controls, prompts and texts.
        batch_size: texts generated at once.

    Raises:
        InputError: a value is out of its range.
    """

    concepts: Annotated[int, Range(2, 2**24)] = 32
    prompts: Count = 4
    strengths: tuple[Strength, ...] = (1.0, 2.0, 4.0, 8.0)
    operation: str = "add"
    teacher_strengths: tuple[Strength, ...] = (0.125, 0.25, 0.5, 1.0)
    named_tokens: tuple[Annotated[int, Range(1, STRONGEST)], ...] = (1, 2, 4, 8)
    prompt_tokens: Count = 16
    new_tokens: Count = 32
    seed: Seed = 0
    batch_size: Batch = 64

    def __post_init__(self) -> None:
        require(self)
        for name in ("strengths", "teacher_strengths", "named_tokens"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise InputError(f"{name} is {', '.join(map(str, given))}; expected one or more different numbers")
        if self.operation == "scale" and min(self.strengths) <= 1:
            raise InputError(f"strengths has {min(self.strengths)}; a factor that raises a concept is above 1")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings that determine the results."""
        return {each.name: _plain(getattr(self, each.name)) for each in fields(self) if each.name != "batch_size"}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


class Pair(NamedTuple):
    """A scored concept and its control."""

    concept: int
    control: int


def choose_concepts(frequencies: np.ndarray, eligible: np.ndarray, count: int, seed: int) -> list[Pair]:
    """Draw concepts evenly from the frequency bands, and for each a control of similar frequency.

    Args:
        frequencies: (C,) fraction of labeled tokens that have each concept as a label.
        eligible: (C,) bool.
        count: N.
        seed: seed of the draw.

    Raises:
        InputError: too few concepts are eligible.
    """
    if (found := int(eligible.sum())) < max(2, count):
        raise InputError(f"{count} concepts cannot be scored: only {found} are labels and active; give at most {found}")
    draw = np.random.default_rng(seed)
    bands = band_of(frequencies)
    shuffled = [draw.permutation(np.flatnonzero(eligible & (bands == band))) for band in range(bands.max() + 1)]
    in_turn = [concept for rank in zip_longest(*shuffled) for concept in rank if concept is not None]
    others = np.flatnonzero(eligible)
    pairs = []
    for concept in sorted(in_turn[:count]):
        apart = np.abs(np.log(frequencies[others] / frequencies[concept]))
        near = others[np.argsort(apart, kind="stable")]
        pairs.append(Pair(int(concept), int(draw.choice(near[near != concept][:CONTROLS]))))
    return pairs


def choose_prompts(
    blocks: Dataset, tokenizer: PreTrainedTokenizerBase, count: int, tokens: int, seed: int
) -> list[str]:
    """Draw the starts of random blocks as text, skipping those with an end-of-text token.

    Args:
        blocks: blocks of validation text, with `input_ids` (T,).
        tokenizer: tokenizer of the blocks.
        count: P.
        tokens: tokens per prompt.
        seed: seed of the draw.

    Raises:
        InputError: there are too few.
    """
    starts = blocks.with_format("numpy")[:]["input_ids"][:, :tokens].astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(starts))
    texts = (tokenizer.decode(starts[row].tolist()) for row in order if not _ends(starts[row], tokenizer))
    found = list(islice((text for each in texts if (text := each.strip("\ufffd")).strip()), count))
    if len(found) < count:
        raise InputError(f"{count} prompts are wanted, but only {len(found)} blocks of validation text provide one")
    return found


def _ends(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> bool:
    return bool((ids == tokenizer.eos_token_id).any())


@torch.no_grad()
def logit_deviation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> float:
    """Compute the standard deviation of a CoCoMix model's concept logits over all concepts and tokens of some texts."""
    logits = []
    for ids in in_tokens(tokenizer, texts):
        inputs = torch.tensor([ids], device=model.device)
        logits.append(model(inputs, output_concepts=True, use_cache=False, logits_to_keep=1).concept_logits[0].float())
    return float(torch.cat(logits).std())


@torch.no_grad()
def residual_length(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    layer: int,
    prefix: Sequence[int] = (),
) -> float:
    """Compute the median length of the residual stream after a block over the tokens of some texts.

    Not the mean, since at the first token, an attention sink, it can be hundreds of times longer than elsewhere.
    """
    lengths: list[Tensor] = []
    for ids in in_tokens(tokenizer, texts, prefix):
        inputs = torch.tensor([ids], device=teacher.device)
        lengths.append(residual_stream(teacher, inputs, layer)[0].float().norm(dim=-1))
    return float(torch.cat(lengths).median())


class ArmScores(NamedTuple):
    """Scores of one arm."""

    points: list[Point]
    """S points, one per strength."""
    gains: np.ndarray
    """(S, N) gain of each concept at each strength, as in `Point`."""


def measure(
    arm: Arm,
    judge: Judge,
    prompts: Sequence[str],
    pairs: Sequence[Pair],
    typical: np.ndarray,
    batch_size: int,
    progress: ProgressBar,
) -> ArmScores:
    """Generate and judge an arm's texts: unsteered ones, and at each strength those of each concept and its control.

    Args:
        arm: arm that generates the texts.
        judge: judge that watches the N concepts of `pairs`, in their order.
        prompts: P prompts.
        pairs: N concepts and their controls.
        typical: (N,) typical activation of each concept.
        batch_size: texts generated at once.
        progress: bar to advance by each text.
    """

    def judged(requests: Sequence[Request]) -> Readings:
        parts = []
        for start in range(0, len(requests), batch_size):
            batch = requests[start : start + batch_size]
            parts.append(judge([prompts[request.prompt] for request in batch], arm.write(batch)))
            progress.update(len(batch))
        return Readings.concatenate(parts)

    def texts_of(concepts: Sequence[int], strength: float) -> Readings:
        return judged([Request(p, concept, strength) for concept in concepts for p in range(len(prompts))])

    unsteered = texts_of([pairs[0].concept], 0.0)
    points, gains = [], []
    for strength in arm.strengths:
        own, control = (texts_of(concepts, strength) for concepts in zip(*pairs, strict=True))
        found = outcome(own, control, len(prompts))
        points.append(point(strength, found, unsteered, typical))
        gains.append((found.activation - unsteered.activation.mean(0)) / typical)
    return ArmScores(points, np.stack(gains))


def texts_to_write(settings: ScoreSettings) -> int:
    """Count the texts of all arms."""
    strengths = len(settings.strengths) + len(settings.teacher_strengths) + len(settings.named_tokens)
    return settings.prompts * (3 + 2 * settings.concepts * strengths)
