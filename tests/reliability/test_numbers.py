"""Text and sparse autoencoders without anything to learn end in a report or in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tiny_run import Runner, tiny_recipe, training, write_text

pytestmark = pytest.mark.reliability


def small(text: Path, output: Path) -> dict[str, Any]:
    recipe = tiny_recipe(text, output)
    recipe["teacher"]["training"] = recipe["training"] = training(2048)
    recipe["sae"]["training_tokens"] = 2048
    return recipe


def run(folder: Path, recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Run a recipe and return its results; no figure in them is NaN or infinite, which JSON lacks."""
    runner = Runner(folder)
    runner.write(recipe)
    code = runner("run")
    told = capsys.readouterr().err
    assert code == 0, told
    return json.loads((folder / "out" / "report" / "results.json").read_text())


def test_a_corpus_of_one_repeated_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for index in range(240):
        (text / f"{index}.txt").write_text("a" * (8000 + index))
    results = run(tmp_path, small(text, tmp_path / "out"), capsys)
    assert results["students"]["cocomix"]["metrics"]["loss"] < 6


def test_a_dead_sae(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    """No latent is ever active, so no token has a label."""
    sae = tmp_path / "dead"
    sae.mkdir()
    described = {
        "architecture": "standard",
        "d_in": 32,
        "d_sae": 64,
        "metadata": {"hook_name": "blocks.1.hook_resid_post"},
    }
    (sae / "cfg.json").write_text(json.dumps(described))
    weights = {
        "W_enc": torch.zeros(32, 64),
        "b_enc": -torch.ones(64),
        "W_dec": torch.zeros(64, 32),
        "b_dec": torch.zeros(32),
    }
    save_file(weights, sae / "sae_weights.safetensors")
    recipe = small(write_text(tmp_path / "text"), tmp_path / "out")
    recipe["sae"] = {"source": str(sae), "teacher_layer": 1}
    results = run(tmp_path, recipe, capsys)
    assert results["sae"]["quality"]["dead_share"] == 1 and results["labels"]["labelled_share"] == 0
    curves = [results["students"][name]["curve"] for name in ("ntp", "cocomix")]
    assert all(point["loss"] < 7 for curve in curves for point in curve)
