"""Tables of `cocomix evaluate concepts` and `cocomix evaluate steering`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cocomix.common.console import table

Measured = Sequence[tuple[str, dict[str, Any]]]
"""`Evaluation`s of one kind as dictionaries, each with the name of its model."""


def concept_tables(measured: Measured) -> list[str]:
    """Build the tables of predictions by frequency band, calibration, and losses with the vector changed."""
    banded = [(_name(model, each), each["figures"]["bands"]) for model, each in measured if each["figures"]["bands"]]
    channels = [
        (_name(model, each), each["figures"]["channel"]) for model, each in measured if each["figures"]["channel"]
    ]
    found = [_band_table(banded), _calibration_table(banded)] if banded else []
    return [*found, _channel_table(channels)] if channels else found


def _name(model: str, each: dict[str, Any]) -> str:
    """Return a row's name: the model, with the settings that differ from the defaults."""
    settings = each["settings"]
    parts = [f"first {settings['limit']} blocks"] if settings["limit"] is not None else []
    parts += [settings["precision"]] if settings["precision"] != "fp32" else []
    return f"{model} ({', '.join(parts)})" if parts else model


def _band_table(banded: Sequence[tuple[str, list[dict[str, Any]]]]) -> str:
    shares = {
        "precision": "precision@A",
        "recall_at_a": "recall@A",
        "table_recall_at_a": "token table@A",
        "recall": "recall@K",
        "table_recall": "token table@K",
        "misplaced": "calibration error",
    }
    header = ["model", "label frequency", "concepts", "labels", *shares.values()]
    return table(
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


def _calibration_table(banded: Sequence[tuple[str, list[dict[str, Any]]]]) -> str:
    """Build the calibration table over all concepts."""
    return table(
        ["model", "expected labels", "observed labels", "predictions"],
        [
            [name, f"{each['promised']:.5f}", f"{each['found']:.5f}", f"{each['predictions']:,}"]
            for name, bands in banded
            for each in bands[0]["promises"]
        ],
    )


def _channel_table(channels: Sequence[tuple[str, dict[str, float]]]) -> str:
    changes = [change for change in channels[0][1] if change != "own"]
    return table(
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


def steering_tables(measured: Measured) -> list[str]:
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
    return [table(header, rows)] if rows else []


def _settings(settings: dict[str, Any]) -> str:
    return f" ({settings['concepts']} concepts × {settings['prompts']} prompts)"


def _estimate(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['mean']:+.3f} ({low:+.3f} to {high:+.3f})"
