"""What a plan counts, and by which GPU's figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from cocomix.cli.main import main
from cocomix.common.gpus import GPUS, peak_flops
from cocomix.pipeline.recipe_file import load_recipe
from cocomix.planning import calibration

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


def test_a_plan_counts_every_replicate(capsys, tmp_path) -> None:
    plans = []
    for options in ((), ("--replicates", "3")):
        options += ("--output", str(tmp_path))  # not that of a finished run, whose corpus has its own size
        assert main(["plan", QUICKSTART, "--only", "cocomix", "--gpus", "1", *options, "--json"]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    one, three = plans
    for kind in ("preparation", "students"):
        for alone, every in zip(one[kind], three[kind], strict=True):
            assert {name: 3 * value for name, value in alone["flops"].items()} == every["flops"]
            assert every["hours"] == pytest.approx(3 * alone["hours"])
    assert "FLOPs, hours and storage are those of all 3 replicates" in three["remarks"]


def test_what_the_teacher_computes_for_an_sae_is_the_teachers(capsys) -> None:
    assert main(["plan", QUICKSTART, "--only", "cocomix", "--gpus", "1", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    flops = next(part["flops"] for part in plan["preparation"] if part["name"] == "sae")
    sizes = load_recipe(QUICKSTART)
    width, tokens = sizes.teacher.backbone.hidden_size, sizes.sae.training_tokens
    assert flops["sae"] == 3 * 2 * 2 * sizes.sae.d_sae * width * tokens  # encoder and decoder, there and back
    assert flops["teacher"] > 0


def test_labels_by_activation_are_the_cheapest_to_make(capsys) -> None:
    flops = {}
    for selection in ("attribution", "activation"):
        options = ("--only", "cocomix", "--gpus", "1", "--labels.selection", selection)
        assert main(["plan", QUICKSTART, *options, "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        labels = next(part["flops"] for part in plan["preparation"] if part["name"] == "labels")
        flops[selection] = labels["teacher"], labels["sae"]
    assert flops["activation"][0] < flops["attribution"][0] / 2
    assert flops["activation"][1] < flops["attribution"][1]


def test_a_student_of_concepts_and_predictions_pays_for_the_teacher(capsys, tmp_path) -> None:
    recipe = yaml.safe_load(Path(QUICKSTART).read_text())
    cocomix = {"method": "cocomix", "mixer": {"insert_layer": 1}}
    recipe["students"] = {
        "kd": {"method": "kd"},
        "cocomix": cocomix,
        "both": {**cocomix, "distillation": {}},
        "stored": {**cocomix, "distillation": {"top_k": 8}},
        "gated": {**cocomix, "gate": {"temperature": 0.5}},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["plan", str(path), "--gpus", "1", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    asked = {student["name"]: student["flops_per_token"]["teacher"] for student in plan["students"]}
    assert asked["both"] == asked["kd"] > asked["cocomix"] == asked["stored"] == asked["gated"] == 0
    assert {"predictions-top-8-temperature-1.0", "teacher-losses"} <= {part["name"] for part in plan["preparation"]}


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--sae.teacher_layer", "9", "sae: teacher_layer is 9; a teacher of 4 blocks takes 0 to 3"),
        ("--backbone.options.n_layer", "2", "backbone.options.n_layer overrides the recipe's num_hidden_layers"),
        ("--backbone.model_type", "gptj", "the backbone 'gptj' cannot be split around the mixer: a trial fails"),
        ("--students.ntp.distillation.top_k", "4096", "students.ntp: distillation has no effect"),
        (
            "--students",
            "{kd: {method: kd, distillation: {top_k: 4000}}}",
            "students.kd: distillation.top_k is 4000, of",
        ),
    ],
)
def test_a_plan_refuses_what_a_run_refuses(option, value, said, capsys) -> None:
    assert main(["plan", QUICKSTART, "--gpus", "1", option, value]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line


def test_a_gpu_is_known_by_the_words_of_its_name(monkeypatch) -> None:
    def peak(name: str) -> float | None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
        return peak_flops(torch.device("cuda"))

    assert peak("NVIDIA H100 80GB HBM3") == peak("NVIDIA H200") == GPUS["H100"].half
    assert peak("NVIDIA A100-SXM4-80GB") == GPUS["A100"].half
    assert peak("NVIDIA GeForce RTX 4090") == GPUS["RTX 4090"].half
    assert peak("NVIDIA L40") is None


def test_a_plan_is_of_this_machine_unless_gpus_are_given(capsys, monkeypatch) -> None:
    speed = calibration.training_speed("cpu", torch.float32, seconds=0.01)
    assert speed > 0
    monkeypatch.setattr(calibration, "training_speed", lambda *_: speed)
    assert main(["plan", QUICKSTART]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "× " not in lines[0]
    for name in ("ntp", "cocomix"):
        costs, memory = (line for line in lines if line.startswith(f"| {name} "))
        assert re.search(r" (s|min|h|days) \|$", costs) and re.search(r"[\d.]+ MiB .* yes \|$", memory)


def test_the_message_about_a_step_names_the_option_to_give(capsys) -> None:
    assert main(["plan", QUICKSTART, "--gpus", "8"]) == 2
    assert capsys.readouterr().err.endswith("give --gpus 1 or change training.tokens_per_step\n")
