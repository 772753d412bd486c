"""Format a plan as text for a terminal."""

from __future__ import annotations

from cocomix.common.console import table
from cocomix.common.units import duration, size
from cocomix.planning.costs import Flops, Machines, Plan, StudentPlan
from cocomix.planning.memory import (
    BACKWARD,
    BLOCKS,
    BUCKETS,
    CASTS,
    GATHERED,
    GRADIENTS,
    HEAD,
    MIXER,
    STATES,
    TEACHER,
    WEIGHTS,
    Peak,
)

KINDS = {
    "weights, optimizer": (WEIGHTS, GRADIENTS, STATES, CASTS),
    "activations": (BLOCKS, MIXER, HEAD, BACKWARD),
    "teacher, SAE": (TEACHER,),
    "ddp, fsdp": (BUCKETS, GATHERED),
}
"""Columns of the memory of a training step, and the parts that each sums up."""


def describe(plan: Plan) -> str:
    """Format all tables, totals and assumptions."""
    on = plan.machines
    where = on.name if on.measured else f"{on.count} × {on.name}"
    lines = [f"{plan.recipe} on {where}", "", _costs(plan)]
    if plan.preparation:
        corpus = f"One-time preparation, for a corpus of {_count(plan.corpus_tokens)} training tokens:"
        lines += ["", corpus, "", _preparation(plan)]
    lines += ["", f"Peak memory{'' if on.count == 1 else ' of each GPU'}, of {size(on.gpu.memory)}:", "", _memory(plan)]
    flops = plan.flops
    parts = ", ".join(f"{name} {value:.2e}" for name, value in _named(flops) if value)
    total = duration(3600 * plan.hours)
    lines += ["", f"Total: about {total}, {flops.total:.2e} FLOPs ({parts or 'none'})."]
    lines += ["", *(f"- {remark}" for remark in _assumptions(plan))]
    return "\n".join(lines)


def _costs(plan: Plan) -> str:
    parts = [name for name in ("student", "teacher", "SAE") if any(_part(each, name) for each in plan.students)]
    header = ["student", "stored", "activated", "tokens", "steps", *(f"FLOPs/token: {name}" for name in parts)]
    rows = [
        [
            student.name,
            f"{student.stored_parameters / 1e6:,.1f}M",
            f"{student.activated_parameters / 1e6:,.1f}M",
            _count(student.tokens),
            f"{student.steps:,}",
            *(f"{value:.2e}" if (value := _part(student, name)) else "–" for name in parts),
            f"{student.flops.total:.2e}",
            duration(3600 * student.hours),
        ]
        for student in plan.students
    ]
    return table([*header, "FLOPs", "time"], rows)


def _part(student: StudentPlan, name: str) -> float:
    return dict(_named(student.flops_per_token))[name]


def _preparation(plan: Plan) -> str:
    rows = [
        [
            part.name,
            *(f"{value:.2e}" if value else "–" for _, value in _named(part.flops)[1:]),
            size(part.storage) if part.storage else "–",
            size(part.memory) if part.memory else "–",
            "done" if part.is_done else duration(3600 * part.hours),
        ]
        for part in plan.preparation
    ]
    return table(["artifact", "FLOPs: teacher", "SAE", "on disk", "memory", "time"], rows)


def _memory(plan: Plan) -> str:
    """Build a table with a row per student, and per kind of parallelism where several GPUs train."""
    ways = [
        (student.name if plan.machines.count == 1 else f"{student.name}, {how}", peaks)
        for student in plan.students
        for how, peaks in student.memory.items()
        if plan.machines.count > 1 or how == next(iter(student.memory))
    ]
    kinds = [kind for kind in KINDS if any(_of_kind(peaks[0], kind) for _, peaks in ways)]
    phases = list(dict.fromkeys(peak.phase for _, peaks in ways for peak in peaks))
    rows = []
    for name, peaks in ways:
        totals = {peak.phase: size(peak.total) for peak in peaks}
        cells = [*(_size(_of_kind(peaks[0], kind)) for kind in kinds), *(totals.get(phase, "–") for phase in phases)]
        rows.append([name, *cells, _fits(peaks, plan.machines)])
    return table(["student", *kinds, *phases, "fits"], rows)


def _of_kind(peak: Peak, kind: str) -> int:
    return sum(peak.parts.get(part, 0) for part in KINDS[kind])


def _size(count: int) -> str:
    return size(count) if count else "–"


def _fits(peaks: list[Peak], on: Machines) -> str:
    return "yes" if max(peak.total for peak in peaks) + on.reserved <= on.gpu.memory else "NO"


def _assumptions(plan: Plan) -> list[str]:
    on = plan.machines
    if on.measured:
        time = (
            f"Time: FLOPs at {on.gpu.single / 1e9:,.0f} GFLOP/s in float32 and {on.gpu.half / 1e9:,.0f} in bf16, "
            "measured for two seconds with a small model. Plan for another machine with --gpu and --gpus."
        )
    else:
        time = (
            f"Time: FLOPs / ({on.gpu.half / 1e12:.0f} TFLOP/s in half precision, {on.gpu.single / 1e12:.0f} in "
            f"float32, × utilization {on.utilization:g} × {on.count} GPU{'s' if on.count > 1 else ''}); assumed, not "
            "measured."
        )
    return [
        f"{time} The SAE runs in float32. Reading data, evaluation and checkpoints are not counted.",
        "Memory: the first columns are the training step by part, the others the totals of each phase. Tensors only, "
        f"without the effect of torch.compile; fits: with {size(on.reserved)} for everything else.",
        *plan.remarks,
    ]


def _named(flops: Flops) -> list[tuple[str, float]]:
    return [(name, getattr(flops, name.lower())) for name in ("student", "teacher", "SAE")]


def _count(tokens: int) -> str:
    return f"{tokens / 1e9:,.2f}B" if tokens >= 1e9 else f"{tokens / 1e6:,.2f}M"
