"""Configurations of the models, as saved in `config.json`.

Dimensions: D width, C concepts, K concepts mixed per token, d teacher width.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

CONTENTS = ("concepts", "hidden_states", "pause")
MIXINGS = ("interleave", "add", "none")
CONCEPT_SLOTS = ("concept", "residual")
SLOT_POSITIONS = ("interleaved", "repeat")
SLOT_ATTENTIONS = ("causal", "pair")
REGRESSION_LOSSES = ("l1", "l2", "cosine")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}")


class StackedConfig(PretrainedConfig):
    """Configuration of a model that splits a backbone into stacks.

    Args:
        backbone_config: configuration of the decoder that is split: a Transformers configuration, or its dictionary
            with `model_type`.
        kwargs: arguments of every Transformers configuration. `tie_word_embeddings` defaults to the backbone's.
    """

    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012 (Transformers' own class attribute)
    keys_to_ignore_at_inference = [  # noqa: RUF012
        "past_key_values",
        "token_loss",
        "kd_loss",
        "concept_loss",
        "hidden_loss",
        "last_hidden_state",
    ]

    def __init__(self, backbone_config: PretrainedConfig | dict[str, Any] | None = None, **kwargs: Any) -> None:
        backbone = {"model_type": "gpt2"} if backbone_config is None else backbone_config
        if isinstance(backbone, dict):
            backbone = AutoConfig.for_model(**backbone)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, getattr(backbone, name, None))
        kwargs.setdefault("tie_word_embeddings", bool(backbone.tie_word_embeddings))
        super().__init__(**kwargs)
        self.backbone_config: PretrainedConfig = backbone
        for name in ("_attn_implementation", "_experts_implementation"):  # set again, for the backbone, too
            setattr(self, name, getattr(self, name))
        self._check()

    def _check(self) -> None:
        """Raise ValueError if a value is out of its range."""

    def __getattr__(self, name: str) -> Any:
        """Return the backbone's setting where this configuration has none: widths, depth, vocabulary, …"""
        if name.startswith("_") or "backbone_config" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no setting {name!r}")
        return getattr(self.backbone_config, name)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PretrainedConfig:
        """Return this configuration: with another one, engines would take the model for a multimodal one."""
        return self

    @property
    def vocab_size(self) -> int:
        """Size of the token vocabulary."""
        return self.backbone_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.backbone_config.vocab_size = value


class CoCoMixConfig(StackedConfig):
    """Configuration of `CoCoMixForCausalLM`.

    The defaults are the published settings (arXiv 2502.08524).

    Args:
        backbone_config: configuration of the decoder that is split around the mixer.
        insert_layer: number of backbone blocks that run before the mixer, 0 ≤ insert_layer < blocks.
        content: content of the inserted vector: `concepts` that the model predicts, `hidden_states` of the teacher
            that it predicts, or `pause`, a learned vector without a prediction.
        num_concepts: C, number of concepts (SAE latents) that the model predicts.
        num_active_concepts: K, number of predicted concepts mixed per token, 1 ≤ K ≤ C.
        mixing: `interleave` inserts the vector after each token (twice the positions above), `add` adds it to the
            token's hidden state, `none` only predicts.
        concept_slot: how the vector c enters: `concept`, as c (published), or `residual`, as c + h − mean(h) where it
            is interleaved and c − mean(h) where it is added, so that c = mean(h) changes nothing.
        slot_positions: rotary positions of the two slots of token t: `interleaved` (2t, 2t+1) or `repeat` (t, t).
            No effect on backbones with learned positions.
        slot_attention: `causal` (published), or `pair`: the two slots of a token attend to each other.
        concept_loss_weight: λ, weight of the prediction loss relative to the token loss.
        teacher_hidden_size: d, width of the predicted hidden states.
        regression_loss: loss of predicted hidden states: l1, l2 or cosine.
        kwargs: arguments of `StackedConfig`.

    Raises:
        ValueError: a value is out of its range.
    """

    model_type = "cocomix"

    def __init__(
        self,
        backbone_config: PretrainedConfig | dict[str, Any] | None = None,
        insert_layer: int = 3,
        content: str = "concepts",
        num_concepts: int = 32768,
        num_active_concepts: int = 32,
        mixing: str = "interleave",
        concept_slot: str = "concept",
        slot_positions: str = "interleaved",
        slot_attention: str = "causal",
        concept_loss_weight: float = 0.1,
        teacher_hidden_size: int | None = None,
        regression_loss: str = "l2",
        **kwargs: Any,
    ) -> None:
        self.insert_layer = insert_layer
        self.content = content
        self.num_concepts = num_concepts
        self.num_active_concepts = num_active_concepts
        self.mixing = mixing
        self.concept_slot = concept_slot
        self.slot_positions = slot_positions
        self.slot_attention = slot_attention
        self.concept_loss_weight = concept_loss_weight
        self.teacher_hidden_size = teacher_hidden_size
        self.regression_loss = regression_loss
        super().__init__(backbone_config, **kwargs)

    def _check(self) -> None:
        _one_of("content", self.content, CONTENTS)
        _one_of("mixing", self.mixing, MIXINGS)
        _one_of("concept_slot", self.concept_slot, CONCEPT_SLOTS)
        _one_of("slot_positions", self.slot_positions, SLOT_POSITIONS)
        _one_of("slot_attention", self.slot_attention, SLOT_ATTENTIONS)
        _one_of("regression_loss", self.regression_loss, REGRESSION_LOSSES)
        blocks = self.backbone_config.num_hidden_layers
        if not 0 <= self.insert_layer < blocks:
            raise ValueError(
                f"insert_layer is {self.insert_layer}; a backbone of {blocks} blocks takes 0 to {blocks - 1} "
                "(the number of blocks before the mixer)"
            )
        if self.content == "concepts" and not 1 <= self.num_active_concepts <= self.num_concepts:
            raise ValueError(
                f"num_active_concepts is {self.num_active_concepts}; with num_concepts {self.num_concepts} "
                f"it must be 1 to {self.num_concepts}"
            )
        if self.content == "hidden_states" and not (self.teacher_hidden_size or 0) >= 1:
            raise ValueError(
                f"teacher_hidden_size is {self.teacher_hidden_size}; to predict hidden states it must be the width of "
                "the teacher"
            )
        if self.content == "pause" and self.mixing == "none":
            raise ValueError("mixing is 'none' with content 'pause', which has no effect; use interleave or add")
        if not self.concept_loss_weight >= 0:
            raise ValueError(f"concept_loss_weight is {self.concept_loss_weight}; it must be 0 or more")

    @property
    def slots_per_token(self) -> int:
        """Positions that a token takes in the upper blocks: 2 if interleaved, else 1."""
        return 2 if self.mixing == "interleave" else 1

    @property
    def mixes_concepts(self) -> bool:
        """Whether predicted concepts are mixed in, so that they can be steered and traced."""
        return self.content == "concepts" and self.mixing != "none"
