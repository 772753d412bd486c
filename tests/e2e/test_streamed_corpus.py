"""A streamed corpus through the command line: nothing stored but a sample, killed, gone on with, shared out."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from safetensors.torch import load_file
from test_bad_input import refused
from test_interruption import kill_when, start

from cocomix.data.corpus import is_held_out
from cocomix.data.tokenizer import encode_documents, load_tokenizer
from several import run_in_several
from tiny_run import PREPARED, Runner, finished_run, tiny_recipe

STREAMING = {"sample_megabytes": 0.05, "validation_megabytes": 0.01, "shuffle_blocks": 50}
STUDENT = "students/cocomix"


def streaming_recipe(text: Path, output: Path) -> dict[str, Any]:
    """The tiny recipe on a stream, which is longer than its sample."""
    recipe = tiny_recipe(text, output)
    recipe["corpus"]["streaming"] = STREAMING
    recipe["labels"]["online"] = True
    del recipe["students"]["ntp"]
    return recipe


@pytest.fixture(scope="module")
def streamed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """Run once to its end."""
    return finished_run(tmp_path_factory, "streamed", lambda output: streaming_recipe(text, output))


def prepared(streamed: Runner, output: Path) -> Path:
    """An output folder in which only the student is missing."""
    for stage in PREPARED:
        shutil.copytree(streamed.folder / "out" / stage, output / stage)
    return output


def assert_same(found: Path, expected: Path) -> None:
    """The same weights, to the last bit, and the same curve."""
    weights, wanted = (load_file(folder / "model.safetensors") for folder in (found, expected))
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    runs = [json.loads((folder / "run.json").read_text()) for folder in (found, expected)]
    assert runs[0]["curve"] == runs[1]["curve"]


def test_only_a_sample_is_stored(streamed: Runner, text: Path) -> None:
    """Tokenizer, SAE and validation have it; the students have read beyond it."""
    corpus = streamed.folder / "out" / "corpus"
    stored = [document for side in ("train", "validation") for document in load_from_disk(corpus / "documents" / side)]
    assert sum(len(document["text"]) for document in stored) < 70_000
    assert sum(file.stat().st_size for file in text.iterdir()) > 200_000
    assert not (streamed.folder / "out" / "labels" / "train").exists()
    curve = json.loads((streamed.folder / "out" / STUDENT / "run.json").read_text())["curve"]
    assert curve[-1]["tokens"] == 8192 and curve[-1]["loss"] < curve[0]["loss"]
    assert "concept_recall" in curve[-1]
    assert streamed("run") == 0  # nothing to do


def test_killed_in_training_it_ends_with_the_same_weights(streamed: Runner, tmp_path: Path) -> None:
    output = prepared(streamed, tmp_path / "out")
    kill_when(start(streamed, output), output, f"{STUDENT}.partial/checkpoint-4/complete")
    assert not (output / STUDENT).exists()
    assert streamed("run", "--output", str(output)) == 0
    assert_same(output / STUDENT, streamed.folder / "out" / STUDENT)


def test_two_processes_read_documents_of_their_own(streamed: Runner, text: Path, tmp_path: Path, capsys: Any) -> None:
    """Together all that are not held out; killed, the two go on as if nothing had been, and one alone cannot."""
    train = ["train", str(streamed.recipe), "--output"]
    for name in ("undisturbed", "killed"):
        prepared(streamed, tmp_path / name)
    killed = run_in_several(2, tmp_path / "commands", [[*train, str(tmp_path / "killed")]], DIE_AT="8")
    assert "-9" in killed.splitlines()[-1], killed
    capsys.readouterr()
    assert streamed("train", "--output", str(tmp_path / "killed")) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "cocomix cannot resume from" in line and "was streamed with 2 processes, now there are 1;" in line
    both = [[*train, str(tmp_path / name)] for name in ("killed", "undisturbed")]
    log = run_in_several(2, tmp_path / "commands", both)
    assert log.endswith("exit codes [0, 0]"), log
    assert_same(tmp_path / "killed" / STUDENT, tmp_path / "undisturbed" / STUDENT)

    read = [set(json.loads((tmp_path / "commands" / f"documents-{rank}.json").read_text())) for rank in range(2)]
    texts = {file.read_text() for file in text.iterdir()}
    assert not read[0] & read[1]
    assert read[0] | read[1] == {t for t in texts if not is_held_out(hashlib.sha256(t.encode()).digest(), 0.1)}
    assert min(map(len, read)) > 80


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": {"online": False}}, ["corpus.streaming stores no training blocks", "set labels.online to true"]),
        (
            {"students": {"kd": {"method": "kd", "distillation": {"top_k": 4}}}},
            ["students.kd: corpus.streaming stores no", "leave distillation.top_k out"],
        ),
        ({"corpus": {"max_documents": 5}}, ["corpus.max_documents has no effect with corpus.streaming"]),
        ({"corpus": {"streaming": {"shuffle_blocks": 0}}}, ["corpus.streaming.shuffle_blocks is 0"]),
        ({"corpus": {"streaming": {"sample_megabytes": -1}}}, ["corpus.streaming.sample_megabytes is -1"]),
        ({"corpus": {"streaming": {"sample_megabyte": 1}}}, ["did you mean", "sample_megabytes"]),
    ],
)
def test_what_a_stream_cannot_do_is_said_first(
    changes: dict[str, Any], words: list[str], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = streaming_recipe(text, tmp_path / "out")
    for key, value in changes.items():
        recipe[key] = value if key == "students" else {**recipe[key], **value}
    runner = Runner(tmp_path)
    runner.write(recipe)
    refused(runner, capsys, *words)


def test_token_files_are_streamed_with_their_tokenizer(
    streamed: Runner, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files as datatrove writes them: refused unless streamed and with the tokenizer that made them."""
    source = str(streamed.folder / "out" / "corpus" / "tokenizer")
    tokenizer = load_tokenizer(source)
    texts = [file.read_text() for file in sorted(text.iterdir())]
    encoded = [[*ids, tokenizer.eos_token_id] for ids in encode_documents(tokenizer, texts)]
    folder = tmp_path / "tokens"
    folder.mkdir()
    (folder / "00000_unshuffled.ds").write_bytes(np.concatenate(encoded).astype("<u2").tobytes())
    index = np.cumsum([len(ids) for ids in encoded]).astype("<u8")
    (folder / "00000_unshuffled.ds.index").write_bytes(index.tobytes())

    recipe = streaming_recipe(text, tmp_path / "out")
    recipe["corpus"]["source"] = str(folder)
    recipe["students"] = {"ntp": {"method": "ntp"}}
    runner = Runner(tmp_path)
    runner.write(recipe)
    refused(runner, capsys, "holds token files", "set tokenizer.source")
    recipe["tokenizer"] = {"source": source}
    runner.write({**recipe, "corpus": {"source": str(folder)}})
    refused(runner, capsys, "holds datatrove's token files, which can only be streamed", "set corpus.streaming")
    runner.write(recipe)
    assert runner("run") == 0
    curve = json.loads((tmp_path / "out" / "students" / "ntp" / "run.json").read_text())["curve"]
    assert curve[-1]["loss"] < curve[0]["loss"]
