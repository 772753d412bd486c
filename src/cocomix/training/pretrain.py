"""Train one model from scratch on packed or streamed blocks; interrupted, it goes on from its last checkpoint."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState

from cocomix import files, processes
from cocomix.data.streaming import BlockStream
from cocomix.errors import InputError
from cocomix.evaluation.flops import training_flops_per_token
from cocomix.evaluation.validation import evaluate_model
from cocomix.integrity import require_readable
from cocomix.objectives import Objective
from cocomix.training.callbacks import TokenProgress, TrainingTime
from cocomix.training.checkpoints import (
    last_complete_checkpoint,
    load_weights,
    position_file,
    step_of,
)
from cocomix.training.config import TrainingConfig, training_arguments
from cocomix.training.trainer import ObjectiveTrainer

MEANINGLESS_LOSS = 100.0
"""Nats per token; a model that diverged is above it, or is not a number."""


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run measured.

    Attributes:
        metrics: of the last evaluation, see `evaluate_model`.
        curve: the metrics of every evaluation, with `tokens` seen until then.
        tokens: training tokens.
        seconds: time of training over all interruptions, see `TrainingTime` for what is included.
        seconds_curve: the same, at every evaluation.
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
    seed: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    parallel: str = "ddp",
) -> TrainingResult:
    """Train `model` and leave it, with its tokenizer, in `files.partial(folder)`.

    The caller adds what else belongs to the run, deletes the checkpoints and gives the folder its final name, as
    `stages.Stage` does. Checkpoints lie in the same unfinished folder until then; called again after an interruption,
    training goes on from the last of them and ends with the same weights; with as many processes as before, or, of
    packed blocks, with others.
    Called by every process, all of which train the one model.

    Args:
        model: freshly initialised.
        objective: what is minimised.
        train: blocks with the columns that the objective reads, enough for a step; or this process' stream of blocks.
        validation: blocks to evaluate on; all of them, every time.
        config: settings.
        folder: final place of the run.
        description: what the progress bar calls it.
        seed: of the order of the blocks and of dropout.
        tokenizer: saved beside the model.
        parallel: how several processes share the work, see `training.config.PARALLEL`.

    Raises:
        InputError: the training diverged, a checkpoint is damaged, or a stream is not what it was before an
            interruption; checkpoints stay.
    """
    unfinished = files.partial(folder)
    block_size = len(validation[0]["input_ids"])
    if not isinstance(train, BlockStream):
        per_step = config.tokens_per_step // block_size
        train = train.select(range(len(train) - len(train) % per_step))  # every step is whole, in every epoch
    timer = TrainingTime()
    trainer = ObjectiveTrainer(
        model,
        training_arguments(config, unfinished, block_size, seed, parallel, streamed=isinstance(train, BlockStream)),
        objective=objective,
        train_dataset=train,
        eval_dataset=validation,
        evaluate=lambda m, blocks: evaluate_model(m, blocks, config.blocks_per_batch, config.precision),
        description=description,
        tokens_per_step=config.tokens_per_step,
        timer=timer,
        flops_per_token=training_flops_per_token(model, block_size),
        keep_checkpoints=config.keep_checkpoints,
        keep_best=config.keep_best,
        callbacks=[TokenProgress(description, config.tokens_per_step), timer],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    checkpoint = _checkpoint_to_resume(unfinished)
    if checkpoint is not None and step_of(checkpoint) == config.steps():  # cut off after its last step
        model.to(processes.device()).load_state_dict(load_weights(checkpoint, model))
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        timer.restore(trainer.state)
    else:
        if checkpoint is not None and isinstance(train, BlockStream):
            _require_same_stream(checkpoint, train, description)
        with _wandb_run(config, unfinished, description):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    curve = _curve(trainer.state.log_history, config.tokens_per_step)
    assert curve[-1]["tokens"] == config.steps() * config.tokens_per_step, "the last step was not evaluated"
    if not curve[-1]["loss"] < MEANINGLESS_LOSS:
        processes.wait_for_first()
        raise InputError(
            f"the training of {description} diverged: its validation loss is {curve[-1]['loss']}; "
            "lower its learning_rate or raise its warmup_ratio"
        )
    trainer.save_model(str(unfinished))
    if tokenizer is not None and processes.is_first():
        tokenizer.save_pretrained(str(unfinished))
    metrics = {name: value for name, value in curve[-1].items() if name != "tokens"}
    seconds = [entry["seconds"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return TrainingResult(metrics, curve, int(curve[-1]["tokens"]), timer.seconds, seconds)


def _wandb_run(config: TrainingConfig, folder: Path, name: str) -> AbstractContextManager[Any]:
    """A run of wandb's own for this training, with its files in the run's folder, if metrics are to go there."""
    if "wandb" not in config.report_to or not processes.is_first():
        return nullcontext()
    import wandb

    return wandb.init(project=os.environ.get("WANDB_PROJECT", "huggingface"), name=name, dir=folder)


def _checkpoint_to_resume(unfinished: Path) -> Path | None:
    """The newest complete checkpoint, if there is any; the first process deletes incomplete ones and checks it."""
    if processes.is_first():
        newest = last_complete_checkpoint(unfinished)
        if newest is not None:
            require_readable(newest)
    processes.wait_for_all()
    return last_complete_checkpoint(unfinished)


def _require_same_stream(checkpoint: Path, stream: BlockStream, description: str) -> None:
    """Raise InputError unless what was read until `checkpoint` was the same files, by as many processes."""
    before = files.read_json(position_file(checkpoint, of=0))
    now = {"processes": processes.count(), "files": stream.files}
    changed = [f"{before[what]} {what}, now there are {count}" for what, count in now.items() if before[what] != count]
    if changed:
        processes.wait_for_first()
        raise InputError(
            f"{description} cannot go on from {checkpoint}: its corpus was streamed with {' and '.join(changed)}; "
            f"go on as it was, or delete {checkpoint.parent} to start again"
        )


def _curve(history: list[dict[str, Any]], tokens_per_step: int) -> list[dict[str, float]]:
    """The evaluations in a Trainer's log."""
    prefix = "eval_"
    return [
        {"tokens": entry["step"] * tokens_per_step}
        | {name.removeprefix(prefix): value for name, value in entry.items() if name.startswith(prefix)}
        for entry in history
        if "eval_loss" in entry
    ]
