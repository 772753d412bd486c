"""The training methods: what a student is made of, and which of its settings have an effect."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated

from cocomix.models.building import BackboneConfig
from cocomix.settings import BlockIndex, Blocks, Concepts, LabelsPerToken, LearningRate, LossWeight, Range, Vocabulary
from cocomix.suggest import did_you_mean

METHODS: dict[str, tuple[str, ...]] = {
    "ntp": (),
    "kd": ("distillation",),
    "pause": ("mixer", "distillation"),
    "mtp": ("num_future_tokens",),
    "cocomix": ("mixer", "labels", "distillation"),
}
"""The training methods, each with the sections of a student that have an effect on it."""
SPLIT_METHODS = ("pause", "mtp", "cocomix")
"""Methods that take their backbone apart."""
NUM_FUTURE_TOKENS = 2
"""Default n of mtp students."""
SECTIONS = ("mixer", "labels", "distillation", "num_future_tokens")
ONLY_FOR = {
    "content": ("concepts", "hidden_states"),
    "num_active_concepts": ("concepts",),
    "concept_loss_weight": ("concepts", "hidden_states"),
    "regression_loss": ("hidden_states",),
}
"""Settings of a mixer that have an effect on some contents only."""


@dataclass
class MixerConfig:
    """What is mixed into a student's hidden states, and how.

    The defaults are the published settings but for slot and λ, as published concept and 0.1 (why: docs/results.md).

    Args:
        insert_layer: blocks before the mixer.
        content: what is predicted and mixed in: concepts, or the teacher's hidden_states.
        num_active_concepts: K, predicted concepts that are mixed per token.
        mixing: interleave, add or none.
        concept_slot: what is mixed in: concept, the vector c itself, or residual, c + h − mean(h) where interleaved and
            c − mean(h) where added.
        slot_positions: rotary positions of the two slots of a token, interleaved or repeat.
        concept_loss_weight: λ, weight of the loss of what is predicted.
        regression_loss: of hidden_states: l1, l2 or cosine.
    """

    insert_layer: BlockIndex = 3
    content: str = "concepts"
    num_active_concepts: Concepts = 32
    mixing: str = "interleave"
    concept_slot: str = "residual"
    slot_positions: str = "interleaved"
    concept_loss_weight: LossWeight = 1.0
    regression_loss: str = "l2"

    def of_pretrained(self) -> MixerConfig:
        """Return the mixer of a student that starts from pretrained weights: a token's slots have one position."""
        return dataclasses.replace(self, slot_positions="repeat") if self.mixing == "interleave" else self

    def problems(self, method: str) -> list[str]:
        """Settings that have no effect on a student of that method, a line each; the model checks their values."""
        if self.content not in ONLY_FOR["content"]:
            known = ONLY_FOR["content"]
            hint = did_you_mean(self.content, known)
            return [f"mixer.content is {self.content!r}; expected {' or '.join(known)}{hint}"]
        content = "pause" if method == "pause" else self.content
        idle = [key for key, contents in ONLY_FOR.items() if content not in contents]
        defaults = {setting.name: setting.default for setting in dataclasses.fields(self)}
        return [
            f"mixer.{key} has no effect on what is mixed here ({content}); leave it out"
            for key in idle
            if getattr(self, key) != defaults[key]
        ]


@dataclass
class DistillationConfig:
    """How a student learns the teacher's distribution over the next token.

    Args:
        weight: of the divergence beside the token loss.
        temperature: τ; both distributions are softmax(logits / τ).
        top_k: store the teacher's top_k most probable tokens at each token, and the mass of the others, once for
            every student; without it the teacher runs in every training step.
    """

    weight: Annotated[float, Range(0, 10**6, open_low=True)] = 0.1
    temperature: Annotated[float, Range(0.001, 1000)] = 1.0
    top_k: Vocabulary | None = None


@dataclass
class StudentLabels:
    """Labels of a cocomix student that are not the recipe's; they are made apart, in a folder of their own.

    Args:
        selection: instead of labels.selection.
        labels_per_token: instead of labels.labels_per_token.
    """

    selection: str | None = None
    labels_per_token: LabelsPerToken | None = None


@dataclass
class StudentConfig:
    """One model to train and compare.

    Args:
        method: ntp, kd, pause, mtp or cocomix.
        backbone: its sizes, if not the recipe's.
        match: name of the student whose activated parameters it is widened to.
        mixer: of a cocomix or pause student.
        labels: of a cocomix student, if not the recipe's.
        distillation: of a kd student; with it a pause or cocomix student learns the teacher's predictions too.
        num_future_tokens: n, of an mtp student.
        learning_rate: instead of training.learning_rate; methods are best compared each at its own.
    """

    method: str
    backbone: BackboneConfig | None = None
    match: str | None = None
    mixer: MixerConfig | None = None
    labels: StudentLabels | None = None
    distillation: DistillationConfig | None = None
    num_future_tokens: Blocks | None = None
    learning_rate: LearningRate | None = None

    def problems(self) -> list[str]:
        """What cannot work about these settings, a line each; the method is a known one."""
        found = [
            f"{section} has no effect on the method {self.method!r}; leave it out"
            for section in SECTIONS
            if getattr(self, section) is not None and section not in METHODS[self.method]
        ]
        if self.mixer is not None and "mixer" in METHODS[self.method]:
            found += self.mixer.problems(self.method)
        if self.mixes_hidden_states():
            found += [
                f"{section} has no effect with mixer.content hidden_states; leave it out"
                for section in ("labels", "distillation")
                if getattr(self, section) is not None
            ]
        return found

    def mixer_config(self) -> MixerConfig | None:
        """The mixer of a student that has one."""
        return (self.mixer or MixerConfig()) if "mixer" in METHODS[self.method] else None

    def distillation_config(self) -> DistillationConfig | None:
        """How it learns the teacher's distribution, if it does."""
        return self.distillation or (DistillationConfig() if self.method == "kd" else None)

    def future_tokens(self) -> int | None:
        """n of an mtp student."""
        return (self.num_future_tokens or NUM_FUTURE_TOKENS) if self.method == "mtp" else None

    def learns_concepts(self) -> bool:
        """Whether it reads concept labels."""
        return self.method == "cocomix" and not self.mixes_hidden_states()

    def mixes_hidden_states(self) -> bool:
        """Whether it predicts the teacher's hidden states in place of concepts."""
        return self.method == "cocomix" and self.mixer is not None and self.mixer.content == "hidden_states"

    def asks_teacher(self) -> bool:
        """Whether it learns from the teacher itself rather than from concepts."""
        return self.distillation_config() is not None or self.mixes_hidden_states()
