"""Labels through the command line: by several processes, killed, damaged, online, inspected."""

from __future__ import annotations

import json
import shutil
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import yaml
from datasets import load_from_disk
from PIL import Image

import forked
from cocomix.cli import workflow
from cocomix.cli.main import main
from tiny_run import Runner


@pytest.fixture
def unlabeled(finished: Runner, recipe, tmp_path: Path) -> Runner:
    """A recipe whose corpus, teacher and SAE are made, and nothing else."""
    runner = recipe()
    for stage in ("corpus", "teacher", "sae"):
        shutil.copytree(finished.folder / "out" / stage, tmp_path / "out" / stage)
    return runner


def labeling(runner: Runner, processes: int) -> list[BaseProcess]:
    """`cocomix label` by several processes."""
    return forked.start_several(processes, forked.command, ["label", str(runner.recipe)], log=runner.folder / "log")


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "stage.json"  # it holds the output folder of its recipe
    }


def test_killed_by_two_and_finished_by_three(finished: Runner, unlabeled: Runner) -> None:
    """All at once, as a machine goes down; what was complete is kept, and the files are those of one process."""
    partial, log = unlabeled.folder / "out" / "labels.partial", unlabeled.folder / "log"
    two = labeling(unlabeled, 2)
    deadline = time.monotonic() + 120
    while len(list(partial.glob("shards/*.json"))) < 2:
        assert all(process.is_alive() for process in two), log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for process in two:
        process.kill()
    assert forked.exit_codes(*two) == [-signal.SIGKILL] * 2
    kept = {path: path.stat().st_mtime_ns for path in partial.glob("train/*.arrow")}
    recorded = {path.stem.removeprefix("train-") for path in partial.glob("shards/train-*.json")}
    assert recorded
    log.unlink()
    assert forked.exit_codes(*labeling(unlabeled, 3)) == [0, 0, 0], log.read_text()
    assert log.read_text().count("[4/4] labels") == 1  # one process speaks
    labels = unlabeled.folder / "out" / "labels"
    made = files_of(labels)
    assert made == files_of(finished.folder / "out" / "labels")
    assert len([name for name in made if name.endswith(".arrow")]) >= 4
    for path, since in kept.items():
        if path.stem.removeprefix("data-") in recorded:
            assert (labels / "train" / path.name).stat().st_mtime_ns == since


def test_a_damaged_shard_is_repaired_by_the_same_command(finished: Runner, tmp_path: Path, capsys) -> None:
    shutil.copytree(finished.folder / "out", tmp_path / "out")
    labels = tmp_path / "out" / "labels"
    undamaged = files_of(labels)
    shard = sorted((labels / "train").glob("*.arrow"))[1]
    shard.write_bytes(shard.read_bytes()[:1000])
    shutil.rmtree(tmp_path / "out" / "students")
    shutil.rmtree(tmp_path / "out" / "report")
    output = ("--output", str(tmp_path / "out"))
    assert finished("run", *output) == 2
    told = capsys.readouterr().err
    assert f"{shard} is damaged" in told and "run cocomix label RECIPE, which recomputes damaged shards only" in told
    assert finished("label", *output) == 0
    assert f"{shard} is damaged" in capsys.readouterr().err
    assert files_of(labels) == undamaged
    assert finished("label", *output) == 0
    assert "Nothing to do" in capsys.readouterr().err


def test_online_labels_train_the_same_model(finished: Runner, recipe, tmp_path: Path) -> None:
    """Bit for bit: every metric of every evaluation."""
    # Of the student; the teacher reads as it always does.
    training = {"blocks_per_batch": 4, "precision": "bf16", "max_tokens": 4096}
    content = {"labels": {"online": True, "labels_per_token": 2}, "training": training}
    online = recipe(**content)
    for stage in ("corpus", "teacher", "sae"):
        shutil.copytree(finished.folder / "out" / stage, tmp_path / "out" / stage)
    stored = tmp_path / "stored"
    shutil.copytree(tmp_path / "out", stored)
    assert online("train", "--only", "cocomix") == 0
    assert not (tmp_path / "out" / "labels" / "train").exists()
    assert online("train", "--only", "cocomix", "--labels.online", "false", "--output", str(stored)) == 0
    runs = [json.loads((out / "students" / "cocomix" / "run.json").read_text()) for out in (tmp_path / "out", stored)]
    assert runs[0]["curve"] == runs[1]["curve"]
    weights = [(out / "students" / "cocomix" / "model.safetensors").read_bytes() for out in (tmp_path / "out", stored)]
    assert weights[0] == weights[1]


def test_a_run_with_online_labels_has_a_report(finished: Runner, recipe, tmp_path: Path, capsys) -> None:
    runner = recipe(labels={"online": True})
    for stage in ("corpus", "teacher", "sae"):
        shutil.copytree(finished.folder / "out" / stage, tmp_path / "out" / stage)
    assert runner("run", "--json") == 0
    results = json.loads(capsys.readouterr().out)
    assert results["labels"]["online"] is True
    assert results["students"]["cocomix"]["metrics"]["constant_recall"] > 0
    assert "of the validation tokens have at least one" in (tmp_path / "out" / "report" / "report.md").read_text()


def test_labels_of_validation_only_are_no_source(finished: Runner, recipe, tmp_path: Path, capsys) -> None:
    runner = recipe(labels={"online": True})
    for stage in ("corpus", "teacher", "sae"):
        shutil.copytree(finished.folder / "out" / stage, tmp_path / "out" / stage)
    assert runner("label") == 0
    source = ("--labels.online", "false", "--labels.source", str(tmp_path / "out" / "labels"))
    capsys.readouterr()
    assert runner("run", "--output", str(tmp_path / "other"), *source) == 2
    assert "holds labels of validation text only (labels.online)" in capsys.readouterr().err


def test_labels_in_bfloat16_state_how_many_differ_from_float32(
    finished: Runner, recipe, tmp_path: Path, capsys
) -> None:
    out = finished.folder / "out"
    runner = recipe(
        tokenizer={"source": str(out / "corpus" / "tokenizer")},
        teacher={"source": str(out / "teacher"), "precision": "bf16"},
        sae={"source": str(out / "sae")},
    )
    assert runner("label", "--inspect") == 0
    labels = tmp_path / "out" / "labels"
    info = json.loads((labels / "labels.json").read_text())
    assert info["precision"] == "bfloat16"
    assert 0 < info["differing_share"] < 0.25
    captured = capsys.readouterr()
    remark = f"Computed in bfloat16: {info['differing_share']:.2%} of the labels differ from those of float32."
    assert remark in captured.out
    assert remark in captured.err
    in_float32 = json.loads((out / "labels" / "labels.json").read_text())
    assert (in_float32["precision"], in_float32["differing_share"]) == (None, None)


def test_inspect_prints_and_draws(finished: Runner, capsys) -> None:
    labels = finished.folder / "out" / "labels"
    assert finished("label", "--inspect") == 0
    printed = capsys.readouterr().out
    assert "| tokens with at least one label" in printed
    assert str(labels / "concept_frequency.png") in printed
    assert "of the labeled tokens have fewer than 2 concepts with a positive score." in printed
    assert Image.open(labels / "concept_frequency.png").size == (1050, 600)
    assert Runner(labels.parent)("run") == 2  # no recipe there; the next is about the folder itself

    capsys.readouterr()
    assert main(["label", str(labels), "--inspect", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert set(figures) == {"train", "validation"}
    ids = load_from_disk(str(labels))["train"].with_format("numpy")["concept_ids"][:]
    assert figures["train"]["labels"] == int((ids >= 0).sum())
    assert main(["label", str(labels)]) == 2
    assert f"cocomix label {labels} --inspect" in capsys.readouterr().err


def test_labels_in_a_folder_that_cannot_be_written_are_inspected_all_the_same(
    finished: Runner, capsys, monkeypatch
) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(workflow, "plot_concept_frequency", refuse)
    assert finished("label", "--inspect") == 0
    captured = capsys.readouterr()
    assert "| tokens with at least one label" in captured.out
    assert "concept_frequency.png cannot be written (Permission denied)" in captured.err


def test_a_student_tokenizer_of_the_same_kind_gives_the_same_labels(
    finished: Runner, recipe, tmp_path: Path, capsys
) -> None:
    """The trained teacher, now somebody else's: labels moved by characters are those of its own tokens."""
    out = finished.folder / "out"
    runner = recipe(
        teacher={"source": str(out / "teacher")},
        sae={"source": str(out / "sae"), "teacher_layer": 1},
    )
    assert runner("label", "--student-tokenizer", str(out / "corpus" / "tokenizer")) == 0
    moved, own = (load_from_disk(str(folder / "labels")) for folder in (tmp_path / "out", out))
    for side in ("train", "validation"):
        assert moved[side]["concept_ids"][:] == own[side]["concept_ids"][:]
    info = json.loads((tmp_path / "out" / "labels" / "labels.json").read_text())
    assert info["alignment"] == "characters"


def test_a_student_with_another_tokenizer_is_trained(finished: Runner, recipe, tmp_path: Path, capsys) -> None:
    out = finished.folder / "out"
    runner = recipe(
        teacher={"source": str(out / "teacher")},
        sae={"source": str(out / "sae"), "teacher_layer": 1},
        tokenizer={"vocab_size": 258},
        corpus={"max_documents": 60},
        block_size=16,
        training={"blocks_per_batch": 16, "max_tokens": 4096},
        labels={"alignment": "characters"},
    )
    assert runner("train", "--only", "cocomix") == 0
    labels = load_from_disk(str(tmp_path / "out" / "labels"))
    ids = labels["train"].with_format("numpy")["concept_ids"][:]
    assert (ids >= 0).any(-1).mean() > 0.8
    metrics = json.loads((tmp_path / "out" / "students" / "cocomix" / "run.json").read_text())["metrics"]
    assert metrics["concept_recall"] > 0


def test_token_files_cannot_be_aligned_by_characters(finished: Runner, recipe, tmp_path: Path, capsys) -> None:
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    for name in ("train.bin", "val.bin"):
        (tokens / name).write_bytes(bytes(range(0, 200)) * 400)
    runner = recipe(
        corpus={"source": str(tokens)},
        tokenizer={"source": str(finished.folder / "out" / "corpus" / "tokenizer")},
        labels={"alignment": "characters"},
    )
    assert runner("label") == 2
    assert "holds token files, which have no text" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_labels_of_every_control_are_written_and_learned_from(
    finished: Runner, recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {
        "activation": {"selection": "activation"},
        "offset": {"selection": "activation", "offset": 1},
        "window": {"selection": "activation", "window": 4},
        "token": {"selection": "token"},
        "permuted": {"selection": "activation", "control": "permuted"},
        "weighted": {"targets": "activation"},
    }
    mixer = {"insert_layer": 1, "num_active_concepts": 8, "mixing": "none"}
    students = {name: {"method": "cocomix", "mixer": mixer, "labels": labels} for name, labels in own.items()}
    students["token"]["mixer"] = {**mixer, "mixing": "add"}
    runner = recipe(students=students)
    for stage in ("corpus", "teacher", "sae"):
        shutil.copytree(finished.folder / "out" / stage, tmp_path / "out" / stage)
    assert runner("label") == 0
    folders = {name: tmp_path / "out" / f"labels-{suffix}" for name, suffix in {
        "activation": "activation-2", "offset": "activation-2-offset-1", "window": "activation-2-window-4",
        "token": "token-2", "permuted": "activation-2-permuted", "weighted": "attribution-2-weighted",
    }.items()}  # fmt: skip
    stored = {name: load_from_disk(str(folder))["train"].with_format("numpy")[:] for name, folder in folders.items()}
    labels = {name: each["concept_ids"] for name, each in stored.items()}
    assert len({each.tobytes() for each in labels.values()}) == len(own)
    moved, plain = labels["offset"][:, :-2], labels["activation"][:, 1:-1]  # the last token has no label
    assert ((moved == plain) | (moved == -100)).all() and (moved == plain).mean() > 0.9
    assert (labels["window"][:, :-1] >= 0).mean() > 0.9
    assert stored["weighted"]["concept_weights"].sum(-1)[labels["weighted"][..., 0] >= 0].min() > 0.99
    assert runner("train", "--only", "weighted,token", "--training.max_tokens", "1024") == 0
    assert json.loads((tmp_path / "out/students/weighted/run.json").read_text())["metrics"]["concept_recall"] > 0
    assert "Labels: 2 per token, by `token`." in (tmp_path / "out/students/token/README.md").read_text()
    monkeypatch.chdir(tmp_path / "out/students/token")
    assert main(["evaluate", "concepts", "../token"]) == main(["report", "."]) == 0
    assert set(json.loads((tmp_path / "out/report/results.json").read_text())["students"]) == {"weighted", "token"}


def test_labels_of_an_untrained_teacher(finished: Runner, recipe, tmp_path: Path) -> None:
    runner = recipe()
    shutil.copytree(finished.folder / "out" / "corpus", tmp_path / "out" / "corpus")
    assert runner("teacher", "--teacher.untrained", "true") == 0
    record = json.loads((tmp_path / "out/teacher/stage.json").read_text())["summary"]
    trained = json.loads((finished.folder / "out/teacher/stage.json").read_text())["summary"]
    assert record["tokens"] == 0 and record["metrics"]["loss"] > trained["metrics"]["loss"] + 0.5


def test_a_recipe_takes_the_corpus_of_another_run_whose_labels_fit(
    finished: Runner, recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tmp_path / "given"
    shutil.copytree(finished.folder / "out" / "corpus", given)
    runner = recipe(labels={"source": str(finished.folder / "out" / "labels")}, training={"max_tokens": 1024})
    content = yaml.safe_load(runner.recipe.read_text())
    content["corpus"] = {"source": str(given)}
    runner.write(content)
    assert runner("train", "--block_size", "16", "--training.max_tokens", "1024") == 2
    assert f"block_size is 16, but the corpus {given} has blocks of 32 tokens; set block_size to 32" in (
        capsys.readouterr().err
    )
    assert runner("train", "--corpus.max_documents", "3") == 2
    assert "is a packed corpus, on which corpus.max_documents has no effect" in capsys.readouterr().err
    assert runner("train", "--only", "cocomix") == 0
    linked, original = tmp_path / "out" / "corpus", finished.folder / "out" / "corpus"
    assert (linked / "train").is_symlink() and (linked / "train").resolve() == given / "train"
    records = [json.loads((folder / "stage.json").read_text()) for folder in (linked, original)]
    assert records[0]["fingerprint"] == records[1]["fingerprint"]
    assert records[0]["summary"]["documents"] == records[1]["summary"]["documents"] is not None
    described = json.loads((given / "corpus.json").read_text())
    (given / "corpus.json").write_text(json.dumps({**described, "fingerprint": "another"}))
    assert runner("train", "--only", "ntp") == 2
    assert f"the corpus {given} has changed since {linked} was computed" in capsys.readouterr().err
