"""Take any Hugging Face decoder apart: its blocks, its final norm, its two halves.

Nothing here knows a model by name. A decoder qualifies by its form: one list of `num_hidden_layers`
blocks, one final norm, a token embedding, and either rotary positions or a learned position table.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel


class Stacks(NamedTuple):
    """The two halves of a decoder, each an ordinary Hugging Face decoder."""

    lower: PreTrainedModel
    """Token and position embedding and the first blocks; its final norm is the identity."""
    upper: PreTrainedModel
    """The other blocks and the final norm; fed with `inputs_embeds`, without embeddings of its own."""


class NoPositions(nn.Module):
    """Stands where a learned position table was: adds nothing, at any position."""

    def forward(self, position_ids: Tensor) -> Tensor:
        return torch.zeros((), device=position_ids.device)


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The list of a decoder's blocks, of the model itself or of its base model.

    It is the outermost list of `num_hidden_layers` modules: a block may hold lists of its own (experts), and a
    model may hold its decoder one level down.

    Raises:
        ValueError: there is none, or more than one equally far out.
    """
    decoder = model.base_model
    depth = decoder.config.get_text_config().num_hidden_layers
    level: list[nn.Module] = [decoder]
    lists: list[nn.ModuleList] = []
    while level and not lists:
        level = [child for module in level for child in module.children()]
        lists = [child for child in level if isinstance(child, nn.ModuleList) and len(child) == depth]
    if len(lists) != 1:
        raise ValueError(
            f"{type(decoder).__name__} has {len(lists)} lists of {depth} blocks; a decoder with exactly one is needed"
        )
    return lists[0]


def final_norm_name(decoder: PreTrainedModel) -> str:
    """The attribute that holds the norm after the last block.

    Raises:
        ValueError: there is not exactly one norm beside the blocks.
    """
    names = [name for name, child in decoder.named_children() if "norm" in type(child).__name__.lower()]
    if len(names) != 1:
        raise ValueError(
            f"{type(decoder).__name__} has {len(names)} norms beside its blocks; exactly one final norm is needed"
        )
    return names[0]


def positions_of(attention_mask: Tensor) -> Tensor:
    """(B, T) positions of tokens in a padded batch: those that the mask keeps are counted, padding gets 0."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def _refuse_sliding_windows(config: PretrainedConfig) -> None:
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if kinds != {"full_attention"} or window is not None:
        raise ValueError(
            f"the backbone {config.model_type!r} has sliding-window or other special attention "
            f"(layer_types {sorted(kinds)}, sliding_window {window}); only full attention can be split around the "
            "mixer: set sliding_window to null and layer_types to full_attention"
        )


def _refuse_scaling(config: PretrainedConfig) -> None:
    for name in ("embedding_multiplier", "logits_scaling", "logit_scale", "final_logit_softcapping"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ValueError(
                f"the backbone {config.model_type!r} scales its embeddings or logits ({name} "
                f"{getattr(config, name)}), which two stacks and a plain token head do not repeat; set it to 1 or null"
            )


def split_decoder(decoder: PreTrainedModel, insert_layer: int) -> Stacks:
    """Cut `decoder` in two after its first `insert_layer` blocks. The decoder itself becomes `lower`.

    Weights are moved, not copied, so the two halves hold exactly what the decoder held.

    Raises:
        ValueError: the decoder is not of a form that can be cut (`decoder_blocks`, `final_norm_name`,
            sliding-window blocks, scaled embeddings or logits).
    """
    config = decoder.config
    _refuse_sliding_windows(config)
    _refuse_scaling(config)
    blocks, norm = decoder_blocks(decoder), final_norm_name(decoder)

    with torch.device("meta"):
        upper = type(decoder)._from_config(
            _with_blocks(config, slice(1)), attn_implementation=config._attn_implementation
        )
    upper_blocks = decoder_blocks(upper)
    del upper_blocks[:]
    upper_blocks.extend(list(blocks)[insert_layer:])
    upper.set_input_embeddings(None)
    setattr(upper, norm, getattr(decoder, norm))
    if hasattr(upper, "rotary_emb"):
        upper.rotary_emb = copy.deepcopy(decoder.rotary_emb)
    for name, child in upper.named_children():
        if isinstance(child, nn.Embedding):
            setattr(upper, name, NoPositions())
    upper.config = _with_blocks(config, slice(insert_layer, None))
    for module in upper_blocks.modules():  # blocks count from 0 in their own stack, as its cache does
        if isinstance(layer := getattr(module, "layer_idx", None), int):
            module.layer_idx = layer - insert_layer  # type: ignore[assignment]  # torch types attributes as modules
        if hasattr(module, "config"):
            module.config = upper.config

    del blocks[insert_layer:]
    setattr(decoder, norm, nn.Identity())
    _describe_blocks(config, slice(insert_layer))
    return Stacks(lower=decoder, upper=upper)


def _with_blocks(config: PretrainedConfig, blocks: slice) -> PretrainedConfig:
    """A copy of `config` that describes only these of its blocks."""
    cut = copy.deepcopy(config)
    _describe_blocks(cut, blocks)
    return cut


def _describe_blocks(config: PretrainedConfig, blocks: slice) -> None:
    """Make `config` describe only these of its blocks."""
    kept = range(config.num_hidden_layers)[blocks]
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in kept]
    config.num_hidden_layers = len(kept)
