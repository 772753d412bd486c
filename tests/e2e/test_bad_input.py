"""Every mistake gets one clear line and exit code 2 before anything expensive, and damages nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel, T5Config

from cocomix.cli.main import main
from tiny_run import Runner, rewrite, tiny_recipe

Recipe = Callable[..., Runner]


def refused(runner: Runner, capsys: pytest.CaptureFixture[str], *words: str, command: str = "run", **_: Any) -> None:
    """The command ends with 2 and one line that has all these words, and makes nothing."""
    before = {p for p in runner.folder.rglob("*")}
    capsys.readouterr()
    assert runner(command) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("cocomix: ")
    for word in words:
        assert word in line, line
    assert {p for p in runner.folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"corpus": {"source": "nowhere"}}, ["nowhere"]),
        ({"sae": {"teacher_layer": 3}}, ["teacher_layer is 3", "0 to 2"]),
        ({"sae": {"teacher_layer": -1}}, ["teacher_layer is -1"]),
        ({"sae": {"k": 65}}, ["sae.k is 65", "64"]),
        ({"sae": {"source": "nowhere"}}, ["no SAE at 'nowhere'"]),
        ({"labels": {"selection": "best"}}, ["selection is 'best'", "attribution"]),
        ({"labels": {"source": "nowhere"}}, ["no labeled corpus at nowhere"]),
        ({"labels": {"labels_per_token": 0}}, ["labels_per_token is 0"]),
        ({"labels": {"labels_per_token": 65}}, ["students.cocomix: labels.labels_per_token is 65, of 64 concepts"]),
        ({"tokenizer": {"source": "nowhere"}}, ["nowhere", "tokenizer"]),
        ({"teacher": {"source": "nowhere"}}, ["nowhere"]),
        ({"backbone": {"model_type": "gpt3"}}, ["gpt3", "did you mean"]),
        ({"backbone": {"hidden_size": 17}}, ["17"]),
        ({"backbone": {"options": {"n_iner": 4}}}, ["n_iner", "n_inner"]),
        ({"training": {"tokens_per_step": 500}}, ["training.tokens_per_step is 500", "multiple", "256"]),
        ({"training": {"precision": "fp8"}}, ["precision is 'fp8'", "bf16"]),
        ({"training": {"max_tokens": 5}}, ["max_tokens is 5"]),
        ({"training": {"blocks_per_batch": 0}}, ["training.blocks_per_batch is 0"]),
        ({"training": {"tokens_per_step": 0}}, ["training.tokens_per_step is 0"]),
        ({"sae": {"tokens_per_step": 0}}, ["sae.tokens_per_step is 0"]),
        ({"block_size": 7}, ["block_size is 7; expected a whole number from 8"]),
        ({"tokenizer": {"vocab_size": 256}}, ["tokenizer.vocab_size is 256", "257"]),
        ({"backbone": {"num_attention_heads": 0}}, ["backbone.num_attention_heads is 0", "from 1 to"]),
        ({"backbone": {"model_type": "llama", "hidden_size": 33}}, ["cannot be built", "33"]),
        ({"backbone": {"options": {"activation_function": "gelu_knew"}}}, ["cannot be built", "gelu_knew"]),
        ({"students": {"ntp": {"method": "nptt"}}}, ["nptt"]),
        ({"students": {"ntp": {"method": "ntp", "match": "other"}}}, ["match is 'other'"]),
        ({"students": {"ntp": {"method": "ntp", "mixer": {"insert_layer": 1}}}}, ["mixer has no effect"]),
        ({"students": {"mtp": {"method": "mtp", "gate": {}}}}, ["students.mtp: gate has no effect on the method"]),
        ({"students": {"p": {"method": "pause", "gate": {}}}}, ["students.p: gate has no effect without distillation"]),
        (
            {"students": {"kd": {"method": "kd", "gate": {"temperature": 0}}}},
            ["students.kd.gate.temperature is 0"],
        ),
        ({"students": {"kd": {"method": "kd", "labels": {"selection": "activation"}}}}, ["labels has no effect"]),
        ({"students": {"m": {"method": "mtp", "num_future_tokens": 3}}}, ["num_future_tokens is 3", "takes 1 to 2"]),
        ({"students": {"m": {"method": "mtp", "num_future_tokens": 0}}}, ["num_future_tokens is 0"]),
        (
            {"students": {"m": {"method": "ntp", "learning_rate": 0}}},
            ["students.m.learning_rate is 0; expected a number above 0"],
        ),
        (
            {
                "students": {
                    "m": {"method": "cocomix", "mixer": {"content": "hidden_states"}, "distillation": {"weight": 1}}
                }
            },
            ["students.m: distillation has no effect with mixer.content hidden_states"],
        ),
        (
            {"students": {"p": {"method": "pause", "mixer": {"insert_layer": 1, "num_active_concepts": 4}}}},
            ["mixer.num_active_concepts has no effect on what is mixed here (pause)"],
        ),
        (
            {"students": {"kd": {"method": "kd", "distillation": {"temperature": 0}}}},
            ["temperature is 0", "from 0.001"],
        ),
        ({"students": {"kd": {"method": "kd", "distillation": {"top_k": 0}}}}, ["top_k is 0"]),
        ({"students": {"kd": {"method": "kd", "distillation": {"top_k": 300}}}}, ["top_k is 300, of 300 tokens"]),
        (
            {
                "students": {
                    "c": {"method": "cocomix", "labels": {"selection": "atribution"}, "mixer": {"insert_layer": 1}}
                }
            },
            ["labels.selection is 'atribution'", "did you mean 'attribution'"],
        ),
        (
            {"students": {"c": {"method": "cocomix", "mixer": {"insert_layer": 1, "content": "thoughts"}}}},
            ["content is 'thoughts'"],
        ),
        ({"training": {"report_to": ["tensorbord"]}}, ["report_to names 'tensorbord'", "did you mean 'tensorboard'"]),
        (
            {"backbone": {"model_type": "opt"}},
            ["the backbone 'opt' cannot be split around the mixer", "exactly one final norm"],
        ),
        (
            {"backbone": {"options": {"n_positions": 16}}},
            ["backbone.options.n_positions overrides the recipe's block_size; leave it out"],
        ),
        (
            {"teacher": {"backbone": {"options": {"num_hidden_layers": 1}}}},
            ["teacher.backbone.options.num_hidden_layers overrides the recipe's num_hidden_layers"],
        ),
        ({"backbone": {"options": {"to_dict": 1}}}, ["'to_dict' is not a setting of the gpt2 architecture"]),
        ({"backbone": {"model_type": "gemma3"}}, ["the recipe's sizes do not apply to its text_config"]),
        ({"backbone": {"hidden_size": 2**17}}, ["the gpt2 backbone takes", "GB of memory"]),
        ({"sae": {"buffer_tokens": 10**14}}, ["sae.buffer_tokens is 100000000000000, which takes"]),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_settings(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: list[str]
) -> None:
    refused(recipe(**changes), capsys, *words)


@pytest.mark.parametrize(
    ("mixer", "words"),
    [
        ({"insert_layer": 3}, ["insert_layer is 3", "0 to 2"]),
        ({"insert_layer": -1}, ["insert_layer is -1"]),
        ({"num_active_concepts": 65}, ["num_active_concepts is 65", "num_concepts 64"]),
        ({"mixing": "interleaved"}, ["mixing is 'interleaved'", "interleave, add, none"]),
        ({"concept_slot": "both"}, ["concept_slot is 'both'"]),
        ({"concept_loss_weight": -0.1}, ["concept_loss_weight is -0.1"]),
    ],
)
def test_mixer(recipe: Recipe, capsys: pytest.CaptureFixture[str], mixer: dict[str, Any], words: list[str]) -> None:
    good = {"insert_layer": 1, "num_active_concepts": 8}
    refused(recipe(students={"cocomix": {"method": "cocomix", "mixer": {**good, **mixer}}}), capsys, *words)


def test_unknown_keys_are_named_all_at_once_with_suggestions(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = recipe(corpus={"sorce": "x"}, blocksize=3)
    assert runner("run", "--sae.kk", "3") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 3
    assert "corpus.sorce" in lines[0] or "corpus.sorce" in lines[1]
    assert any("unknown key blocksize; did you mean 'block_size'?" in line for line in lines)
    assert any("command line: unknown key sae.kk; did you mean 'k'?" in line for line in lines)


def test_values_of_a_wrong_type(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    refused(recipe(block_size="many"), capsys, "block_size", "many")


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "a: [", "\x00"])
def test_files_that_are_no_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    runner = Runner(tmp_path)
    runner.recipe.write_text(content)
    refused(runner, capsys, "recipe.yaml")


def test_a_recipe_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(Runner(tmp_path), capsys, "no recipe at", "YAML")


def test_an_empty_corpus(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    refused(recipe(corpus={"source": str(tmp_path / "empty")}), capsys, "empty", "txt")


def made_nothing(runner: Runner, capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """Found only while the corpus is read: exit code 2, one line, and no stage is there."""
    capsys.readouterr()
    assert runner("run") == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cocomix: ")]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0], lines[0]
    assert not (runner.folder / "out" / "corpus").exists()


def test_a_binary_corpus(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "a.txt").write_bytes(bytes(range(256)) * 10)
    made_nothing(recipe(corpus={"source": str(tmp_path / "binary")}), capsys, "binary")


def test_all_mistakes_are_reported_at_once(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    cocomix = {"method": "cocomix", "mixer": {"insert_layer": 30}}
    runner = recipe(
        corpus={"source": "nowhere"},
        tokenizer={"source": "missing"},
        sae={"teacher_layer": 99},
        training={"tokens_per_step": 1000},
        students={"cocomix": cocomix},
    )
    assert runner("run") == 2
    lines = capsys.readouterr().err.splitlines()
    words = ("tokens_per_step is 1000", "'nowhere' does not exist", "missing", "layer", "insert_layer is 30")
    assert len(lines) == 5 and all(word in line for word, line in zip(words, lines, strict=True)), lines


def test_a_missing_text_field(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = "\n".join(json.dumps({"body": f"text {i}", "id": i}) for i in range(20))
    (tmp_path / "a.jsonl").write_text(lines)
    refused(recipe(corpus={"source": str(tmp_path / "a.jsonl")}), capsys, "text", "body")


def test_a_corpus_too_small_for_one_block(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "small").mkdir()
    for index in range(20):
        (tmp_path / "small" / f"{index}.txt").write_text(f"word {index}")
    changes = {"source": str(tmp_path / "small"), "validation_fraction": 0.5}
    made_nothing(
        recipe(
            corpus=changes,
            block_size=1024,
            training={"tokens_per_step": 8192, "max_tokens": 8192},
            teacher={"training": {"tokens_per_step": 8192, "blocks_per_batch": 8}},
        ),
        capsys,
        "1024",
        "block",
    )


def test_an_sae_of_another_width(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {
        "pre_bias": torch.zeros(24),
        "latent_bias": torch.zeros(64),
        "encoder.weight": torch.randn(64, 24),
        "decoder.weight": torch.randn(24, 64),
        "activation": "TopK",
        "activation_state_dict": {"k": 8},
    }
    torch.save(state, tmp_path / "sae.pt")
    refused(recipe(sae={"source": str(tmp_path / "sae.pt")}), capsys, "width 24", "width is 32")


def test_a_tokenizer_that_is_not_the_teachers(
    recipe: Recipe, finished: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = str(finished.folder / "out" / "teacher")
    refused(
        recipe(teacher={"source": teacher}),
        capsys,
        "trains another one",
        f"tokenizer.source to the teacher's, e.g. {teacher}",
    )
    from cocomix.data.tokenizer import train_tokenizer

    train_tokenizer(["other words, other merges"] * 9, 280).save_pretrained(str(tmp_path / "other"))
    refused(
        recipe(teacher={"source": teacher}, tokenizer={"source": str(tmp_path / "other")}),
        capsys,
        "is not that of the teacher",
    )
    bare = tmp_path / "bare"
    GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=32, n_layer=3, n_head=2)).save_pretrained(bare)
    refused(
        recipe(teacher={"source": str(bare)}, tokenizer={"source": str(tmp_path / "other")}),
        capsys,
        "272 tokens",
        "only 100 embeddings",
    )


def test_a_teacher_with_a_weight_that_is_not_a_number(
    recipe: Recipe, finished: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = GPT2LMHeadModel.from_pretrained(finished.folder / "out" / "teacher")
    model.transformer.ln_f.bias.data[0] = float("nan")
    damaged = str(tmp_path / "damaged")
    model.save_pretrained(damaged)
    source = str(finished.folder / "out" / "corpus" / "tokenizer")
    refused(recipe(teacher={"source": damaged}, tokenizer={"source": source}), capsys, "NaN", "transformer.ln_f.bias")


def with_own_copy(finished: Runner, text: Path, tmp_path: Path) -> tuple[Runner, dict[str, Any]]:
    """A copy of the finished run that a test may spoil."""
    shutil.copytree(finished.folder / "out", tmp_path / "out")
    return Runner(tmp_path), tiny_recipe(text, tmp_path / "out")


def test_an_output_folder_of_a_different_recipe(
    finished: Runner, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runner, content = with_own_copy(finished, text, tmp_path)
    runner.write({**content, "tokenizer": {"vocab_size": 310}})
    refused(runner, capsys, "written by a different recipe", "vocab_size is 300 there, 310 here", "another output")


def test_a_step_larger_than_the_corpus(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    step = {"tokens_per_step": 2**20, "max_tokens": 2**20}
    made_nothing(recipe(training=step), capsys, "less than one step of training: 1048576")


def test_token_files_without_their_tokenizer(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("train.bin", "val.bin"):
        (tmp_path / "bin" / name).write_bytes(b"\x01\x00" * 9000)
    refused(recipe(corpus={"source": str(tmp_path / "bin")}), capsys, "token files", "tokenizer.source")


def test_an_output_that_is_a_file(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    runner = recipe()
    (runner.folder / "out").write_text("a file")
    refused(runner, capsys, "is not a folder")


def test_a_teacher_that_reads_less_than_a_block(
    recipe: Recipe, finished: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    source = {"source": str(finished.folder / "out" / "teacher")}
    refused(recipe(block_size=64, teacher=source, tokenizer=source), capsys, "block_size is 64", "at most 32")


def test_labels_of_another_sae_than_the_recipe_names(
    recipe: Recipe, finished: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished.folder / "out" / "sae", tmp_path / "sae")
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps({**config, "k": 7}))
    labels = {"source": str(finished.folder / "out" / "labels")}
    refused(recipe(labels=labels, sae={"source": str(tmp_path / "sae")}), capsys, "computed with sae")


def test_a_report_folder_that_is_something_else(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    runner = recipe()
    (runner.folder / "out" / "report").mkdir(parents=True)
    (runner.folder / "out" / "report" / "thesis.tex").write_text("years of work")
    refused(runner, capsys, "not a report")


def test_an_output_folder_that_is_something_else(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    runner = recipe()
    (runner.folder / "out" / "corpus").mkdir(parents=True)
    (runner.folder / "out" / "corpus" / "thesis.tex").write_text("years of work")
    refused(runner, capsys, "not created by cocomix")


@pytest.mark.parametrize(
    ("field", "wrong"), [("corpus", "f00"), ("teacher", "f00"), ("sae", "f00"), ("teacher_layer", 0)]
)
def test_labels_of_something_else(
    finished: Runner, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], field: str, wrong: Any
) -> None:
    runner, content = with_own_copy(finished, text, tmp_path)
    runner.write(content)
    shutil.rmtree(tmp_path / "out" / "students" / "cocomix")
    shutil.rmtree(tmp_path / "out" / "report")
    rewrite(tmp_path / "out" / "labels" / "labels.json", **{field: wrong})
    capsys.readouterr()
    assert runner("run") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cocomix: ")]
    assert f"computed with {field} {wrong!r}" in line
    assert not (tmp_path / "out" / "students" / "cocomix").exists()


def test_labels_made_elsewhere_serve_and_are_checked(
    finished: Runner, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = str(finished.folder / "out" / "labels")
    refused(recipe(labels={"source": labels, "labels_per_token": 3}), capsys, "labels_per_token 2", "3")
    runner = recipe(labels={"source": labels})
    assert runner("run", "--json") == 0
    results = json.loads(capsys.readouterr().out)
    there = json.loads((finished.folder / "out" / "report" / "results.json").read_text())
    assert results["students"]["cocomix"]["metrics"] == there["students"]["cocomix"]["metrics"]
    assert not (runner.folder / "out" / "teacher").exists()


def test_a_teacher_that_changed(
    finished: Runner, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runner, content = with_own_copy(finished, text, tmp_path)
    runner.write(content)
    rewrite(tmp_path / "out" / "teacher" / "stage.json", fingerprint="f00")
    capsys.readouterr()
    assert runner("run") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert all("was computed from another teacher than the one in" in line for line in lines)
    assert len(lines) == 2  # the SAE and the labels


def test_comparing_what_cannot_be_compared(
    finished: Runner, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ntp = finished.folder / "out" / "students" / "ntp"
    assert main(["compare", str(tmp_path)]) == 2
    assert "no finished run" in capsys.readouterr().err
    assert main(["compare", str(ntp), str(ntp)]) == 2
    assert "given twice" in capsys.readouterr().err
    other = tmp_path / "other"
    shutil.copytree(ntp, other)
    run = json.loads((other / "run.json").read_text())
    for key, what in (("validation", "validation text"), ("tokenizer", "tokenizer"), ("block_size", "block size")):
        rewrite(other / "run.json", **{**run, "name": "other", key: 0})
        assert main(["compare", str(ntp), str(other)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"were evaluated with a different {what}; " in line
    rewrite(other / "run.json", **{**run, "name": "other", "corpus": "more text, the same validation"})
    assert main(["compare", str(ntp), str(other)]) == 0
    capsys.readouterr()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "results.json").write_text("{}")
    (tmp_path / "taken" / "thesis.tex").write_text("years of work")
    assert main(["compare", str(ntp), "--output", str(tmp_path / "taken")]) == 2
    assert "not a report" in capsys.readouterr().err


def test_seeds_beyond_what_generators_take_are_refused_first(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = recipe(seeds=[0, -1, 2**32])
    assert runner("run") == 2
    first, second = capsys.readouterr().err.strip().splitlines()
    assert "seeds[1] is -1; expected a whole number from 0 to" in first
    assert f"seeds[2] is {2**32}; expected" in second
    assert not (runner.folder / "out").exists()


def test_a_comparison_in_the_place_of_the_report_gives_way_to_it(
    finished: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished.folder / "out", out)
    shutil.rmtree(out / "report")
    assert main(["compare", str(out / "students" / "ntp"), "--output", str(out / "report")]) == 0
    assert finished("run", "--output", str(out)) == 0
    assert "cocomix" in json.loads((out / "report" / "results.json").read_text())["groups"]


@pytest.mark.parametrize("command", ["evaluate", "compare", "plan", "inspect"])
def test_what_is_done_in_one_process_is_told_once(
    command: str, finished: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        text = ["text"] if command == "inspect" else []
        assert main([command, str(finished.folder / "out" / "students" / "ntp"), *text]) == 2
    told = f"cocomix: cocomix {command} runs in one process; start it without torchrun"
    assert capsys.readouterr().err.strip().splitlines() == [told]


def test_an_unknown_student(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    runner = recipe()
    assert runner("train", "--only", "cocmix") == 2
    assert "did you mean 'cocomix'?" in capsys.readouterr().err
    assert not (runner.folder / "out").exists()


def test_recipes_in_the_repository_are_sound() -> None:
    from cocomix.pipeline.recipe_file import load_recipe

    recipes = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))
    assert recipes
    for path in recipes:
        assert load_recipe(path).problems() == []
        assert yaml.safe_load(path.read_text())["name"]


def test_a_teacher_that_is_no_language_model(
    finished: Runner, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    T5Config(d_model=32, num_layers=3, num_heads=2, vocab_size=300).save_pretrained(tmp_path / "t5")
    tokenizer = {"source": str(finished.folder / "out" / "corpus" / "tokenizer")}
    runner = recipe(teacher={"source": str(tmp_path / "t5")}, tokenizer=tokenizer)
    refused(runner, capsys, "is not a causal language model", "T5Config")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": {"alignment": "chars"}}, ["alignment is 'chars'", "tokens, characters"]),
        ({"teacher": {"precision": "fp16"}}, ["teacher.precision is 'fp16'", "fp32 or bf16"]),
        ({"sae": {"architecture": "topk2"}}, ["architecture is 'topk2'", "did you mean 'topk'"]),
        ({"sae": {"source": "saelens:nothing"}}, ["SAELens knows no release 'nothing'", "saelens:RELEASE/SAE_ID"]),
        ({"catalog": {"contexts": 0}}, ["catalog.contexts is 0"]),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_settings_of_concepts(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: list[str]
) -> None:
    refused(recipe(**changes), capsys, *words, command="label")


def test_mistakes_in_the_corpus_and_in_a_student_are_told_together(recipe, capsys) -> None:
    students = {"cocomix": {"method": "cocomix", "mixer": {"insert_layer": 9}}}
    runner = recipe(corpus={"source": "no/such/folder"}, students=students)
    assert runner("run") == 2
    said = capsys.readouterr().err
    assert "no/such/folder" in said
    assert "insert_layer is 9" in said
