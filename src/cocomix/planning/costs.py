"""The contents of a plan: the machines, and the cost of each part of a recipe on them."""

from __future__ import annotations

from dataclasses import dataclass, field

from cocomix.common.errors import InputError, did_you_mean
from cocomix.common.gpus import GPUS, Gpu
from cocomix.common.units import GIB
from cocomix.planning.memory import Peak


@dataclass(frozen=True)
class Machines:
    """The devices to train on.

    Attributes:
        name: name of the GPU or CPU.
        gpu: its memory and throughput.
        count: number of devices.
        utilization: assumed share of the throughput that training reaches.
        device: cuda or cpu.
        measured: whether the throughput is that of a training on this machine, rather than the vendor's peak.
    """

    name: str
    gpu: Gpu
    count: int
    utilization: float
    device: str = "cuda"
    measured: bool = False

    @property
    def reserved(self) -> float:
        """Assumed memory of CUDA, its libraries, NCCL, and fragmentation; on a CPU, of Python and the libraries."""
        return 2 * GIB if self.device == "cuda" else GIB / 2

    def hours(self, flops: float, precision: str) -> float:
        """Return the hours for a number of FLOPs in a precision."""
        return flops / (self.gpu.peak(precision) * self.utilization * self.count) / 3600


def machines(name: str, count: int, utilization: float) -> Machines:
    """Describe `count` GPUs by a name such as h100.

    Raises:
        InputError: the GPU is unknown.
    """
    known = {key.lower().replace(" ", "-"): gpu for key, gpu in GPUS.items()}
    if name.lower() not in known:
        raise InputError(f"--gpu is {name!r}; expected one of {', '.join(known)}{did_you_mean(name.lower(), known)}")
    return Machines(name.lower(), known[name.lower()], count, utilization)


@dataclass(frozen=True)
class Flops:
    """FLOPs by model, per token or in total."""

    student: float = 0
    teacher: float = 0
    sae: float = 0

    @property
    def total(self) -> float:
        """Sum over the models."""
        return self.student + self.teacher + self.sae

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.student + other.student, self.teacher + other.teacher, self.sae + other.sae)

    def times(self, tokens: float) -> Flops:
        """Multiply FLOPs per token by a number of tokens."""
        return Flops(self.student * tokens, self.teacher * tokens, self.sae * tokens)


@dataclass(frozen=True)
class StudentPlan:
    """The cost of training one student.

    Attributes:
        name: name of the student.
        method: training method.
        stored_parameters: number of weights.
        activated_parameters: number of weights that one token uses.
        tokens: training tokens.
        steps: optimizer steps.
        flops_per_token: FLOPs of a training step, per token.
        flops: FLOPs of the training, over all seeds and replicates.
        hours: hours of the training, over all seeds and replicates.
        memory: peak memory per GPU in each phase, by kind of parallelism.
    """

    name: str
    method: str
    stored_parameters: int
    activated_parameters: int
    tokens: int
    steps: int
    flops_per_token: Flops
    flops: Flops
    hours: float
    memory: dict[str, list[Peak]]

    def peak(self, parallel: str) -> Peak:
        """Return the peak of the phase that needs the most memory."""
        return max(self.memory[parallel], key=lambda peak: peak.total)


@dataclass(frozen=True)
class PreparationPlan:
    """The one-time cost of an artifact that students learn from.

    Attributes:
        name: name of its stage.
        flops: FLOPs to compute it, in all replicates that lack it.
        hours: hours to compute it, in these.
        storage: bytes on disk in these, for artifacts that grow with the corpus; else 0.
        memory: peak bytes per GPU; None if not computed.
        is_done: whether every replicate has it already, so that no cost remains.
    """

    name: str
    flops: Flops
    hours: float
    storage: int
    memory: int | None
    is_done: bool


@dataclass(frozen=True)
class Plan:
    """The cost of a recipe.

    Attributes:
        recipe: name of the recipe.
        machines: the GPUs.
        corpus_tokens: training tokens of the corpus.
        preparation: artifacts that are computed before the students, in order.
        students: the students.
        remarks: assumptions, in words.
    """

    recipe: str
    machines: Machines
    corpus_tokens: int
    preparation: list[PreparationPlan]
    students: list[StudentPlan]
    remarks: list[str] = field(default_factory=list)

    @property
    def flops(self) -> Flops:
        """FLOPs of the missing preparation and of all students."""
        return sum((part.flops for part in self._remaining()), Flops())

    @property
    def hours(self) -> float:
        """Hours of the missing preparation and of all students, run sequentially."""
        return sum(part.hours for part in self._remaining())

    def _remaining(self) -> list[PreparationPlan | StudentPlan]:
        return [*(part for part in self.preparation if not part.is_done), *self.students]
