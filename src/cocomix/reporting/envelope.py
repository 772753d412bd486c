"""Next-token prediction at every size and length: its envelope, the lowest loss at given FLOPs, and its tokens.

One size of `ntp` is rarely the best use of its FLOPs. The envelope over several sizes is what another method has to
pass at equal FLOPs. These functions read the `students` and `groups` of a comparison's results.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from cocomix.common.document import Table
from cocomix.reporting.costs import AXES, cost_to_reach
from cocomix.reporting.figures import png, style
from cocomix.reporting.seeds import Curve, SeedDifference, over_seeds

ENVELOPE = "envelope.png"
ENVELOPE_AXES = ("student_flops", "single_run_flops")
ENVELOPE_NOTE = (
    "Envelope: the lowest loss of any `ntp` student here at the FLOPs of the row, interpolated linearly between its "
    "evaluations; `at most` if no `ntp` student used as many. Each student is compared at the end of its training, by "
    "the FLOPs of the student alone and with teacher, SAE and labels all paid by this one run. In parentheses: 95 % "
    "intervals (Student's t) over seeds, each with the envelope of its own seed."
)


class Reached(NamedTuple):
    """Whether next-token prediction reaches the final loss of a group."""

    tokens: float | None
    """Fewest training tokens until then, of any `ntp` group with the baseline's activated parameters."""
    most: float
    """Most tokens that such a group was trained on."""


def plain_tokens(results: dict[str, Any], run: str, baseline: str) -> Reached:
    """Return the tokens at which a plain model of the baseline's size reaches the final loss of `run`.

    Uses the mean curve over seeds of the baseline and of `ntp` groups of its size, which may be trained longer.
    """
    size = _size(results, baseline)
    same = {baseline, *(name for name in _plain(results) if _size(results, name) == size)} - {run}
    curves = [_mean(_curves(results, name, "tokens")) for name in same]
    final = _mean(_curves(results, run, "tokens")).losses[-1]
    reached = [cost_to_reach(curve.costs, curve.losses, float(final)) for curve in curves]
    return Reached(
        min((tokens for tokens in reached if tokens is not None), default=None),
        max(float(curve.costs[-1]) for curve in curves),
    )


def envelope_loss(curves: Sequence[Curve], budget: float) -> float | None:
    """Return the lowest loss of any curve at a cost of at most `budget`; None if all curves start above it."""
    losses = [np.interp(budget, curve.costs, curve.losses) for curve in curves if curve.costs[0] <= budget]
    return float(min(losses)) if losses else None


def has_envelope(results: dict[str, Any]) -> bool:
    """Return whether the comparison has `ntp` students of several sizes."""
    return len({_size(results, name) for name in _plain(results)}) > 1


def envelope_table(results: dict[str, Any]) -> Table:
    """Compare each group with the envelope at equal FLOPs."""
    header = ["against the envelope of ntp", "loss"]
    for axis in ENVELOPE_AXES:
        header += ["FLOPs" if axis == "student_flops" else "FLOPs, all for one run", "envelope", "difference"]
    rows = []
    for name in results["groups"]:
        if name in _plain(results):
            continue
        row = [name, f"{_mean(_curves(results, name, 'tokens')).losses[-1]:.4f}"]
        for axis in ENVELOPE_AXES:
            row += _against(results, name, axis)
        rows.append(row)
    return Table(header, rows)


def _against(results: dict[str, Any], name: str, axis: str) -> list[str]:
    """Return the cells of one group and one axis: FLOPs, loss of the envelope, difference."""
    members = _members(results, name)
    if axis == "single_run_flops" and any(each["flops"] is None for each in members[0]["preparation"].values()):
        return ["–"] * 3
    ours, theirs = _curves(results, name, axis), [_curves(results, plain, axis) for plain in _plain(results)]
    budget = fmean(float(curve.costs[-1]) for curve in ours)
    best = envelope_loss([_mean(curves) for curves in theirs], budget)
    if best is None:
        return [f"{budget:.2e}", "–", "–"]
    at_most = "at most " if budget > max(float(curves[0].costs[-1]) for curves in theirs) else ""
    difference = _difference(results, name, axis)
    mean = float(_mean(ours).losses[-1]) - best if difference is None else difference.mean
    interval = difference.interval if difference else None
    around = f" ({interval[0]:+.4f} to {interval[1]:+.4f})" if interval else ""
    return [f"{budget:.2e}", f"{at_most}{best:.4f}", f"{mean:+.4f}{around}"]


def _difference(results: dict[str, Any], name: str, axis: str) -> SeedDifference | None:
    """Return the difference over seeds; None unless every `ntp` group has the seeds of this one."""
    seeds = [run["seed"] for run in _members(results, name)]
    plain = _plain(results)
    if any([run["seed"] for run in _members(results, each)] != seeds for each in plain):
        return None
    theirs = [_curves(results, each, axis) for each in plain]
    differences = []
    for number, curve in enumerate(_curves(results, name, axis)):
        best = envelope_loss([curves[number] for curves in theirs], float(curve.costs[-1]))
        if best is None:
            return None
        differences.append(float(curve.losses[-1]) - best)
    return over_seeds(differences)


def envelope_picture(results: dict[str, Any], dark: bool = False, narrow: bool = False) -> bytes:
    """Plot the envelope of `ntp` and the mean curve of each group against both kinds of FLOPs; returns a PNG.

    Args:
        results: results of `compare_runs`.
        dark: for a dark page.
        narrow: with the panels below each other.
    """
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    with style(dark):
        plain = _plain(results)
        figure = Figure(figsize=(4.6, 8) if narrow else (11, 4.5), dpi=120, layout="constrained")
        panels = figure.subplots(*((2, 1) if narrow else (1, 2)), sharey=True)
        for axes, axis in zip(panels, ENVELOPE_AXES, strict=True):
            curves = {name: _mean(_curves(results, name, axis)) for name in results["groups"]}
            for name, curve in curves.items():
                faint = {"color": "0.6", "linewidth": 1} if name in plain else {}
                axes.plot(curve.costs, curve.losses, marker=".", label=name, **faint)
            costs = np.unique(np.concatenate([curves[name].costs for name in plain]))
            losses = [envelope_loss([curves[name] for name in plain], cost) for cost in costs]
            axes.plot(costs, losses, color=rcParams["text.color"], linewidth=2.5, label="envelope of ntp", zorder=3)
            axes.set(xlabel=AXES[axis].label, xscale="log")
            axes.grid(alpha=0.3)
        panels[-1].legend(fontsize="small")
        figure.supylabel("validation loss, nats per token", fontsize="medium")
        return png(figure)


def _members(results: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Return the runs of a group, ordered by seed."""
    return sorted((results["students"][member] for member in results["groups"][name]), key=lambda run: run["seed"])


def _plain(results: dict[str, Any]) -> list[str]:
    return [name for name in results["groups"] if _members(results, name)[0]["method"] == "ntp"]


def _size(results: dict[str, Any], name: str) -> int:
    return int(_members(results, name)[0]["activated_parameters"])


def _curves(results: dict[str, Any], name: str, axis: str) -> list[Curve]:
    return [
        Curve(np.array(run["costs"][axis], dtype=np.float64), np.array([point["loss"] for point in run["curve"]]))
        for run in _members(results, name)
    ]


def _mean(curves: Sequence[Curve]) -> Curve:
    """Return the mean over seeds, which are evaluated at the same tokens."""
    return Curve(np.mean([c.costs for c in curves], axis=0), np.mean([c.losses for c in curves], axis=0))
