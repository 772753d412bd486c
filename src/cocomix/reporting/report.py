"""Write the text, tables and plots of a report that compares runs."""

from __future__ import annotations

from statistics import fmean, stdev
from typing import Any

from cocomix.common.document import Block, Bullets, Heading, Picture, Table, literal
from cocomix.common.units import duration
from cocomix.reporting.answer import answer
from cocomix.reporting.concept_report import concept_section
from cocomix.reporting.concept_tables import SUMMARY_NOTE, concept_summary
from cocomix.reporting.curves import CURVES
from cocomix.reporting.envelope import ENVELOPE, ENVELOPE_NOTE, envelope_table, has_envelope
from cocomix.reporting.tables import evaluation_tables
from cocomix.reporting.wording import caveats, comparison_sentences, concept_sentences, provenance_lines, verdict_note
from cocomix.training import older_records

EVALUATION_NOTE = (
    "Measured by `cocomix evaluate`. In parentheses: 95 % intervals over documents, that is, the variation to expect "
    "with other text of the same kind. Tasks: lm-evaluation-harness, value ± standard error."
)
GATE_NOTE = (
    "Mean gate: the mean, over the tokens of the training, of the weight of what a student learns from its teacher. "
    "The weight is 1/2 where both predict the next token equally well, and falls as the student outgrows its teacher."
)
STUDENTS_NOTE = (
    "Loss: validation loss at the end, nats per token. FLOPs: the student's own training. All for one run: adds the "
    "teacher's work during training and all of teacher, SAE and labels. Stored: all weights. Activated: the weights "
    "that one token uses."
)
EQUAL_COST_NOTE = (
    "Each column compares the runs at the budget of the cheapest one; a dash if a run costs more than that by its "
    "first evaluation. All shared: teacher, SAE and labels are divided among the runs here that learn from them."
)
PUBLISHED_SETTINGS = (
    "The published settings are `interleave`, slot `concept`, weight 0.1, K 32, 4 labels by `attribution`."
)


def equal_cost_table(results: dict[str, Any]) -> Table:
    """Build a table of each group's mean loss at equal cost, with the standard deviation over seeds."""
    equal = results["equal_cost"]
    header = [
        "student",
        "seeds",
        f"loss at {equal['tokens']['budget'] / 1e6:,.3g}M tokens",
        f"at {equal['student_flops']['budget']:.2e} FLOPs",
        f"at {equal['all_flops']['budget']:.2e} FLOPs, all shared",
        f"at {equal['single_run_flops']['budget']:.2e} FLOPs, all for one run",
        f"after {duration(equal['seconds']['budget'])}",
    ]
    rows = [
        [name, str(len(members)), *(_mean_and_deviation([equal[axis]["losses"][m] for m in members]) for axis in equal)]
        for name, members in results["groups"].items()
    ]
    return Table(header, rows)


def _mean_and_deviation(losses: list[float | None]) -> str:
    known = [loss for loss in losses if loss is not None]
    if len(known) < len(losses):
        return "–"
    return f"{fmean(known):.4f}" + (f" ± {stdev(known):.4f}" if len(known) > 1 else "")


def is_gated(results: dict[str, Any]) -> bool:
    """Return whether a student has a gate."""
    return any("mean_gate" in student["metrics"] for student in results["students"].values())


def _mean_gate(metrics: dict[str, float]) -> str:
    return f"{metrics['mean_gate']:.3f}" if "mean_gate" in metrics else NONE


def students_table(results: dict[str, Any]) -> Table:
    """Build a table of each student's losses, size and cost; with the teacher's tokens too, where known."""
    teacher_tokens = results.get("teacher", {}).get("tokens")
    gated = is_gated(results)
    header = [
        "student",
        "loss",
        "perplexity",
        "bits/byte",
        "tokens",
        *(["tokens, with teacher's"] if teacher_tokens else []),
        "FLOPs",
        "FLOPs, all for one run",
        "time",
        "tokens/s",
        "stored",
        "activated",
        *(["mean gate"] if gated else []),
    ]
    rows = [
        [
            name,
            f"{student['metrics']['loss']:.4f}",
            f"{student['metrics']['perplexity']:.2f}",
            f"{student['metrics']['bits_per_byte']:.4f}",
            f"{student['tokens'] / 1e6:.2f}M",
            *([_tokens_with_teacher(student, teacher_tokens)] if teacher_tokens else []),
            f"{student['training_flops']:.2e}",
            f"{student['costs']['single_run_flops'][-1]:.2e}",
            duration(student["timing"]["seconds"]),
            f"{student['timing']['tokens_per_second']:,.0f}",
            f"{student['stored_parameters'] / 1e6:.2f}M",
            f"{student['activated_parameters'] / 1e6:.2f}M",
            *([_mean_gate(student["metrics"])] if gated else []),
        ]
        for name, student in results["students"].items()
    ]
    return Table(header, rows)


def _tokens_with_teacher(student: dict[str, Any], teacher_tokens: int) -> str:
    """Return the training tokens of a student and of the teacher that it learns from."""
    return f"{(student['tokens'] + (teacher_tokens if student['preparation'] else 0)) / 1e6:.2f}M"


NONE = "–"
"""Cell for a figure that is unknown or a setting that has no effect."""


SETTINGS = (
    "mixes in",
    "how",
    "slot",
    "after blocks",
    "loss weight",
    "K",
    "labels per token",
    "distillation",
    "gate",
    "learning rate",
)


def settings_table(recipe: dict[str, Any]) -> Table | None:
    """Build a table of the students' settings other than the backbone; None if there are none.

    A dash marks a setting that has no effect.
    """
    students = older_records.complete_students(recipe)
    rows = {
        name: [*_mixed(student), _labeled(student), _distilled(student), _gated(student), rate]
        for (name, student), rate in zip(students.items(), _learning_rates(recipe), strict=True)
    }
    shown = {name: row for name, row in rows.items() if any(cell != NONE for cell in row)}
    used = [at for at in range(len(SETTINGS)) if any(row[at] != NONE for row in shown.values())]
    header = ["student", *(SETTINGS[at] for at in used)]
    return Table(header, [[name, *(row[at] for at in used)] for name, row in shown.items()]) if shown else None


def _mixed(student: dict[str, Any]) -> list[str]:
    """Return content, mixing, slot, insertion layer, λ and K of a student's mixer."""
    if student["mixer"] is None:
        return [NONE] * 6
    mixer = student["mixer"]
    content = "pause" if student["method"] == "pause" else mixer["content"]
    return [
        f"{content} ({mixer['regression_loss']})" if content == "hidden_states" else content,
        mixer["mixing"],
        mixer["concept_slot"] if mixer["mixing"] != "none" else NONE,
        str(mixer["insert_layer"]),
        NONE if content == "pause" else _scheduled(mixer["concept_loss_weight"], mixer.get("concept_loss_schedule")),
        str(mixer["num_active_concepts"]) if content == "concepts" else NONE,
    ]


def _scheduled(weight: float, schedule: dict[str, Any] | None) -> str:
    """Return the weight of a loss and how it changes, e.g. `1, linear to 0 from 0 % to 50 % of the steps`."""
    if schedule is None:
        return f"{weight:g}"
    kind = "on" if schedule["kind"] == "constant" else f"{schedule['kind']} to 0"
    return f"{weight:g}, {kind} from {100 * schedule['start']:g} % to {100 * schedule['end']:g} % of the steps"


def _labeled(student: dict[str, Any]) -> str:
    if student["method"] != "cocomix" or student["mixer"]["content"] != "concepts":
        return NONE
    labels = student["labels"]
    offset = f", of the token {labels['offset']} later" if labels["offset"] else ""
    window = f", over the next {labels['window']} tokens" if labels["window"] else ""
    control = "" if labels["control"] == "none" else f", {labels['control']}"
    weighted = ", weighted by activation" if labels["targets"] == "activation" else ""
    return f"{labels['labels_per_token']} by {labels['selection']}{offset}{window}{control}{weighted}"


def _distilled(student: dict[str, Any]) -> str:
    distillation = student.get("distillation")
    if not distillation:
        return NONE
    top = f", top {distillation['top_k']}" if distillation["top_k"] else ""
    weight = _scheduled(distillation["weight"], distillation.get("weight_schedule"))
    return f"{weight} at τ {distillation['temperature']:g}{top}"


def _gated(student: dict[str, Any]) -> str:
    return NONE if student["gate"] is None else f"τ {student['gate']['temperature']:g}"


def _learning_rates(recipe: dict[str, Any]) -> list[str]:
    """Return each student's learning rate; dashes if all use the recipe's, which older records leave out."""
    rates = [student.get("learning_rate") for student in recipe["students"].values()]
    alike = all(rate in (None, recipe["training"]["learning_rate"]) for rate in rates)
    return [NONE if alike or rate is None else f"{rate:g}" for rate in rates]


def _answers(results: dict[str, Any]) -> list[Block]:
    found = answer(results)
    return [Bullets(found)] if len(found) > 1 else [*found]


def report(results: dict[str, Any]) -> list[Block]:
    """Build the report."""
    parts: list[Block] = [Heading(1, literal(results["name"])), *_answers(results)]
    parts += [students_table(results), STUDENTS_NOTE]
    if is_gated(results):
        parts.append(GATE_NOTE)
    parts.append(Picture(CURVES, "Validation loss by tokens and by FLOPs"))
    if results["comparisons"]:
        parts += [Heading(2, "In detail"), *comparison_sentences(results)]
    if note := verdict_note(results):
        parts.append(note)
    parts += [equal_cost_table(results), EQUAL_COST_NOTE]
    if has_envelope(results):
        envelope = Picture(ENVELOPE, "Validation loss by FLOPs, with the envelope of next-token prediction")
        parts += [envelope_table(results), ENVELOPE_NOTE, envelope]
    if concepts := concept_summary(results["students"]):
        parts += [Heading(2, "Concepts"), *concepts, SUMMARY_NOTE, *concept_sentences(results["students"])]
    if shown := results.get("showcase"):
        parts += concept_section(shown)
    if measured := evaluation_tables(results["evaluations"]):
        parts += [
            Heading(2, "Evaluation"),
            *measured,
            EVALUATION_NOTE,
        ]
    parts += [Heading(2, "How to read these results"), Bullets(caveats(results))]
    provenance = provenance_lines(results)
    if provenance:
        parts += [Heading(2, "Provenance"), Bullets(provenance)]
    settings = settings_table(results["recipe"]) if "recipe" in results else None
    if settings:
        parts += [settings, PUBLISHED_SETTINGS]
    if environment := results.get("environment"):
        versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
        parts.append(
            f"Measured on {environment['date']} with {environment['hardware']}; cocomix commit "
            f"{environment['commit'] or 'unknown'}; {versions}; command `{environment['command']}`."
        )
    return parts
