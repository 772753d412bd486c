"""Train one model on packed or streamed blocks, resuming from the last checkpoint after an interruption."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState

from cocomix.common import distributed, files, integrity, interruption
from cocomix.common.errors import InputError
from cocomix.data.streaming import BlockStream
from cocomix.models.flops import training_flops_per_token
from cocomix.objectives import Objective
from cocomix.training.callbacks import SaveAt, StopWhenInterrupted, TokenProgress, TrainingLog, TrainingTime
from cocomix.training.checkpoints import (
    copy_checkpoint,
    intact_checkpoint,
    last_complete_checkpoint,
    load_weights,
    position_file,
)
from cocomix.training.config import TrainingConfig, training_arguments
from cocomix.training.trainer import ObjectiveTrainer
from cocomix.training.validation import evaluate_model

LOG_FILE = "log.jsonl"
"""Losses, learning rate, gradient norm and speed at each log, and the evaluations, a line of JSON each."""
MEANINGLESS_LOSS = 100.0
"""Loss in nats per token above which training has diverged."""


@dataclass(frozen=True)
class TrainingResult:
    """Measurements of a finished training.

    Attributes:
        metrics: metrics of the last evaluation, see `evaluate_model`. With a gate also its mean over the training,
            `mean_gate`.
        curve: metrics of every evaluation, with the number of training `tokens` until then and, with a gate, its mean
            since the evaluation before.
        tokens: number of training tokens.
        seconds: time of training without interruptions, as `TrainingTime` measures it.
        seconds_curve: the same at every evaluation.
    """

    metrics: dict[str, float]
    curve: list[dict[str, float]]
    tokens: int
    seconds: float
    seconds_curve: list[float]


def pretrain(
    model: PreTrainedModel,
    objective: Objective,
    train: Dataset | BlockStream,
    validation: Dataset,
    config: TrainingConfig,
    folder: Path,
    *,
    description: str,
    project: str,
    seed: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    parallel: str = "ddp",
    branch_steps: Collection[int] = (),
    branch: Path | None = None,
) -> TrainingResult:
    """Train `model` and save it, with its tokenizer, to `files.partial(folder)`.

    The caller adds the other files of the run, deletes the checkpoints and renames the folder into place, as
    `pipeline.stage.Stage` does. Until then, the unfinished folder holds the checkpoints. Called again after an
    interruption, training resumes from the last checkpoint and ends with the same weights. On packed blocks the number
    of processes may change. Every process calls this function.

    Args:
        model: model with initial weights.
        objective: loss to minimize.
        train: blocks with the objective's columns, at least one step; or this process' stream of blocks.
        validation: blocks for every evaluation.
        config: training settings.
        folder: final folder of the run.
        description: name of the training in progress, messages and trackers.
        project: name of the project in trackers.
        seed: seed of the order of the blocks and of dropout.
        tokenizer: tokenizer to save with the model.
        parallel: how several processes share the work, see `training.config.PARALLEL`.
        branch_steps: steps after which the checkpoint is kept in `branch-N`, for trainings that continue it.
        branch: checkpoint of another training to continue. The result is that of the path from 0 tokens on.

    Raises:
        InputError: training diverged, a checkpoint is damaged, or a stream has changed since an interruption.
            Checkpoints stay.
    """
    unfinished = files.partial(folder)
    block_size = len(validation[0]["input_ids"])
    if not isinstance(train, BlockStream):
        per_step = config.tokens_per_step // block_size
        train = train.select(range(len(train) - len(train) % per_step))  # full steps only, in every epoch
    timer, log = TrainingTime(), TrainingLog(unfinished / LOG_FILE, config.tokens_per_step)
    arguments = training_arguments(
        config, unfinished, block_size, seed, parallel, streamed=isinstance(train, BlockStream)
    )
    arguments.run_name, arguments.project = description, project
    trainer = ObjectiveTrainer(
        model,
        arguments,
        objective=objective,
        train_dataset=train,
        eval_dataset=validation,
        evaluate=lambda m, blocks: evaluate_model(m, blocks, config.blocks_per_batch, config.precision),
        description=description,
        tokens_per_step=config.tokens_per_step,
        timer=timer,
        flops_per_token=training_flops_per_token(model, block_size),
        optimizer=config.optimizer,
        keep_checkpoints=config.keep_checkpoints,
        keep_best=config.keep_best,
        branch_steps=branch_steps,
        callbacks=[
            TokenProgress(description, config.tokens_per_step),
            timer,
            log,
            SaveAt(branch_steps),
            StopWhenInterrupted(),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    checkpoint = _checkpoint_to_resume(unfinished)
    if checkpoint is None and branch is not None:
        checkpoint = _start_of_branch(branch, unfinished)
    if checkpoint is not None and files.step_of(checkpoint) == config.steps():  # cut off after its last step
        model.to(distributed.device()).load_state_dict(load_weights(checkpoint, model))
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        timer.restore(trainer.state)
        if distributed.is_main_process():
            log.write(trainer.state.log_history)
    else:
        if checkpoint is not None and isinstance(train, BlockStream):
            _require_same_stream(checkpoint, train, description)
        with _wandb_run(config, unfinished, project, description), _checkpoint_when_interrupted():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    curve = _curve(trainer.state.log_history, config.tokens_per_step)
    assert curve[-1]["tokens"] == config.steps() * config.tokens_per_step, "the last step was not evaluated"
    if not curve[-1]["loss"] < MEANINGLESS_LOSS:
        distributed.wait_for_main_process()
        raise InputError(
            f"the training of {description} diverged: its validation loss is {curve[-1]['loss']}; "
            "lower its learning_rate or raise its warmup_ratio"
        )
    trainer.save_model(str(unfinished))
    if tokenizer is not None and distributed.is_main_process():
        tokenizer.save_pretrained(str(unfinished))
    metrics = {name: value for name, value in curve[-1].items() if name != "tokens"} | _mean_gate(curve)
    seconds = [entry["seconds"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return TrainingResult(metrics, curve, int(curve[-1]["tokens"]), timer.seconds, seconds)


def _checkpoint_when_interrupted() -> AbstractContextManager[None]:
    """Defer signals until `StopWhenInterrupted` has ended the training with a checkpoint.

    Several processes receive a signal at different steps, so they end at once and resume from their last checkpoint.
    """
    return interruption.deferred() if distributed.world_size() == 1 else nullcontext()


def _wandb_run(config: TrainingConfig, folder: Path, project: str, name: str) -> AbstractContextManager[Any]:
    """Open a separate wandb run for this training, with its files in `folder`, if metrics go to wandb."""
    if "wandb" not in config.report_to or not distributed.is_main_process():
        return nullcontext()
    import wandb

    return wandb.init(project=os.environ.get("WANDB_PROJECT", project), name=name, dir=folder)


def _checkpoint_to_resume(unfinished: Path) -> Path | None:
    """Return the newest checkpoint, or None. Rank 0 verifies its checksums, and deletes incomplete and damaged ones."""
    if distributed.is_main_process():
        intact_checkpoint(unfinished)
    distributed.barrier()
    newest = last_complete_checkpoint(unfinished)
    distributed.barrier()  # every process has looked before one is copied here for a branch
    return newest


def _start_of_branch(branch: Path, unfinished: Path) -> Path:
    """Copy the checkpoint that a branch continues, so that an interrupted branch resumes from its own."""
    target = unfinished / f"checkpoint-{files.step_of(branch)}"
    if distributed.is_main_process():
        integrity.verify(branch, f"restore it, or delete {branch.parent} to train it again")
        copy_checkpoint(branch, target)
    distributed.barrier()
    return target


def _require_same_stream(checkpoint: Path, stream: BlockStream, description: str) -> None:
    """Raise InputError if the number of processes or streamed files has changed since `checkpoint`."""
    before = files.read_json(position_file(checkpoint, rank=0))
    now = {"processes": distributed.world_size(), "files": stream.files}
    changed = [f"{before[what]} {what}, now there are {count}" for what, count in now.items() if before[what] != count]
    if changed:
        distributed.wait_for_main_process()
        raise InputError(
            f"{description} cannot resume from {checkpoint}: its corpus was streamed with {' and '.join(changed)}; "
            f"resume with the same number, or delete {checkpoint.parent} to start again"
        )


def _curve(history: list[dict[str, Any]], tokens_per_step: int) -> list[dict[str, float]]:
    """Extract the evaluations from a Trainer's log, each with the mean gate since the one before."""
    prefix = "eval_"
    curve: list[dict[str, float]] = []
    gates: list[tuple[float, int]] = []  # means, and the steps that they are over
    logged = 0
    for entry in history:
        if "loss" in entry:
            if "mean_gate" in entry:
                gates.append((entry["mean_gate"], entry["step"] - logged))
            logged = entry["step"]
        if "eval_loss" in entry:
            metrics = {name.removeprefix(prefix): value for name, value in entry.items() if name.startswith(prefix)}
            gate = {"mean_gate": _mean(gates)} if gates else {}
            curve.append({"tokens": entry["step"] * tokens_per_step, **metrics, **gate})
            gates = []
    return curve


def _mean_gate(curve: list[dict[str, float]]) -> dict[str, float]:
    """Return `mean_gate` over the part of the training in which there was a gate; nothing if there was none."""
    starts = [0.0, *(point["tokens"] for point in curve)]
    gates = [
        (point["mean_gate"], point["tokens"] - start)
        for start, point in zip(starts, curve, strict=False)
        if "mean_gate" in point
    ]
    return {"mean_gate": _mean(gates)} if gates else {}


def _mean(weighted: Sequence[tuple[float, float]]) -> float:
    """Return the mean of values with weights."""
    return sum(value * weight for value, weight in weighted) / sum(weight for _, weight in weighted)
