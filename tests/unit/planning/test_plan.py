"""What a plan counts, and by which GPU's figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cocomix.cli import main
from cocomix.evaluation.gpus import GPUS, peak_flops
from cocomix.recipe import load_recipe

QUICKSTART = str(Path(__file__).parents[3] / "recipes" / "quickstart.yaml")


def test_a_plan_counts_every_seed(capsys) -> None:
    totals = []
    for seeds in ("[0]", "[0, 1, 2]"):
        assert main(["plan", QUICKSTART, "--only", "ntp", "--gpus", "1", "--seeds", seeds, "--json"]) == 0
        (student,) = json.loads(capsys.readouterr().out)["students"]
        totals.append((student["flops"]["student"], student["hours"], student["tokens"]))
    (once, hours, tokens), (three_times, three_hours, same_tokens) = totals
    assert three_times == 3 * once
    assert three_hours == pytest.approx(3 * hours)
    assert same_tokens == tokens


def test_what_the_teacher_computes_for_an_sae_is_the_teachers(capsys) -> None:
    assert main(["plan", QUICKSTART, "--only", "cocomix", "--gpus", "1", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    flops = next(part["flops"] for part in plan["preparation"] if part["name"] == "sae")
    sizes = load_recipe(QUICKSTART)
    width, tokens = sizes.teacher.backbone.hidden_size, sizes.sae.training_tokens
    assert flops["sae"] == 3 * 2 * 2 * sizes.sae.d_sae * width * tokens  # encoder and decoder, there and back
    assert flops["teacher"] > 0


def test_a_gpu_is_known_by_the_words_of_its_name(monkeypatch) -> None:
    def peak(name: str) -> float | None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
        return peak_flops(torch.device("cuda"))

    assert peak("NVIDIA H100 80GB HBM3") == peak("NVIDIA H200") == GPUS["H100"].half
    assert peak("NVIDIA A100-SXM4-80GB") == GPUS["A100"].half
    assert peak("NVIDIA GeForce RTX 4090") == GPUS["RTX 4090"].half
    assert peak("NVIDIA L40") is None
