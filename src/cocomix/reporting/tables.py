"""Tables of the measurements of `cocomix evaluate`, for one model or several."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from cocomix.common.document import Block, Table, literal
from cocomix.data.packing import text_changed_note
from cocomix.reporting.concept_tables import concept_tables, steering_tables

Evaluations = dict[str, list[dict[str, Any]]]
"""`Evaluation`s as dictionaries, by model."""


def evaluation_tables(evaluations: Evaluations) -> list[Block]:
    """Build the tables that have data: text losses, by context and by token frequency, tasks, concepts, steering.

    A note on text that has changed follows the text losses.
    """
    texts = _of_kind(evaluations, "text")
    texts.sort(key=lambda row: (row[1]["name"], row[1]["settings"]["text"]))  # keeps the models of a text together
    found: list[Block] = [_text_table(texts)] if texts else []
    found += [
        f"`{model}`: {text_changed_note(changed, literal(_name(each, texts)))}"
        for model, each in texts
        if (changed := each["figures"].get("text_changed"))
    ]
    found += [_bucket_table(texts, *buckets) for buckets in BUCKETS if texts]
    tasks = _task_table(evaluations)
    found += [tasks] if tasks is not None else []
    return [
        *found,
        *concept_tables(_of_kind(evaluations, "concepts")),
        *steering_tables(_of_kind(evaluations, "steering")),
    ]


def _of_kind(evaluations: Evaluations, kind: str) -> list[tuple[str, dict[str, Any]]]:
    """Select the measurements of one kind, each with its model."""
    return [(model, each) for model, found in evaluations.items() for each in found if each["kind"] == kind]


BUCKETS = (
    ("by_context", "loss by tokens of context"),
    ("by_frequency", "loss by occurrences per million tokens"),
)


def _text_table(texts: list[tuple[str, dict[str, Any]]]) -> Table:
    header = ["model", "text", "window/stride", "documents", "tokens", "loss", "perplexity", "bits/byte"]
    rows = []
    for model, each in texts:
        figures = each["figures"]
        rows.append(
            [
                model,
                _name(each, texts),
                _reading(each),
                f"{figures['documents']:,}",
                f"{figures['tokens']:,}",
                f"{figures['loss']:.4f}",
                f"{figures['perplexity']:.2f}{_interval(figures['perplexity_interval'], '.2f')}",
                f"{figures['bits_per_byte']:.4f}{_interval(figures['bits_per_byte_interval'], '.4f')}",
            ]
        )
    return Table(header, rows)


def _bucket_table(texts: list[tuple[str, dict[str, Any]]], key: str, what: str) -> Table:
    """Build a table with one row per model and text and one column per bucket."""
    buckets = {(bucket["from"], bucket["to"]) for _, each in texts for bucket in each["figures"][key]}
    columns = sorted(buckets, key=lambda bucket: (bucket[0], bucket[1] or 0))
    rows = []
    for model, each in texts:
        losses = {(bucket["from"], bucket["to"]): bucket["loss"] for bucket in each["figures"][key]}
        cells = [f"{losses[column]:.4f}" if column in losses else "–" for column in columns]
        rows.append([model, _name(each, texts), _reading(each), *cells])
    return Table([what, "text", "window/stride", *map(_bucket_name, columns)], rows)


def _bucket_name(bucket: tuple[float, float | None]) -> str:
    low, high = bucket
    if high is None:
        return f"{low:,}+"
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def _reading(each: dict[str, Any]) -> str:
    settings = each["settings"]
    return f"{settings['window']}/{settings['stride']} {settings['precision']}"


def _name(each: dict[str, Any], texts: list[tuple[str, dict[str, Any]]]) -> str:
    """Return the name of a text, with part of its fingerprint if another text has the same name."""
    contents = {other["settings"]["text"] for _, other in texts if other["name"] == each["name"]}
    return each["name"] if len(contents) == 1 else f"{each['name']} #{each['settings']['text'][:6]}"


def _interval(interval: list[float] | None, form: str) -> str:
    return "" if interval is None else f" ({interval[0]:{form}}–{interval[1]:{form}})"


def _task_table(evaluations: Evaluations) -> Table | None:
    """Build a table with one row per task, settings and metric and one column per model; None without tasks."""
    rows: defaultdict[str, dict[str, str]] = defaultdict(dict)  # in order of first appearance
    for model, found in evaluations.items():
        for each in found:
            if each["kind"] == "task":
                for metric, measured in each["figures"]["metrics"].items():
                    rows[f"{each['name']} {metric}{_task_settings(each['settings'])}"][model] = _measured(measured)
    models = [model for model in evaluations if any(model in row for row in rows.values())]
    if not models:
        return None
    return Table(["task", *models], [[name, *(row.get(m, "–") for m in models)] for name, row in rows.items()])


def _task_settings(settings: dict[str, Any]) -> str:
    """Format the settings that differ from the defaults."""
    parts = [f"first {settings['limit']}"] if settings["limit"] is not None else []
    parts += [settings["precision"]] if settings["precision"] != "fp32" else []
    return f" ({', '.join(parts)})" if parts else ""


def _measured(measured: dict[str, float | None]) -> str:
    value, error = measured["value"], measured["stderr"]
    if value is None:
        return "–"
    form = ".4f" if value < 1e4 else ".4g"
    return f"{value:{form}}" + (f" ± {error:{form}}" if error is not None else "")
