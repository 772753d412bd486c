"""Every method from one recipe: trained, compared, on the same data, and never made twice."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_from_disk
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cocomix.cli.main import main
from tiny_run import Runner, finished_run, tiny_recipe, training

MIXER = {"insert_layer": 1, "num_active_concepts": 8, "concept_slot": "residual"}
PAUSE = {"insert_layer": 1, "concept_slot": "residual"}
STUDENTS: dict[str, dict[str, Any]] = {
    "ntp": {"method": "ntp"},
    "ntp-slow": {"method": "ntp", "training": {"learning_rate": 1e-4, "schedule": "wsd"}},
    "kd": {"method": "kd"},
    "kd-strong": {"method": "kd", "distillation": {"weight": 1.0, "temperature": 2.0}},
    "kd-falling": {"method": "kd", "distillation": {"weight_schedule": {"kind": "linear", "end": 0.5}}},
    "kd-stored": {"method": "kd", "distillation": {"weight": 1.0, "temperature": 2.0, "top_k": 299}},  # of 300 tokens
    "pause": {"method": "pause", "mixer": PAUSE, "match": "cocomix"},
    "pause-kd": {"method": "pause", "mixer": PAUSE, "distillation": {"top_k": 8}},
    "mtp": {"method": "mtp"},
    "cocomix": {"method": "cocomix", "mixer": MIXER},
    "loss-only": {"method": "cocomix", "mixer": {**MIXER, "mixing": "none"}},
    "mixing-only": {"method": "cocomix", "mixer": {**MIXER, "concept_loss_weight": 0.0}},
    "cocomix-kd": {"method": "cocomix", "mixer": MIXER, "distillation": {"weight": 1.0, "temperature": 2.0}},
    "cocomix-kd-stored": {
        "method": "cocomix",
        "mixer": MIXER,
        "distillation": {"weight": 1.0, "temperature": 2.0, "top_k": 299},
    },
    "kd-gated": {
        "method": "kd",
        "distillation": {"weight": 1.0, "temperature": 2.0},
        "gate": {"temperature": 0.5},
    },
    "kd-gated-stored": {
        "method": "kd",
        "distillation": {"weight": 1.0, "temperature": 2.0, "top_k": 299},
        "gate": {"temperature": 0.5},
    },
    "cocomix-gated": {"method": "cocomix", "mixer": MIXER, "gate": {"temperature": 0.5}},
    "add": {"method": "cocomix", "mixer": {**MIXER, "mixing": "add"}},
    "activation": {"method": "cocomix", "mixer": MIXER, "labels": {"selection": "activation", "labels_per_token": 3}},
    "hidden": {
        "method": "cocomix",
        "mixer": {**PAUSE, "content": "hidden_states", "regression_loss": "cosine"},
    },
}


@pytest.fixture(scope="module")
def compared(finished: Runner, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """The tiny recipe with a student of every kind, its corpus, teacher, SAE and labels made before."""
    out = finished.folder / "out"

    def recipe(output: Path) -> dict[str, Any]:
        few = {**training(8192), "tokens_per_evaluation": 4096}
        return {**tiny_recipe(text, output), "training": few, "students": STUDENTS}

    return finished_run(tmp_path_factory, "methods", recipe, prepared=out)


@pytest.fixture(scope="module")
def results(compared: Runner) -> dict[str, Any]:
    return json.loads((compared.folder / "out" / "report" / "results.json").read_text())


def run_of(runner: Runner, name: str) -> dict[str, Any]:
    return json.loads((runner.folder / "out" / "students" / name / "run.json").read_text())


def test_every_student_is_trained_on_the_same_tokens_and_learns(results):
    assert list(results["students"]) == list(STUDENTS)
    for name, student in results["students"].items():
        assert student["method"] == STUDENTS[name]["method"]
        assert student["tokens"] == 8192
        losses = [point["loss"] for point in student["curve"]]
        assert losses[-1] < losses[0] < math.log(300) + 0.2, name
    slow, plain = ([point["loss"] for point in results["students"][name]["curve"]] for name in ("ntp-slow", "ntp"))
    assert slow[0] - slow[-1] < (plain[0] - plain[-1]) / 2  # at a learning rate of its own
    assert {c["run"] for c in results["comparisons"]} == set(STUDENTS) - {"ntp"}


def test_methods_differ_in_what_they_end_with(results):
    losses = [student["metrics"]["loss"] for student in results["students"].values()]
    assert len(set(losses)) >= len(losses) - 2  # stored and online distillation may agree to the last digit


def test_a_matched_student_has_the_activated_parameters_of_the_other(results):
    students = results["students"]
    assert students["pause"]["activated_parameters"] == pytest.approx(
        students["cocomix"]["activated_parameters"], rel=0.02
    )


def test_pausing_computes_as_much_as_cocomix_above_the_mixer_and_distilling_nothing_more(results):
    flops = {name: student["training_flops_per_token"] for name, student in results["students"].items()}
    assert flops["kd"] == flops["kd-stored"] == flops["ntp"] < flops["pause-kd"] < flops["cocomix"]
    assert flops["mtp"] > flops["ntp"]


@pytest.mark.parametrize(
    "names",
    [
        ("kd-strong", "kd-stored", "ntp"),
        ("cocomix-kd", "cocomix-kd-stored", "cocomix"),
        ("kd-gated", "kd-gated-stored", "ntp"),
    ],
    ids=" ".join,
)
def test_stored_predictions_of_nearly_all_tokens_train_what_the_teacher_would(results, names):
    curves = [[point["loss"] for point in results["students"][name]["curve"]] for name in names]
    assert curves[1] == pytest.approx(curves[0], abs=1e-4)
    assert abs(curves[0][-1] - curves[2][-1]) > 3e-3


def test_what_a_student_learns_from_is_counted_whole(results):
    students = results["students"]
    kinds = {name: set(students[name]["preparation"]) for name in ("kd", "kd-stored", "cocomix", "cocomix-kd-stored")}
    assert kinds == {
        "kd": {"teacher"},
        "kd-stored": {"teacher", "predictions"},
        "cocomix": {"teacher", "sae", "labels"},
        "cocomix-kd-stored": {"teacher", "sae", "labels", "predictions"},
    }
    asked = {name: students[name]["teacher_flops_per_token"] for name in ("kd", "cocomix", "cocomix-kd")}
    assert (
        students["kd-falling"]["teacher_flops_per_token"] == asked["kd"] // 2
    )  # the teacher runs in half of the steps
    assert asked["cocomix-kd"] == asked["kd"] > asked["cocomix"] == 0


def test_a_gate_falls_as_the_student_learns_and_the_report_states_it(compared, results):
    students, out = results["students"], compared.folder / "out"
    for name in ("kd-gated", "kd-gated-stored", "cocomix-gated"):
        gates = [point["mean_gate"] for point in students[name]["curve"]]
        assert 1 > gates[0] > gates[-1] > 0
        assert students[name]["metrics"]["mean_gate"] == pytest.approx(sum(gates) / len(gates))
    assert "mean_gate" not in students["kd"]["metrics"]
    assert {"losses", "teacher"} <= set(students["cocomix-gated"]["preparation"])
    assert set(students["kd-gated"]["preparation"]) == {"teacher"}
    assert students["kd-gated"]["teacher_flops_per_token"] > students["kd"]["teacher_flops_per_token"]
    report = (out / "report" / "report.md").read_text()
    assert "| mean gate" in report and "Mean gate: the mean" in report
    teacher = json.loads((out / "teacher" / "run.json").read_text())["metrics"]["loss"]
    info = json.loads((out / "teacher-losses" / "losses.json").read_text())
    assert info["mean_loss"] == pytest.approx(teacher, abs=0.5)  # of other text
    stored = load_from_disk(str(out / "teacher-losses" / "train"))
    assert stored.features["teacher_losses"].feature.dtype == "float16"


def test_labels_of_a_students_own_lie_beside_the_recipes(compared):
    out = compared.folder / "out"
    info = json.loads((out / "labels-activation-3" / "labels.json").read_text())
    assert (info["selection"], info["labels_per_token"]) == ("activation", 3)
    assert load_from_disk(str(out / "labels-activation-3" / "train"))[0]["concept_ids"].__len__() == 32
    assert (out / "predictions-top-8-temperature-1.0" / "predictions.json").is_file()
    assert run_of(compared, "activation")["metrics"]["concept_recall"] > 0


def test_students_load_as_hugging_face_models_of_their_kind(compared):
    kinds = {"mtp": "MultiTokenForCausalLM", "pause": "CoCoMixForCausalLM", "kd": "GPT2LMHeadModel"}
    for name, kind in kinds.items():
        model = AutoModelForCausalLM.from_pretrained(compared.folder / "out" / "students" / name)
        assert type(model).__name__ == kind
        made = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert made.shape == (1, 6)


def test_nothing_is_made_twice(compared, capsys):
    assert compared("run") == 0
    assert "Nothing to do" in capsys.readouterr().err


def test_damaged_predictions_are_made_anew_by_label(compared, capsys):
    out = compared.folder / "out" / "predictions-top-8-temperature-1.0"
    shard = sorted((out / "train").glob("*.arrow"))[0]
    undamaged = shard.read_bytes()
    shard.write_bytes(undamaged[:-9])
    assert compared("label") == 0
    assert f"{shard} is damaged" in capsys.readouterr().err
    assert shard.read_bytes() == undamaged


def test_the_teacher_is_read_in_full_precision_whatever_the_student_trains_in(compared, tmp_path):
    """bfloat16 products of the student leave the teacher's distribution alone: the loss at step 0 says so."""
    for stage in ("corpus", "teacher"):
        shutil.copytree(compared.folder / "out" / stage, tmp_path / "out" / stage)
    options = ("--output", str(tmp_path / "out"), "--training.precision", "bf16")
    assert compared("train", "--only", "kd", *options) == 0
    reached = json.loads((tmp_path / "out" / "students" / "kd" / "run.json").read_text())["metrics"]["loss"]
    assert reached == pytest.approx(run_of(compared, "kd")["metrics"]["loss"], abs=0.05)


def test_the_mixer_of_a_student_that_only_learns_concepts_mixes_none_in(compared):
    weights = load_file(str(compared.folder / "out" / "students" / "loss-only" / "model.safetensors"))
    assert not any("compress" in name for name in weights)


def test_a_branch_is_trained_from_the_checkpoint_of_another_student(finished, recipe, tmp_path, capsys):
    shutil.copytree(finished.folder / "out" / "corpus", tmp_path / "out" / "corpus")
    wsd = {**training(4096), "schedule": "wsd", "decay_ratio": 0.25}
    short = {"method": "ntp", "branch_from": "long", "training": {"max_tokens": 2048}}
    runner = recipe(training=wsd, students={"short": short, "long": {"method": "ntp"}})
    assert runner("train", "--only", "short") == 0
    assert "[2/3] student long" in capsys.readouterr().err
    students = tmp_path / "out" / "students"
    assert (students / "long" / "branch-3").is_dir() and not list(students.glob("*/checkpoint-*"))
    runs = {name: json.loads((students / name / "run.json").read_text()) for name in ("short", "long")}
    assert {name: run["tokens"] for name, run in runs.items()} == {"short": 2048, "long": 4096}
    assert main(["compare", *(str(students / name) for name in runs)]) == 0
    assert "short continues the training of long; its tokens, FLOPs and time count" in capsys.readouterr().out
    shutil.rmtree(students / "long" / "branch-3")
    shutil.rmtree(students / "short")
    assert runner("train", "--only", "short") == 2
    told = capsys.readouterr().err
    assert "long/branch-3/" in told and "delete" in told and "long to compute student long again" in told
