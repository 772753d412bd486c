"""Effect of steering against its cost in fluency: estimates with intervals, and their plot.

Dimensions: N concepts, P prompts.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cocomix.evaluation.statistics import bootstrap_ratios, percentile_interval
from cocomix.evaluation.steering_judge import Readings


class Outcome(NamedTuple):
    """The judge's readings of the texts of one strength by concept, each (N,), averaged over the prompts."""

    activation: np.ndarray
    """Mean activation of the steered concept."""
    active: np.ndarray
    """Fraction of tokens at which it is active."""
    control_activation: np.ndarray
    """Mean activation of the same concept where its control was steered."""
    nll: np.ndarray
    """Negative log-probability of the texts with the steered concept, nats per token."""
    control_nll: np.ndarray
    """The same of the texts with the steered control."""
    distinct_1: np.ndarray
    """distinct-1 of the texts with the steered concept."""
    distinct_2: np.ndarray
    """distinct-2 of the same texts."""


@dataclass(frozen=True)
class Estimate:
    """A mean over concepts with its 95 % bootstrap interval over concepts."""

    mean: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Point:
    """Estimates of an arm at one strength, relative to its unsteered texts.

    Attributes:
        strength: strength in the arm's unit.
        gain: activation of the steered concept minus that in unsteered text, in units of the concept's typical
            activation: 1 means as active at every token as it typically is where it is active.
        control: the same, where a random concept of similar frequency was steered instead.
        specific: gain − control.
        active: fraction of tokens at which the steered concept is active, minus that of unsteered text.
        cost: mean negative log-probability by the teacher minus that of unsteered text, nats per token: the logarithm
            of the ratio of perplexities.
        control_cost: the same for the texts of `control`.
        perplexity: perplexity of the texts by the teacher: e to the mean over texts.
        distinct_1, distinct_2: fraction of distinct tokens, and of distinct pairs of neighbors.
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
    """Estimate the mean of values (N,) of N concepts."""
    interval = percentile_interval(bootstrap_ratios(values.astype(np.float64), np.ones(len(values))))
    return Estimate(float(values.mean()), interval)


def outcome(steered: Readings, control: Readings, prompts: int) -> Outcome:
    """Average the readings of one strength over the prompts.

    Args:
        steered: readings of N · P texts, ordered by concept, then prompt, with all N concepts watched in each.
        control: the same, with each concept's control steered.
        prompts: P.
    """

    def own(watched: np.ndarray) -> np.ndarray:
        """(N · P, N) readings to (N,): each concept in its own texts."""
        concepts = watched.shape[1]
        by_prompt = watched.reshape(concepts, prompts, concepts)
        return by_prompt[np.arange(concepts), :, np.arange(concepts)].mean(-1)

    per_text = (steered.nll, control.nll, steered.distinct_1, steered.distinct_2)
    watched = (steered.activation, steered.active, control.activation)
    return Outcome(*map(own, watched), *(each.reshape(-1, prompts).mean(-1) for each in per_text))


def point(strength: float, found: Outcome, unsteered: Readings, typical: np.ndarray) -> Point:
    """Estimate effect and cost at one strength.

    Args:
        strength: strength in the arm's unit.
        found: outcome of the steered texts.
        unsteered: readings of the P texts of the same model without steering.
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
    """An arm's points in the plot."""

    name: str
    points: Sequence[Point]


def picture(lines: Sequence[Line], title: str) -> bytes:
    """Plot gain against cost as a PNG: a panel per arm, with intervals in both directions, and its control dotted."""
    from matplotlib.figure import Figure

    columns = min(3, len(lines))
    rows = -(-len(lines) // columns)
    figure = Figure(figsize=(1 + 3.4 * columns, 0.8 + 3.2 * rows), dpi=120, layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for line, axes in zip(lines, panels, strict=False):
        for label, gain, cost, style in (
            ("steered", "gain", "cost", "o-"),
            ("control", "control", "control_cost", "x:"),
        ):
            across, up = ([getattr(each, name) for each in line.points] for name in (cost, gain))
            axes.errorbar(
                [0.0, *(each.mean for each in across)],
                [0.0, *(each.mean for each in up)],
                xerr=_bars(across),
                yerr=_bars(up),
                fmt=style,
                color="C0" if label == "steered" else "0.6",
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
            )
        axes.axhline(0, color="0.6", linewidth=0.8)
        axes.tick_params(labelbottom=True, labelleft=True)
        axes.set_title(line.name, fontsize=9, parse_math=False)
        axes.grid(alpha=0.3)
    for unused in list(panels):
        unused.set_visible(False)
    figure.axes[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.supxlabel("fluency cost, nats per token", fontsize=9)
    figure.supylabel("gain in activation", fontsize=9)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _bars(estimates: Sequence[Estimate]) -> np.ndarray:
    """(2, points + 1) lengths of the error bars down and up; the first point is unsteered text."""
    lengths = [(each.mean - each.interval[0], each.interval[1] - each.mean) for each in estimates]
    return np.maximum(0.0, np.array([(0.0, 0.0), *lengths]).T)
