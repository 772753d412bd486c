"""The peak memory of a training step, by part, from running one on fake tensors.

Fake tensors have shapes and no contents: every operation of the real model, objective and optimiser is
dispatched, nothing is computed and nothing allocated, and each storage is followed from when it is made to when it
is freed. So the figure holds for any backbone and method, and no formula of theirs is repeated here. What fakes
cannot show is added by name: the buckets of ddp, and what fsdp shares out and gathers.

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

from cocomix.evaluation.validation import evaluation_sums
from cocomix.models import linear_loss
from cocomix.models.backbones import decoder_blocks
from cocomix.models.causal_lm import CoCoMixForCausalLM
from cocomix.models.multi_token import MultiTokenForCausalLM
from cocomix.models.plain import with_token_loss
from cocomix.objectives import Objective
from cocomix.objectives.base import Batch
from cocomix.training.config import TrainingConfig

WEIGHTS, GRADIENTS, STATES, CASTS = "weights", "gradients", "optimiser states", "weights in low precision"
BLOCKS, MIXER, HEAD = "activations of the blocks", "activations of the mixer", "embedding, token head, losses"
BACKWARD, TEACHER, BUCKETS, GATHERED = "backward pass", "teacher and SAE", "ddp's buckets", "fsdp's gathered blocks"
PARTS = (WEIGHTS, GRADIENTS, STATES, BUCKETS, GATHERED, CASTS, BLOCKS, MIXER, HEAD, BACKWARD, TEACHER)
GATHERED_BLOCKS = 2
"""Blocks that fsdp holds whole at once: one at work, and the next on its way."""
Labeller = Callable[[], object]
"""Labels a batch of its own when called."""
STEP = "training step"
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class LiveMemory(TorchDispatchMode):
    """Follows every storage that is made while it is open.

    Attributes:
        part: what storages that are made now belong to.
        now: bytes alive, by part.
        peak: what `now` was when its sum was largest.
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
                self._follow(tensor, part)
        return result

    def belongs(self, tensor: Tensor, part: str) -> None:
        """Count a tensor as `part` from now on, whatever was at work when it was made."""
        storage = tensor.untyped_storage()
        self.now[self._part_of[storage][0]] -= storage.nbytes()
        self.now[part] += storage.nbytes()
        self._part_of[storage][0] = part

    def forget_peak(self) -> None:
        """The peak begins anew with what is alive."""
        self.peak, self._peak_total = Counter(self.now), self._total

    @contextmanager
    def counting(self, part: str) -> Iterator[None]:
        """While open, what is made belongs to `part`."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def count_module(self, module: nn.Module, part: str) -> None:
        """What the module's forward pass makes belongs to `part`, also when it is run again by checkpointing."""
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

    def _follow(self, tensor: Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        if storage in self._part_of:
            return
        size, kept = storage.nbytes(), [part]
        self._part_of[storage] = kept
        self.now[part] += size
        self._total += size
        weakref.finalize(storage, self._freed, kept, size)
        if self._total > self._peak_total:
            self.forget_peak()

    def _freed(self, kept: list[str], size: int) -> None:
        self.now[kept[0]] -= size
        self._total -= size


@dataclass(frozen=True)
class Peak:
    """The most that a process holds at once in a phase of a training.

    Attributes:
        phase: training step, evaluation or online labelling.
        parts: bytes by part.
    """

    phase: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class TrainingMemory:
    """What a process that trains alone holds, and what has to be known to share it out.

    Attributes:
        phases: bytes by part at the peak of each phase: a training step, an evaluation, online labelling.
        weights: bytes of all weights, 4 P.
        block: bytes of the weights of the largest block.
        outside: bytes of the weights outside the blocks.
        accumulates: whether a step has several micro-batches, between which gradients are kept.
    """

    phases: dict[str, Counter[str]]
    weights: int
    block: int
    outside: int
    accumulates: bool

    def peaks(self, parallel: str, processes: int) -> list[Peak]:
        """Of each phase, on each GPU, where `processes` of them train one model.

        ddp keeps everything, and buckets as large as the gradients, in which they are averaged. fsdp
        (`training.config`: version 2, float32) keeps 1/N of weights, gradients and states. What lies outside the blocks
        stays gathered through the step, blocks come and go, each with its gradient; gradients of several micro-batches
        wait whole, because they are only shared out in the last one.
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
        found[WEIGHTS] = self.weights // processes
        found[STATES] = parts[STATES] // processes
        kept = self.weights // processes
        if parts[GRADIENTS] or parts[BACKWARD]:
            found[GRADIENTS] = kept + (self.weights if self.accumulates else gathered)
        if parallel == "fsdp+cpu-offload":
            found[WEIGHTS] = found[STATES] = 0
            found[GRADIENTS] = max(0, found[GRADIENTS] - kept)
        return found


def training_memory(
    build: Callable[[], PreTrainedModel],
    make_objective: Callable[[], Objective],
    make_batch: Callable[[], Batch],
    training: TrainingConfig,
    *,
    accumulates: bool,
    make_labeller: Callable[[], Labeller] | None = None,
    device: str = "cuda",
) -> TrainingMemory:
    """Run a micro-batch and an evaluation on fake tensors, as Accelerate and the Trainer run them.

    Args:
        build: makes the model.
        make_objective: what is minimised, with its teacher if it asks one in every step.
        make_batch: a micro-batch of the columns that the objective reads.
        training: its settings.
        accumulates: whether other micro-batches came before it in the same step.
        make_labeller: makes what labels the blocks of a step before it, if that is done online.
        device: cpu or cuda, whose sizes of chunks are taken (`linear_loss.CHUNK_BYTES`).
    """
    phases: dict[str, Counter[str]] = {}
    with torch.device("meta"):  # a fake tensor cannot be copied as modules are where a decoder is taken apart
        model = with_token_loss(build())
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
        optimizer = _with_states(model, live)
        if not accumulates:
            optimizer.zero_grad()
        with live.counting(TEACHER):
            objective = make_objective()
            label = make_labeller and make_labeller()
        batch = make_batch()
        _autocast(model, training.precision)

        live.forget_peak()
        losses = objective(model, batch, objective.count(batch))
        with live.counting(BACKWARD):
            losses.total.backward()
        phases[STEP] = live.peak
        del losses
        optimizer.zero_grad()
        live.forget_peak()
        with torch.no_grad():
            evaluation_sums(model.eval(), batch, training.precision)
        phases["evaluation"] = live.peak
        if label is not None:
            live.forget_peak()
            with live.counting(TEACHER):
                label()
            phases["online labelling"] = live.peak
        weights = [parameter.nbytes for parameter in model.parameters()]
        of_blocks = [sum(parameter.nbytes for parameter in block.parameters()) for block in blocks]
    return TrainingMemory(phases, sum(weights), max(of_blocks), sum(weights) - sum(of_blocks), accumulates)


def peak_of_call(make: Callable[[], Labeller], device: str = "cuda") -> int:
    """Peak bytes of making something and calling it."""
    with FakeTensorMode(), _chunks_of(device), LiveMemory() as live:
        call = make()
        call()
        return live.peak.total()


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """All blocks of a student, of whatever stacks it is made."""
    if isinstance(model, MultiTokenForCausalLM):
        return [*decoder_blocks(model.trunk), *(block for head in model.heads for block in decoder_blocks(head))]
    if isinstance(model, CoCoMixForCausalLM):
        stacks = [model.lower, model.upper] if model.config.insert_layer else [model.upper]
        return [block for stack in stacks for block in decoder_blocks(stack)]
    return list(decoder_blocks(model))


def _grouped_product(a: Tensor, b: Tensor, offs: Tensor | None = None, **_: Any) -> Tensor:
    """The product of each expert, as torch's kernels return it; its fake tensors refuse float32."""
    if a.dim() == b.dim() == 2:  # rows of experts, summed: the gradient of their weights
        assert offs is not None
        return a.new_empty(len(offs), a.shape[0], b.shape[1])
    return a.new_empty(*a.shape[:-1], b.shape[-1])


def _with_states(model: nn.Module, live: LiveMemory) -> torch.optim.Optimizer:
    """AdamW with its states, as a step leaves it, and with gradients; they are told apart from now on."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
        live.belongs(parameter.grad, GRADIENTS)
        parameter.register_post_accumulate_grad_hook(lambda weight: live.belongs(weight.grad, GRADIENTS))
    with live.counting(STATES):
        optimizer.step()
    return optimizer


def _autocast(model: PreTrainedModel, precision: str) -> None:
    """Wrap the forward pass as Accelerate does: products in low precision, what comes out in float32."""
    if precision in AUTOCAST:
        in_low_precision = torch.autocast("cpu", AUTOCAST[precision])(model.forward)
        model.forward = convert_outputs_to_fp32(in_low_precision)


@contextmanager
def _chunks_of(device: str) -> Iterator[None]:
    """A build of torch without CUDA has no fake GPU, so a CPU stands for it, with its chunks."""
    before = dict(linear_loss.CHUNK_BYTES)
    linear_loss.CHUNK_BYTES["cpu"] = before[device]
    try:
        yield
    finally:
        linear_loss.CHUNK_BYTES.update(before)


def _in_order(parts: Counter[str]) -> dict[str, int]:
    return {part: parts[part] for part in PARTS if parts[part]}
