"""Format a plan as text for a terminal."""

from __future__ import annotations

from cocomix.common.console import table
from cocomix.common.gpus import GIB
from cocomix.planning.costs import Flops, Machines, Plan, StudentPlan
from cocomix.planning.memory import PARTS, Peak

RESERVED = 2 * GIB
"""Assumed GPU memory of CUDA, its libraries, NCCL, and fragmentation."""


def describe(plan: Plan) -> str:
    """Format all tables, totals and assumptions."""
    on = plan.machines
    lines = [f"{plan.recipe} on {on.count} × {on.name}", "", _costs(plan)]
    if plan.preparation:
        corpus = f"One-time preparation, for a corpus of {_count(plan.corpus_tokens)} training tokens:"
        lines += ["", corpus, "", _preparation(plan)]
    for student in plan.students:
        lines += ["", f"{student.name}: peak memory per GPU", "", _memory(student), ""]
        lines += [_fits(how, student.peak(how), on) for how in student.memory]
    flops = plan.flops
    parts = ", ".join(f"{name} {value:.2e}" for name, value in _named(flops) if value)
    lines += ["", f"Total: {flops.total:.2e} FLOPs ({parts or 'none'}), {_hours(plan.hours)}."]
    lines += ["", *(f"- {remark}" for remark in _assumptions(plan))]
    return "\n".join(lines)


def _costs(plan: Plan) -> str:
    header = ["student", "stored", "activated", "tokens", "steps", "FLOPs/token: student", "teacher", "SAE"]
    header += ["FLOPs", "hours"]
    rows = [
        [
            student.name,
            f"{student.stored_parameters / 1e6:,.1f}M",
            f"{student.activated_parameters / 1e6:,.1f}M",
            _count(student.tokens),
            f"{student.steps:,}",
            *(f"{value:.3e}" if value else "–" for _, value in _named(student.flops_per_token)),
            f"{student.flops.total:.2e}",
            f"{student.hours:,.1f}",
        ]
        for student in plan.students
    ]
    return table(header, rows)


def _preparation(plan: Plan) -> str:
    rows = [
        [
            part.name,
            *(f"{value:.2e}" if value else "–" for _, value in _named(part.flops)[1:]),
            f"{part.storage / 1e9:,.1f} GB" if part.storage else "–",
            f"{part.memory / GIB:,.1f} GiB" if part.memory else "–",
            "done" if part.is_done else f"{part.hours:,.1f}",
        ]
        for part in plan.preparation
    ]
    return table(["artifact", "FLOPs: teacher", "SAE", "on disk", "memory per GPU", "hours"], rows)


def _memory(student: StudentPlan) -> str:
    """Build a table of the training step by part, and of the totals of all phases."""
    steps = [peaks[0].parts for peaks in student.memory.values()]
    rows = [[part, *(_gib(step.get(part, 0)) for step in steps)] for part in PARTS if any(part in s for s in steps)]
    for phases in zip(*student.memory.values(), strict=True):
        rows.append([f"{phases[0].phase}, total", *(_gib(peak.total) for peak in phases)])
    return table(["GiB", *student.memory], rows)


def _fits(how: str, peak: Peak, on: Machines) -> str:
    needed, available = (peak.total + RESERVED) / GIB, on.gpu.memory / GIB
    verdict = "fits" if needed <= available else "does NOT fit"
    return f"{how}: {verdict} {on.name}: {needed:,.1f} of {available:,.1f} GiB ({peak.phase}; 2 GiB of them reserved)"


def _assumptions(plan: Plan) -> list[str]:
    on = plan.machines
    return [
        f"Hours: FLOPs / ({on.gpu.half / 1e12:.0f} TFLOP/s in half precision, {on.gpu.single / 1e12:.0f} in float32, "
        f"× utilization {on.utilization} × {on.count} GPUs); assumed, not measured. The SAE runs in float32. Reading "
        "data, evaluation and checkpoints are not counted.",
        "Memory: tensors only; the effect of torch.compile is not included.",
        *plan.remarks,
    ]


def _named(flops: Flops) -> list[tuple[str, float]]:
    return [(name, getattr(flops, name.lower())) for name in ("student", "teacher", "SAE")]


def _count(tokens: int) -> str:
    return f"{tokens / 1e9:,.2f}B" if tokens >= 1e9 else f"{tokens / 1e6:,.2f}M"


def _hours(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours < 48 else f"{hours:,.0f} hours ({hours / 24:,.1f} days)"


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}" if size else "–"
