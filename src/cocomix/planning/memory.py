"""Estimate the peak memory of a training step, by part, by running the step on fake tensors.

Fake tensors have shapes but no contents. Every operation of the real model, objective and optimizer is dispatched, but
nothing is computed or allocated, and each storage is tracked from creation to release. The estimate therefore works for
any backbone and method without a formula for each. Two things that fake tensors cannot show are added explicitly: the
buckets of ddp, and what fsdp shards and gathers.

P weights, N processes (one GPU each).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from cocomix.models import linear_loss
from cocomix.models.backbones import decoder_blocks
from cocomix.models.causal_lm import CoCoMixForCausalLM
from cocomix.models.multi_token import MultiTokenForCausalLM
from cocomix.models.plain import with_token_loss
from cocomix.objectives import Objective
from cocomix.objectives.base import Batch
from cocomix.training.config import TrainingConfig
from cocomix.training.optimizers import MuonWithAdamW
from cocomix.training.validation import evaluation_sums

WEIGHTS, GRADIENTS, STATES, CASTS = "weights", "gradients", "optimizer states", "weights in low precision"
BLOCKS, MIXER, HEAD = "activations of the blocks", "activations of the mixer", "embedding, token head, losses"
BACKWARD, TEACHER, BUCKETS, GATHERED = "backward pass", "teacher and SAE", "ddp's buckets", "fsdp's gathered blocks"
PARTS = (WEIGHTS, GRADIENTS, STATES, BUCKETS, GATHERED, CASTS, BLOCKS, MIXER, HEAD, BACKWARD, TEACHER)
GATHERED_BLOCKS = 2
"""Blocks that fsdp gathers at a time: the current one, and the next one being prefetched."""
Labeler = Callable[[], object]
"""Labels a batch when called."""
STEP = "training step"
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class LiveMemory(TorchDispatchMode):
    """Tracks every storage that is created inside the context.

    Attributes:
        part: part to which new storages are assigned.
        now: live bytes by part.
        peak: `now` at the time of its largest sum.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = HEAD
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._total, self._peak_total = 0, 0
        self._part_of = WeakIdKeyDictionary()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function is torch.ops.aten._grouped_mm.default:
            result: Any = _grouped_product(*arguments, **(keywords or {}))
        else:
            result = function(*arguments, **(keywords or {}))
        part = self.part
        if function is torch.ops.aten._to_copy.default and self._is_weight(arguments[0]):
            part = CASTS
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._track(tensor, part)
        return result

    def reassign(self, tensor: Tensor, part: str) -> None:
        """Assign a tensor to `part` from now on."""
        storage = tensor.untyped_storage()
        self.now[self._part_of[storage][0]] -= storage.nbytes()
        self.now[part] += storage.nbytes()
        self._part_of[storage][0] = part

    def reset_peak(self) -> None:
        """Restart the peak from the live storages."""
        self.peak, self._peak_total = Counter(self.now), self._total

    @contextmanager
    def counting(self, part: str) -> Iterator[None]:
        """Assign storages that are created inside the context to `part`."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def count_module(self, module: nn.Module, part: str) -> None:
        """Assign storages of the module's forward pass to `part`, also when checkpointing reruns it."""
        before: list[str] = []

        def enter(*_: object) -> None:
            before.append(self.part)
            self.part = part

        def leave(*_: object) -> None:
            self.part = before.pop()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, always_call=True)

    def _is_weight(self, tensor: Tensor) -> bool:
        return self._part_of.get(tensor.untyped_storage(), [None])[0] == WEIGHTS

    def _track(self, tensor: Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        if storage in self._part_of:
            return
        size, assigned = storage.nbytes(), [part]
        self._part_of[storage] = assigned
        self.now[part] += size
        self._total += size
        weakref.finalize(storage, self._release, assigned, size)
        if self._total > self._peak_total:
            self.reset_peak()

    def _release(self, assigned: list[str], size: int) -> None:
        self.now[assigned[0]] -= size
        self._total -= size


@dataclass(frozen=True)
class Peak:
    """The peak memory of a process in a phase of training.

    Attributes:
        phase: training step, evaluation or online labeling.
        parts: bytes by part.
    """

    phase: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Total bytes."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class TrainingMemory:
    """The peak memory of training in a single process, and the sizes needed to derive that of several.

    Attributes:
        phases: bytes by part at the peak of each phase: training step, evaluation, online labeling.
        weights: bytes of all weights, 4 P.
        block: bytes of the weights of the largest block.
        outside: bytes of the weights outside the blocks.
        accumulates: whether a step accumulates gradients over several micro-batches.
    """

    phases: dict[str, Counter[str]]
    weights: int
    block: int
    outside: int
    accumulates: bool

    def peaks(self, parallel: str, processes: int) -> list[Peak]:
        """Compute the peak of each phase per GPU if `processes` GPUs train one model.

        ddp replicates everything and adds buckets as large as the gradients. fsdp (`training.config`: version 2,
        float32) shards weights, gradients and optimizer states 1/N each. Weights outside the blocks stay gathered
        during the step; blocks are gathered in turn, each with its gradient. Gradients of several micro-batches stay
        unsharded, because they are reduced only in the last one.
        """
        share = Counter if processes == 1 else partial(self._share, parallel, processes)
        return [Peak(phase, _in_order(share(parts))) for phase, parts in self.phases.items()]

    def _share(self, parallel: str, processes: int, parts: Counter[str]) -> Counter[str]:
        found = Counter(parts)
        if parallel == "ddp":
            found[BUCKETS] = self.weights
            return found
        gathered = self.outside + min(GATHERED_BLOCKS * self.block, self.weights - self.outside)
        found[GATHERED] = gathered
        found[WEIGHTS] = shard = self.weights // processes
        found[STATES] = parts[STATES] // processes
        if parts[GRADIENTS] or parts[BACKWARD]:
            found[GRADIENTS] = shard + (self.weights if self.accumulates else gathered)
        if parallel == "fsdp+cpu-offload":
            found[WEIGHTS] = found[STATES] = 0
            found[GRADIENTS] = max(0, found[GRADIENTS] - shard)
        return found


def training_memory(
    build_model: Callable[[], PreTrainedModel],
    build_objective: Callable[[], Objective],
    build_batch: Callable[[], Batch],
    training: TrainingConfig,
    *,
    accumulates: bool,
    build_labeler: Callable[[], Labeler] | None = None,
    device: str = "cuda",
) -> TrainingMemory:
    """Run a micro-batch and an evaluation on fake tensors, as Accelerate and the Trainer run them.

    Args:
        build_model: builds the model.
        build_objective: builds the objective, with the teacher if the objective calls it in every step.
        build_batch: builds a micro-batch with the columns that the objective reads.
        training: training settings.
        accumulates: whether the micro-batch follows others of the same step.
        build_labeler: builds the labeler of the blocks of a step, for online labels.
        device: cpu or cuda; selects the chunk size in `linear_loss.CHUNK_BYTES`.
    """
    phases: dict[str, Counter[str]] = {}
    with torch.device("meta"):  # splitting a decoder copies modules, which fake tensors do not support
        model = with_token_loss(build_model())
    with FakeTensorMode(), _chunks_of(device), LiveMemory() as live:
        with live.counting(WEIGHTS):
            model._apply(lambda weight: torch.empty(weight.shape, dtype=weight.dtype)).tie_weights()
        model.train()
        if training.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        blocks = blocks_of(model)
        for block in blocks:
            live.count_module(block, BLOCKS)
        if isinstance(model, CoCoMixForCausalLM):
            live.count_module(model.mixer, MIXER)
        optimizer = _with_states(model, live, training.optimizer)
        if not accumulates:
            optimizer.zero_grad()
        with live.counting(TEACHER):
            objective = build_objective()
            label = build_labeler and build_labeler()
        batch = build_batch()
        _autocast(model, training.precision)

        live.reset_peak()
        losses = objective(model, batch, objective.count(batch))
        with live.counting(BACKWARD):
            losses.total.backward()
        phases[STEP] = live.peak
        del losses
        optimizer.zero_grad()
        live.reset_peak()
        with torch.no_grad():
            evaluation_sums(model.eval(), batch, training.precision)
        phases["evaluation"] = live.peak
        if label is not None:
            live.reset_peak()
            with live.counting(TEACHER):
                label()
            phases["online labeling"] = live.peak
        weights = [parameter.nbytes for parameter in model.parameters()]
        block_weights = [sum(parameter.nbytes for parameter in block.parameters()) for block in blocks]
    return TrainingMemory(phases, sum(weights), max(block_weights), sum(weights) - sum(block_weights), accumulates)


def labeling_memory(build_labeler: Callable[[], Labeler], device: str = "cuda") -> int:
    """Return the peak bytes of building a labeler and labeling a batch."""
    with FakeTensorMode(), _chunks_of(device), LiveMemory() as live:
        label = build_labeler()
        label()
        return live.peak.total()


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """Return all decoder blocks of a student, over all its stacks."""
    if isinstance(model, MultiTokenForCausalLM):
        return [*decoder_blocks(model.trunk), *(block for head in model.heads for block in decoder_blocks(head))]
    if isinstance(model, CoCoMixForCausalLM):
        stacks = [model.lower, model.upper] if model.config.insert_layer else [model.upper]
        return [block for stack in stacks for block in decoder_blocks(stack)]
    return list(decoder_blocks(model))


def _grouped_product(a: Tensor, b: Tensor, offs: Tensor | None = None, **_: Any) -> Tensor:
    """Return the shape of a grouped matrix product; torch's fake implementation refuses float32."""
    if a.dim() == b.dim() == 2:  # the gradient of the experts' weights: summed over each expert's rows
        assert offs is not None
        return a.new_empty(len(offs), a.shape[0], b.shape[1])
    return a.new_empty(*a.shape[:-1], b.shape[-1])


def _with_states(model: PreTrainedModel, live: LiveMemory, name: str) -> torch.optim.Optimizer:
    """Build the optimizer with its states and gradients allocated, each assigned to its part."""
    optimizer: torch.optim.Optimizer = (
        MuonWithAdamW(model, (), weight_decay=0.0, lr=1e-3, fused=True)
        if name == "muon"
        else torch.optim.AdamW(model.parameters(), fused=True)
    )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
        live.reassign(parameter.grad, GRADIENTS)
        parameter.register_post_accumulate_grad_hook(lambda weight: live.reassign(weight.grad, GRADIENTS))
    with live.counting(STATES):
        optimizer.step()
    return optimizer


def _autocast(model: PreTrainedModel, precision: str) -> None:
    """Wrap the forward pass as Accelerate does: products in low precision, outputs in float32."""
    if precision in AUTOCAST:
        in_low_precision = torch.autocast("cpu", AUTOCAST[precision])(model.forward)
        model.forward = convert_outputs_to_fp32(in_low_precision)


@contextmanager
def _chunks_of(device: str) -> Iterator[None]:
    """Use the chunk size of `device` on the CPU, because torch builds without CUDA have no fake GPU."""
    before = dict(linear_loss.CHUNK_BYTES)
    linear_loss.CHUNK_BYTES["cpu"] = before[device]
    try:
        yield
    finally:
        linear_loss.CHUNK_BYTES.update(before)


def _in_order(parts: Counter[str]) -> dict[str, int]:
    return {part: parts[part] for part in PARTS if parts[part]}
