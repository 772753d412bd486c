"""Write the page of a study: tables, curves and verdicts, with the provenance of the figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from cocomix.common import files
from cocomix.common.console import table
from cocomix.common.document import Block, Bullets, Picture, to_markdown
from cocomix.common.errors import InputError
from cocomix.evaluation.verdicts import LEVEL
from cocomix.reporting.concept_tables import SUMMARY_NOTE, concept_summary
from cocomix.reporting.curves import curves_picture
from cocomix.reporting.envelope import (
    ENVELOPE,
    ENVELOPE_NOTE,
    envelope_picture,
    envelope_table,
    has_envelope,
    plain_tokens,
)
from cocomix.reporting.report import EVALUATION_NOTE, settings_table
from cocomix.reporting.tables import Evaluations, evaluation_tables
from cocomix.reporting.wording import baseline_of, caveats, provenance_lines, repetitions
from study import (
    LOSS,
    Claim,
    Measured,
    Part,
    Study,
    claim_verdicts,
    load_results,
    measure,
    unknown_costs,
)

VERDICTS = (
    "A verdict needs a smallest difference of interest: {loss:g} nats per token, {cost:.0%} of a cost. *Holds*: the "
    "difference exceeds it in the claimed direction. *Does not hold*: the difference exceeds it in the other "
    "direction. *No difference of interest*: the difference is smaller. *Not decided*: none of these is certain at "
    "{sure:.0%} for all measured claims together (Student's t over seeds, Holm's correction), or for the stated "
    "reason. A claim with its own bound is tested against that bound. In parentheses: 95 % intervals of each "
    "difference by itself."
)
CLAIM_HEADER = ["claim", "paper", "measured here", "over", "verdict"]
DETAILS_INTRODUCTION = (
    "Evaluations, settings and provenance of each part of [the results](results.md), and the parts that are too short "
    "to decide anything. The columns are explained there."
)
CONCEPTS = f"Tables of bits per label and of shares are means over seeds or replicates. {SUMMARY_NOTE}"
OWN_LOSS = "at its own loss"
WITH_TEACHER = "tokens, with teacher's"
COLUMNS = {
    "tokens": "tokens",
    "student_flops": "FLOPs",
    "all_flops": "FLOPs, all shared",
    "single_run_flops": "FLOPs, all for one run",
}
PAGE = "results.md"
DETAILS = "results-details.md"
MARKER = "<!-- Written by `docs/study/write_results.py`; change results/study.yaml instead. -->"
POINTS = 6
"""Largest number of evaluations that the table of losses by tokens lists."""
READING = (
    "*Loss*: validation, nats per token, mean ± standard deviation over seeds or replicates. *Tokens* and *FLOPs*: the "
    "cost of reaching the final loss of the baseline, relative to the baseline's cost; *at most* if the first "
    "evaluation already reaches it. *With teacher's* adds all tokens that the teacher was trained on, as if for one "
    "run alone. *FLOPs* count the student's own training; *all shared* adds the teacher's computation during training "
    "and an equal share of teacher, SAE, labels and stored predictions, divided among the runs of the table that learn "
    "from them; *all for one run* charges all of these to one run (a dash if they come from elsewhere). *At its own "
    "loss*: the tokens of the student relative to those at which the baseline, or a longer `ntp` of its size, reaches "
    "the student's final loss, on mean curves. In parentheses: 95 % intervals (Student's t) of paired differences. "
    "*Break-even*: the number of such runs that must share teacher, SAE and labels before the total takes fewer FLOPs "
    "than the baseline alone; *if stored*: with the teacher's predictions computed once for the corpus and shared too."
)


def write_page(study: Study, folder: Path) -> Path:
    """Write the page and its details into `folder`, and a plot of each part's curves into `folder/results`.

    Returns:
        Path of the page.

    Raises:
        InputError: `load_results` refuses a file, or `folder` has a page that this function did not write.
    """
    check_page(folder)
    found = [load_results(folder, part) for part in study.parts]
    claims = _claims(study, found)
    page = [f"# {study.title}", MARKER, study.introduction.strip()]
    if rows := [row for part in study.parts if not part.minor for row in claims[part.title]]:
        note = VERDICTS.format(loss=study.loss_margin, cost=study.cost_margin, sure=1 - LEVEL)
        page += ["## Claims", table(CLAIM_HEADER, rows), note]
    page += ["## How to read the tables", READING]
    details = [f"# {study.title}: details", MARKER, DETAILS_INTRODUCTION, CONCEPTS]
    for part, results in zip(study.parts, found, strict=True):
        section = _section(part, results)
        if part.minor:
            details += section
            if rows := claims[part.title]:
                details.append(table(CLAIM_HEADER, rows))
        else:
            page += section
            details.append(section[0])
        if results is None:
            continue
        details.append(_details(results))
        files.write_bytes(folder / "results" / f"{part.results}.png", curves_picture(results))
        if has_envelope(results):
            files.write_bytes(folder / "results" / f"{part.results}-{ENVELOPE}", envelope_picture(results))
    files.write_output(folder / DETAILS, "\n\n".join(details) + "\n")
    files.write_output(folder / PAGE, "\n\n".join(page) + "\n")
    return folder / PAGE


def check_page(folder: Path) -> None:
    """Raise InputError if the folder of a study has a page that was not written by `write_page`."""
    for page in (folder / PAGE, folder / DETAILS):
        if page.exists() and MARKER not in page.read_text(encoding="utf-8", errors="replace"):
            raise InputError(
                f"{page} was not written by docs/study/write_results.py; move it away and repeat the command"
            )


def _section(part: Part, results: dict[str, Any] | None) -> list[str]:
    """Return the question of a part, its tables, its conclusion and its pictures."""
    lines = [f"## {part.title}", part.question.strip()]
    if results is None:
        return [*lines, f"Not measured yet: `results/{part.results}.json` does not exist."]
    lines.append(_table(part, results, baseline_of(results)))
    if part.conclusion:
        lines.append(part.conclusion.strip())
    lines.append(f"![Validation loss by tokens and by FLOPs](results/{part.results}.png)")
    if by_tokens := _losses_by_tokens(results):
        lines.append(by_tokens)
    if has_envelope(results):
        picture = Picture(f"results/{part.results}-{ENVELOPE}", "Envelope")
        lines.append(to_markdown([envelope_table(results), ENVELOPE_NOTE, picture]).rstrip("\n"))
    return lines


def _details(results: dict[str, Any]) -> str:
    """Return what was evaluated, the settings and where the figures come from, as Markdown."""
    blocks: list[Block] = []
    if measured := evaluation_tables(_in_short(results["evaluations"])):
        blocks += [*measured, EVALUATION_NOTE]
    blocks += concept_summary(_means(results))
    if settings := settings_table(results["recipe"]):
        blocks.append(settings)
    blocks.append(Bullets([*caveats(results), *provenance_lines(results), _provenance(results)]))
    return to_markdown(blocks).rstrip("\n")


def _means(results: dict[str, Any]) -> dict[str, Any]:
    """Return the mean metrics of each group, in the form of a run."""
    means = {}
    for name, members in results["groups"].items():
        metrics = [results["students"][each]["metrics"] for each in members]
        shared = set(metrics[0]).intersection(*metrics)
        means[name] = {"metrics": {key: fmean(each[key] for each in metrics) for key in metrics[0] if key in shared}}
    return means


def _losses_by_tokens(results: dict[str, Any]) -> str:
    """Return a table of mean validation losses by tokens, and by tokens per activated parameter of the baseline.

    It has the evaluations that all students share, at most `POINTS` of them.
    """
    runs = {name: [results["students"][each] for each in members] for name, members in results["groups"].items()}
    curves = {
        name: [{point["tokens"]: point["loss"] for point in run["curve"]} for run in members]
        for name, members in runs.items()
    }
    shared = sorted(set.intersection(*(set(curve) for each in curves.values() for curve in each)))
    if len(shared) < 2:
        return ""
    places = sorted({round(place * (len(shared) - 1) / (POINTS - 1)) for place in range(POINTS)})
    chosen = [shared[place] for place in places]
    size = runs[baseline_of(results)][0]["activated_parameters"]
    header = ["loss after", *(f"{at / 1e6:.2f}M ({at / size:.1f} per parameter)" for at in chosen)]
    rows = [[name, *(f"{fmean(curve[at] for curve in each):.4f}" for at in chosen)] for name, each in curves.items()]
    return table(header, rows)


def _in_short(evaluations: Evaluations) -> Evaluations:
    """Drop the concept predictions by frequency band, which fill pages; the report of each recipe has them."""
    return {
        model: [
            {**each, "figures": {**each["figures"], "bands": []}} if each["kind"] == "concepts" else each
            for each in found
        ]
        for model, found in evaluations.items()
    }


def _table(part: Part, results: dict[str, Any], baseline: str) -> str:
    first, *others = COLUMNS
    header = [
        "student",
        "activated",
        "loss",
        f"− {baseline}",
        COLUMNS[first],
        OWN_LOSS,
        WITH_TEACHER,
        *(COLUMNS[what] for what in others),
        "break-even",
    ]
    rows = []
    for name, members in results["groups"].items():
        runs = [results["students"][member] for member in members]
        losses = [run["metrics"]["loss"] for run in runs]
        scatter = f" ± {stdev(losses):.4f}" if len(losses) > 1 else ""
        row = [name, f"{runs[0]['activated_parameters'] / 1e6:.3f}M", f"{fmean(losses):.4f}{scatter}"]
        if name == baseline:
            rows.append([*row, *[""] * (len(header) - len(row))])
            continue
        row += [_figure(measure(results, name, baseline, what), what) for what in (LOSS, first)]
        row.append(_at_own_loss(results, name, baseline))
        row.append(_with_teacher(part, results, name, baseline))
        row += [_figure(measure(results, name, baseline, what), what) for what in others]
        rows.append([*row, _break_even(results, name, baseline)])
    return table(header, rows)


def _figure(found: Measured, what: str) -> str:
    """Format a difference with its interval, or the reason that there is none."""
    if found.unknown:
        return "–"
    if found.difference is None:
        return f"reached by {found.reached} of {found.seeds} seeds" if found.reached else "not reached"
    form = "+.4f" if what == LOSS else "+.1%"
    if found.at_most and found.difference.mean >= 0:
        return "reached by the first evaluation"
    at_most = "at most " if found.at_most else ""
    interval = found.difference.interval
    around = f" ({interval[0]:{form}} to {interval[1]:{form}})" if interval else ""
    return f"{at_most}{found.difference.mean:{form}}{around}"


def _at_own_loss(results: dict[str, Any], name: str, baseline: str) -> str:
    """Compare the student's tokens with those of the baseline at the student's final loss."""
    found = plain_tokens(results, name, baseline)
    if found.tokens is None:
        return f"not reached in {found.most / 1e6:.2f}M"
    return f"{results['students'][results['groups'][name][0]]['tokens'] / found.tokens - 1:+.1%}"


def _with_teacher(part: Part, results: dict[str, Any], name: str, baseline: str) -> str:
    """Compare tokens to the baseline's final loss, the teacher's included, with the baseline's; "–" if unknown."""
    run, other = (results["students"][results["groups"][group][0]] for group in (name, baseline))
    found = measure(results, name, baseline, "tokens")
    teachers = [_teacher_tokens(part, results, student) for student in (run, other)]
    if found.difference is None or None in teachers:
        return "–"
    ours, theirs = (tokens or 0 for tokens in teachers)
    tokens = (1 + found.difference.mean) * other["tokens"] + ours
    at_most = "at most " if found.at_most else ""
    return f"{at_most}{tokens / (other['tokens'] + theirs) - 1:+.1%}"


def _teacher_tokens(part: Part, results: dict[str, Any], student: dict[str, Any]) -> int | None:
    """Return the training tokens of the teacher that a student learns from: 0 without one, None if unknown."""
    if not student["preparation"]:
        return 0
    return part.teacher_tokens or results.get("teacher", {}).get("tokens")


def _break_even(results: dict[str, Any], name: str, baseline: str) -> str:
    """Return how many runs must share teacher, SAE and labels until each costs less than the baseline."""
    run, other = (results["students"][results["groups"][group][0]] for group in (name, baseline))
    tokens = measure(results, name, baseline, "tokens").difference
    if tokens is None or not run["preparation"] or unknown_costs(results, name):
        return "–"
    preparation = sum(each["flops"] for each in run["preparation"].values())
    read = (1 + tokens.mean) * other["tokens"]
    own, teacher = run["training_flops_per_token"], run["teacher_flops_per_token"]
    online = _runs_to_share(preparation, other["training_flops"] - read * (own + teacher))
    if not teacher:
        return online
    once = teacher * results["corpus"]["packed"]["train_tokens"] if "corpus" in results else teacher * run["tokens"]
    return f"{online} ({_runs_to_share(preparation + once, other['training_flops'] - read * own)} if stored)"


def _runs_to_share(preparation: float, saved: float) -> str:
    """Format how many runs must share a preparation if each of them saves so many FLOPs."""
    if saved <= 0:
        return "never"
    runs = int(preparation // saved) + 1
    return f"{runs:,} runs" if runs > 1 else "1 run"


def _claims(study: Study, results: Sequence[dict[str, Any] | None]) -> dict[str, list[list[str]]]:
    """Return the rows of the table of claims, by the title of their part."""
    measured = [
        (part, claim, found, None if found is None else measure(found, claim.run, claim.baseline, claim.measure))
        for part, found in zip(study.parts, results, strict=True)
        for claim in part.claims or []
    ]
    decided = iter(claim_verdicts(study, [(claim, figure) for _, claim, _, figure in measured if figure is not None]))
    rows: dict[str, list[list[str]]] = {part.title: [] for part in study.parts}
    for part, claim, found, figure in measured:
        texts = [" ".join(text.split()).replace("|", "\\|") for text in (claim.text, claim.paper or "–")]
        if found is None or figure is None:
            rows[part.title].append([*texts, "–", "–", "not measured"])
        else:
            rows[part.title].append([*texts, _measured(claim, figure), _repetitions(found, claim), next(decided)])
    return rows


def _repetitions(results: dict[str, Any], claim: Claim) -> str:
    """Name what a claim's interval is over: seeds, and what they share, or replicates."""
    count = len(results["groups"][claim.run])
    return "1 seed" if count == 1 else f"{count} {repetitions(results, (claim.run, claim.baseline))}"


def _measured(claim: Claim, found: Measured) -> str:
    if found.unknown:
        return f"cost of {', '.join(found.unknown)} unknown"
    if found.difference is None:
        return _figure(found, claim.measure)
    unit = "nats" if claim.measure == LOSS else COLUMNS.get(claim.measure, claim.measure)
    return f"{_figure(found, claim.measure)} {unit}"


def _provenance(results: dict[str, Any]) -> str:
    """Name the command, dates, hardware, commits and versions behind the figures."""
    environments = [student["environment"] for student in results["students"].values()]

    def each(key: str) -> str:
        return ", ".join(dict.fromkeys(str(environment[key] or "unknown") for environment in environments))

    versions = ", ".join(f"{name} {version}" for name, version in environments[0]["versions"].items())
    dates = sorted(environment["date"] for environment in environments)
    when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    return (
        f"Command `{results['environment']['command']}`; trained {when} on {each('hardware')}; cocomix commit "
        f"{each('commit')}; {versions}."
    )
