"""Training by several processes: the same figures as by one, sharded or not, killed and gone on with."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cocomix.concepts.sae_loading import SAELENS_WEIGHTS
from several import run_in_several
from tiny_run import PREPARED, Runner, finished_run, tiny_recipe, training

STEP = {"tokens_per_step": 768, "blocks_per_batch": 2, "tokens_per_evaluation": 1536}  # 24 blocks: 12, 6 or 4 batches


def curve(run: Path) -> list[dict[str, float]]:
    return json.loads((run / "run.json").read_text())["curve"]


def assert_close(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    """The same evaluations, every figure to 1e-5."""
    assert [point.keys() for point in found] == [point.keys() for point in expected]
    for point, wanted in zip(found, expected, strict=True):
        for name, value in wanted.items():
            assert abs(point[name] - value) < 1e-5 * max(1.0, abs(value)), (name, point, wanted)


def shared_recipe(text: Path, output: Path) -> dict[str, Any]:
    """The tiny recipe with steps that 2 and 3 processes can share."""
    recipe = tiny_recipe(text, output)
    recipe["training"] = {**training(4608), **STEP}
    recipe["teacher"]["training"] = {**training(4608), **STEP}
    return recipe


@pytest.fixture(scope="module")
def alone(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """One process's run."""
    return finished_run(tmp_path_factory, "alone", lambda output: shared_recipe(text, output))


@pytest.fixture(scope="module")
def alone_every_method(alone: Runner, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """One process's run of all methods."""

    def recipe(output: Path) -> dict[str, Any]:
        content = shared_recipe(text, output)
        loss_only = {"insert_layer": 1, "mixing": "none", "concept_loss_weight": 1.0}
        content["students"]["loss-only"] = {"method": "cocomix", "mixer": loss_only}
        content["students"]["pause"] = {"method": "pause", "mixer": {"insert_layer": 1, "concept_slot": "residual"}}
        content["students"]["mtp"] = {"method": "mtp"}
        content["students"]["kd"] = {"method": "kd"}
        return content

    return finished_run(tmp_path_factory, "alone-every-method", recipe, prepared=alone.folder / "out")


def command(runner: Runner, output: Path, *options: str, prepared: tuple[str, ...] = PREPARED) -> list[str]:
    """A training from what `alone` has prepared."""
    for stage in prepared:
        shutil.copytree(runner.folder / "out" / stage, output / stage)
    return ["train", str(runner.recipe), "--output", str(output), *options]


def assert_as_by_one(output: Path, alone: Runner) -> int:
    """The students in `output` are those of one process; returns their number."""
    students = list((output / "students").iterdir())
    for student in students:
        by_one = alone.folder / "out" / "students" / student.name
        assert_close(curve(student), curve(by_one))
        assert {file.name for file in student.iterdir()} == {file.name for file in by_one.iterdir()}
        weights, expected = (load_file(folder / "model.safetensors") for folder in (student, by_one))
        assert weights.keys() == expected.keys()
        assert max((weights[key] - expected[key]).abs().max() for key in expected) < 1e-5
    return len(students)


@pytest.mark.parametrize(
    ("processes", "everything"), [(2, False), (3, False), pytest.param(2, True, marks=pytest.mark.slow)]
)
def test_the_same_curve_as_one_process(
    processes: int, everything: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Cocomix with stored labels by ddp, with online ones by fsdp; or the other way round, and every other method."""
    alone = request.getfixturevalue("alone_every_method" if everything else "alone")
    online = ("--only", "cocomix", "--labels.online", "true", "--parallel", "ddp" if everything else "fsdp")
    stored = ("--parallel", "fsdp") if everything else ("--only", "cocomix", "--parallel", "ddp")
    commands = [
        command(alone, tmp_path / "stored", *stored),
        command(alone, tmp_path / "online", *online, prepared=PREPARED[:3]),
    ]
    log = run_in_several(processes, tmp_path / "commands", commands)
    assert log.endswith(f"exit codes {[0] * processes}"), log
    trained = assert_as_by_one(tmp_path / "stored", alone)
    assert trained == (6 if everything else 1)
    assert assert_as_by_one(tmp_path / "online", alone) == 1
    for rank in range(processes):
        kept_a_share = json.loads((tmp_path / "commands" / f"{rank}.json").read_text())
        assert kept_a_share == [everything] * trained + [not everything]
    environment = json.loads((tmp_path / "stored/students/cocomix/run.json").read_text())["environment"]
    assert environment["processes"] == processes


@pytest.mark.slow
def test_replicates_by_two(alone: Runner, tmp_path: Path) -> None:
    options = ("--replicates", "2", "--only", "ntp", "--training.max_tokens", "2048")
    log = run_in_several(2, tmp_path / "commands", [command(alone, tmp_path / "out", *options, prepared=())])
    assert log.endswith("exit codes [0, 0]"), log
    assert len([*tmp_path.glob("out/replicate-*/students/ntp/run.json")]) == 2


@pytest.mark.slow
def test_schedules_gates_and_branches_by_two(alone: Runner, text: Path, tmp_path: Path, tmp_path_factory: Any) -> None:
    """By ddp and by fsdp: the branch continues a checkpoint that two processes wrote."""

    def recipe(output: Path) -> dict[str, Any]:
        content = shared_recipe(text, output)
        rate = content["training"]["learning_rate"] / 4  # float32 noise of Adam grows with it
        content["training"] |= {"schedule": "wsd", "decay_ratio": 0.5, "learning_rate": rate}
        mixer = {"insert_layer": 1, "concept_loss_schedule": {"kind": "linear", "end": 0.5}}
        kd = {"weight_schedule": {"kind": "cosine", "start": 0.2}, "top_k": 16}
        content["students"] = {
            "long": {"method": "ntp"},
            "short": {"method": "ntp", "branch_from": "long", "training": {"max_tokens": 3072}},
            "falling": {"method": "cocomix", "mixer": mixer, "distillation": kd},
            "gated": {"method": "cocomix", "mixer": {"insert_layer": 1}, "gate": {"temperature": 0.5}},
        }
        return content

    single = finished_run(tmp_path_factory, "scheduled", recipe, prepared=alone.folder / "out")
    stages = (*PREPARED, "teacher-losses", "predictions-top-16-temperature-1.0")
    commands = [command(single, tmp_path / how, "--parallel", how, prepared=stages) for how in ("ddp", "fsdp")]
    log = run_in_several(2, tmp_path / "commands", commands)
    assert log.endswith("exit codes [0, 0]"), log
    assert [assert_as_by_one(tmp_path / how, single) for how in ("ddp", "fsdp")] == [4, 4]


def test_weights_of_shares_are_whole_weights(alone: Runner, tmp_path: Path) -> None:
    """Killed while two train by fsdp: one process reads their checkpoint, and goes on with it; so do two with one's."""
    options = ("--only", "cocomix", "--parallel", "fsdp")
    train = command(alone, tmp_path / "out", *options)
    killed = run_in_several(2, tmp_path / "commands", [train], DIE_AT="4")
    assert "-9" in killed.splitlines()[-1], killed
    (checkpoint,) = (tmp_path / "out" / "students" / "cocomix.partial").glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-4"
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert all(type(weight) is torch.nn.Parameter for weight in loaded.parameters())
    shutil.copytree(tmp_path / "out", tmp_path / "by-three")

    assert alone("train", *options, "--output", str(tmp_path / "out")) == 0
    expected = curve(alone.folder / "out" / "students" / "cocomix")
    assert_close(curve(tmp_path / "out" / "students" / "cocomix"), expected)

    train[train.index("--output") + 1] = str(tmp_path / "by-three")
    train[train.index("fsdp")] = "ddp"
    log = run_in_several(3, tmp_path / "commands", [train])
    assert log.endswith("exit codes [0, 0, 0]"), log
    assert_close(curve(tmp_path / "by-three" / "students" / "cocomix"), expected)


@pytest.mark.parametrize("architecture", ["topk", pytest.param("jumprelu", marks=pytest.mark.slow)])
def test_an_sae_by_several(architecture: str, alone: Runner, tmp_path: Path) -> None:
    """Killed while two train it and resumed by three, it has the weights of one process's."""
    settings = ["--sae.architecture", architecture, "--sae.k", "32"]
    by_one, by_several = (
        ["label", *command(alone, tmp_path / out, *settings, prepared=PREPARED[:2])[1:]] for out in ("one", "several")
    )
    assert run_in_several(1, tmp_path / "log", [by_one]).endswith("exit codes [0]")
    killed = run_in_several(2, tmp_path / "log", [by_several], DIE_AT="4")
    assert "-9" in killed.splitlines()[-1], killed
    assert [path.name for path in (tmp_path / "several" / "sae.partial").glob("checkpoint-*")] == ["checkpoint-4"]
    log = run_in_several(3, tmp_path / "log", [by_several])
    assert log.endswith("exit codes [0, 0, 0]"), log
    one, several = (load_file(tmp_path / out / "sae" / SAELENS_WEIGHTS) for out in ("one", "several"))
    assert all(torch.allclose(several[name], one[name], rtol=1e-5, atol=1e-6) for name in one)


def test_a_whole_recipe_by_two(alone: Runner, tmp_path: Path) -> None:
    """From text to report; the both train the teacher and the SAE too, and one does what only one can."""
    out = tmp_path / "out"
    run = ["run", str(alone.recipe), "--output", str(out), "--parallel", "fsdp", "--training.max_tokens", "1536"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "cocomix"]
    found = subprocess.run([*launch, *run], capture_output=True, text=True, timeout=400)
    log = found.stdout + found.stderr
    assert found.returncode == 0, log
    assert_close(curve(out / "teacher"), curve(alone.folder / "out" / "teacher"))
    assert (out / "report" / "report.html").is_file()
    assert log.count("Report: ") == 1
    assert log.count("/6] teacher\n") == 1


def refusal(runner: Runner, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert runner("run", *options) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_what_several_processes_cannot_do_is_said_first(
    alone: Runner, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "5")
    monkeypatch.setenv("RANK", "0")
    new = ("--output", str(tmp_path / "new"))
    assert alone("run", *new) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    told = "must be a multiple of blocks_per_batch × block_size × processes = 2 × 32 × 5 = 320"
    assert lines == [
        f"cocomix: {where}tokens_per_step is 768; it {told}" for where in ("training.", "teacher.training.")
    ]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refusal(alone, capsys, *new, "--parallel", "fsdp+cpu-offload") == (
        "cocomix: parallel is 'fsdp+cpu-offload', but there is no GPU from which to offload; use fsdp"
    )
    assert "parallel is 'fdsp'; expected one of ddp, fsdp, fsdp+cpu-offload; did you mean 'fsdp'?" in refusal(
        alone, capsys, *new, "--parallel", "fdsp"
    )
    assert not (tmp_path / "new").exists()
