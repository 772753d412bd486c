"""Plot the validation curves of a comparison."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from cocomix.reporting.costs import AXES
from cocomix.reporting.figures import png, scale, style

CURVES = "curves.png"
CURVE_AXES = ("tokens", "student_flops", "all_flops")


def curves_picture(results: dict[str, Any], dark: bool = False, narrow: bool = False) -> bytes:
    """Plot the mean validation loss of each group against tokens and FLOPs, with a band over seeds; returns a PNG.

    Args:
        results: results of `compare_runs`.
        dark: for a dark page.
        narrow: with the panels below each other.
    """
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    with style(dark):
        groups, colors = results["groups"], len(rcParams["axes.prop_cycle"])
        many = len(groups) > colors
        size = (4.6, 10 + many * len(groups) / 8) if narrow else (14, 7) if many else (13, 4)
        figure = Figure(figsize=size, dpi=120, layout="constrained")
        shape = (len(CURVE_AXES), 1) if narrow else (1, len(CURVE_AXES))
        panels = dict(zip(CURVE_AXES, figure.subplots(*shape, sharey=True), strict=True))
        units = {
            axis: scale(max(max(run["costs"][axis]) for run in results["students"].values()), AXES[axis].label)
            for axis in CURVE_AXES
        }
        for number, (name, members) in enumerate(groups.items()):
            line_style = ("-", "--", ":")[number // colors % 3]  # the colors repeat
            runs = [results["students"][member] for member in members]
            losses = [[point["loss"] for point in run["curve"]] for run in runs]
            low, mean, high = ([f(column) for column in zip(*losses, strict=True)] for f in (min, fmean, max))
            for axis, axes in panels.items():
                costs = zip(*(run["costs"][axis] for run in runs), strict=True)
                at = [fmean(column) / units[axis][0] for column in costs]
                (line,) = axes.plot(at, mean, line_style, marker=".", label=name if axis == "tokens" else None)
                if len(runs) > 1:
                    axes.fill_between(at, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        for axis, axes in panels.items():
            axes.set(xlabel=units[axis][1])
            axes.locator_params(axis="x", nbins=6)
            axes.grid(alpha=0.3)
        figure.supylabel("validation loss, nats per token", fontsize="medium")
        if many:
            figure.legend(loc="outside lower center", ncols=2 if narrow else 6)
        else:
            panels["tokens"].legend()
        return png(figure)
