"""How a batch is cut up changes nothing; neither does an interruption."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import cocomix
from cocomix import InputError
from cocomix.objectives import ConceptMixing, NextToken
from cocomix.training import callbacks
from cocomix.training.callbacks import TrainingTime
from cocomix.training.checkpoints import intact_checkpoint, last_complete_checkpoint, load_weights, mark_complete
from cocomix.training.config import TrainingConfig, training_arguments
from cocomix.training.trainer import ObjectiveTrainer
from small_training import BACKBONE, OBJECTIVES, SIZES, KeepCheckpoints, blocks, losses, model_of, trainer_of


@pytest.mark.parametrize("method", ["ntp", "cocomix", "gated"])
@pytest.mark.parametrize(("batch", "accumulation"), [(1, 8), (4, 2)])
def test_micro_batches_add_up_to_the_batch(method: str, batch: int, accumulation: int, tmp_path: Path) -> None:
    whole, parts = trainer_of(method, tmp_path, 8, 1), trainer_of(method, tmp_path, batch, accumulation)
    whole.train()
    parts.train()
    assert len(losses(whole)) == 6
    for one, other in zip(losses(whole), losses(parts), strict=True):
        assert one == pytest.approx(other, abs=2e-5)
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert (one - other).abs().max() < 1e-4


@pytest.mark.parametrize("method", ["ntp", "cocomix"])
def test_the_loss_is_that_of_the_model_on_the_batch(method: str, tmp_path: Path) -> None:
    trainer = trainer_of(method, tmp_path, 2, 4, max_steps=1)
    order = list(trainer.get_train_dataloader())[:4]
    batch = {name: torch.cat([part[name] for part in order]) for name in order[0]}
    trainer.train()
    model = model_of(method)
    (logged,) = losses(trainer)
    logits = model(batch["input_ids"]).logits
    tokens = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())
    assert logged["token_loss"] == pytest.approx(tokens.item(), rel=1e-5)
    if method == "cocomix":
        expected = model(batch["input_ids"], concept_ids=batch["concept_ids"]).concept_loss.item()
        assert logged["concept_loss"] == pytest.approx(expected, rel=1e-5)
        assert logged["loss"] == pytest.approx(tokens.item() + 0.1 * expected, rel=1e-5)


def test_a_scheduled_weight_follows_the_steps_and_is_logged(tmp_path: Path) -> None:
    trainer = trainer_of("falling", tmp_path, 4, 2, max_steps=5)
    trainer.train()
    found = losses(trainer)
    weights = [entry["concept_loss_weight"] for entry in found]
    assert weights == pytest.approx([1, 2 / 3, 1 / 3, 0, 0])
    for weight, entry in zip(weights, found, strict=True):
        assert entry["loss"] == pytest.approx(entry["token_loss"] + weight * entry["concept_loss"], rel=1e-5)


@pytest.mark.parametrize("method", ["ntp", "cocomix", "experts", "falling", "gated"])
def test_a_resumed_run_is_bit_equal(method: str, tmp_path: Path) -> None:
    options = {"max_steps": 10, "save_strategy": "steps", "save_steps": 4}
    whole = trainer_of(method, tmp_path, 4, 2, **options)
    whole.add_callback(KeepCheckpoints())
    whole.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-10"]
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    resumed = trainer_of(method, tmp_path, 4, 2, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "kept" / "checkpoint-4"))
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert losses(whole)[4:] == losses(resumed)[4:]


def test_unfinished_checkpoints_are_deleted(tmp_path: Path) -> None:
    for step, complete in ((4, True), (8, True), (12, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if complete:
            (folder / "complete").touch()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-8"
    assert not (tmp_path / "checkpoint-12").exists()
    assert last_complete_checkpoint(tmp_path / "checkpoint-4") is None


def saved(folder: Path, model: PreTrainedModel) -> Path:
    """A checkpoint of only weights and a state of the optimizer."""
    model.save_pretrained(folder, save_original_format=False)
    torch.save({"step": torch.ones(8)}, folder / "optimizer.pt")
    return folder


def test_a_checkpoint_whose_weights_are_not_the_model_s_is_refused(tmp_path: Path) -> None:
    """Tied weights, of which the file has one name, are all there."""
    ours, other = model_of("experts"), model_of("cocomix")
    found = load_weights(saved(tmp_path / "experts", ours), ours)
    assert found.keys() == ours.state_dict().keys()
    assert all(torch.equal(found[name], weight) for name, weight in ours.state_dict().items())
    with pytest.raises(InputError, match=r"damaged: it lacks weight .* and \d+ more; delete this checkpoint"):
        load_weights(saved(tmp_path / "other", other), ours)
    more = {**ours.state_dict(), "head.bias": torch.ones(1)}
    ours.save_pretrained(tmp_path / "more", state_dict=more, save_original_format=False)
    with pytest.raises(InputError, match=r"has the unknown weight head\.bias; delete"):
        load_weights(tmp_path / "more", ours)


def test_a_damaged_checkpoint_is_passed_over_or_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    older, newer = (saved(tmp_path / f"checkpoint-{step}", model_of("ntp")) for step in (4, 8))
    for checkpoint in (older, newer):
        mark_complete(checkpoint)
    assert intact_checkpoint(tmp_path) == newer
    weights = newer / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1  # a weight, which no format of the file notices
    weights.write_bytes(content)
    assert intact_checkpoint(tmp_path) == older
    assert f"{weights} is damaged: its content has changed" in capsys.readouterr().err and not newer.exists()
    (older / "optimizer.pt").unlink()
    with pytest.raises(InputError, match=r"checkpoint-4/optimizer\.pt is damaged: .*No such file.*; delete this"):
        intact_checkpoint(tmp_path)


def test_time_counts_batches_labels_and_the_device_but_neither_evaluation_nor_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that each of them advances, the device's work only when it is waited for."""
    now, queued, waits = [0.0], [0.0], [0]

    def takes(seconds: float, result: Any = None) -> Any:
        now[0] += seconds
        return result

    def synchronize() -> None:
        takes(queued[0])
        queued[0] = 0.0
        waits[0] += 1

    class OnDevice(ConceptMixing):
        def __call__(self, *arguments: Any) -> Any:
            queued[0] += 0.5
            return super().__call__(*arguments)

    device = SimpleNamespace(is_available=lambda: True, synchronize=synchronize)
    monkeypatch.setattr(callbacks, "torch", SimpleNamespace(accelerator=device))
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: now[0])
    labeler = lambda ids: takes(1.0, torch.zeros(*ids.shape, 3, dtype=torch.long))  # noqa: E731
    monkeypatch.setitem(OBJECTIVES, "cocomix", OnDevice(labeler))
    steps = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4, "logging_steps": 4}
    trainer = trainer_of("cocomix", tmp_path, 8, 1, max_steps=12, **steps)
    trainer.evaluate_model = lambda model, data: takes(100.0, {"loss": 1.0})
    collate, save = trainer.data_collator, trainer.save_model
    monkeypatch.setattr(trainer, "data_collator", lambda rows: takes(0.25, collate(rows)))
    monkeypatch.setattr(trainer, "save_model", lambda *args, **options: takes(10.0, save(*args, **options)))
    trainer.train()
    assert trainer.timer.seconds == 12 * 1.5 + 13 * 0.25  # one batch of the second epoch is read ahead
    assert [entry["seconds"] for entry in trainer.state.log_history if "eval_loss" in entry] == [7.25, 14.0, 21.25]
    speeds = [entry["tokens_per_second"] for entry in trainer.state.log_history if "loss" in entry]
    assert speeds == pytest.approx([4 * 8 * 16 / seconds for seconds in (7.25, 6.75, 7.25)])
    assert waits[0] == 3 * 3 + 1  # per log, evaluation and checkpoint, and at the end; not per step


def test_weight_decay_acts_on_matrices_only(tmp_path: Path) -> None:
    pause = cocomix.CoCoMixConfig(BACKBONE, insert_layer=1, content="pause")
    sinks = AutoConfig.for_model("gpt_oss", **SIZES, head_dim=8)
    for model in (cocomix.CoCoMixForCausalLM(pause), AutoModelForCausalLM.from_config(sinks)):
        decayed = trainer_of("ntp", tmp_path, 8, 1).get_decay_parameter_names(model)
        weights = model.named_parameters(remove_duplicate=False)
        expected = {name for name, weight in weights if weight.dim() >= 2 and "bias" not in name}
        assert set(decayed) == expected


def test_the_environment_does_not_overrule_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "MIXED_PRECISION": "bf16", "USE_FSDP": "true", "DYNAMO_BACKEND": "eager", "GRADIENT_ACCUMULATION_STEPS": "4",
        "USE_DEEPSPEED": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    config = TrainingConfig(max_tokens=256, tokens_per_step=128, blocks_per_batch=8)
    trainer = ObjectiveTrainer(
        model_of("ntp"), training_arguments(config, tmp_path, 16, 0), objective=NextToken(), train_dataset=blocks(),
        eval_dataset=blocks(2), evaluate=lambda model, data: {}, description="", tokens_per_step=128,
        timer=TrainingTime(), flops_per_token=1,
    )  # fmt: skip
    state = trainer.accelerator.state
    assert (trainer.args.mixed_precision, state.mixed_precision) == ("no", "no")
    assert state.dynamo_plugin.backend == "NO" and not trainer.is_fsdp_enabled and not trainer.is_deepspeed_enabled
    assert trainer.accelerator.gradient_accumulation_steps == 1


class Waits(TorchDispatchMode):
    """Counts operations whose result Python waits for."""

    OPERATIONS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name in self.OPERATIONS:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("method", "decoders"), [("ntp", 1), ("cocomix", 2)])
def test_a_step_waits_for_the_device_only_where_transformers_decoders_do(method, decoders, tmp_path):
    waits = {}
    for steps in (2, 5):
        trainer = trainer_of(method, tmp_path, 2, 2, max_steps=steps, logging_steps=100, logging_nan_inf_filter=False)
        with Waits() as mode:
            trainer.train()
        waits[steps] = len(mode.found)
    micro_batches = 2
    # Uncompiled, each decoder looks once whether its positions are those of packed sequences.
    assert (waits[5] - waits[2]) / 3 == micro_batches * decoders
