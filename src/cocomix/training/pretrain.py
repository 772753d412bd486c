"""Train one model from scratch on packed blocks; interrupted, it goes on from its last checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState

from cocomix import files
from cocomix.errors import InputError
from cocomix.evaluation.validation import evaluate_model
from cocomix.objectives import Objective
from cocomix.training.callbacks import TokenProgress, TrainingTime
from cocomix.training.trainer import ObjectiveTrainer, last_complete_checkpoint, step_of

PRECISIONS = ("fp32", "bf16")
MEANINGLESS_LOSS = 100.0
"""Nats per token; a model that diverged is above it, or is not a number."""


@dataclass
class TrainingConfig:
    """How a model is trained.

    Args:
        max_tokens: training tokens; the corpus is repeated if it has fewer.
        tokens_per_step: tokens of one optimiser step, over all its micro-batches.
        blocks_per_batch: blocks of one micro-batch on one device.
        learning_rate: peak of the schedule: linear warm-up, then cosine.
        min_learning_rate_ratio: end of the schedule as a share of the peak.
        warmup_ratio: share of the steps that warm up.
        weight_decay: AdamW's, on matrices; biases and norms are left out.
        adam_beta1: AdamW's first moment.
        adam_beta2: AdamW's second moment.
        max_grad_norm: gradients are clipped to this norm.
        precision: fp32, or bf16 for matrix products in bfloat16 (autocast).
        tokens_per_evaluation: training tokens between two evaluations, each followed by a checkpoint.
    """

    max_tokens: int = 2_000_000
    tokens_per_step: int = 4_096
    blocks_per_batch: int = 16
    learning_rate: float = 1e-3
    min_learning_rate_ratio: float = 0.1
    warmup_ratio: float = 0.05
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    precision: str = "fp32"
    tokens_per_evaluation: int = 200_000

    def problems(self, block_size: int) -> list[str]:
        """What cannot work about these settings for blocks of `block_size` tokens, a line each."""
        found = [
            f"{name} is {getattr(self, name)}; expected 1 or more"
            for name in ("max_tokens", "tokens_per_step", "blocks_per_batch", "tokens_per_evaluation")
            if getattr(self, name) < 1
        ]
        if found:
            return found
        batch = self.blocks_per_batch * block_size
        if self.tokens_per_step % batch:
            found.append(
                f"tokens_per_step is {self.tokens_per_step}; it must be a multiple of blocks_per_batch × block_size "
                f"= {self.blocks_per_batch} × {block_size} = {batch}"
            )
        if self.max_tokens < self.tokens_per_step:
            found.append(f"max_tokens is {self.max_tokens}, less than one step of {self.tokens_per_step} tokens")
        if self.precision not in PRECISIONS:
            found.append(f"precision is {self.precision!r}; expected one of {', '.join(PRECISIONS)}")
        if not self.learning_rate > 0:
            found.append(f"learning_rate is {self.learning_rate}; it must be above 0")
        return found

    def steps(self) -> int:
        """Optimiser steps."""
        return self.max_tokens // self.tokens_per_step

    def steps_per_evaluation(self) -> int:
        """Optimiser steps between two evaluations."""
        return max(1, round(self.tokens_per_evaluation / self.tokens_per_step))


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run measured.

    Attributes:
        metrics: of the last evaluation, see `evaluate_model`.
        curve: the metrics of every evaluation, with `tokens` seen until then.
        tokens: training tokens.
        seconds: time in training steps, over all interruptions; evaluation is not counted.
    """

    metrics: dict[str, float]
    curve: list[dict[str, float]]
    tokens: int
    seconds: float


def _arguments(config: TrainingConfig, folder: Path, block_size: int, seed: int) -> TrainingArguments:
    every = config.steps_per_evaluation()
    steps = config.steps()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=config.blocks_per_batch,
        gradient_accumulation_steps=config.tokens_per_step // (config.blocks_per_batch * block_size),
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": config.min_learning_rate_ratio},
        warmup_steps=round(config.warmup_ratio * steps),
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        max_grad_norm=config.max_grad_norm,
        bf16=config.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),  # on a CPU, bfloat16 is refused unless the CPU was asked for
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        logging_steps=every,
        seed=seed,
        data_seed=seed,
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    assert arguments.device is not None
    arguments._n_gpu = 1  # of several visible GPUs the Trainer would use all, by DataParallel
    return arguments


def pretrain(
    model: PreTrainedModel,
    objective: Objective,
    train: Dataset,
    validation: Dataset,
    config: TrainingConfig,
    folder: Path,
    *,
    description: str,
    seed: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> TrainingResult:
    """Train `model` and leave it, with its tokenizer, in `files.partial(folder)`.

    The caller adds what else belongs to the run, deletes the checkpoints and gives the folder its final name, as
    `stages.Stage` does. Checkpoints lie in the same unfinished folder until then; called again after an interruption,
    training goes on from the last of them and ends with the same weights.

    Args:
        model: freshly initialised.
        objective: what is minimised.
        train: blocks with the columns that the objective reads, enough for a step.
        validation: blocks to evaluate on; all of them, every time.
        config: settings.
        folder: final place of the run.
        description: what the progress bar calls it.
        seed: of the order of the blocks and of dropout.
        tokenizer: saved beside the model.

    Raises:
        InputError: the training diverged.
    """
    unfinished = files.partial(folder)
    block_size = len(train[0]["input_ids"])
    per_step = config.tokens_per_step // block_size
    train = train.select(range(len(train) - len(train) % per_step))  # every step is whole, in every epoch
    timer = TrainingTime()
    trainer = ObjectiveTrainer(
        model,
        _arguments(config, unfinished, block_size, seed),
        objective=objective,
        train_dataset=train,
        eval_dataset=validation,
        evaluate=lambda m, blocks: evaluate_model(m, blocks, config.blocks_per_batch, config.precision),
        callbacks=[TokenProgress(description, config.tokens_per_step), timer],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    checkpoint = last_complete_checkpoint(unfinished) if unfinished.exists() else None
    if checkpoint is not None and step_of(checkpoint) == config.steps():  # cut off after its last step
        load_model(model, str(checkpoint / "model.safetensors"))
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        timer.restore(trainer.state)
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    curve = _curve(trainer.state.log_history, config.tokens_per_step)
    assert curve[-1]["tokens"] == config.steps() * config.tokens_per_step, "the last step was not evaluated"
    if not curve[-1]["loss"] < MEANINGLESS_LOSS:
        raise InputError(
            f"the training of {description} diverged: its validation loss is {curve[-1]['loss']}; "
            "lower its learning_rate or raise its warmup_ratio"
        )
    trainer.save_model(str(unfinished))
    (unfinished / "training_args.bin").unlink()
    if tokenizer is not None:
        tokenizer.save_pretrained(str(unfinished))
    metrics = {name: value for name, value in curve[-1].items() if name != "tokens"}
    return TrainingResult(metrics, curve, int(curve[-1]["tokens"]), timer.seconds)


def _curve(history: list[dict[str, Any]], tokens_per_step: int) -> list[dict[str, float]]:
    """The evaluations in a Trainer's log."""
    prefix = "eval_"
    return [
        {"tokens": entry["step"] * tokens_per_step}
        | {name.removeprefix(prefix): value for name, value in entry.items() if name.startswith(prefix)}
        for entry in history
        if "eval_loss" in entry
    ]
