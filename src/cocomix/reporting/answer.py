"""The answer of a comparison in plain sentences: which run is ahead, by how much, what that costs, and if it pays."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

from cocomix.evaluation.verdicts import LOSS_MARGIN, Verdict

ARTIFACTS = {"teacher": "teacher", "sae": "SAE", "labels": "labels", "predictions": "predictions", "losses": "losses"}


def answer(results: dict[str, Any]) -> list[str]:
    """Return one paragraph for each group that is compared with the baseline."""
    return [
        " ".join(filter(None, (_ahead(results, each), _reached(results, each), _pays(results, each))))
        for each in results["comparisons"]
    ]


def _ahead(results: dict[str, Any], comparison: dict[str, Any]) -> str:
    run, baseline, difference = comparison["run"], comparison["baseline"], comparison["loss_difference"]
    ours, theirs = (math.exp(min(_loss(results, name), 700)) for name in (run, baseline))
    word = "below" if difference < 0 else "above"
    return (
        f"`{run}` ends {abs(difference):.3f} nats per token {word} `{baseline}` (perplexity {ours:,.4g} against "
        f"{theirs:,.4g}){_certainty(comparison)}."
    )


def _loss(results: dict[str, Any], group: str) -> float:
    return fmean(results["students"][member]["metrics"]["loss"] for member in results["groups"][group])


def _certainty(comparison: dict[str, Any]) -> str:
    """State how certain the difference is, over seeds if these were measured, else over documents."""
    verdict = comparison["verdict_over_seeds"] or comparison["verdict_over_documents"]
    if verdict is None:
        return "; how certain this is was not measured"
    sample = "seeds" if comparison["verdict_over_seeds"] else "validation documents, with one seed"
    if verdict in (Verdict.LOWER, Verdict.HIGHER):
        return f", a clear difference over {sample}"
    if verdict == Verdict.SAME:
        return f", within {LOSS_MARGIN:g} nats over {sample}: no difference of interest"
    return f", not decided over {sample}"


def _reached(results: dict[str, Any], comparison: dict[str, Any]) -> str:
    """State where the run reaches the final loss of the baseline."""
    baseline, tokens = comparison["baseline"], comparison["tokens_to_baseline_loss"]
    if tokens is None:
        return f"It does not reach the final loss of `{baseline}`."
    if comparison["tokens_at_most"]:
        return f"It is already at the final loss of `{baseline}` at its first evaluation, after {tokens:,.0f} tokens."
    ratio = comparison["tokens_ratio"]
    share = f"{1 - ratio:.0%} fewer" if ratio <= 1 else f"{ratio - 1:.0%} more"
    return f"It reaches the final loss of `{baseline}` with {share} tokens."


def _pays(results: dict[str, Any], comparison: dict[str, Any]) -> str:
    """Compare the FLOPs saved until the final loss of the baseline with those of teacher, SAE and labels."""
    run, other = (results["students"][results["groups"][comparison[key]][0]] for key in ("run", "baseline"))
    known = {kind: each["flops"] for kind, each in run["preparation"].items() if each["flops"] is not None}
    prepared = sum(known.values())
    if not prepared:
        return ""
    names = [name for kind, name in ARTIFACTS.items() if kind in known]
    listed = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    times = prepared / other["training_flops"]
    cost = f"{listed[0].upper()}{listed[1:]} took {times:,.1f} times the FLOPs of `{comparison['baseline']}`"
    tokens = comparison["tokens_to_baseline_loss"]
    if tokens is None:
        return f"{cost}; they do not pay off here."
    per_token = run["training_flops_per_token"] + run["teacher_flops_per_token"]
    saved = other["training_flops"] - tokens * per_token
    if saved <= 0:
        return f"{cost}; a run up to that loss saves no FLOPs that could pay for them."
    runs = math.ceil(prepared / saved)
    most = "at most " if comparison["tokens_at_most"] else ""
    if runs == 1:
        return f"{cost}; a single run that stops at that loss saves more."
    return f"{cost}; they pay off after {most}{runs:,} runs that share them and stop at that loss."
