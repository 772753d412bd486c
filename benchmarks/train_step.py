"""Benchmark a training step of every method against a plain GPT-2 step of the same shape in the same process.

python benchmarks/train_step.py --shape small
python benchmarks/train_step.py --shape 69m --methods plain ntp cocomix online
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Callable

import measuring
import shapes
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cocomix import CoCoMixForCausalLM
from cocomix.common.gpus import peak_flops
from cocomix.concepts.teacher import compile_blocks, freeze
from cocomix.models.building import build_plain
from cocomix.models.flops import forward_flops_per_token, labeling_flops_per_token, training_flops_per_token
from cocomix.models.plain import with_token_loss
from cocomix.objectives import ConceptMixing, Distillation, NextToken, Objective
from cocomix.objectives.distillation import predictor

MIXERS: dict[str, dict[str, str]] = {
    "pause": {"content": "pause"},
    "cocomix": {},
    "cocomix-add": {"mixing": "add"},
    "cocomix-none": {"mixing": "none"},
    "online": {},
}
"""Settings of the methods with a mixer; by default it interleaves."""
SELECTIONS = {"online": "attribution", "labels": "attribution", "labels-activation": "activation"}
"""How the methods that compute labels select them."""
METHODS = ("plain", "ntp", "kd", *MIXERS, "labels", "labels-activation")
"""`plain` is Transformers' own model and loss. `cocomix` reads stored labels, `online` computes them in the step, and
`labels` and `labels-activation` only compute labels."""
KERNELS, NAME_LENGTH = 15, 80
"""Number of kernels that a profile lists, and the length at which it cuts their names."""


class Step:
    """A method's training step: forward, loss, backward, AdamW.

    Attributes:
        flops: FLOPs of a step.
    """

    def __init__(self, method: str, shape: shapes.Shape, precision: str, compiled: bool) -> None:
        torch.manual_seed(0)
        self.device = measuring.device()
        self.precision, self.compiled = precision, compiled
        self.batch = shapes.random_batch(shape, self.device)
        self.extractor = None
        if method in SELECTIONS:
            dtype = measuring.PRECISIONS[precision]
            self.extractor = shapes.extractor(shape, self.device, SELECTIONS[method], dtype, compiled)
        self.objective: Objective | None = None
        self.model: PreTrainedModel | None = None
        self.flops = 0
        if self.extractor is not None:
            per_token = labeling_flops_per_token(
                self.extractor.teacher,
                shape.teacher_layer,
                shape.concepts,
                shapes.ACTIVE_LATENTS,
                shape.block_size,
                self.extractor.selection,
            )
            self.flops += per_token.total * shape.tokens
        if method.startswith("labels"):
            return
        self.model = with_token_loss(self._model(method, shape)).to(self.device)
        self.flops += training_flops_per_token(self.model, shape.block_size) * shape.tokens
        self.objective = self._objective(method, shape)
        self.run: nn.Module = torch.compile(self.model) if compiled else self.model  # type: ignore[assignment]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    @staticmethod
    def _model(method: str, shape: shapes.Shape) -> PreTrainedModel:
        if method == "plain":
            return shapes.plain(shape).train()
        if method in ("ntp", "kd"):
            return build_plain(shapes.decoder_config(shape.student, shape)).train()
        return shapes.cocomix_model(shape, **MIXERS[method]).train()

    def _objective(self, method: str, shape: shapes.Shape) -> Objective | None:
        if method == "plain":
            return None
        if method == "kd":
            teacher = freeze(shapes.teacher(shape).to(self.device, measuring.PRECISIONS[self.precision]))
            if self.compiled:
                compile_blocks(teacher)
            self.flops += forward_flops_per_token(teacher, shape.block_size) * shape.tokens
            return Distillation(teacher=predictor(teacher, shape.vocabulary))
        if method == "online":
            assert self.extractor is not None
            extract = self.extractor
            return ConceptMixing(lambda ids: extract(ids).ids)
        return NextToken() if method in ("ntp", "pause") else ConceptMixing()

    def __call__(self) -> None:
        """Run the step."""
        if self.model is None:
            assert self.extractor is not None
            self.extractor(self.batch["input_ids"])
            return
        with self.autocast():
            loss = self._loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _loss(self) -> Tensor:
        if self.objective is None:
            ids = self.batch["input_ids"]
            return self.run(input_ids=ids, labels=ids, use_cache=False).loss
        columns = {name: self.batch[name] for name in self.objective.columns}
        (batch,) = self.objective.prepare([columns])
        return self.objective(self.run, batch, self.objective.count(batch)).total  # type: ignore[arg-type]

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Return the autocast context of the precision."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, measuring.PRECISIONS[self.precision])

    def parts(self) -> dict[str, float]:
        """Measure the seconds of each part of a CoCoMix step, forward and backward together."""
        assert isinstance(self.model, CoCoMixForCausalLM)
        clock = Clock()
        handles = []
        for name in ("lower", "mixer", "upper"):
            module = getattr(self.model, name)
            before = "labels" if name == "lower" else "other"
            handles.append(module.register_forward_pre_hook(lambda *_, b=before: clock.lap(b)))
            handles.append(module.register_forward_hook(lambda _m, _i, out, n=name: clock.after(n, out)))
        with self.autocast():
            loss = self._loss()
        clock.lap("heads and losses")
        loss.backward()
        clock.lap("lower")  # the last part of the backward pass
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        clock.lap("optimizer")
        for handle in handles:
            handle.remove()
        return clock.parts


class Clock:
    """A stopwatch that assigns the time since its last reading to a part."""

    BACKWARD = {"upper": "heads and losses", "mixer": "upper", "lower": "mixer"}  # noqa: RUF012
    """The part above each stack, whose backward pass ends when the gradient reaches the stack's output."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        measuring.synchronize()
        self.last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Assign the time since the last reading to `part`."""
        measuring.synchronize()
        now = time.perf_counter()
        self.parts[part] = self.parts.get(part, 0.0) + now - self.last
        self.last = now

    def after(self, name: str, output: object) -> None:
        """End a stack's forward pass, and end the part above it when the gradient arrives."""
        self.lap(name)
        hidden = getattr(output, "hidden_states" if name == "mixer" else "last_hidden_state")
        hidden.register_hook(lambda _: self.lap(self.BACKWARD[name]))


def median_parts(step: Step, repeats: int) -> dict[str, float]:
    """Return the share of each part in the time of a step."""
    step.parts()
    found = [step.parts() for _ in range(repeats)]
    medians = {name: statistics.median(parts[name] for parts in found) for name in found[0]}
    return {name: round(value / sum(medians.values()), 3) for name, value in medians.items()}


def profile(step: Step, repeats: int = 3) -> dict[str, float]:
    """Return the share of each kernel (on a CPU, operation) in the time that the device works, largest first."""
    on_gpu = step.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(repeats):
            step()
        measuring.synchronize()
    found = profiler.key_averages()
    times: Counter[str] = Counter()
    for event in found:
        times[event.key[:NAME_LENGTH]] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    return {name: round(each / times.total(), 3) for name, each in times.most_common(KERNELS)}


def peak_megabytes(arguments: argparse.Namespace, method: str, precision: str) -> float:
    """Return the peak memory of one step, in megabytes: this process' own, if it measures nothing else."""
    if len(arguments.methods) * len(arguments.precision) == 1:
        return measuring.peak_bytes() / 1e6
    options = ["--shape", arguments.shape, "--precision", precision, "--peak-of", method]
    return measuring.peak_bytes_of(__file__, options + ["--compile"] * arguments.compile) / 1e6


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("--shape", choices=shapes.SHAPES, default="69m-gpu" if torch.cuda.is_available() else "small")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--precision", nargs="+", choices=measuring.PRECISIONS, default=["fp32"])
    parser.add_argument("--compile", action="store_true", help="torch.compile students and teachers")
    parser.add_argument("--profile", action="store_true", help="also list the kernels of a step by their time")
    parser.add_argument("--peak-of", metavar="METHOD", choices=METHODS, help="only print the peak of one method")
    arguments = parser.parse_args()
    shape = shapes.SHAPES[arguments.shape]
    if arguments.peak_of:
        step = Step(arguments.peak_of, shape, arguments.precision[0], arguments.compile)
        for _ in range(3):
            step()
        print(measuring.peak_bytes())
        return

    steps: dict[tuple[str, str], Step] = {
        (method, precision): Step(method, shape, precision, arguments.compile)
        for precision in arguments.precision
        for method in arguments.methods
    }
    named: dict[str, Callable[[], None]] = {f"{m} {p}": step for (m, p), step in steps.items()}
    times = measuring.alternating(named, arguments.repeats)
    memory = {
        (method, precision): None if arguments.no_memory else peak_megabytes(arguments, method, precision)
        for method, precision in steps
    }
    rate = {precision: measuring.matmul_flops_per_second(precision) for precision in arguments.precision}
    rows = []
    for (method, precision), step in steps.items():
        taken = times[f"{method} {precision}"]
        median = statistics.median(taken)
        reference = times.get(f"plain {arguments.precision[0]}")
        peak = peak_flops(step.device) if precision == "bf16" else None
        rows.append(
            (
                method,
                precision,
                1e3 * median,
                shape.tokens / median,
                measuring.median_ratio(taken, reference) if reference else None,
                memory[method, precision],
                step.flops / shape.tokens / 1e6,
                median * rate[precision] / step.flops,
                100 * step.flops / median / peak if peak else None,
            )
        )
    columns = ("method", "precision", "ms", "tokens/s", "× plain", "peak MB", "MFLOP/token", "× matmul time", "MFU %")
    shares = {
        f"{method} {precision}": median_parts(step, 3)
        for (method, precision), step in steps.items()
        if isinstance(step.model, CoCoMixForCausalLM) and not arguments.compile
    }
    rates = {precision: round(value / 1e9) for precision, value in rate.items()}
    more = {"shares": shares, "matmul_gflops": rates}
    if arguments.profile:
        more["profiles"] = {f"{method} {precision}": profile(step) for (method, precision), step in steps.items()}
    measuring.finish(arguments, columns, rows, shape=arguments.shape, **more)


if __name__ == "__main__":
    main()
