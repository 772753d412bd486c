"""The report of a comparison: `results.json`, `report.md`, `report.html` and the curves as PNG."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from cocomix import files
from cocomix.console import table
from cocomix.errors import InputError
from cocomix.evaluation.costs import AXES
from cocomix.evaluation.documents import RESAMPLES
from cocomix.evaluation.tables import evaluation_tables

CURVES = "curves.png"
CURVE_AXES = ("tokens", "student_flops", "all_flops")
RESULTS = "results.json"
FILES = {CURVES, RESULTS, "report.md", "report.html"}

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  :root {{ color-scheme: light dark; }}
  body {{ font: 16px/1.55 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }}
  table {{ border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums; }}
  th, td {{ padding: .35rem .75rem; border-bottom: 1px solid #8886; text-align: right; white-space: nowrap; }}
  th:first-child, td:first-child {{ text-align: left; }}
  img {{ max-width: 100%; background: white; }}
  code {{ font-size: .9em; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def check_report_folder(folder: Path) -> None:
    """Raise InputError if `folder` holds anything else than a report, which a new one would replace."""
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= FILES):
        raise InputError(f"{folder} exists and is not a report; choose another output folder")


def write_report(results: dict[str, Any], folder: Path) -> None:
    """Write a comparison to `folder`, whole or not at all.

    Args:
        results: as of `compare_runs`, with `name`, and with `corpus`, `teacher`, `sae`, `labels` and
            `environment` where there are such.
        folder: where to.
    """
    with files.whole_folder(folder) as unfinished:
        plot_curves(results, unfinished / CURVES)
        text = markdown(results)
        (unfinished / "report.md").write_text(text, encoding="utf-8")
        (unfinished / "report.html").write_text(to_html(text, results["name"], unfinished), encoding="utf-8")
        files.write_json(unfinished / RESULTS, results)


def plot_curves(results: dict[str, Any], path: Path) -> None:
    """Mean validation loss of each group by tokens and by FLOPs; a band from the lowest to the highest seed."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    groups, colours = results["groups"], len(rcParams["axes.prop_cycle"])
    many = len(groups) > colours
    figure = Figure(figsize=(14, 7) if many else (13, 4), dpi=120, layout="constrained")
    panels = dict(zip(CURVE_AXES, figure.subplots(1, len(CURVE_AXES), sharey=True), strict=True))
    for number, (name, members) in enumerate(groups.items()):
        style = ("-", "--", ":")[number // colours % 3]  # colours come round
        runs = [results["students"][member] for member in members]
        losses = [[point["loss"] for point in run["curve"]] for run in runs]
        low, mean, high = ([f(column) for column in zip(*losses, strict=True)] for f in (min, fmean, max))
        for axis, axes in panels.items():
            at = [fmean(column) for column in zip(*(run["costs"][axis] for run in runs), strict=True)]
            (line,) = axes.plot(at, mean, style, marker=".", label=name if axis == "tokens" else None)
            if len(runs) > 1:
                axes.fill_between(at, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    for axis, axes in panels.items():
        axes.set(xlabel=AXES[axis].label)
        axes.grid(alpha=0.3)
    panels["tokens"].set(ylabel="validation loss, nats per token")
    if many:
        figure.legend(loc="outside lower center", ncols=6)
    else:
        panels["tokens"].legend()
    figure.savefig(path)


def equal_cost_table(results: dict[str, Any]) -> str:
    """One row per group: its mean loss where all runs have cost the same, with the deviation from seed to seed."""
    equal = results["equal_cost"]
    header = [
        "loss at equal cost",
        "seeds",
        f"{equal['tokens']['budget'] / 1e6:,.3g}M tokens",
        f"{equal['student_flops']['budget']:.2e} FLOPs",
        f"{equal['all_flops']['budget']:.2e} FLOPs, all",
        duration(equal["seconds"]["budget"]),
    ]
    rows = [
        [name, str(len(members)), *(_mean_and_scatter([equal[axis]["losses"][m] for m in members]) for axis in equal)]
        for name, members in results["groups"].items()
    ]
    return table(header, rows)


def _mean_and_scatter(losses: list[float | None]) -> str:
    known = [loss for loss in losses if loss is not None]
    if len(known) < len(losses):
        return "–"
    return f"{fmean(known):.4f}" + (f" ± {stdev(known):.4f}" if len(known) > 1 else "")


def students_table(students: dict[str, Any]) -> str:
    """One row per student: size, cost and losses."""
    header = [
        "student",
        "stored",
        "activated",
        "tokens",
        "FLOPs",
        "time",
        "tokens/s",
        "loss",
        "perplexity",
        "bits/byte",
    ]
    rows = [
        [
            name,
            f"{student['stored_parameters'] / 1e6:.2f}M",
            f"{student['activated_parameters'] / 1e6:.2f}M",
            f"{student['tokens'] / 1e6:.2f}M",
            f"{student['training_flops']:.2e}",
            duration(student["timing"]["seconds"]),
            f"{student['timing']['tokens_per_second']:,.0f}",
            f"{student['metrics']['loss']:.4f}",
            f"{student['metrics']['perplexity']:.2f}",
            f"{student['metrics']['bits_per_byte']:.4f}",
        ]
        for name, student in students.items()
    ]
    return table(header, rows)


def concepts_table(students: dict[str, Any]) -> str | None:
    """How well each cocomix student predicts its labels, or None if there is none."""
    rows = [
        [
            name,
            f"{m['concept_loss']:.3f}",
            f"{m['concept_precision']:.1%}",
            f"{m['concept_recall']:.1%}",
            f"{m['constant_recall']:.1%}",
        ]
        for name, m in ((name, student["metrics"]) for name, student in students.items())
        if "concept_loss" in m
    ]
    return table(["student", "concept loss", "precision", "recall", "constant recall"], rows) if rows else None


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"


def comparison_sentences(results: dict[str, Any]) -> list[str]:
    """What was measured of each student against the baseline, in words, and no more than that."""
    sentences = []
    for comparison in results["comparisons"]:
        run, baseline = comparison["run"], comparison["baseline"]
        difference = comparison["loss_difference"]
        word = "lower" if difference < 0 else "higher"
        trained = results["students"][results["groups"][run][0]]["tokens"]
        sentence = (
            f"After {trained:,} tokens `{run}` ends with a validation loss {abs(difference):.4f} nats {word} than "
            f"`{baseline}`{_certainty(comparison)}"
        )
        tokens = comparison["tokens_to_baseline_loss"]
        if tokens is None:
            sentence += f"; the final loss of `{baseline}` was not reached."
        else:
            sentence += (
                f"; it reaches the final loss of `{baseline}` after {tokens:,.0f} tokens "
                f"({_relative(comparison['tokens_ratio'])} tokens) and {comparison['flops_to_baseline_loss']:.2e} "
                f"FLOPs of its own training ({_relative(comparison['flops_ratio'])} FLOPs)."
            )
        sentences.append(sentence)
    return sentences


def _certainty(comparison: dict[str, Any]) -> str:
    """How sure seeds and validation documents make of a difference."""
    found = []
    if (deviation := comparison["loss_difference_sd"]) is not None:
        found.append(f"standard deviation over {comparison['seeds'][0]} seeds {deviation:.4f}")
    if documents := comparison["documents"]:
        low, high = documents["interval"]
        p = documents["p_value"]
        found.append(
            f"95 % interval over {documents['documents']:,} validation documents {low:+.4f} to {high:+.4f}, "
            f"p {'<' if p == 0 else '='} {max(p, 1 / RESAMPLES):.2g}"
        )
    return f" ({'; '.join(found)})" if found else ""


def _relative(ratio: float) -> str:
    return f"{1 - ratio:.1%} fewer" if ratio <= 1 else f"{ratio - 1:.1%} more"


def caveats(results: dict[str, Any]) -> list[str]:
    """What a difference in these results means, and what it leaves out."""
    students = results["students"].values()
    seeds = sorted({student["seed"] for student in students})
    largest = max(student["tokens"] for student in students)
    once = any(len(members) == 1 for members in results["groups"].values())
    lines = [
        f"One seed ({', '.join(map(str, seeds))}) per student: how much these figures vary from seed to seed "
        "was not measured, so a small difference may be chance; the interval over validation documents does not "
        "know of it."
        if once
        else f"Seeds {', '.join(map(str, seeds))}: the deviation from seed to seed says what training again changes, "
        "the interval over validation documents what other validation text would.",
        f"Trained on {largest:,} tokens, which is small: nothing here says how larger models or longer runs compare.",
    ]
    cost = preparation_flops(results)
    if cost:
        parts = ", ".join(f"{name} {value:.2e}" for name, value in cost.items())
        lines.append(
            f"FLOPs of a student are those of its own training. What the concepts cost before it ({parts} FLOPs) is "
            "spent once; `all` adds to each student an equal part of what it shares with others, and what its "
            "teacher computes while it trains."
        )
    elsewhere = sorted({k for s in students for k, made in s["preparation"].items() if made["flops"] is None})
    if elsewhere:
        lines.append(f"Made elsewhere, at a cost that is not counted: {', '.join(elsewhere)}.")
    if len({student["environment"]["hardware"] for student in students}) > 1:
        lines.append("These runs were trained on different hardware: their times do not compare.")
    return lines


def preparation_flops(results: dict[str, Any]) -> dict[str, float]:
    """FLOPs of each kind of thing that was made once before these students were trained, as far as it was here."""
    made = {
        (kind, each["fingerprint"]): each["flops"]
        for student in results["students"].values()
        for kind, each in student["preparation"].items()
        if each["flops"] is not None
    }
    cost: dict[str, float] = {}
    for (kind, _), flops in made.items():
        cost[kind] = cost.get(kind, 0.0) + flops
    return cost


def _provenance(results: dict[str, Any]) -> list[str]:
    """Where the concepts came from: corpus, teacher, SAE, labels."""
    lines = []
    if corpus := results.get("corpus"):
        packed, documents = corpus["packed"], corpus["documents"]
        counted = ""
        if documents:
            counted = (
                f", {documents['train_documents']:,} training and {documents['validation_documents']:,} validation "
                f"documents, {documents['duplicates_dropped']:,} duplicates dropped"
            )
        lines.append(
            f"Corpus `{corpus['source']}`{counted}: {packed['train_tokens']:,} training and "
            f"{packed['validation_tokens']:,} validation tokens in blocks of {packed['block_size']}, "
            f"vocabulary {packed['vocab_size']:,}, {packed['bytes_per_token']:.2f} bytes per token."
        )
    if teacher := results.get("teacher"):
        size = f", {teacher['stored_parameters'] / 1e6:.2f}M parameters" if "stored_parameters" in teacher else ""
        trained = f", trained on {teacher['tokens']:,} tokens" if "tokens" in teacher else f" (`{teacher['source']}`)"
        lines.append(f"Teacher{size}{trained}: validation loss {teacher['metrics']['loss']:.4f}.")
    if sae := results.get("sae"):
        quality = sae["quality"]
        lines.append(
            f"SAE, {sae['d_sae']:,} latents of which {sae['k']} per token: fraction of variance unexplained "
            f"{quality['fraction_variance_unexplained']:.3f}, dead latents {quality['dead_share']:.1%} "
            f"(never active on {quality['tokens']:,} validation tokens), teacher's loss "
            f"{quality['teacher_loss']:.4f} → {quality['spliced_loss']:.4f} with the reconstruction spliced in "
            f"({quality['zero_loss']:.4f} with zeros; {quality['loss_recovered']:.1%} recovered)."
        )
    if labels := results.get("labels"):
        lines.append(
            f"Labels by `{labels['selection']}`, {labels['labels_per_token']} per token: "
            f"{labels['labelled_share']:.1%} of the {'validation' if labels['online'] else 'training'} tokens have at "
            f"least one, {labels['full_share']:.1%} have all; {labels['fewer_positive_share']:.1%} of those with one "
            "have a label whose score is not positive, or fewer than all."
        )
    return lines


def settings_table(recipe: dict[str, Any]) -> str | None:
    """What is mixed into each student, and how; None if into none of them. A dash is what has no effect."""
    rows = []
    for name, student in recipe["students"].items():
        if (mixer := student["mixer"]) is None:
            continue
        content = "pause" if student["method"] == "pause" else mixer["content"]
        labels = {**recipe["labels"], **{k: v for k, v in (student["labels"] or {}).items() if v is not None}}
        of_concepts = content == "concepts"
        rows.append(
            [
                name,
                f"{content} ({mixer['regression_loss']})" if content == "hidden_states" else content,
                mixer["mixing"],
                mixer["concept_slot"] if mixer["mixing"] != "none" else "–",
                str(mixer["insert_layer"]),
                "–" if content == "pause" else f"{mixer['concept_loss_weight']:g}",
                str(mixer["num_active_concepts"]) if of_concepts else "–",
                f"{labels['labels_per_token']} by {labels['selection']}" if of_concepts else "–",
            ]
        )
    header = ["student", "mixes in", "how", "slot", "after blocks", "loss weight", "K", "labels per token"]
    return table(header, rows) if rows else None


def markdown(results: dict[str, Any]) -> str:
    """The report as Markdown."""
    parts = [f"# {results['name']}", students_table(results["students"]), equal_cost_table(results)]
    parts.append(
        "Loss where every run has cost as much as the cheapest: in tokens, in FLOPs of its own training, in those and "
        "its part of teacher, SAE and labels, and in time."
    )
    sentences = comparison_sentences(results)
    if sentences:
        parts.append("\n\n".join(sentences))
    parts.append(f"![Validation loss by tokens and by FLOPs]({CURVES})")
    concepts = concepts_table(results["students"])
    if concepts:
        parts += [
            "## Concepts",
            concepts,
            "Over validation tokens that have labels. Precision: share of the predicted concepts (the model's own "
            "top K) that are labels; with fewer labels than predictions it cannot reach 100%. Recall: share of the "
            "labels that are predicted; constant recall: that of always predicting the K most frequent labels.",
        ]
    if measured := evaluation_tables(results["evaluations"]):
        parts += [
            "## Evaluation",
            *measured,
            "By `cocomix evaluate`. In brackets: 95 % intervals over documents, which say what other text of the kind "
            "would change. Tasks: lm-evaluation-harness, value ± standard error.",
        ]
    parts += ["## What this means", _bullets(caveats(results))]
    provenance = _provenance(results)
    if provenance:
        parts += ["## How it was made", _bullets(provenance)]
    settings = settings_table(results["recipe"]) if "recipe" in results else None
    if settings:
        parts += [settings, "The published settings are `interleave`, slot `concept`, weight 0.1, K 32, 4 labels."]
    if environment := results.get("environment"):
        versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
        parts.append(
            f"Measured on {environment['date']} with {environment['hardware']}; cocomix commit "
            f"{environment['commit'] or 'unknown'}; {versions}; command `{environment['command']}`."
        )
    return "\n\n".join(parts) + "\n"


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def to_html(text: str, title: str, folder: Path) -> str:
    """The Markdown report as one page, pictures inside it."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark").enable("table").render(text)

    def embed(match: re.Match[str]) -> str:
        data = base64.b64encode((folder / match[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{data}"'

    return _PAGE.format(title=html.escape(title), body=re.sub(r'src="([^"]+\.png)"', embed, body))
