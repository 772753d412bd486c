"""Convert a pretrained decoder to a CoCoMix model with the same initial predictions, and back.

Compress weights and biases start at zero, so the continuous vector c equals mean(h) whatever concepts are predicted,
and with `concept_slot="residual"` a slot is a copy of its token's hidden state. With `mixing="add"` nothing changes.
With `mixing="interleave"`, the slots of a token must also share one position (`slot_positions="repeat"`) and attend to
each other (`slot_attention="pair"`). Then every block reads each key twice, which leaves attention unchanged, and the
copies stay equal up to the last block. The first training step moves the compress weights away from zero.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from .backbones import decoder_blocks, split_decoder, widen_windows
from .linear_loss import is_plain
from .mixer import MIXERS

NEUTRAL = {
    "none": {},
    "add": {"concept_slot": "residual"},
    "interleave": {"concept_slot": "residual", "slot_positions": "repeat", "slot_attention": "pair"},
}
"""By `mixing`: settings with which zero compress weights change nothing."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Largest change of a logit, relative to the largest logit; 2e-2 in half precision."""


class Retrofit:
    """Mixin with the conversions between a decoder and its CoCoMix model."""

    @classmethod
    def from_backbone(
        cls: Any,
        pretrained: PreTrainedModel,
        insert_layer: int = 3,
        num_concepts: int = 32768,
        num_active_concepts: int = 32,
        mixing: str = "interleave",
        concept_loss_weight: float = 0.1,
    ) -> Any:
        """Build a CoCoMix model with the weights and the initial predictions of a pretrained causal language model.

        Copies the weights, and verifies the predictions on a few tokens.

        Args:
            pretrained: any Hugging Face decoder that can be split.
            insert_layer: number of its blocks that run before the mixer.
            num_concepts: C.
            num_active_concepts: K.
            mixing: interleave, add or none.
            concept_loss_weight: λ.

        Raises:
            ValueError: the decoder cannot be split, or its predictions would change.
        """
        config = cls.config_class(
            backbone_config=copy.deepcopy(pretrained.config.get_text_config()),
            insert_layer=insert_layer,
            num_concepts=num_concepts,
            num_active_concepts=num_active_concepts,
            mixing=mixing,
            concept_loss_weight=concept_loss_weight,
            **NEUTRAL.get(mixing, {}),
        )
        return cls.retrofit(pretrained, config)

    @classmethod
    def retrofit(cls: Any, pretrained: PreTrainedModel, config: Any) -> Any:
        """Build a model of the configuration `config` with the weights of `pretrained`; see `from_backbone`.

        Raises:
            ValueError: the decoder cannot be split, or its predictions would change with this configuration.
        """
        head = pretrained.get_output_embeddings()
        if getattr(head, "bias", None) is not None:
            raise ValueError(
                f"the backbone {pretrained.config.model_type!r} has a bias on its token head, which a CoCoMix model "
                "does not have"
            )
        if not is_plain(head):
            raise ValueError(
                f"the token head of the backbone {pretrained.config.model_type!r} is a {type(head).__name__} or has "
                "hooks; expected a plain linear layer: merge adapters, and load without quantization and offloading"
            )
        if config.content != "pause":
            for name, value in NEUTRAL[config.mixing].items():
                if getattr(config, name) != value:
                    raise ValueError(
                        f"{name} is {getattr(config, name)!r}; with pretrained weights it must be {value!r}, so that "
                        "the initial predictions do not change"
                    )
        config.tie_word_embeddings = head.weight is pretrained.get_input_embeddings().weight
        with torch.device("meta"):
            model = cls(config)
        model.lower, model.upper = split_decoder(copy.deepcopy(pretrained.base_model), config.insert_layer)
        widen_windows(model.upper, config.slots_per_token)
        model.mixer = MIXERS[config.content](config).to(head.weight)
        model.mixer.reset_parameters(std=getattr(config.backbone_config, "initializer_range", 0.02))
        for name, weight in model.mixer.named_parameters():
            if not name.startswith("predict"):
                torch.nn.init.zeros_(weight)
        model.lm_head.weight = torch.nn.Parameter(head.weight.detach().clone())
        model.tie_weights()
        model.generation_config = copy.deepcopy(pretrained.generation_config)
        model.train(pretrained.training)
        _check_predictions(model, pretrained)
        return model

    def to_backbone(self: Any) -> PreTrainedModel:
        """Build the plain decoder, if removing the mixer changes no prediction: it mixes in nothing, or only zeros.

        Raises:
            ValueError: the upper blocks read what the mixer mixes in.
        """
        config = self.config
        if config.content != "concepts":
            raise ValueError(f"this model mixes in {config.content}, which its upper blocks read; it has no backbone")
        if config.mixing != "none":
            neutral = all(getattr(config, name) == value for name, value in NEUTRAL[config.mixing].items())
            mixed = (self.mixer.compress_weight, self.mixer.compress_bias, self.mixer.pre_bias)
            if not neutral or any(bool(weight.any()) for weight in mixed):
                raise ValueError(
                    f"the upper blocks of this model read the concepts that it mixes in (mixing {config.mixing}); "
                    "no backbone makes the same predictions without them"
                )
        if not is_plain(self.lm_head):
            raise ValueError(
                f"the token head is a {type(self.lm_head).__name__} or has hooks; expected a plain linear layer: "
                "merge adapters, and load without quantization and offloading"
            )
        backbone_config = copy.deepcopy(config.backbone_config)
        backbone_config.tie_word_embeddings = self.lm_head.weight is self.get_input_embeddings().weight
        plain = AutoModelForCausalLM.from_config(backbone_config, dtype=self.dtype)
        decoder = plain.base_model
        blocks = decoder_blocks(decoder)
        (name,) = (name for name, module in decoder.named_modules() if module is blocks)
        weights = dict(self.lower.state_dict())
        for key, weight in self.upper.state_dict().items():
            if key.startswith(f"{name}."):
                index, _, rest = key.removeprefix(f"{name}.").partition(".")
                key = f"{name}.{int(index) + config.insert_layer}.{rest}"
            weights[key] = weight
        decoder.load_state_dict(weights)
        plain.get_output_embeddings().weight.data.copy_(self.lm_head.weight)
        plain.generation_config = copy.deepcopy(self.generation_config)
        plain.to(self.device).train(self.training)
        return plain


@torch.no_grad()
def _check_predictions(model: Any, pretrained: PreTrainedModel) -> None:
    """Raise ValueError unless both make the same predictions on a few tokens."""
    ids = torch.arange(1, 9, device=model.device).unsqueeze(0) % pretrained.config.get_text_config().vocab_size
    training = model.training
    expected = pretrained.eval()(input_ids=ids, use_cache=False).logits
    found = model.eval()(input_ids=ids, use_cache=False).logits
    pretrained.train(training)
    model.train(training)
    apart = ((found - expected).abs().max() / expected.abs().max()).item()
    if not apart <= TOLERANCE.get(expected.dtype, 2e-2):
        raise ValueError(
            f"the backbone {pretrained.config.model_type!r} would make other predictions after the split (logits "
            f"{apart:.1e} apart): "
            + (
                "use mixing 'add' and concept_slot 'concept', with which a pause vector of zeros changes nothing"
                if model.config.content == "pause"
                else "it does more than its blocks, embedding, final norm and token head do"
            )
        )
