"""Tables of `cocomix evaluate concepts` and `cocomix evaluate steering`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from cocomix.common.document import Table

Measured = Sequence[tuple[str, dict[str, Any]]]
"""`Evaluation`s of one kind as dictionaries, each with the name of its model."""


BITS = {
    "constant_loss": "H(label)",
    "token_table_loss": "given token",
    "bigram_table_loss": "given 2 tokens",
    "concept_loss": "student",
    "concept_loss_floor": "floor",
}
EXPLAINED = {"token_table_loss": "explained by token", "bigram_table_loss": "by 2 tokens"}
SHARES = {
    "concept_precision_at_a": "precision@A",
    "token_table_precision_at_a": "of token table",
    "bigram_table_precision_at_a": "of bigram table",
    "concept_recall": "recall@K",
    "token_table_recall": "of token table",
    "bigram_table_recall": "of bigram table",
    "constant_recall": "constant",
    "concept_precision": "precision@K",
}
"""Column headers by metric of a run; runs of older versions lack some metrics."""
SUMMARY_NOTE = (
    "How well each student predicts the concept labels of validation tokens. First table: bits per label. H(label): "
    "from the labels' overall frequencies. Given token: from their frequencies with the current token. Given 2 "
    "tokens: with the previous and the current token. Floor: a prediction that knows the labels of each token. "
    "Explained: the share of H(label) − student that one or two tokens explain. Second table: A is the number of "
    "labels of a token. Precision@A: share of labels among the A most probable concepts. Recall@K: share of the "
    "labels among the K most probable. Precision@K: share of labels among these K; with fewer than K labels per "
    "token it cannot exceed the limit in parentheses. Token table and bigram table: the training labels that are "
    "most frequent with the current token, and with the previous and the current token. Constant: the K most "
    "frequent labels. Labels that are computed during training are not stored, so the tables then count validation "
    "labels, which favors them."
)


def concept_summary(students: dict[str, Any]) -> list[Table]:
    """Build the tables of how well cocomix students predict their labels; empty without such students."""
    measured = {name: student["metrics"] for name, student in students.items() if "concept_loss" in student["metrics"]}
    if not measured:
        return []
    bits = [
        [
            name,
            *(f"{m[key] / math.log(2):.3f}" if key in m else "–" for key in BITS),
            *(_share(explained_share(m, key)) for key in EXPLAINED),
        ]
        for name, m in measured.items()
    ]
    shares = [
        [name, *(_share(m.get(key)) + _limit(m) * (key == "concept_precision") for key in SHARES)]
        for name, m in measured.items()
    ]
    return [
        Table(["bits per label", *BITS.values(), *EXPLAINED.values()], bits),
        Table(["student", *SHARES.values()], shares),
    ]


def _limit(metrics: dict[str, float]) -> str:
    """Return the largest possible precision@K in parentheses: labels per token / K, or "" if it is unknown."""
    precision, recall = metrics.get("concept_precision"), metrics.get("concept_recall")
    return f" (at most {precision / recall:.1%})" if precision and recall else ""


def explained_share(metrics: dict[str, float], table_loss: str) -> float | None:
    """Return the share of a student's gain over the labels' overall frequencies that a table reaches.

    None if the metrics lack one of the losses, or if the student gains nothing.
    """
    if "constant_loss" not in metrics or table_loss not in metrics:
        return None
    gain = metrics["constant_loss"] - metrics["concept_loss"]
    return (metrics["constant_loss"] - metrics[table_loss]) / gain if gain > 0 else None


def concept_tables(measured: Measured) -> list[Table]:
    """Build the tables of predictions by frequency band, calibration, and losses with the vector changed."""
    banded = [(_name(model, each), each["figures"]["bands"]) for model, each in measured if each["figures"]["bands"]]
    channels = [
        (_name(model, each), each["figures"]["channel"]) for model, each in measured if each["figures"]["channel"]
    ]
    found = [_band_table(banded, "A"), _band_table(banded, "K"), _calibration_table(banded)] if banded else []
    return [*found, _channel_table(channels)] if channels else found


def _name(model: str, each: dict[str, Any]) -> str:
    """Return a row's name: the model, with the settings that differ from the defaults."""
    settings = each["settings"]
    parts = [f"first {settings['limit']} blocks"] if settings["limit"] is not None else []
    parts += [settings["precision"]] if settings["precision"] != "fp32" else []
    return f"{model} ({', '.join(parts)})" if parts else model


BANDS = {
    "A": {
        "precision": "precision@A",
        "table_precision": "of token table",
        "bigram_precision": "of bigram table",
        "recall_at_a": "recall@A",
        "table_recall_at_a": "of token table",
        "bigram_recall_at_a": "of bigram table",
    },
    "K": {
        "recall": "recall@K",
        "table_recall": "of token table",
        "bigram_recall": "of bigram table",
        "misplaced": "calibration error",
    },
}
"""Columns by the number of predictions per token: A, its number of labels, or K. Older evaluations lack some."""


def _band_table(banded: Sequence[tuple[str, list[dict[str, Any]]]], rank: str) -> Table:
    shares = BANDS[rank]
    header = ["model", "label frequency", "concepts", "labels", *shares.values()]
    return Table(
        header,
        [
            [
                name,
                band["name"],
                f"{band['concepts']:,}",
                f"{band['labels']:,}",
                *(_share(band.get(key)) for key in shares),
            ]
            for name, bands in banded
            for band in bands
        ],
    )


def _calibration_table(banded: Sequence[tuple[str, list[dict[str, Any]]]]) -> Table:
    """Build the calibration table over all concepts."""
    return Table(
        ["model", "expected labels", "observed labels", "predictions"],
        [
            [name, f"{each['promised']:.5f}", f"{each['found']:.5f}", f"{each['predictions']:,}"]
            for name, bands in banded
            for each in bands[0]["promises"]
        ],
    )


def _channel_table(channels: Sequence[tuple[str, dict[str, float]]]) -> Table:
    changes = [change for change in channels[0][1] if change != "own"]
    return Table(
        ["loss with the continuous vector", "own", *changes],
        [
            [
                name,
                f"{losses['own']:.4f}",
                *(f"{losses[each]:.4f} ({losses[each] - losses['own']:+.4f})" for each in changes),
            ]
            for name, losses in channels
        ],
    )


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def steering_tables(measured: Measured) -> list[Table]:
    """Build a table with one row per arm and strength."""
    rows = [
        [
            f"{model}: {arm['name']}{_settings(each['settings'])}",
            f"{point['strength']:g}",
            *(_estimate(point[key]) for key in ("gain", "control", "specific", "cost")),
            f"{point['perplexity']:.1f}",
            f"{point['distinct_1']:.3f}",
            f"{point['distinct_2']:.3f}",
        ]
        for model, each in measured
        for arm in each["figures"]["arms"]
        for point in arm["points"]
    ]
    header = [
        "steered by",
        "strength",
        "gain",
        "control",
        "gain − control",
        "cost",
        "perplexity",
        "distinct-1",
        "distinct-2",
    ]
    return [Table(header, rows)] if rows else []


def _settings(settings: dict[str, Any]) -> str:
    return f" ({settings['concepts']} concepts × {settings['prompts']} prompts)"


def _estimate(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['mean']:+.3f} ({low:+.3f} to {high:+.3f})"
