"""Training methods, and the settings of a student: which of them have an effect, and which objective they give."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from cocomix.common.errors import did_you_mean
from cocomix.common.settings import (
    BlockIndex,
    Blocks,
    Concepts,
    LabelsPerToken,
    LearningRate,
    LossWeight,
    Partial,
    Range,
    Vocabulary,
)
from cocomix.models.building import BackboneConfig
from cocomix.models.configuration import CoCoMixConfig
from cocomix.objectives import (
    ConceptMixing,
    Distillation,
    HiddenStateMixing,
    MultiToken,
    NextToken,
    Objective,
    TeacherGate,
    WeightSchedule,
)
from cocomix.objectives.base import TeacherSignals
from cocomix.training.config import TrainingConfig

NUM_FUTURE_TOKENS = 2
"""Default number of future tokens for `mtp` students."""
SECTIONS = ("mixer", "labels", "distillation", "gate", "num_future_tokens")
ONLY_FOR = {
    "content": ("concepts", "hidden_states"),
    "num_active_concepts": ("concepts",),
    "concept_loss_weight": ("concepts", "hidden_states"),
    "concept_loss_schedule": ("concepts", "hidden_states"),
    "regression_loss": ("hidden_states",),
}
"""Settings of a mixer that have an effect on some contents only."""
DEFAULTS = CoCoMixConfig()


@dataclass
class MixerConfig:
    """What is mixed into a student's hidden states, and how. The defaults are those of `CoCoMixConfig`.

    Args:
        insert_layer: number of blocks before the mixer.
        content: what is predicted and mixed in: concepts, or the teacher's hidden_states.
        num_active_concepts: K, number of predicted concepts that are mixed per token.
        mixing: interleave, add or none.
        concept_slot: the vector that is mixed in: concept, the concept vector c itself, or residual, c + h − mean(h) if
            interleaved and c − mean(h) if added.
        slot_positions: rotary positions of the two slots of a token, interleaved or repeat.
        concept_loss_weight: λ, weight of the loss of the prediction.
        concept_loss_schedule: how λ changes during training; by default it is constant. Where it is 0, the teacher of
            online labels and of hidden_states does not run.
        regression_loss: for hidden_states: l1, l2 or cosine.
    """

    insert_layer: BlockIndex = DEFAULTS.insert_layer
    content: str = DEFAULTS.content
    num_active_concepts: Concepts = DEFAULTS.num_active_concepts
    mixing: str = DEFAULTS.mixing
    concept_slot: str = DEFAULTS.concept_slot
    slot_positions: str = DEFAULTS.slot_positions
    concept_loss_weight: LossWeight = DEFAULTS.concept_loss_weight
    concept_loss_schedule: WeightSchedule | None = None
    regression_loss: str = DEFAULTS.regression_loss

    def for_pretrained(self) -> MixerConfig:
        """Return the mixer of a student that starts from pretrained weights: both slots of a token share a position."""
        return dataclasses.replace(self, slot_positions="repeat") if self.mixing == "interleave" else self

    def problems(self, content: str) -> list[str]:
        """Return a line for each setting that has no effect on the mixed content; the model checks their values."""
        if self.content not in ONLY_FOR["content"]:
            known = ONLY_FOR["content"]
            hint = did_you_mean(self.content, known)
            return [f"mixer.content is {self.content!r}; expected {' or '.join(known)}{hint}"]
        schedule = self.concept_loss_schedule
        wrong = [] if schedule is None else [f"mixer.concept_loss_schedule.{line}" for line in schedule.problems()]
        idle = [key for key, contents in ONLY_FOR.items() if content not in contents]
        defaults = {setting.name: setting.default for setting in dataclasses.fields(self)}
        return wrong + [
            f"mixer.{key} has no effect on what is mixed here ({content}); leave it out"
            for key in idle
            if getattr(self, key) != defaults[key]
        ]


@dataclass
class DistillationConfig:
    """How a student learns the teacher's distribution over the next token.

    Args:
        weight: of the divergence, relative to the token loss.
        weight_schedule: how the weight changes during training; by default it is constant. Where it is 0, the teacher
            does not run.
        temperature: τ; both distributions are softmax(logits / τ).
        top_k: store the teacher's top_k most probable tokens at each position, and the probability mass of the others,
            once for all students; without it the teacher runs in every training step.
    """

    weight: Annotated[float, Range(0, 10**6, open_low=True)] = 0.1
    temperature: Annotated[float, Range(0.001, 1000)] = 1.0
    top_k: Vocabulary | None = None
    weight_schedule: WeightSchedule | None = None


@dataclass
class GateConfig:
    """Weights that limit learning from the teacher to tokens that it predicts better.

    The concept loss and the divergence of each token are multiplied by σ((loss of the student − loss of the teacher) /
    temperature), where both losses are those of the next token. The teacher's are stored once for all students; if the
    teacher runs in every training step, they are computed there.

    Args:
        temperature: in nats; the smaller, the more abrupt the weights change from 0 to 1.
    """

    temperature: Annotated[float, Range(0.001, 1000)] = 1.0


@dataclass
class StudentLabels:
    """Label settings of one cocomix student that differ from the recipe's; its labels get a separate folder.

    Args:
        selection: replaces labels.selection.
        labels_per_token: replaces labels.labels_per_token.
        offset: replaces labels.offset.
        window: replaces labels.window.
        control: replaces labels.control.
        targets: replaces labels.targets.
    """

    selection: str | None = None
    labels_per_token: LabelsPerToken | None = None
    offset: Annotated[int, Range(0, 2**20)] | None = None
    window: Annotated[int, Range(0, 2**20)] | None = None
    control: str | None = None
    targets: str | None = None


@dataclass
class StudentConfig:
    """One model to train and compare.

    Args:
        method: ntp, kd, pause, mtp or cocomix.
        backbone: its sizes, if they differ from the recipe's.
        match: name of the student whose activated parameters it is widened to match.
        mixer: for cocomix and pause students.
        labels: for cocomix students, if they differ from the recipe's.
        distillation: for kd students; a pause or cocomix student that sets it also learns the teacher's predictions.
        gate: for kd and cocomix students, and pause students with distillation: weighs what they learn from the teacher
            by how much better it predicts each token.
        num_future_tokens: n, for mtp students.
        learning_rate: replaces training.learning_rate; compare methods each at its own best rate.
        training: keys of the recipe's `training` with other values for this student, such as max_tokens, schedule or
            weight_decay.
        branch_from: name of the student whose training this one continues. Both have the same settings and schedule
            wsd; this one leaves the other's stable phase where its own decay begins.
    """

    method: str
    backbone: BackboneConfig | None = None
    match: str | None = None
    mixer: MixerConfig | None = None
    labels: StudentLabels | None = None
    distillation: DistillationConfig | None = None
    gate: GateConfig | None = None
    num_future_tokens: Blocks | None = None
    learning_rate: LearningRate | None = None
    training: Annotated[dict[str, Any], Partial(TrainingConfig)] | None = None
    branch_from: str | None = None

    def problems(self) -> list[str]:
        """Return a line for each setting that cannot work; the method must be known."""
        sections = METHODS[self.method].sections
        found = [
            f"{section} has no effect on the method {self.method!r}; leave it out"
            for section in SECTIONS
            if getattr(self, section) is not None and section not in sections
        ]
        if self.learning_rate is not None and "learning_rate" in (self.training or {}):
            found.append("learning_rate and training.learning_rate are both given; leave one of them out")
        if self.mixer is not None and "mixer" in sections:
            found += self.mixer.problems(METHODS[self.method].content or self.mixer.content)
        if self.distillation is not None and (schedule := self.distillation.weight_schedule) is not None:
            found += [f"distillation.weight_schedule.{line}" for line in schedule.problems()]
        if self.mixes_hidden_states():
            found += [
                f"{section} has no effect with mixer.content hidden_states; leave it out"
                for section in ("labels", "distillation", "gate")
                if getattr(self, section) is not None
            ]
        elif self.gate is not None and not self.learns_concepts() and self.distillation_config() is None:
            found += ["gate has no effect without distillation; leave it out"] if "gate" in sections else []
        return found

    def mixer_config(self) -> MixerConfig | None:
        """Return the mixer; None if the method has none."""
        return (self.mixer or MixerConfig()) if "mixer" in METHODS[self.method].sections else None

    def distillation_config(self) -> DistillationConfig | None:
        """Return how it learns the teacher's distribution; None if it does not."""
        return self.distillation or (DistillationConfig() if METHODS[self.method].always_distills else None)

    def future_tokens(self) -> int | None:
        """Return n; None if the method predicts the next token only."""
        has_heads = "num_future_tokens" in METHODS[self.method].sections
        return (self.num_future_tokens or NUM_FUTURE_TOKENS) if has_heads else None

    def splits_backbone(self) -> bool:
        """Return whether the backbone is cut into stacks of blocks."""
        return self.mixer_config() is not None or self.future_tokens() is not None

    def learns_concepts(self) -> bool:
        """Return whether it learns from concept labels."""
        return "labels" in METHODS[self.method].sections and not self.mixes_hidden_states()

    def mixes_hidden_states(self) -> bool:
        """Return whether it predicts the teacher's hidden states instead of concepts."""
        learns = "labels" in METHODS[self.method].sections
        return learns and self.mixer is not None and self.mixer.content == "hidden_states"

    def asks_teacher(self) -> bool:
        """Return whether it learns from the teacher's predictions, losses or hidden states."""
        return self.distillation_config() is not None or self.gate is not None or self.mixes_hidden_states()

    def objective(self, teacher: TeacherSignals) -> Objective:
        """Return what it minimizes.

        Args:
            teacher: computes, during training, what is not stored.
        """
        return METHODS[self.method].objective(self, teacher)


@dataclass(frozen=True)
class Method:
    """A training method.

    Attributes:
        objective: builds what a student minimizes from its settings and the teacher.
        sections: of a student's settings that have an effect. A student with `labels` learns concepts; one with `mixer`
            or `num_future_tokens` splits its backbone.
        content: what the mixer inserts, if the method decides it.
        always_distills: whether the student learns the teacher's distribution even if its recipe does not say how.
    """

    objective: Callable[[StudentConfig, TeacherSignals], Objective]
    sections: tuple[str, ...] = ()
    content: str | None = None
    always_distills: bool = False


def _distillation(student: StudentConfig, teacher: TeacherSignals) -> Distillation | None:
    config = student.distillation_config()
    if config is None:
        return None
    predict = teacher.token_distributions() if config.top_k is None else None
    return Distillation(config.weight, config.temperature, predict, config.weight_schedule)


def _gate(student: StudentConfig, teacher: TeacherSignals) -> TeacherGate | None:
    if student.gate is None:
        return None
    return TeacherGate(student.gate.temperature, None if teacher.losses_are_stored() else teacher.token_distributions())


def _next_token(student: StudentConfig, teacher: TeacherSignals) -> Objective:
    distillation = _distillation(student, teacher)
    return NextToken() if distillation is None else dataclasses.replace(distillation, gate=_gate(student, teacher))


def _concepts(student: StudentConfig, teacher: TeacherSignals) -> Objective:
    mixer = student.mixer or MixerConfig()
    schedule = mixer.concept_loss_schedule
    weight = None if schedule is None else mixer.concept_loss_weight
    if student.mixes_hidden_states():
        return HiddenStateMixing(teacher.hidden_states(), weight, schedule)
    return ConceptMixing(
        teacher.labeler(),
        _distillation(student, teacher),
        weight,
        schedule,
        teacher.labels_have_weights(),
        _gate(student, teacher),
    )


METHODS: dict[str, Method] = {
    "ntp": Method(_next_token),
    "kd": Method(_next_token, ("distillation", "gate"), always_distills=True),
    "pause": Method(_next_token, ("mixer", "distillation", "gate"), content="pause"),
    "mtp": Method(lambda student, teacher: MultiToken(), ("num_future_tokens",)),
    "cocomix": Method(_concepts, ("mixer", "labels", "distillation", "gate")),
}
"""Every training method, by the name that recipes use."""
