"""`transformers.Trainer` with an objective in place of a model's own loss, and our own evaluation."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerControl, TrainingArguments

from cocomix.objectives import Counts, Objective

Evaluate = Callable[[PreTrainedModel, Dataset], dict[str, float]]

COMPLETE = "complete"
"""File that a checkpoint folder gets last; one without it was cut off while being written."""


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Blocks as a batch, every column stacked; integers as int64 (stored, they are as small as they can be)."""
    columns = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return {
        name: torch.from_numpy(column if column.dtype.kind == "f" else column.astype(np.int64))
        for name, column in columns.items()
    }


class ObjectiveTrainer(Trainer):
    """Trains any model on any objective.

    Every loss is a sum over targets divided by the number of targets in the whole batch, over all
    micro-batches and processes: how a batch is cut up does not change it.

    Args:
        model: the model to train.
        args: Transformers' training arguments.
        objective: what is minimised.
        train_dataset: blocks with the objective's columns.
        eval_dataset: validation blocks.
        evaluate: metrics of the model on `eval_dataset`, called at every evaluation.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        objective: Objective,
        train_dataset: Dataset,
        eval_dataset: Dataset,
        evaluate: Evaluate,
        **kwargs: Any,
    ) -> None:
        columns = train_dataset.select_columns(list(objective.columns)).with_format("numpy")
        super().__init__(model, args, train_dataset=columns, eval_dataset=eval_dataset, data_collator=collate, **kwargs)
        self.objective = objective
        self.evaluate_model = evaluate
        self.loss_is_scaled_for_ga = True  # the counts below span all accumulated micro-batches
        self._parts: dict[str, Tensor] = {}
        self._steps_in_parts = 0

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Any]:
        """The micro-batches of the next step, and their targets counted over all of them and all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = self.objective.prepare(batches)
        self._steps_in_parts += 1
        counted = [self.objective.count(batch) for batch in batches]
        counts = {
            name: torch.stack([c[name] for c in counted]).sum().clamp(min=1).to(device) for name in (counted or [{}])[0]
        }
        return batches, {name: self.accelerator.reduce(count) for name, count in counts.items()}

    def compute_loss(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Counts | None = None,
    ) -> Tensor:
        """The objective's loss; its parts are kept for the next log without waiting for the device."""
        assert num_items_in_batch is not None and not return_outputs, "evaluation has its own path"
        losses = self.objective(model, inputs, num_items_in_batch)
        for name, part in losses.parts.items():
            self._parts[name] = self._parts.get(name, torch.zeros_like(part)) + part
        return losses.total * self.accelerator.num_processes  # gradients are averaged over processes

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the Trainer does, the parts of the training loss beside their sum."""
        if "loss" in logs:
            steps = self._steps_in_parts
            logs |= {name: self.accelerator.reduce(part).item() / steps for name, part in self._parts.items()}
            self._parts, self._steps_in_parts = {}, 0
        super().log(logs, start_time)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Metrics on the validation blocks, in evaluation mode."""
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        found = self.evaluate_model(model.eval(), self.eval_dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        model.train(was_training)
        self.log(dict(metrics))
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self.args.output_dir)
            newest = folder / f"checkpoint-{self.state.global_step}"
            (newest / COMPLETE).touch()
            for older in set(folder.glob("checkpoint-*")) - {newest}:
                (older / COMPLETE).unlink(missing_ok=True)  # first, so that none is ever complete and half deleted
                shutil.rmtree(older)


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that was written to its end; unfinished ones are deleted."""
    complete = []
    for checkpoint in folder.glob("checkpoint-*"):
        if (checkpoint / COMPLETE).exists():
            complete.append(checkpoint)
        else:
            shutil.rmtree(checkpoint)
    return max(complete, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """Optimiser steps done when a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])
