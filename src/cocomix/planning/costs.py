"""What a plan says: on which machines, and what each part of a recipe costs there."""

from __future__ import annotations

from dataclasses import dataclass, field

from cocomix.errors import InputError, did_you_mean
from cocomix.evaluation.gpus import GPUS, Gpu
from cocomix.planning.memory import Peak


@dataclass(frozen=True)
class Machines:
    """On what is trained.

    Attributes:
        name: of the GPU.
        gpu: what one can do.
        count: how many.
        utilisation: share of its peak that the work reaches; an assumption.
    """

    name: str
    gpu: Gpu
    count: int
    utilisation: float

    def hours(self, flops: float, precision: str) -> float:
        """Hours that so many FLOPs of a precision take."""
        return flops / (self.gpu.peak(precision) * self.utilisation * self.count) / 3600


def machines(name: str, count: int, utilisation: float) -> Machines:
    """`count` GPUs of a name such as h100.

    Raises:
        InputError: an unknown GPU, or numbers that cannot be.
    """
    known = {key.lower().replace(" ", "-"): gpu for key, gpu in GPUS.items()}
    if name.lower() not in known:
        raise InputError(f"--gpu is {name!r}; expected one of {', '.join(known)}{did_you_mean(name.lower(), known)}")
    return Machines(name.lower(), known[name.lower()], count, utilisation)


@dataclass(frozen=True)
class Flops:
    """FLOPs by who does them; of a token, or of all."""

    student: float = 0
    teacher: float = 0
    sae: float = 0

    @property
    def total(self) -> float:
        """All of them."""
        return self.student + self.teacher + self.sae

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.student + other.student, self.teacher + other.teacher, self.sae + other.sae)

    def times(self, tokens: float) -> Flops:
        """Of so many tokens."""
        return Flops(self.student * tokens, self.teacher * tokens, self.sae * tokens)


@dataclass(frozen=True)
class StudentPlan:
    """What training one model costs.

    Attributes:
        name: of the model.
        method: how it is trained.
        stored_parameters: weights.
        activated_parameters: those that one token uses.
        tokens: that it reads.
        steps: of the optimiser.
        flops_per_token: of a training step.
        flops: of the whole training, with every seed.
        hours: that they take.
        memory: peak memory per GPU in each phase, by how the GPUs share the work.
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
        """Of the phase that needs most."""
        return max(self.memory[parallel], key=lambda peak: peak.total)


@dataclass(frozen=True)
class PreparationPlan:
    """What is made once, for all students that learn from it.

    Attributes:
        name: of its stage.
        flops: of making it.
        hours: that it takes.
        storage: bytes on disk, of what is as long as the corpus.
        memory: peak bytes on each GPU; None where that was not computed.
        is_done: whether it is there already, and so costs nothing any more.
    """

    name: str
    flops: Flops
    hours: float
    storage: int
    memory: int | None
    is_done: bool


@dataclass(frozen=True)
class Plan:
    """What a recipe costs.

    Attributes:
        recipe: its name.
        machines: on what.
        corpus_tokens: training tokens of the corpus.
        preparation: what is made before the students, in order.
        students: the models.
        remarks: what was assumed.
    """

    recipe: str
    machines: Machines
    corpus_tokens: int
    preparation: list[PreparationPlan]
    students: list[StudentPlan]
    remarks: list[str] = field(default_factory=list)

    @property
    def flops(self) -> Flops:
        """Of all that is still to be done."""
        return sum((part.flops for part in self._to_do()), Flops())

    @property
    def hours(self) -> float:
        """Of all that is still to be done, one after the other."""
        return sum(part.hours for part in self._to_do())

    def _to_do(self) -> list[PreparationPlan | StudentPlan]:
        return [*(part for part in self.preparation if not part.is_done), *self.students]
