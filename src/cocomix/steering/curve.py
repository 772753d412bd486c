"""Effect of steering against what it costs in fluency: figures with intervals, and their picture.

N concepts, P prompts, S strengths.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cocomix.evaluation.documents import bootstrap_ratios, percentile_interval
from cocomix.steering.judge import Readings


class Outcome(NamedTuple):
    """What the judge says of the texts of one strength, by concept; each (N,), a mean over the prompts."""

    activation: np.ndarray
    """Of the concept that was turned up."""
    active: np.ndarray
    """Share of the tokens at which it is active."""
    control_activation: np.ndarray
    """Of the same concept, where another one was turned up."""
    control_active: np.ndarray
    """Share of their tokens."""
    nll: np.ndarray
    """Of the texts in which the concept was turned up, nats per token."""
    control_nll: np.ndarray
    """Of those in which the other one was."""
    distinct_1: np.ndarray
    """Of the texts in which the concept was turned up."""
    distinct_2: np.ndarray
    """The same."""


@dataclass(frozen=True)
class Estimate:
    """A mean over concepts, and the interval in which it lies in 95 of 100 bootstrap samples of the concepts."""

    mean: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Point:
    """An arm at one strength, against its own unsteered texts.

    Attributes:
        strength: in the arm's unit.
        gain: activation of the steered concept less that in unsteered text, in units of the concept's typical
            activation: 1 is as active at every token as it typically is where it is active.
        control: the same where a random concept of about equal frequency was turned up instead.
        specific: gain − control.
        active: share of the tokens at which the steered concept is active, less that of unsteered text.
        cost: mean negative log-probability by the teacher less that of unsteered text, nats per token: the logarithm
            of how many times the perplexity is larger.
        control_cost: the same of the texts of `control`.
        perplexity: of the texts, by the teacher: e to the mean over texts.
        distinct_1, distinct_2: of the texts.
    """

    strength: float
    gain: Estimate
    control: Estimate
    specific: Estimate
    active: Estimate
    cost: Estimate
    control_cost: Estimate
    perplexity: float
    distinct_1: float
    distinct_2: float


def estimate(values: np.ndarray) -> Estimate:
    """Of the values of N concepts, (N,)."""
    interval = percentile_interval(bootstrap_ratios(values.astype(np.float64), np.ones(len(values))))
    return Estimate(float(values.mean()), interval)


def outcome(steered: Readings, control: Readings, prompts: int) -> Outcome:
    """Of one strength.

    Args:
        steered: N · P texts, prompt by prompt for each concept; of every text all N concepts were looked at.
        control: the same, where the concept's control was turned up.
        prompts: P.
    """

    def own(watched: np.ndarray) -> np.ndarray:
        """(N,) what N · P texts say of their own concept."""
        concepts = watched.shape[1]
        by_prompt = watched.reshape(concepts, prompts, concepts)
        return by_prompt[np.arange(concepts), :, np.arange(concepts)].mean(-1)

    of_texts = (steered.nll, control.nll, steered.distinct_1, steered.distinct_2)
    watched = (steered.activation, steered.active, control.activation, control.active)
    return Outcome(*map(own, watched), *(each.reshape(-1, prompts).mean(-1) for each in of_texts))


def point(strength: float, found: Outcome, unsteered: Readings, typical: np.ndarray) -> Point:
    """The figures of one strength.

    Args:
        strength: in the arm's unit.
        found: what became of the texts.
        unsteered: the P texts of the same model, not steered.
        typical: (N,) mean activation of each concept where it is active in ordinary text.
    """
    before = unsteered.activation.mean(0)
    gain, control = (found.activation - before) / typical, (found.control_activation - before) / typical
    return Point(
        strength=float(strength),
        gain=estimate(gain),
        control=estimate(control),
        specific=estimate(gain - control),
        active=estimate(found.active - unsteered.active.mean(0)),
        cost=estimate(found.nll - unsteered.nll.mean()),
        control_cost=estimate(found.control_nll - unsteered.nll.mean()),
        perplexity=float(np.exp(found.nll.mean())),
        distinct_1=float(found.distinct_1.mean()),
        distinct_2=float(found.distinct_2.mean()),
    )


class Line(NamedTuple):
    """An arm's points, as they are drawn."""

    name: str
    points: Sequence[Point]


def picture(lines: Sequence[Line], title: str) -> bytes:
    """Gain against cost, a line per arm with intervals both ways; dashed, its control. A PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    axes = figure.subplots()
    for number, line in enumerate(lines):
        colour = f"C{number}"
        for label, gain, cost, style, alpha in (
            (line.name, "gain", "cost", "o-", 1.0),
            (f"{line.name}: control", "control", "control_cost", "x:", 0.5),
        ):
            across, up = ([getattr(each, name) for each in line.points] for name in (cost, gain))
            axes.errorbar(
                [0.0, *(each.mean for each in across)],
                [0.0, *(each.mean for each in up)],
                xerr=_bars(across),
                yerr=_bars(up),
                fmt=style,
                color=colour,
                alpha=alpha,
                markersize=4,
                elinewidth=0.8,
                label=label,
            )
        for each in line.points:
            axes.annotate(
                f"{each.strength:g}",
                (each.cost.mean, each.gain.mean),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=8,
                color=colour,
            )
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set(
        xlabel="fluency cost: log perplexity by the teacher, less that of unsteered text (nats per token)",
        ylabel="gain in activation (1: as active everywhere as it\ntypically is where it is active)",
    )
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _bars(estimates: Sequence[Estimate]) -> np.ndarray:
    """(2, points + 1) lengths of the error bars down and up; the first point is the unsteered text."""
    lengths = [(each.mean - each.interval[0], each.interval[1] - each.mean) for each in estimates]
    return np.maximum(0.0, np.array([(0.0, 0.0), *lengths]).T)
