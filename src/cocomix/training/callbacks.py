"""Trainer callbacks: progress, the log of the run, and the time of training."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from cocomix.common import interruption
from cocomix.common.console import ProgressBar, has_terminal, progress_bar, status
from cocomix.common.units import duration

SHOWN = {
    "token_loss": "loss",
    "concept_loss": "concepts",
    "hidden_loss": "hidden states",
    "kd_loss": "teacher",
    "mean_gate": "gate",
    "eval_loss": "validation",
}
"""Logged metrics that the progress bar shows, and their labels there."""


class TokenProgress(TrainerCallback):
    """Progress bar that counts tokens and shows the latest losses; without a terminal, a line for each log."""

    def __init__(self, description: str, tokens_per_step: int) -> None:
        self.description = description
        self.tokens_per_step = tokens_per_step
        self.bar: ProgressBar | None = None
        self.shown: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        done = state.global_step * self.tokens_per_step
        if done and state.is_world_process_zero:
            status(f"{self.description}: resumed at {done:,} tokens")
        self.bar = progress_bar(
            total=state.max_steps * self.tokens_per_step,
            initial=done,
            desc=self.description,
            unit="tok",
            unit_scale=True,
            disable=not (state.is_world_process_zero and has_terminal()),
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.bar is not None
        self.bar.update(state.global_step * self.tokens_per_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        for key, label in SHOWN.items():
            if logs and key in logs:
                self.shown[label] = f"{logs[key]:.3f}"
        if self.bar is not None:
            self.bar.set_postfix(self.shown, refresh=False)
        if logs and state.is_world_process_zero and not has_terminal() and {"loss", "eval_loss"} & logs.keys():
            status(self._line(state, logs))

    def _line(self, state: TrainerState, logs: dict[str, float]) -> str:
        """Return a log as a line: tokens, losses, speed and the time left at this speed."""
        done, total = (steps * self.tokens_per_step for steps in (state.global_step, state.max_steps))
        shown = [f"{label} {logs[key]:.3f}" for key, label in SHOWN.items() if key in logs]
        if speed := logs.get("tokens_per_second"):
            shown += [f"{speed:,.0f} tokens/s", f"{duration((total - done) / speed)} left"]
        return ", ".join([f"{self.description}: {done:,} of {total:,} tokens", *shown])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.bar is not None
        self.bar.close()


class TrainingLog(TrainerCallback):
    """Write each log of the training as a line of JSON. A resumed training continues from its checkpoint's logs."""

    def __init__(self, path: Path, tokens_per_step: int) -> None:
        self.path = path
        self.tokens_per_step = tokens_per_step

    def write(self, history: Sequence[dict[str, Any]], mode: str = "w") -> None:
        """Write the entries of a trainer's log history: losses of training steps, and evaluations."""
        with self.path.open(mode, encoding="utf-8") as file:
            for entry in history:
                if "loss" in entry or "eval_loss" in entry:
                    step = entry["step"]
                    line = {"step": step, **entry, "tokens": step * self.tokens_per_step}
                    file.write(json.dumps({key: value for key, value in line.items() if key != "epoch"}) + "\n")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.write(state.log_history)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.write(state.log_history[-1:], "a")


class SaveAt(TrainerCallback):
    """Request a checkpoint after each of these steps."""

    def __init__(self, steps: Collection[int]) -> None:
        self.steps = steps

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            control.should_save = True


class StopWhenInterrupted(TrainerCallback):
    """End the training with a checkpoint after the step in which a signal arrived; see `interruption.deferred`."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if interruption.is_requested():
            # The metrics since the last log are not in the checkpoint.
            control.should_log = control.should_save = control.should_training_stop = True


class TrainingTime(TrainerCallback, ExportableState):
    """Measure the seconds of training. Checkpoints store them, so that a resumed run continues the count.

    Included: loading and preparing batches, labels and predictions that a teacher computes during training, forward
    and backward passes, the optimizer, compilation, and logging. Every reading first waits for the device. Excluded:
    setup before the first batch, evaluation, and writing checkpoints.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        """Seconds until the last reading."""
        self._since: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.restore(state)
        self._since = time.perf_counter()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.read()
        self._since = None

    def restore(self, state: TrainerState) -> None:
        """Continue from the seconds in a checkpoint's state."""
        self.seconds = state.stateful_callbacks[type(self).__name__]["attributes"]["seconds"]

    def read(self) -> float:
        """Wait for the device, and return the seconds until now."""
        if self._since is not None:
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            now = time.perf_counter()
            self.seconds += now - self._since
            self._since = now
        return self.seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time spent within the block."""
        self.read()
        running, self._since = self._since is not None, None
        yield
        self._since = time.perf_counter() if running else None

    def state(self) -> dict[str, Any]:
        """Return the state that checkpoints store."""
        return {"args": {}, "attributes": {"seconds": self.seconds}}
