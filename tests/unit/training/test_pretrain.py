"""Training settings: schedules, what is kept, what is reported, and how a training that diverges ends."""

from __future__ import annotations

import contextlib
import json
import math
import re
import signal
import sqlite3
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback

import forked
from cocomix import InputError
from cocomix.common import files, integrity, interruption
from cocomix.data.datatrove import TokenDocuments
from cocomix.data.streaming import BlockStream
from cocomix.objectives import NextToken
from cocomix.training import config as training_config
from cocomix.training import pretrain as pretrain_module
from cocomix.training.checkpoints import last_complete_checkpoint
from cocomix.training.config import TrainingConfig, training_arguments
from cocomix.training.pretrain import TrainingResult, pretrain
from cocomix.training.trainer import ObjectiveTrainer
from small_training import BACKBONE, OBJECTIVES, blocks, model_of, trainer_of

STEPS, TOKENS_PER_STEP = 12, 64
SMALL: dict[str, Any] = {
    "max_tokens": STEPS * TOKENS_PER_STEP,
    "tokens_per_step": TOKENS_PER_STEP,
    "blocks_per_batch": 2,
    "learning_rate": 5e-3,
    "tokens_per_evaluation": 4 * TOKENS_PER_STEP,
}


class Killed(BaseException):
    pass


def train(
    folder: Path,
    method: str = "ntp",
    data: Dataset | BlockStream | None = None,
    branch_steps: tuple[int, ...] = (),
    branch: Path | None = None,
    **changes: Any,
) -> TrainingResult:
    files.partial(folder).mkdir(parents=True, exist_ok=True)
    data = blocks() if data is None else data
    settings = TrainingConfig(**{**SMALL, **changes})
    assert settings.problems(16) == []
    return pretrain(
        model_of(method),
        OBJECTIVES[method],
        data,
        blocks(4),
        settings,
        folder,
        description="student ntp",
        project="tests",
        seed=3,
        branch_steps=branch_steps,
        branch=branch,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(str(files.partial(folder) / "model.safetensors"))


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of the log of a training, without its times."""
    lines = (files.partial(folder) / "log.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in ("seconds", "tokens_per_second")}
        for line in lines
    ]


def log_of(folder: Path) -> list[dict[str, Any]]:
    checkpoint = last_complete_checkpoint(files.partial(folder))
    assert checkpoint is not None
    return json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]


# Schedules


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_learning_rate_follows_its_schedule(schedule, tmp_path):
    steps, warmup, decay = 100, 10, 20
    settings = TrainingConfig(
        max_tokens=steps * 64, tokens_per_step=64, blocks_per_batch=4, learning_rate=2.0, schedule=schedule,
        warmup_ratio=warmup / steps, decay_ratio=decay / steps, min_learning_rate_ratio=0.1, tokens_per_evaluation=640,
    )  # fmt: skip
    trainer = ObjectiveTrainer(
        model_of("ntp"), training_arguments(settings, tmp_path, 16, 0), objective=NextToken(), train_dataset=blocks(),
        eval_dataset=blocks(2), evaluate=lambda model, data: {}, description="", tokens_per_step=64,
        timer=pretrain_module.TrainingTime(), flops_per_token=1,
    )  # fmt: skip
    trainer.create_optimizer_and_scheduler(steps)
    rates = []
    for _ in range(steps + 1):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates[5] == pytest.approx(1.0, rel=0.11)
    assert rates[warmup] == pytest.approx(2.0)
    assert rates[steps] == pytest.approx(0.2, abs=1e-6)
    if schedule == "wsd":
        assert rates[warmup : steps - decay + 1] == pytest.approx([2.0] * (steps - decay - warmup + 1))
        assert rates[steps - decay // 2] == pytest.approx(1.1)
    else:
        assert rates[(warmup + steps) // 2] == pytest.approx(1.1)


# The same weights


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "wsd"},
        {"gradient_checkpointing": True},
        {"precision": "bf16"},
        {"keep_checkpoints": 2},
        {"optimizer": "muon"},
    ],
    ids=str,
)
def test_interrupted_it_ends_with_the_same_weights(settings, tmp_path, monkeypatch):
    step = ObjectiveTrainer.training_step

    def killed_at_step_6(self: ObjectiveTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == 6:
            raise Killed
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(ObjectiveTrainer, "training_step", killed_at_step_6)
        with pytest.raises(Killed):
            train(tmp_path / "killed", "cocomix", **settings)
    assert last_complete_checkpoint(files.partial(tmp_path / "killed")) is not None
    train(tmp_path / "killed", "cocomix", **settings)
    train(tmp_path / "undisturbed", "cocomix", **settings)
    found, expected = weights(tmp_path / "killed"), weights(tmp_path / "undisturbed")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    killed, undisturbed = (lines_of(tmp_path / name) for name in ("killed", "undisturbed"))
    assert killed == undisturbed
    assert [line["step"] for line in killed if "loss" in line] == list(range(1, STEPS + 1))


@pytest.fixture
def stream(tmp_path: Path) -> Callable[[], BlockStream]:
    """New streams of one corpus, of 80 documents in two files, so of less than the training's 48 blocks."""
    draw = np.random.default_rng(0)
    for name in ("a.ds", "b.ds"):
        documents = [draw.integers(1, 61, draw.integers(4, 12)) for _ in range(40)]
        (tmp_path / name).write_bytes(np.concatenate(documents).astype("<u2").tobytes())
        (tmp_path / f"{name}.index").write_bytes(np.cumsum([len(d) for d in documents]).astype("<u8").tobytes())
    return lambda: BlockStream(
        TokenDocuments(str(tmp_path), 61), validation_fraction=0.1, excluded=frozenset(), block_size=16,
        vocab_size=61, shuffle_blocks=5, seed=3,
    )  # fmt: skip


@pytest.mark.parametrize("killed_at", [5, 6, 9])
def test_interrupted_on_a_stream_it_ends_with_the_same_weights(killed_at, stream, tmp_path, monkeypatch):
    """Dropout included: going on draws no random number that the undisturbed training does not."""
    for dropout in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        monkeypatch.setattr(BACKBONE, dropout, 0.1)
    step = ObjectiveTrainer.training_step
    read: list[torch.Tensor] = []

    def killed(self: ObjectiveTrainer, model: PreTrainedModel, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == killed_at:
            raise Killed
        return step(self, model, inputs, *args, **kwargs)

    def watched(self: ObjectiveTrainer, model: PreTrainedModel, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        read.append(inputs["input_ids"])
        return step(self, model, inputs, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(ObjectiveTrainer, "training_step", killed)
        with pytest.raises(Killed):
            train(tmp_path / "killed", data=stream())
    train(tmp_path / "killed", data=stream())
    monkeypatch.setattr(ObjectiveTrainer, "training_step", watched)
    undisturbed = train(tmp_path / "undisturbed", data=stream())
    found, expected = weights(tmp_path / "killed"), weights(tmp_path / "undisturbed")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert undisturbed.tokens == STEPS * TOKENS_PER_STEP
    assert torch.equal(torch.cat(read), torch.stack(list(islice(stream(), 4 * STEPS))))


def test_a_stream_that_has_changed_is_not_gone_on_with(stream, tmp_path):
    train(tmp_path / "run", data=stream())
    last = files.partial(tmp_path / "run") / "checkpoint-12"
    checkpoint = last.rename(last.with_name("checkpoint-8"))  # so that there is something to go on with
    position = files.read_json(checkpoint / "position-0.json")
    with integrity.replaced(checkpoint, "position-0.json"):
        files.write_json(checkpoint / "position-0.json", {**position, "processes": 2})
    (tmp_path / "b.ds").rename(tmp_path / "b.other")
    with pytest.raises(InputError) as caught:
        train(tmp_path / "run", data=stream())
    assert str(caught.value) == (
        f"student ntp cannot resume from {checkpoint}: its corpus was streamed with 2 processes, now there are 1 and "
        f"2 files, now there are 1; resume with the same number, or delete {checkpoint.parent} to start again"
    )
    assert (checkpoint / "complete").is_file()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_training_with_a_checkpoint_after_the_step(number, tmp_path, monkeypatch):
    undisturbed = train(tmp_path / "undisturbed")
    before = {each: signal.getsignal(each) for each in interruption.SIGNALS}
    for each in before:
        signal.signal(each, signal.default_int_handler)
    interruption.raise_on_signals()
    step = ObjectiveTrainer.training_step
    steps = []

    def interrupted(trainer, *args):
        steps.append(trainer.state.global_step)
        if len(steps) == 6:
            signal.raise_signal(number)
        return step(trainer, *args)

    with monkeypatch.context() as patch, pytest.raises(interruption.Interrupted) as caught:
        patch.setattr(ObjectiveTrainer, "training_step", interrupted)
        train(tmp_path / "run")
    assert caught.value.exit_code == 128 + number
    checkpoint = last_complete_checkpoint(files.partial(tmp_path / "run"))
    assert checkpoint.name == f"checkpoint-{steps[-1] + 1}" and len(steps) < 12
    assert train(tmp_path / "run").curve == undisturbed.curve
    for name, weight in weights(tmp_path / "undisturbed").items():
        assert torch.equal(weights(tmp_path / "run")[name], weight)
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.mark.parametrize("method", ["ntp", "cocomix"])
def test_gradient_checkpointing_changes_no_weight(method, tmp_path):
    train(tmp_path / "a", method)
    train(tmp_path / "b", method, gradient_checkpointing=True)
    found, expected = weights(tmp_path / "b"), weights(tmp_path / "a")
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["ntp", "cocomix"])
def test_a_compiled_training_saves_a_model_like_any_other(method, tmp_path, monkeypatch):
    """Traced and cut up as torch.compile does, without the C++ compiler that a machine may lack."""
    monkeypatch.setattr(training_config, "COMPILE_BACKEND", "aot_eager")
    plain = train(tmp_path / "plain", method)
    compiled = train(tmp_path / "compiled", method, compile=True)
    assert compiled.metrics["loss"] == pytest.approx(plain.metrics["loss"], rel=1e-4)
    assert weights(tmp_path / "compiled").keys() == weights(tmp_path / "plain").keys()
    assert isinstance(AutoModelForCausalLM.from_pretrained(files.partial(tmp_path / "compiled")), PreTrainedModel)


# What is kept


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_newest_checkpoints_stay(keep, tmp_path):
    train(tmp_path / "run", keep_checkpoints=keep)
    found = sorted(path.name for path in files.partial(tmp_path / "run").glob("checkpoint-*"))
    assert found == sorted(["checkpoint-4", "checkpoint-8", "checkpoint-12"][-keep:])


def test_the_best_weights_are_those_of_the_lowest_validation_loss(tmp_path, monkeypatch):
    losses = iter([3.0, 2.0, 2.5])
    seen: list[dict[str, torch.Tensor]] = []

    def evaluate(model: PreTrainedModel, *args: object) -> dict[str, float]:
        seen.append({name: weight.clone() for name, weight in model.state_dict().items()})
        return {"loss": next(losses)}

    monkeypatch.setattr(pretrain_module, "evaluate_model", evaluate)
    train(tmp_path / "run", keep_best=True)
    best = AutoModelForCausalLM.from_pretrained(files.partial(tmp_path / "run") / "best").state_dict()
    last = AutoModelForCausalLM.from_pretrained(files.partial(tmp_path / "run")).state_dict()
    assert all(torch.equal(best[name], weight) for name, weight in seen[1].items())
    assert all(torch.equal(last[name], weight) for name, weight in seen[2].items())


# What is logged


def test_every_part_of_the_loss_is_logged_with_the_speed(tmp_path, capsys):
    train(tmp_path / "run", "cocomix")
    logs = [entry for entry in log_of(tmp_path / "run") if "loss" in entry]
    assert [entry["tokens"] for entry in logs] == [(i + 1) * TOKENS_PER_STEP for i in range(STEPS)]
    for entry in logs:
        assert entry["loss"] == pytest.approx(entry["token_loss"] + 0.1 * entry["concept_loss"], rel=1e-3)
        assert entry["tokens_per_second"] > 0 and entry["grad_norm"] > 0 and "learning_rate" in entry
    lines = lines_of(tmp_path / "run")
    assert [line["tokens"] for line in lines if "grad_norm" in line] == [entry["tokens"] for entry in logs]
    assert {"concept_loss", "learning_rate", "tokens"} < lines[0].keys() and "eval_loss" in lines[-1]
    printed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("student ntp: ")]
    assert len(printed) == len(lines) and "\r" not in "".join(printed)
    assert re.match(r"student ntp: 64 of 768 tokens, loss .*, concepts .* tokens/s, .* s left", printed[0])
    evaluations = [entry for entry in log_of(tmp_path / "run") if "eval_loss" in entry]
    assert all("eval_concept_precision" in entry and "eval_concept_recall" in entry for entry in evaluations)


def test_tensorboard_gets_the_curves(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path / "run", "cocomix", report_to=["tensorboard"])
    (events,) = files.partial(tmp_path / "run").rglob("events.out.tfevents*")
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    points = accumulator.Scalars("train/concept_loss")
    assert [point.step for point in points] == list(range(1, STEPS + 1))
    assert {"train/token_loss", "train/grad_norm", "train/tokens_per_second", "eval/loss"} <= {
        tag for tag in accumulator.Tags()["scalars"]
    }


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"report_to": ["tensorbord"]}, "report_to names 'tensorbord'; .*did you mean 'tensorboard'"),
        ({"report_to": ["comet_ml"]}, "report_to names comet_ml, which is not installed"),
        ({"optimizer": "moun"}, "optimizer is 'moun'; expected one of adamw, muon; did you mean 'muon'"),
        ({"schedule": "wds"}, "schedule is 'wds'; expected one of cosine, wsd; did you mean 'wsd'"),
        ({"schedule": "wsd", "warmup_ratio": 0.6, "decay_ratio": 0.6}, "exceed 1 together"),
        ({"precision": "fp8"}, "precision is 'fp8'; expected one of fp32, bf16, fp16"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, expected):
    (line,) = TrainingConfig(**{**SMALL, **settings}).problems(16)
    assert re.search(expected, line)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which fp16 works")
@pytest.mark.parametrize(
    ("mode", "logged_in", "expected"),
    [
        ("offline", False, []),
        ("online", True, []),
        (
            "online",
            False,
            [r"report_to names wandb, .*no user is logged in; run `wandb login`, set WANDB_MODE=offline"],
        ),
    ],
)
def test_wandb_without_a_login_is_refused_before_anything_starts(mode, logged_in, expected, monkeypatch):
    settings = SimpleNamespace(settings=SimpleNamespace(mode=mode))
    fake = SimpleNamespace(
        setup=lambda: settings, login=lambda prompt: logged_in, errors=SimpleNamespace(Error=OSError)
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    found = TrainingConfig(**SMALL, report_to=["wandb"]).launch_problems(16)
    assert len(found) == len(expected) and all(map(re.match, expected, found))


def test_fp16_without_a_gpu_is_refused():
    (line,) = TrainingConfig(**SMALL, precision="fp16").problems(16)
    assert line == "precision is 'fp16', which needs a GPU; use bf16, or fp32"


# Divergence


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_a_training_that_is_no_number_ends_and_keeps_the_last_good_checkpoint(what, tmp_path, monkeypatch):
    def spoil(self: ObjectiveTrainer, model: PreTrainedModel, inputs: Any, **kwargs: Any) -> torch.Tensor:
        loss = compute(self, model, inputs, **kwargs)
        if self.state.global_step == 6:
            if what == "loss":
                return loss * math.nan
            loss.register_hook(lambda gradient: gradient * math.inf)
        return loss

    compute = ObjectiveTrainer.compute_loss
    monkeypatch.setattr(ObjectiveTrainer, "compute_loss", spoil)
    good = files.partial(tmp_path / "run") / "checkpoint-4"
    for _ in range(2):  # the same command meets the same end
        with pytest.raises(InputError) as caught:
            train(tmp_path / "run")
        message = str(caught.value)
        assert "\n" not in message
        assert f"the training of student ntp diverged: after 448 tokens its {what} is nan; " in message
        assert "its last good checkpoint, of 256 tokens, is kept in" in message
        assert str(good) in message
        assert last_complete_checkpoint(files.partial(tmp_path / "run")) == good
    assert all(weight.isfinite().all() for weight in load_file(str(good / "model.safetensors")).values())


def test_no_checkpoint_of_weights_that_are_no_numbers(tmp_path):
    """They may become so in the last step before a checkpoint, which needs no evaluation."""

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            model.transformer.ln_f.bias.data[0] = math.nan if state.global_step == 3 else 0.0

    trainer = trainer_of("ntp", tmp_path, batch=4, accumulation=1, save_strategy="steps", save_steps=3)
    trainer.add_callback(Spoil())
    with pytest.raises(InputError, match="its weight norm is nan; no checkpoint was written before"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_validation_loss_that_is_no_number_ends_it_too(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain_module, "evaluate_model", lambda *args: {"loss": math.inf})
    with pytest.raises(InputError, match=r"after 256 tokens its validation loss is inf; no checkpoint was written"):
        train(tmp_path / "run")


def train_with_trackio(folder: Path) -> int:
    train(folder / "run", "cocomix", report_to=["trackio"])
    return 0


def test_trackio_gets_the_curves_without_a_network(tmp_path):
    """In a process of its own, as trackio decides when it is imported where its files lie."""
    log, place = tmp_path / "log", str(tmp_path / "trackio")
    process = forked.start(train_with_trackio, tmp_path, log=log, TRACKIO_DIR=place, HF_HUB_OFFLINE="1")
    assert forked.exit_codes(process) == [0], log.read_text()
    (database,) = (tmp_path / "trackio").glob("*.db")
    with contextlib.closing(sqlite3.connect(database)) as connection:
        logged = [json.loads(row[0]) for row in connection.execute("SELECT metrics FROM metrics ORDER BY step")]
    assert len([entry for entry in logged if "train/concept_loss" in entry]) == STEPS
    assert any("eval/loss" in entry for entry in logged)


def test_a_branch_ends_as_the_training_that_it_would_have_been(tmp_path):
    """Its curve and its weights are those of its own schedule from the beginning."""
    wsd = {"schedule": "wsd", "warmup_ratio": 0.0, "tokens_per_evaluation": 3 * TOKENS_PER_STEP}
    short = {**wsd, "max_tokens": 8 * TOKENS_PER_STEP, "decay_ratio": 0.5}
    train(tmp_path / "long", **wsd, branch_steps=(4,))
    branch = files.partial(tmp_path / "long") / "branch-4"
    assert [path.name for path in files.partial(tmp_path / "long").glob("checkpoint-*")] == ["checkpoint-12"]
    one, other = train(tmp_path / "branch", **short, branch=branch), train(tmp_path / "alone", **short)
    assert one.curve == other.curve and one.tokens == other.tokens == 8 * TOKENS_PER_STEP
    weights = [load_file(files.partial(tmp_path / name) / "model.safetensors") for name in ("branch", "alone")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
