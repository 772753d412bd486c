"""Trainings small enough for tests: models of two blocks, 64 blocks of tokens and labels, and their trainer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, List, Value
from transformers import (
    AutoConfig,
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
from cocomix.concepts.teacher_losses import loss_columns
from cocomix.objectives import ConceptMixing, NextToken, TeacherGate, WeightSchedule
from cocomix.training.callbacks import TrainingTime
from cocomix.training.trainer import ObjectiveTrainer

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
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
EXPERTS = AutoConfig.for_model("mixtral", **SIZES)
"""Transformers writes these weights under other names than the model's."""
FALLING = WeightSchedule("linear", 0.0, 0.6)
OBJECTIVES = {
    "ntp": NextToken(),
    "cocomix": ConceptMixing(),
    "experts": ConceptMixing(),
    "falling": ConceptMixing(weight=1.0, schedule=FALLING),
    "gated": ConceptMixing(gate=TeacherGate(0.5)),
}


def model_of(method: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if method == "ntp":
        return GPT2LMHeadModel(BACKBONE)
    backbone = EXPERTS if method == "experts" else BACKBONE
    config = cocomix.CoCoMixConfig(backbone, insert_layer=1, num_concepts=24, num_active_concepts=4)
    return cocomix.CoCoMixForCausalLM(config)


def blocks(count: int = 64) -> Dataset:
    """Blocks of which some have many labels and some hardly any, so that means of means would be wrong."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 61, (count, 16), generator=generator)
    labels = torch.randint(0, 24, (count, 16, 3), generator=generator)
    labels[::3, 2:] = -100
    labels[1::3, :, 2] = -100
    losses = (3 + 3 * torch.rand(count, 16, generator=generator)).half()
    columns = {"input_ids": ids.tolist(), "concept_ids": labels.tolist(), "teacher_losses": losses.tolist()}
    both = {**features(16, 3, "int64", 24), **loss_columns(List(Value("int64"), length=16))}
    return Dataset.from_dict(columns, features=Features(both))


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
        **{"use_cpu": True, "max_steps": 6, "save_strategy": "no", "logging_steps": 1, **options},
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
    keys = ("loss", "token_loss", "concept_loss", "concept_loss_weight", "mean_gate", "grad_norm")
    return [{k: entry[k] for k in keys if k in entry} for entry in trainer.state.log_history if "loss" in entry]
