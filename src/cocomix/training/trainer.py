"""Transformers' Trainer with an objective instead of the model's loss, and with our evaluation.

One training step, function by function:

1. `training/pretrain.py: pretrain` builds the `ObjectiveTrainer` and calls `Trainer.train`, Transformers' loop.
2. `data/blocks.py: Blocks.__getitems__` and `collate` read a micro-batch; `data/streaming.py: BlockStream` for streams.
3. `ObjectiveTrainer.get_batch_samples` collects the micro-batches of the step and calls the objective:
   `objectives/METHOD.py: prepare` adds what a teacher computes (`concept_ids`), `count` counts the targets, and the
   counts are summed over micro-batches and processes.
4. For each micro-batch, `Trainer.training_step` calls `ObjectiveTrainer.compute_loss`, and that
   `objectives/METHOD.py: __call__` with the counts.
5. The objective calls the model: `models/causal_lm.py: CoCoMixForCausalLM.forward` for CoCoMix (prepare inputs, lower
   blocks, mixer, upper blocks, losses); `models/multi_token.py: MultiTokenForCausalLM.forward` for multi-token
   prediction; `models/plain.py: with_token_loss` for plain decoders.
6. The losses are sums divided by the counts: `models/linear_loss.py: linear_cross_entropy` without logits,
   `models/losses.py` with logits.
7. `Trainer.training_step` runs the backward pass. After the last micro-batch, Transformers' loop clips gradients and
   steps the optimizer and the schedule of `training/config.py: training_arguments`.
8. `training/callbacks.py: TokenProgress.on_step_end` advances the bar; at logging steps `ObjectiveTrainer.log` writes
   losses and speed; at evaluation steps `ObjectiveTrainer.evaluate` and `_save_checkpoint` run.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from datasets import Dataset
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerControl, TrainingArguments

from cocomix.common import distributed, files
from cocomix.common.errors import InputError
from cocomix.common.gpus import peak_flops
from cocomix.data.blocks import Blocks, collate
from cocomix.data.streaming import BlockStream
from cocomix.models.plain import with_token_loss
from cocomix.objectives import Counts, Objective
from cocomix.training.callbacks import TrainingTime
from cocomix.training.checkpoints import (
    branch_point,
    copy_checkpoint,
    keep_newest,
    last_complete_checkpoint,
    load_weights,
    mark_complete,
    position_file,
)
from cocomix.training.optimizers import MuonWithAdamW

Evaluate = Callable[[PreTrainedModel, Dataset], dict[str, float]]

FULL_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True)
OPTIMIZER, SCHEDULE = "optimizer.pt", "scheduler.pt"
BEST = "best"


class ObjectiveTrainer(Trainer):
    """Train any model on any objective.

    Every loss is a sum over targets divided by the number of targets in the full batch, over all micro-batches and
    processes, so it does not depend on how the batch is split.

    Args:
        model: model to train.
        args: Transformers' training arguments.
        objective: loss to minimize.
        train_dataset: blocks with the objective's columns, or this process' stream of blocks.
        eval_dataset: validation blocks.
        evaluate: function that computes the metrics of the model on `eval_dataset` at every evaluation.
        description: name of the model in messages.
        tokens_per_step: tokens per optimizer step.
        timer: callback that measures the seconds of training steps.
        flops_per_token: FLOPs of a training step per token, for the utilization of a GPU.
        optimizer: one of `OPTIMIZERS`.
        keep_checkpoints: number of newest checkpoints to keep.
        keep_best: keep the weights with the lowest validation loss in `best/`.
        branch_steps: steps whose checkpoints are kept for branches.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        objective: Objective,
        train_dataset: Dataset | BlockStream,
        eval_dataset: Dataset,
        evaluate: Evaluate,
        description: str,
        tokens_per_step: int,
        timer: TrainingTime,
        flops_per_token: int,
        optimizer: str = "adamw",
        keep_checkpoints: int = 1,
        keep_best: bool = False,
        branch_steps: Collection[int] = (),
        **kwargs: Any,
    ) -> None:
        streamed = isinstance(train_dataset, BlockStream)
        blocks = train_dataset if streamed else Blocks(train_dataset, objective.columns)
        model = with_token_loss(model)
        super().__init__(model, args, train_dataset=blocks, eval_dataset=eval_dataset, data_collator=collate, **kwargs)
        self.model_class = type(model)
        self.optimizer_name = optimizer
        self.objective = objective
        self._current = objective  # with the weights of the current step
        self.evaluate_model = evaluate
        self.loss_is_scaled_for_ga = True  # counts span all accumulated micro-batches
        self.description = description
        self.tokens_per_step = tokens_per_step
        self.timer = timer
        self.flops_per_token = flops_per_token
        self.keep_checkpoints = keep_checkpoints
        self.keep_best = keep_best
        self.branch_steps = branch_steps
        self._parts: dict[str, Tensor] = {}
        self._steps_of_part: defaultdict[str, set[int]] = defaultdict(set)
        self._logged: tuple[int, float] | None = None  # steps and seconds at the start or the last log

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, and shard on CPUs too, where Accelerate would silently fall back to ddp."""
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if self.args.fsdp and getattr(state, "fsdp_plugin", None) is None:
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            state.distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True

    def get_train_dataloader(self) -> DataLoader:
        """Return the Trainer's data loader, or for a stream, which is one per process, one that does not distribute."""
        if not isinstance(self.train_dataset, BlockStream):
            return super().get_train_dataloader()
        return DataLoader(
            self.train_dataset,
            self.args.per_device_train_batch_size,
            collate_fn=lambda blocks: {"input_ids": torch.stack(blocks)},
            generator=torch.Generator(),  # the default one also drives dropout, and iterators advance it
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Any]:
        """Return the micro-batches of the next step, and their targets summed over micro-batches and processes."""
        self._logged = self._logged or (self.state.global_step, self.timer.seconds)
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._current = self.objective.at(self.state.global_step / self.state.max_steps)
        batches = self._current.prepare([self._prepare_inputs(batch) for batch in batches])
        counted = [self._current.count(batch) for batch in batches]
        counts = {name: torch.stack([c[name] for c in counted]).sum().to(device) for name in (counted or [{}])[0]}
        return batches, {name: self.accelerator.reduce(count).clamp(min=1) for name, count in counts.items()}

    def compute_loss(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Counts | None = None,
    ) -> Tensor:
        """Compute the objective's loss; accumulate its parts for the next log without waiting for the device."""
        assert num_items_in_batch is not None and not return_outputs, "evaluation does not call compute_loss"
        losses = self._current(model, inputs, num_items_in_batch)
        for name, part in losses.parts.items():
            self._parts[name] = self._parts.get(name, torch.zeros_like(part)) + part
            self._steps_of_part[name].add(self.state.global_step)
        return losses.total * self.accelerator.num_processes  # gradients are averaged over processes

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the Trainer does; add the parts of the training loss and the speed.

        Raises:
            InputError: the loss or the norm of the gradient is not finite; no checkpoint of such weights is written.
        """
        if "loss" in logs:
            for name, part in self._parts.items():  # a loss with weight 0 is computed in fewer steps
                logs[name] = self.accelerator.reduce(part).item() / len(self._steps_of_part[name])
            self._parts, self._steps_of_part = {}, defaultdict(set)
            logs |= self._current.scheduled_weights()
            self._require_finite("loss", logs["loss"])
            if not self.args.fp16:  # whose loss scaling skips steps with infinite gradients
                self._require_finite("gradient norm", logs.get("grad_norm", 0.0))
            logs |= self._speed()
        super().log(logs, start_time)

    def _speed(self) -> dict[str, float]:
        """Compute tokens so far, tokens per second since the last log, and model FLOP utilization of the GPU."""
        step, seconds = self.state.global_step, self.timer.read()
        before = self._logged or (0, 0.0)
        tokens, elapsed = (step - before[0]) * self.tokens_per_step, seconds - before[1]
        self._logged = (step, seconds)
        found = {"tokens": float(step * self.tokens_per_step)}
        if elapsed > 0:
            found["tokens_per_second"] = tokens / elapsed
            peak = peak_flops(self.args.device) if self.args.bf16 or self.args.fp16 else None
            if peak is not None:
                used = found["tokens_per_second"] * self.flops_per_token
                found["model_flop_utilization"] = used / peak / self.accelerator.num_processes
        return found

    def _require_finite_weights(self) -> None:
        shares = [w.to_local() if isinstance(w, DTensor) else w for w in self.model.parameters()]
        norms = torch.stack([torch.linalg.vector_norm(share.detach().float()) for share in shares])
        self._require_finite("weight norm", self.accelerator.reduce(norms.norm()).item())

    def _require_finite(self, what: str, value: float) -> None:
        if math.isfinite(value):
            return
        distributed.wait_for_main_process()
        tokens = self.state.global_step * self.tokens_per_step
        good = last_complete_checkpoint(Path(self.args.output_dir))
        kept = "no checkpoint was written before"
        if good is not None:
            seen = files.step_of(good) * self.tokens_per_step
            kept = f"its last good checkpoint, of {seen:,} tokens, is kept in {good}"
        raise InputError(
            f"the training of {self.description} diverged: after {tokens:,} tokens its {what} is {value}; {kept}; "
            "lower its learning_rate or raise its warmup_ratio (a changed recipe starts again and deletes it)"
        )

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Compute the metrics on the validation blocks, in evaluation mode and outside the training time."""
        with self.timer.paused():
            return self._evaluate_now(metric_key_prefix)

    def _evaluate_now(self, metric_key_prefix: str) -> dict[str, float]:
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        found = self.evaluate_model(model.eval(), self.eval_dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        model.train(was_training)
        self._require_finite("validation loss", found.get("loss", 0.0))
        if self.keep_best:
            self._keep_if_best(metrics[f"{metric_key_prefix}_loss"], metric_key_prefix)
        self.log({**metrics, "seconds": self.timer.seconds})
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _keep_if_best(self, loss: float, prefix: str) -> None:
        """Save the weights to `best/` atomically, unless an earlier evaluation had a lower loss."""
        before = [entry[f"{prefix}_loss"] for entry in self.state.log_history if f"{prefix}_loss" in entry]
        if loss < min(before, default=math.inf):
            best = Path(self.args.output_dir) / BEST
            with (
                files.whole_folder(best)
                if distributed.is_main_process()
                else contextlib.nullcontext(best) as unfinished
            ):
                self.save_model(str(unfinished))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the full model, gathering it from all processes if it is sharded. Every process calls this.

        A checkpoint (`_internal_call`) stores weights under the model's names, not those of the published format (which
        differ for experts), so that resuming needs no conversion.
        """
        model = self._gathered_model() if self.is_fsdp_enabled else self.model
        if distributed.is_main_process():
            folder = output_dir or self.args.output_dir
            model.save_pretrained(folder, save_original_format=not _internal_call)
        distributed.barrier()

    def _gathered_model(self) -> PreTrainedModel:
        """Build an unsharded model of the original class; on rank 0 with all weights."""
        weights = get_model_state_dict(self.model, options=FULL_STATE)
        with torch.device("meta"):
            gathered = self.model_class(self.model.config)
        if distributed.is_main_process():
            gathered.load_state_dict(weights, assign=True)
            gathered.tie_weights()
            gathered.generation_config = self.model.generation_config
        return gathered

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save both in a form that does not depend on the number of processes or on sharding."""
        state = get_optimizer_state_dict(self.model, self._bare_optimizer(), options=FULL_STATE)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER)
            torch.save(self._get_schedule().state_dict(), Path(output_dir) / SCHEDULE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = torch.load(Path(checkpoint) / OPTIMIZER, map_location="cpu", weights_only=True)
        set_optimizer_state_dict(self.model, self._bare_optimizer(), state, options=FULL_STATE)
        self._get_schedule().load_state_dict(torch.load(Path(checkpoint) / SCHEDULE, weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        checkpoint = Path(resume_from_checkpoint)
        if isinstance(self.train_dataset, BlockStream):
            self.train_dataset.load_state_dict(files.read_json(position_file(checkpoint, distributed.rank())))
        weights: dict[str, Any] = load_weights(checkpoint, self.model)
        set_model_state_dict(self.model, weights, options=StateDictOptions(full_state_dict=True))

    def _bare_optimizer(self) -> torch.optim.Optimizer:
        optimizer: Any = self.optimizer
        return getattr(optimizer, "optimizer", optimizer)

    def _get_schedule(self) -> torch.optim.lr_scheduler.LRScheduler:
        assert self.lr_scheduler is not None
        return self.lr_scheduler

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        with self.timer.paused():
            self._require_finite_weights()
            super()._save_checkpoint(model, trial)
            newest = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            if isinstance(self.train_dataset, BlockStream):
                files.write_json(position_file(newest, distributed.rank()), self.train_dataset.state_dict())
            distributed.barrier()  # every process has written its random state and its position in the stream
            if self.args.should_save:
                mark_complete(newest)
                if self.state.global_step in self.branch_steps:
                    copy_checkpoint(newest, branch_point(newest.parent, self.state.global_step))
                keep_newest(newest.parent, self.keep_checkpoints)
            distributed.barrier()  # the checkpoint is complete before any process can fail and end the others

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Create AdamW as the Trainer does, or with the same settings Muon and AdamW."""
        if self.optimizer_name == "adamw":
            return super().create_optimizer(model)
        _, adamw = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        decayed = self.get_decay_parameter_names(self.model)
        built = MuonWithAdamW(self.model, decayed, self.args.weight_decay, **adamw)
        self.optimizer = built
        return built

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Return the names of weights with weight decay: matrices only, while Transformers includes some vectors."""
        vectors = {name for name, weight in model.named_parameters() if weight.dim() < 2}
        return [name for name in super().get_decay_parameter_names(model) if name not in vectors]
