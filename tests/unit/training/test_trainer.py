"""How a batch is cut up changes nothing; neither does an interruption."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import cocomix
from cocomix.concepts.label_store import features
from cocomix.objectives import ConceptMixing, NextToken
from cocomix.training.callbacks import TrainingTime
from cocomix.training.trainer import ObjectiveTrainer, last_complete_checkpoint

BACKBONE = GPT2Config(
    vocab_size=61,
    n_positions=16,
    n_embd=16,
    n_layer=2,
    n_head=2,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    bos_token_id=None,
    eos_token_id=None,
)
OBJECTIVES = {"ntp": NextToken(), "cocomix": ConceptMixing()}


def model_of(method: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if method == "ntp":
        return GPT2LMHeadModel(BACKBONE)
    published = {"concept_slot": "concept", "concept_loss_weight": 0.1}
    config = cocomix.CoCoMixConfig(BACKBONE, insert_layer=1, num_concepts=24, num_active_concepts=4, **published)
    return cocomix.CoCoMixForCausalLM(config)


def blocks(count: int = 64) -> Dataset:
    """Blocks of which some have many labels and some hardly any, so that means of means would be wrong."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 61, (count, 16), generator=generator)
    labels = torch.randint(0, 24, (count, 16, 3), generator=generator)
    labels[::3, 2:] = -100
    labels[1::3, :, 2] = -100
    columns = {"input_ids": ids.tolist(), "concept_ids": labels.tolist()}
    return Dataset.from_dict(columns, features=features(16, 3, "int64", 24))


def trainer_of(method: str, folder: Path, batch: int, accumulation: int, **options: Any) -> ObjectiveTrainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        max_grad_norm=0.5,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        use_cpu=True,
        **{"max_steps": 6, "save_strategy": "no", "logging_steps": 1, **options},
    )
    timer = TrainingTime()
    return ObjectiveTrainer(
        model_of(method),
        arguments,
        objective=OBJECTIVES[method],
        train_dataset=blocks(),
        eval_dataset=blocks(2),
        evaluate=lambda model, data: {},
        description="the model",
        tokens_per_step=batch * accumulation * 16,
        timer=timer,
        flops_per_token=1,
        callbacks=[timer],
    )


class KeepCheckpoints(TrainerCallback):
    """Copies every checkpoint; the trainer keeps the newest only."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        name = f"checkpoint-{state.global_step}"
        shutil.copytree(Path(args.output_dir) / name, Path(args.output_dir) / "kept" / name)


def losses(trainer: ObjectiveTrainer) -> list[dict[str, float]]:
    keys = ("loss", "token_loss", "concept_loss", "grad_norm")
    return [{k: entry[k] for k in keys if k in entry} for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("method", ["ntp", "cocomix"])
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


@pytest.mark.parametrize("method", ["ntp", "cocomix"])
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
