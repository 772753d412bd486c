"""lm-evaluation-harness: the same figures through our command and through its own; its tasks on local files."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import FunctionType
from typing import Any

import lm_eval
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import cocomix
from cocomix.common.errors import InputError
from cocomix.data.tokenizer import train_tokenizer
from cocomix.evaluation.harness import TaskSettings, _show_warnings, evaluate_tasks, plan_tasks
from cocomix.evaluation.perplexity import text_losses
from cocomix.inspection.runs import open_model

LOCAL_TASKS = Path(__file__).parents[2] / "local_tasks"
NAMES = ("arc_easy", "hellaswag", "lambada_openai", "piqa", "winogrande")
LIMIT = 8
COMMAND_LINE = """
import sys
sys.modules["cocomix"] = None  # the harness knows nothing of it: the saved model's own code must do

import torch
torch.set_num_threads(1)
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """save("cocomix"): a folder with a small model that is not trained, and its tokenizer."""

    def make(kind: str) -> Path:
        folder = tmp_path_factory.mktemp("saved") / kind
        torch.manual_seed(0)
        tokenizer = train_tokenizer(["Question: which of them is it? Answer: the first of the two, then. " * 3], 300)
        backbone = AutoConfig.for_model(
            "gpt2", vocab_size=300, n_embd=32, n_layer=3, n_head=4, n_positions=512, bos_token_id=0, eos_token_id=0
        )
        if kind == "cocomix":
            config = cocomix.CoCoMixConfig(backbone, insert_layer=1, num_concepts=40, num_active_concepts=5)
            model = cocomix.CoCoMixForCausalLM(config)
        else:
            model = AutoModelForCausalLM.from_config(backbone)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the harness' bootstrap starts others."""
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")


def through_cocomix(folder: Path, settings: TaskSettings) -> dict[str, Any]:
    found = evaluate_tasks(open_model(folder), plan_tasks(settings))
    assert all(each.figures["items"] == settings.limit for each in found)
    return {each.name: each.figures["metrics"] for each in found}


def of_harness(results: dict[str, Any]) -> dict[str, Any]:
    """The figures in the harness' own form, as ours."""
    metrics: dict[str, Any] = {}
    for task, figures in results.items():
        for key, value in figures.items():
            name, comma, _ = key.partition(",")
            if comma:
                base = name.removesuffix("_stderr")
                kind = "value" if base == name else "stderr"
                metrics.setdefault(task, {}).setdefault(base, {})[kind] = None if value == "N/A" else value
    return metrics


def test_the_harness_command_line_gives_the_same_figures_of_a_saved_cocomix_model(save, local_tasks, tmp_path) -> None:
    folder, names = save("cocomix"), [f"{name}_local" for name in NAMES]
    ours = through_cocomix(folder, TaskSettings(names, local_tasks, limit=LIMIT, batch_size=4))
    arguments = {
        "--model": "hf",
        "--model_args": f"pretrained={folder},trust_remote_code=True",
        "--device": "cpu",
        "--include_path": str(local_tasks),
        "--tasks": ",".join(names),
        "--limit": str(LIMIT),
        "--batch_size": "4",
        "--output_path": str(tmp_path / "results"),
    }
    done = subprocess.run(
        [sys.executable, "-c", COMMAND_LINE, *chain.from_iterable(arguments.items())],
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = (tmp_path / "results").rglob("results_*.json")
    assert ours == of_harness(json.loads(written.read_text())["results"])
    assert ours["piqa_local"]["acc"]["stderr"] > 0
    assert ours["lambada_openai_local"]["perplexity"]["value"] > 1


def test_the_harness_itself_gives_the_same_figures_of_a_plain_model(save, local_tasks) -> None:
    from lm_eval.tasks import TaskManager

    folder, names = save("gpt2"), ["arc_easy_local", "arc_challenge_local", "lambada_openai_local", "blimp_local"]
    ours = through_cocomix(folder, TaskSettings(names, local_tasks, limit=8, batch_size=4))
    with contextlib.redirect_stdout(None):
        theirs = lm_eval.simple_evaluate(
            model="hf",
            model_args=f"pretrained={folder}",
            device="cpu",
            tasks=names,
            limit=8,
            batch_size=4,
            task_manager=TaskManager(include_path=local_tasks, include_defaults=False),
        )
    assert ours == of_harness(theirs["results"])
    assert ours["lambada_openai_local"]["perplexity"]["value"] > 1  # which the last digit of a logit would change


def test_bits_per_byte_of_windows_that_do_not_overlap_are_the_harness_rolling_ones(save, local_tasks) -> None:
    from lm_eval.tasks import TaskManager

    run = open_model(save("gpt2"))
    settings = TaskSettings(["wikitext_local"], local_tasks, limit=2, batch_size=4)
    (found,) = evaluate_tasks(run, plan_tasks(settings))
    manager = TaskManager(include_path=local_tasks, include_defaults=False)
    (task,) = manager.load("wikitext_local")["tasks"].values()
    pages = [task.eval_docs[number] for number in range(2)]
    losses = text_losses(
        run.model,
        run.tokenizer,
        [task.doc_to_target(page) for page in pages],
        window=512,
        stride=512,
        batch_size=4,
        precision="fp32",
    )
    size = sum(len(page["page"].encode()) for page in pages)  # the harness counts those before its detokenizer
    bits = losses.documents.nll.sum() / torch.log(torch.tensor(2.0)).item() / size
    assert found.figures["metrics"]["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-5)


def comparable(definition: dict[str, Any]) -> dict[str, Any]:
    """What decides prompts and scores; functions by where they are."""
    apart = {"task", "tag", "dataset_path", "dataset_name", "custom_dataset", "training_split", "test_split"}
    return {
        key: (value.__code__.co_filename, value.__name__) if isinstance(value, FunctionType) else value
        for key, value in definition.items()
        if key not in apart
    }


OWN = {
    "arc_challenge": "arc/arc_challenge",
    "arc_easy": "arc/arc_easy",
    "blimp": "blimp/wh_island",
    "hellaswag": "hellaswag/hellaswag",
    "hellaswag_1000": "hellaswag/hellaswag",
    "lambada_openai": "lambada/lambada_openai",
    "piqa": "piqa/piqa",
    "wikitext": "wikitext/wikitext",
    "winogrande": "winogrande/winogrande",
}


@pytest.mark.parametrize("name", sorted(path.stem.removesuffix("_local") for path in LOCAL_TASKS.glob("*.yaml")))
def test_local_tasks_are_defined_as_the_harness_defines_them(name: str) -> None:
    from lm_eval.tasks._yaml_loader import load_yaml

    tasks = Path(lm_eval.__file__).parent / "tasks"
    path = tasks / f"{OWN[name]}.yaml"
    own = comparable(load_yaml(path if path.is_file() else path.with_name("default.yaml")))
    local = comparable(load_yaml(LOCAL_TASKS / f"{name}_local.yaml"))
    if name in ("lambada_openai", "arc_easy", "arc_challenge", "wikitext"):
        assert load_yaml(LOCAL_TASKS / f"{name}_local.yaml")["test_split"] == "test"
    for definition in (own, local):
        if name.startswith("arc") or name in ("lambada_openai", "wikitext"):
            definition.pop("validation_split", None)  # the test split comes first
        if name == "hellaswag":
            definition.pop("process_docs", None)  # the copy holds what it makes
    assert local == own


def test_local_data(local_tasks: Path) -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=local_tasks, include_defaults=False)
    tasks = manager.load("cocomix_local")["tasks"]
    assert {name.removesuffix("_local"): len(task.eval_docs) for name, task in tasks.items()} == {
        "arc_challenge": 1172,
        "arc_easy": 2376,
        "blimp": 67000,
        "hellaswag": 10042,
        "hellaswag_1000": 1000,
        "lambada_openai": 5153,
        "piqa": 1838,
        "wikitext": 62,
        "winogrande": 1267,
    }
    whole = {tuple(map(str.strip, item["choices"])): item for item in tasks["hellaswag_local"].eval_docs}
    for item in tasks["hellaswag_1000_local"].eval_docs:
        same = whole[tuple(map(str.strip, item["choices"]))]
        assert (same["query"], same["label"]) == (item["query"], item["label"])
    pages = tasks["wikitext_local"].eval_docs["page"]
    assert pages[0].startswith(" = Robert Boulter = \n \n Robert Boulter is an English film")
    assert sum(len((line + "\n").encode()) for page in pages for line in page.split("\n") if line.strip()) == 1_287_656


def test_tasks_that_cannot_be_loaded_are_refused(tmp_path, monkeypatch) -> None:
    with pytest.raises(InputError, match=r"--tasks-path is .*nowhere, which is not a folder"):
        plan_tasks(TaskSettings(["pick"], tmp_path / "nowhere"))
    definition = {
        "task": "pick",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(tmp_path / "none.jsonl")},
    }
    (tmp_path / "pick.yaml").write_text(json.dumps(definition))
    with pytest.raises(InputError, match=r"task 'pick' or its data cannot be loaded \(FileNotFoundError: "):
        plan_tasks(TaskSettings(["pick"], tmp_path))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(InputError, match=r"pip install 'cocomix\[eval\]'"):
        plan_tasks(TaskSettings(["pick"]))


@pytest.fixture(scope="module")
def joining(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model that reads 64 tokens, whose tokenizer joins a colon, a blank and a letter into one token."""
    folder = tmp_path_factory.mktemp("joining")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(["x: C", "y: C", "z: C", "x: D"] * 50, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", pad_token="<end>")
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=1, bos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("choices", "question", "message"),
    [
        (["C", "D"], "{{q}}", "of task pick has no separate token: .* merges it with the end of its question 'x:'"),
        (["C", "@#" * 40], "Is it so, {{q}} really", "of task pick has 81 tokens, more than the model's context of 64"),
        (["C", "D"], "{{q.upper()}}", "does not fit its data: 'None' has no attribute 'upper'"),
    ],
)
def test_an_answer_that_cannot_be_scored_is_named(choices, question, message, joining, tmp_path) -> None:
    (tmp_path / "data.jsonl").write_text('{"q": "x:", "a": 0}\n{"q": null, "a": 1}\n')
    definition = {
        "task": "pick",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}, "cache_dir": str(tmp_path)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": question,
        "doc_to_target": "a",
        "doc_to_choice": choices,
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "pick.yaml").write_text(json.dumps(definition))
    plan = plan_tasks(TaskSettings(["pick"], definitions=tmp_path / "tasks"))
    with pytest.raises(InputError, match=message):
        evaluate_tasks(open_model(joining), plan)


def test_warnings_that_concern_a_figure_are_shown_once(capsys) -> None:
    _show_warnings()
    logger = logging.getLogger("lm_eval.models.huggingface")
    for length in (40, 41):
        logger.warning("Combined length of context (%d) exceeds\nmodel's maximum length (32).", length)
    logger.warning("Passed an already-initialized model through `pretrained`")
    logger.info("Running loglikelihood requests")
    assert capsys.readouterr().err == (
        "lm-evaluation-harness (first of its kind): Combined length of context (40) exceeds model's maximum length "
        "(32).\n"
    )
