"""How a model is trained: the recipe's `training` sections, and what Transformers' Trainer is told of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from transformers import TrainingArguments

from cocomix import processes
from cocomix.settings import Batch, Count, LearningRate, Range, Share
from cocomix.suggest import did_you_mean

PRECISIONS = ("fp32", "bf16")
"""Of models that are only read."""
TRAINING_PRECISIONS = (*PRECISIONS, "fp16")
SCHEDULES = ("cosine", "wsd")
PARALLEL = ("ddp", "fsdp", "fsdp+cpu-offload")
"""How several processes train one model: each keeps all of it, or a share, or a share in the memory of the CPU."""
COMPILE_BACKEND = "inductor"
LOGS_PER_EVALUATION = 10
MomentDecay = Annotated[float, Range(0, 1, open_high=True)]


@dataclass
class TrainingConfig:
    """How a model is trained.

    Args:
        max_tokens: training tokens; the corpus is repeated if it has fewer.
        tokens_per_step: tokens of one optimiser step, over all its micro-batches.
        blocks_per_batch: blocks of one micro-batch on one device.
        learning_rate: peak of the schedule.
        schedule: after a linear warm-up, cosine to the end, or wsd: constant, then linear decay (warmup-stable-decay).
        min_learning_rate_ratio: end of the schedule as a share of the peak.
        warmup_ratio: share of the steps that warm up.
        decay_ratio: of wsd, share of the steps that decay.
        weight_decay: AdamW's, on matrices; biases and norms are left out.
        adam_beta1: AdamW's first moment.
        adam_beta2: AdamW's second moment.
        max_grad_norm: gradients are clipped to this norm; 0 leaves them as they are.
        precision: fp32, or matrix products in bf16 or (on a GPU) fp16, by autocast.
        gradient_checkpointing: keep only each block's input for the backward pass and compute the rest again.
        compile: compile the model with torch.compile.
        tokens_per_evaluation: training tokens between two evaluations, each followed by a checkpoint.
        keep_checkpoints: how many of the newest stay until the training is over.
        keep_best: leave the weights with the lowest validation loss in `best/`, beside the last.
        report_to: where metrics go in addition to the log: trackio, tensorboard, wandb, or another integration of
            Transformers.
    """

    max_tokens: Count = 2_000_000
    tokens_per_step: Count = 4_096
    blocks_per_batch: Batch = 16
    learning_rate: LearningRate = 1e-3
    schedule: str = "cosine"
    min_learning_rate_ratio: Share = 0.1
    warmup_ratio: Share = 0.05
    decay_ratio: Share = 0.2
    weight_decay: Annotated[float, Range(0, 100)] = 0.1
    adam_beta1: MomentDecay = 0.9
    adam_beta2: MomentDecay = 0.95
    max_grad_norm: Annotated[float, Range(0, 10**9)] = 1.0
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    compile: bool = False
    tokens_per_evaluation: Count = 200_000
    keep_checkpoints: Count = 1
    keep_best: bool = False
    report_to: list[str] = field(default_factory=list)

    def problems(self, block_size: int) -> list[str]:
        """What cannot work about these settings for blocks of `block_size` tokens, a line each."""
        found = []
        batch = self.blocks_per_batch * block_size
        if self.tokens_per_step % batch:
            found.append(
                f"tokens_per_step is {self.tokens_per_step}; it must be a multiple of blocks_per_batch × block_size = "
                f"{self.blocks_per_batch} × {block_size} = {batch}"
            )
        if self.max_tokens < self.tokens_per_step:
            found.append(f"max_tokens is {self.max_tokens}, less than one step of {self.tokens_per_step} tokens")
        if self.precision not in TRAINING_PRECISIONS:
            found.append(f"precision is {self.precision!r}; expected one of {', '.join(TRAINING_PRECISIONS)}")
        elif self.precision == "fp16" and not torch.cuda.is_available():
            found.append("precision is 'fp16', which needs a GPU; use bf16, or fp32")
        if self.schedule not in SCHEDULES:
            found.append(
                f"schedule is {self.schedule!r}; expected one of {', '.join(SCHEDULES)}"
                + did_you_mean(self.schedule, SCHEDULES)
            )
        if self.schedule == "wsd" and self.warmup_ratio + self.decay_ratio > 1:
            found.append(f"warmup_ratio {self.warmup_ratio} and decay_ratio {self.decay_ratio} exceed 1 together")
        return found + self._report_problems()

    def launch_problems(self, block_size: int) -> list[str]:
        """Why a training cannot start here and now, a line each: what depends on the processes and on logins."""
        return self._sharing_problems(block_size) + (_wandb_problems() if "wandb" in self.report_to else [])

    def _sharing_problems(self, block_size: int) -> list[str]:
        """Why these processes cannot share a training in equal parts, a line; nothing if they can."""
        batch, several = self.blocks_per_batch * block_size, processes.count()
        if several == 1 or self.tokens_per_step % (batch * several) == 0:
            return []
        return [
            f"tokens_per_step is {self.tokens_per_step}; it must be a multiple of blocks_per_batch × block_size × "
            f"processes = {self.blocks_per_batch} × {block_size} × {several} = {batch * several}"
        ]

    def _report_problems(self) -> list[str]:
        if not self.report_to:
            return []
        from transformers.integrations.integration_utils import (
            INTEGRATION_TO_CALLBACK,
            get_available_reporting_integrations,
        )

        found = []
        for name in self.report_to:
            if name not in INTEGRATION_TO_CALLBACK:
                known = sorted(INTEGRATION_TO_CALLBACK)
                found.append(
                    f"report_to names {name!r}; expected some of {', '.join(known)}{did_you_mean(name, known)}"
                )
            elif name not in get_available_reporting_integrations():
                found.append(f"report_to names {name}, which is not installed; install it with: pip install {name}")
        return found

    def steps(self) -> int:
        """Optimiser steps."""
        return self.max_tokens // self.tokens_per_step

    def steps_per_evaluation(self) -> int:
        """Optimiser steps between two evaluations."""
        return max(1, round(self.tokens_per_evaluation / self.tokens_per_step))


def _wandb_problems() -> list[str]:
    """Why wandb would not take metrics, a line; nothing if it would."""
    import wandb

    if wandb.setup().settings.mode != "online":
        return []
    try:
        problem = None if wandb.login(prompt=False) else "nobody is logged in"
    except wandb.errors.Error as error:
        problem = " ".join(str(error).split())
    remedy = "run `wandb login`, set WANDB_MODE=offline, or leave wandb out"
    return [] if problem is None else [f"report_to names wandb, which cannot be used: {problem}; {remedy}"]


def training_arguments(
    config: TrainingConfig, folder: Path, block_size: int, seed: int, parallel: str = "ddp", streamed: bool = False
) -> TrainingArguments:
    """The Trainer's arguments for blocks of `block_size` tokens, with checkpoints in `folder`.

    `parallel` is how the processes share the work, if there are several. A stream of blocks that is gone on with
    begins where it was: nothing of it is skipped.
    """
    processes.ignore_launcher_settings()
    every = config.steps_per_evaluation()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps(),
        per_device_train_batch_size=config.blocks_per_batch,
        gradient_accumulation_steps=config.tokens_per_step
        // (config.blocks_per_batch * block_size * processes.count()),
        learning_rate=config.learning_rate,
        **_schedule(config),
        warmup_steps=round(config.warmup_ratio * config.steps()),
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        max_grad_norm=config.max_grad_norm,
        bf16=config.precision == "bf16",
        fp16=config.precision == "fp16",
        tf32=False,  # float32 is float32: Transformers would turn TF32 on for torch.compile, the environment for all
        **_memory_and_speed(config),
        use_cpu=not torch.cuda.is_available(),  # on a CPU, bfloat16 is refused unless the CPU was asked for
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        logging_steps=_steps_per_log(every),
        logging_nan_inf_filter=False,  # it would hide that a training has diverged
        seed=seed,
        data_seed=seed,
        ignore_data_skip=streamed,
        report_to=config.report_to or "none",
        remove_unused_columns=False,
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        **_sharding(parallel),
    )
    _keep_precision(arguments)
    assert arguments.device is not None
    arguments._n_gpu = 1  # of several visible GPUs the Trainer would use all, by DataParallel
    return arguments


def _sharding(parallel: str) -> dict[str, Any]:
    """One process trains alone, whatever the recipe says, so that the same recipe runs on a laptop and a cluster."""
    if parallel == "ddp" or processes.count() == 1:
        return {}
    return {"fsdp": True, "fsdp_config": {"version": 2, "cpu_offload": parallel == "fsdp+cpu-offload"}}


def _keep_precision(arguments: TrainingArguments) -> None:
    """Weights are gathered and gradients summed in float32, products made by autocast: figures are those of ddp."""
    if arguments.fsdp_plugin_args is not None:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        arguments.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy()


def _memory_and_speed(config: TrainingConfig) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    if config.gradient_checkpointing:
        chosen |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    if config.compile:
        chosen |= {"torch_compile": True, "torch_compile_backend": COMPILE_BACKEND}
    return chosen


def _schedule(config: TrainingConfig) -> dict[str, Any]:
    least = config.min_learning_rate_ratio
    if config.schedule == "cosine":
        return {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": least}}
    decay = round(config.decay_ratio * config.steps())
    settings = {"num_decay_steps": decay, "min_lr_ratio": least, "decay_type": "linear"}
    return {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": settings}


def _steps_per_log(every: int) -> int:
    """Steps between two logs, such that each evaluation, and so each checkpoint, comes with one."""
    return next(steps for steps in range(max(1, every // LOGS_PER_EVALUATION), 0, -1) if every % steps == 0)
