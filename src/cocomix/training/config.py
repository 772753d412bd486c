"""Training settings: the `training` sections of a recipe, and the arguments of Transformers' Trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from transformers import TrainingArguments

from cocomix.common import distributed
from cocomix.common.errors import did_you_mean, error_message
from cocomix.common.settings import Batch, Count, LearningRate, Range, Share
from cocomix.training.optimizers import OPTIMIZERS

PRECISIONS = ("fp32", "bf16")
"""Precisions of inference."""
TRAINING_PRECISIONS = (*PRECISIONS, "fp16")
SCHEDULES = ("cosine", "wsd")
PARALLEL = ("ddp", "fsdp", "fsdp+cpu-offload")
"""How several processes train one model: each holds all of it, a shard, or a shard in CPU memory."""
COMPILE_BACKEND = "inductor"
LOGS_PER_EVALUATION = 10
MomentDecay = Annotated[float, Range(0, 1, open_high=True)]


@dataclass
class TrainingConfig:
    """Settings of a training.

    Args:
        max_tokens: number of training tokens; a smaller corpus is repeated.
        tokens_per_step: tokens per optimizer step, over all its micro-batches.
        blocks_per_batch: blocks per micro-batch and device.
        optimizer: adamw, or muon: Muon for the matrices of the blocks and AdamW for all other weights, with the same
            learning rate and weight decay.
        learning_rate: peak learning rate.
        schedule: after a linear warm-up, cosine decay, or wsd: constant, then linear decay (warmup-stable-decay).
        min_learning_rate_ratio: final learning rate as a fraction of the peak.
        warmup_ratio: fraction of the steps that warm up.
        decay_ratio: fraction of the steps that decay, with wsd.
        weight_decay: weight decay, on matrices only, not on biases and norms.
        adam_beta1: decay of AdamW's first moment.
        adam_beta2: decay of AdamW's second moment.
        max_grad_norm: norm to which gradients are clipped; 0 for no clipping.
        precision: fp32, or autocast to bf16 or (on a GPU) fp16.
        gradient_checkpointing: store only the input of each block for the backward pass and recompute the rest.
        compile: compile the model with torch.compile.
        tokens_per_evaluation: training tokens between two evaluations, each followed by a checkpoint; by default a
            tenth of `max_tokens`.
        keep_checkpoints: number of newest checkpoints to keep until training ends.
        keep_best: also save the weights with the lowest validation loss, in `best/`.
        report_to: integrations of Transformers that receive the metrics: trackio, tensorboard, wandb, …
    """

    max_tokens: Count = 2_000_000
    tokens_per_step: Count = 4_096
    blocks_per_batch: Batch = 16
    optimizer: str = "adamw"
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
    tokens_per_evaluation: Count | None = None
    keep_checkpoints: Count = 1
    keep_best: bool = False
    report_to: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.tokens_per_evaluation is None:
            self.tokens_per_evaluation = default_tokens_per_evaluation(self.max_tokens)

    def problems(self, block_size: int) -> list[str]:
        """List what is wrong with these settings for blocks of `block_size` tokens, one line each."""
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
        if self.optimizer not in OPTIMIZERS:
            found.append(
                f"optimizer is {self.optimizer!r}; expected one of {', '.join(OPTIMIZERS)}"
                + did_you_mean(self.optimizer, OPTIMIZERS)
            )
        if self.schedule not in SCHEDULES:
            found.append(
                f"schedule is {self.schedule!r}; expected one of {', '.join(SCHEDULES)}"
                + did_you_mean(self.schedule, SCHEDULES)
            )
        if self.schedule == "wsd" and self.warmup_ratio + self.decay_ratio > 1:
            found.append(f"warmup_ratio {self.warmup_ratio} and decay_ratio {self.decay_ratio} exceed 1 together")
        return found + self._report_problems()

    def launch_problems(self, block_size: int) -> list[str]:
        """List what keeps training from starting with these processes and logins, one line each."""
        return self._sharing_problems(block_size) + (_wandb_problems() if "wandb" in self.report_to else [])

    def _sharing_problems(self, block_size: int) -> list[str]:
        """List why these processes cannot share the batches equally, one line at most."""
        batch, several = self.blocks_per_batch * block_size, distributed.world_size()
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
        """Return the number of optimizer steps."""
        return self.max_tokens // self.tokens_per_step

    def decay_start(self) -> int:
        """Return the number of steps before the decay of wsd."""
        return self.steps() - round(self.decay_ratio * self.steps())

    def warmup_steps(self) -> int:
        """Return the number of steps that warm up."""
        return round(self.warmup_ratio * self.steps())

    def steps_per_evaluation(self) -> int:
        """Return the number of optimizer steps between two evaluations."""
        assert self.tokens_per_evaluation is not None  # see __post_init__
        return max(1, round(self.tokens_per_evaluation / self.tokens_per_step))


def default_tokens_per_evaluation(max_tokens: int) -> int:
    """Return a tenth of the training tokens."""
    return max(1, max_tokens // 10)


def _wandb_problems() -> list[str]:
    """List why wandb cannot receive metrics, one line at most."""
    import wandb

    if wandb.setup().settings.mode != "online":
        return []
    try:
        problem = None if wandb.login(prompt=False) else "no user is logged in"
    except wandb.errors.Error as error:
        problem = error_message(error)
    remedy = "run `wandb login`, set WANDB_MODE=offline, or leave wandb out"
    return [] if problem is None else [f"report_to names wandb, which cannot be used: {problem}; {remedy}"]


def training_arguments(
    config: TrainingConfig, folder: Path, block_size: int, seed: int, parallel: str = "ddp", streamed: bool = False
) -> TrainingArguments:
    """Build the Trainer's arguments for blocks of `block_size` tokens, with checkpoints in `folder`.

    `parallel` is how the processes share the work, if there are several. A stream of blocks that resumes
    begins where it was: nothing of it is skipped.
    """
    distributed.ignore_launcher_settings()
    every, on_gpu = config.steps_per_evaluation(), torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps(),
        per_device_train_batch_size=config.blocks_per_batch,
        gradient_accumulation_steps=config.tokens_per_step
        // (config.blocks_per_batch * block_size * distributed.world_size()),
        learning_rate=config.learning_rate,
        **_schedule(config),
        warmup_steps=config.warmup_steps(),
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        max_grad_norm=config.max_grad_norm,
        bf16=config.precision == "bf16",
        fp16=config.precision == "fp16",
        tf32=False,  # float32 stays float32: Transformers enables TF32 for torch.compile, and environments may
        **_memory_and_speed(config),
        accelerator_config={"non_blocking": on_gpu},  # a step does not wait until its batch is on the device
        use_cpu=not on_gpu,  # Transformers refuses bf16 on a CPU unless it is requested explicitly
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        logging_steps=_steps_per_log(every),
        logging_nan_inf_filter=False,  # filtering would hide divergence
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
    arguments._n_gpu = 1  # the Trainer would use all visible GPUs, with DataParallel
    return arguments


def _sharding(parallel: str) -> dict[str, Any]:
    """Arguments for sharding; none for a single process, so that a recipe runs on a laptop and on a cluster."""
    if parallel == "ddp" or distributed.world_size() == 1:
        return {}
    return {"fsdp": True, "fsdp_config": {"version": 2, "cpu_offload": parallel == "fsdp+cpu-offload"}}


def _keep_precision(arguments: TrainingArguments) -> None:
    """Gather weights and reduce gradients in float32 and leave products to autocast, so that results match ddp."""
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
    decay = config.steps() - config.decay_start()
    settings = {"num_decay_steps": decay, "min_lr_ratio": least, "decay_type": "linear"}
    return {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": settings}


def _steps_per_log(every: int) -> int:
    """Return the number of steps between two logs, a divisor of `every`, so that each evaluation comes with a log."""
    return next(steps for steps in range(max(1, every // LOGS_PER_EVALUATION), 0, -1) if every % steps == 0)
