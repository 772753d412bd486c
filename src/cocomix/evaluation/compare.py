"""Compare finished runs: losses at equal tokens, and the cost at which one reaches another's loss."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cocomix.errors import InputError
from cocomix.training.run import Run, load_run


@dataclass(frozen=True)
class Comparison:
    """A run against the baseline.

    Attributes:
        run: name of the run.
        baseline: name of the baseline.
        loss_difference: run − baseline, nats per token at the end; below 0 is better.
        tokens_to_baseline_loss: training tokens at which the run's validation curve first reaches the
            baseline's final loss; None if it never does.
        tokens_ratio: those tokens as a share of the baseline's.
        flops_to_baseline_loss: the run's own training FLOPs until then.
        flops_ratio: those FLOPs as a share of the baseline's.
    """

    run: str
    baseline: str
    loss_difference: float
    tokens_to_baseline_loss: float | None
    tokens_ratio: float | None
    flops_to_baseline_loss: float | None
    flops_ratio: float | None


def tokens_to_reach(curve: list[dict[str, float]], loss: float) -> float | None:
    """Training tokens at which a validation curve first falls to `loss`, linear between evaluations.

    None if it never does. A curve that starts below `loss` gives its first evaluation, an upper bound.
    """
    tokens = np.array([point["tokens"] for point in curve])
    losses = np.array([point["loss"] for point in curve])
    reached = np.flatnonzero(losses <= loss)
    if not len(reached):
        return None
    at = int(reached[0])
    if at == 0:
        return float(tokens[0])
    return float(np.interp(-loss, [-losses[at - 1], -losses[at]], [tokens[at - 1], tokens[at]]))


def compare_to_baseline(run: Run, baseline: Run) -> Comparison:
    """One run against the baseline."""
    final = baseline.metrics["loss"]
    tokens = tokens_to_reach(run.curve, final)
    flops = None if tokens is None else tokens * run.training_flops_per_token
    baseline_flops = baseline.tokens * baseline.training_flops_per_token
    return Comparison(
        run=run.name,
        baseline=baseline.name,
        loss_difference=run.metrics["loss"] - final,
        tokens_to_baseline_loss=tokens,
        tokens_ratio=None if tokens is None else tokens / baseline.tokens,
        flops_to_baseline_loss=flops,
        flops_ratio=None if flops is None else flops / baseline_flops,
    )


def compare_runs(folders: list[Path]) -> dict[str, Any]:
    """Results of several runs on the same corpus, and each against the baseline: the first `ntp` run, or the first.

    Raises:
        InputError: a folder without a run, one that is given twice, or runs that were not evaluated on the same
            corpus, tokenizer and block size.
    """
    runs = [load_run(folder) for folder in folders]
    for folder, run in zip(folders[1:], runs[1:], strict=True):
        if run.corpus != runs[0].corpus:
            raise InputError(
                f"{folder} was evaluated on another corpus, tokenizer or block size than {folders[0]}; "
                "losses of these runs cannot be compared"
            )
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError(f"the same run is given twice: {', '.join(map(str, folders))}")
    if len({run.name for run in runs}) < len(runs):  # of different recipes: their folders tell them apart
        runs = [replace(run, name=str(folder)) for folder, run in zip(folders, runs, strict=True)]
    baseline = next((run for run in runs if run.method == "ntp"), runs[0])
    return {
        "students": {run.name: _figures(run) for run in runs},
        "comparisons": [asdict(compare_to_baseline(run, baseline)) for run in runs if run is not baseline],
    }


def _figures(run: Run) -> dict[str, Any]:
    figures = asdict(run)
    del figures["name"], figures["recipe"]
    figures["training_flops"] = run.tokens * run.training_flops_per_token
    return figures
