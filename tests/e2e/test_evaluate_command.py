"""`cocomix evaluate`: a finished run on its own text and on other text, kept beside it and merged into comparisons."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import load_from_disk
from transformers import AutoConfig, AutoModelForCausalLM

from cocomix.cli.main import main
from cocomix.common.integrity import SUMS_FILE
from cocomix.data.packing import load_packed
from cocomix.data.tokenizer import load_tokenizer
from cocomix.evaluation.record import EVALUATION_FILE
from tiny_run import Runner


@pytest.fixture
def output(finished: Runner, tmp_path: Path) -> Path:
    """A copy of the finished run, to add evaluations to."""
    return shutil.copytree(finished.folder / "out", tmp_path / "out")


def evaluate(run: Path, capsys: pytest.CaptureFixture[str], *options: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["evaluate", str(run), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def kept(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / EVALUATION_FILE).read_text())["evaluations"]


def test_a_run_on_its_own_validation_documents(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, corpus = output / "students" / "cocomix", output / "corpus"
    (found,) = evaluate(run, capsys)
    assert kept(run) == [found]
    texts = load_from_disk(str(corpus / "documents" / "validation"))["text"]
    tokenizer = load_tokenizer(str(run))
    figures, settings = found["figures"], found["settings"]
    assert (found["kind"], found["name"]) == ("text", "validation")
    assert (settings["window"], settings["stride"], settings["precision"]) == (32, 16, "fp32")
    assert figures["documents"] == len(texts)
    assert figures["tokens"] == sum(len(tokenizer(text)["input_ids"]) for text in texts)
    assert figures["bytes"] == sum(len(text.encode()) for text in texts)
    low, high = figures["perplexity_interval"]
    assert low < figures["perplexity"] == math.exp(figures["loss"]) < high
    for buckets in ("by_context", "by_frequency"):
        assert sum(bucket["tokens"] for bucket in figures[buckets]) == figures["tokens"]
    assert figures["frequency_in"] == "training text"
    ids = np.array(load_packed(corpus).train["input_ids"]).ravel()
    frequencies = np.bincount(ids, minlength=tokenizer.vocab_size) * 1e6 / ids.size
    frequent = {int(token) for token in np.flatnonzero(frequencies >= 10000)}
    expected = sum(token in frequent for text in texts for token in tokenizer(text)["input_ids"])
    assert figures["by_frequency"][-1]["tokens"] == expected
    trained = json.loads((run / "run.json").read_text())["metrics"]["loss"]
    assert figures["loss"] == pytest.approx(trained, rel=0.02)  # the same text, in windows rather than blocks
    assert {"commit", "hardware", "date", "versions"} <= found["environment"].keys()


def test_evaluations_are_merged_into_comparison_and_report(
    output: Path, finished: Runner, prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = str(prose / "val")
    for name in ("ntp", "cocomix"):
        for _ in range(2):  # again: in place of the first
            evaluate(output / "students" / name, capsys, "--text", text, "--limit", "6")
    runs = [str(output / "students" / name) for name in ("ntp", "cocomix")]
    assert [len(kept(Path(run))) for run in runs] == [1, 1]
    assert main(["compare", *runs, "--output", str(tmp_path / "report")]) == 0
    assert "| window/stride |" in capsys.readouterr().out
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert results["evaluations"] == {"ntp": kept(Path(runs[0])), "cocomix": kept(Path(runs[1]))}
    report = (tmp_path / "report" / "report.md").read_text()
    assert "## Evaluation" in report
    assert f"{kept(Path(runs[0]))[0]['figures']['perplexity']:.2f} (" in report

    # The recipe's own report, which was whole before, takes them up too.
    own = Runner(tmp_path)
    own.write({**yaml.safe_load(finished.recipe.read_text()), "output": str(output)})
    assert own("run") == 0
    assert "## Evaluation" in (output / "report" / "report.md").read_text()


def test_a_prose_corpus(output: Path, prose: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every document of the small corpus' validation file, counted exactly."""
    (found,) = evaluate(output / "teacher", capsys, "--text", str(prose / "val"), "--limit", "3", "--stride", "32")
    (again,) = evaluate(output / "teacher", capsys, "--text", str(prose / "val"), "--limit", "3", "--window", "16")
    assert found["figures"]["bytes"] == again["figures"]["bytes"] > 5000
    assert found["figures"]["tokens"] == again["figures"]["tokens"]
    assert found["figures"]["bits_per_byte"] == pytest.approx(
        found["figures"]["loss"] * found["figures"]["tokens"] / math.log(2) / found["figures"]["bytes"]
    )
    assert kept(output / "teacher") == [found, again]


def test_token_files_are_read_as_the_documents_they_hold(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = output / "students" / "ntp"
    tokenizer = load_tokenizer(str(run))
    texts = load_from_disk(str(output / "corpus" / "documents" / "validation"))["text"]
    folder = output / "tokens"
    folder.mkdir()
    ids = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    for name in ("train.bin", "val.bin"):
        np.array(ids, "<u2").tofile(folder / name)
    (own,), (found,) = evaluate(run, capsys), evaluate(run, capsys, "--text", str(folder))
    assert found["figures"] == own["figures"]
    assert found["settings"] == own["settings"]


def test_weights_saved_in_bfloat16_are_read_in_the_same_precision(
    output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model of another's making: float32 unless asked for otherwise, whatever its file holds."""
    torch.manual_seed(0)
    folder = tmp_path / "other"
    tokenizer = load_tokenizer(str(output / "corpus" / "tokenizer"))
    config = AutoConfig.for_model("gpt2", vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text = tmp_path / "text.md"
    text.write_text("The river counts the stone. " * 3)
    found = [evaluate(folder, capsys, "--text", str(text), "--precision", p)[0] for p in ("fp32", "bf16")]
    assert [each["settings"]["window"] for each in found] == [64, 64]
    assert found[0]["figures"]["frequency_in"] == "evaluated text"
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text.read_text())["input_ids"]]])[:, :65]
    with torch.no_grad():
        logits = model.float().eval()(ids[:, :-1]).logits
    whole = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:]).item()
    assert found[0]["figures"]["tokens"] == ids.shape[1] - 1
    assert found[0]["figures"]["loss"] == pytest.approx(whole, rel=1e-6)
    assert 0 < abs(found[1]["figures"]["loss"] - whole) < 0.05
    assert len(kept(folder)) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--text", "nowhere"], ["'nowhere' does not exist"]),
        (["--text", "empty.txt"], ["'empty.txt' has no document with text"]),
        (["--window", "33"], ["--window is 33", "expected 1 to 32"]),
        (["--window", "0"], ["--window is 0"]),
        (["--stride", "0"], ["--stride is 0", "from 1"]),
        (["--stride", "33"], ["--stride is 33", "1 to 32"]),
        (["--limit", "0"], ["--limit is 0", "a whole number from 1"]),
        (["--batch-size", "-1"], ["--batch-size is -1"]),
        (["--tasks-path", "."], ["--tasks-path has no effect without --tasks"]),
        (["--tasks", ","], ["--tasks is ',', an empty list"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_mistakes_take_one_line(
    finished: Runner, options: list[str], words: list[str], monkeypatch, tmp_path: Path, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text(" \n")
    run = finished.folder / "out" / "students" / "ntp"
    assert main(["evaluate", str(run), *options]) == 2
    _told(capsys, *words)
    assert not (run / EVALUATION_FILE).exists()


def test_models_that_are_not_there(local_tasks: Path, tmp_path: Path, output: Path, capsys) -> None:
    assert main(["evaluate", str(tmp_path / "none")]) == 2
    _told(capsys, "no model in", "save_pretrained")
    run = shutil.copytree(output / "students" / "ntp", tmp_path / "elsewhere" / "deep" / "ntp")
    assert main(["evaluate", str(run)]) == 2
    _told(capsys, "is gone or has changed; give --text SOURCE")
    (run / "run.json").unlink()
    assert main(["evaluate", str(run)]) == 2
    _told(capsys, "has no run.json", "give --text SOURCE")
    (run / "model.safetensors").write_bytes(b"spoilt")
    assert main(["evaluate", str(run), "--text", "python-stdlib", "--limit", "1"]) == 2
    _told(capsys, "model.safetensors is damaged")
    (run / SUMS_FILE).unlink()
    tasks = ["--tasks", "piqa_local", "--tasks-path", str(local_tasks)]
    assert main(["evaluate", str(run), *tasks, "--limit", "2"]) == 2
    _told(capsys, "does not load")


def test_a_folder_that_cannot_keep_them(output: Path, monkeypatch, capsys) -> None:
    run = output / "students" / "ntp"
    (run / EVALUATION_FILE).write_text("mine")
    assert main(["evaluate", str(run)]) == 2
    _told(capsys, "does not hold evaluations", "delete it")
    (run / EVALUATION_FILE).unlink()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert main(["evaluate", str(run)]) == 2
    _told(capsys, "is not writable")


def test_an_answer_longer_than_the_context(finished: Runner, local_tasks: Path, capsys) -> None:
    """The models of the tiny run read 32 tokens at once, about one character each."""
    run, tasks = finished.folder / "out" / "students" / "ntp", ["--tasks", "piqa_local"]
    assert main(["evaluate", str(run), *tasks, "--tasks-path", str(local_tasks), "--limit", "2"]) == 2
    _told(capsys, "of task piqa_local has 145 tokens, more than the model's context of 32")
    assert not (run / EVALUATION_FILE).exists()


def _told(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    captured = capsys.readouterr()
    assert captured.out == ""
    line = captured.err.strip().splitlines()[-1]
    assert line.startswith("cocomix: ")
    assert captured.err.count("cocomix: ") == 1
    for word in words:
        assert word in line
