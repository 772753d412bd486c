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
from transformers.activations import ACT2FN
from transformers.masking_utils import find_packed_sequence_indices


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


def fuse_activations(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with torch's kernel of GPT-2's activation, which Transformers spells out in eight operations.

    One function in another order of rounding; each operation would write, and keep, four times the hidden states.
    """
    spelled_out = type(ACT2FN["gelu_new"])
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is spelled_out:
                setattr(module, name, ACT2FN["gelu_pytorch_tanh"])
    return model


def positions_of(attention_mask: Tensor) -> Tensor:
    """(B, T) positions of tokens in a padded batch: those that the mask keeps are counted, padding gets 0."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def packed_texts(position_ids: Tensor | None, mask: Tensor | None, cached: bool) -> Tensor | None:
    """(B, T) number of the text that each token belongs to, where rows hold several texts; None where each holds one.

    As in Transformers, a text begins where `position_ids` do not continue, if there is neither a mask nor a cache.

    Raises:
        ValueError: positions start again within a row, and a mask or a cache hides that from Transformers' decoders.
    """
    if position_ids is None or position_ids.shape[-1] == 1:
        return None
    if mask is None and not cached:
        return find_packed_sequence_indices(position_ids)
    restarts = position_ids.diff() <= 0
    if mask is not None:
        kept = mask[:, -position_ids.shape[-1] :].bool()
        restarts = restarts & kept[:, 1:] & kept[:, :-1]
    if not torch.compiler.is_compiling() and restarts.any():
        raise ValueError(
            "position_ids start again within a row, so it holds several texts, which a cache or an attention_mask "
            "would read as one; leave out attention_mask and past_key_values, and set use_cache to False"
        )
    return None


def pair_mask(mask: Tensor | None, slots_in: Tensor, slots: int, past: int, texts: Tensor | None = None) -> Tensor:
    """(B, 1, slots·T, slots·(past + T)) additive mask under which the slots of a token see each other too.

    Still causal over tokens. Where all slots of a token hold the same, each sees every earlier key equally often and
    so reads what one slot per token would read.

    Args:
        mask: (B, past + T), 0 at padding; None where there is none.
        slots_in: (B, slots·T, D), input of the stack, for its shape and type.
        slots: per token.
        past: tokens in the cache.
        texts: (B, T) or (1, T), as `packed_texts` returns them; a token sees its own text only.
    """
    rows, new = slots_in.shape[0], slots_in.shape[1] // slots
    tokens = torch.arange(past + new, device=slots_in.device)
    seen = (tokens[past:, None] >= tokens).expand(rows, -1, -1)  # (B, T, past + T)
    if texts is not None:
        seen = seen & (texts[:, :, None] == texts[:, None]).to(seen.device)
    if mask is not None:
        # Padding sees itself: a row that sees nothing would be no number.
        seen = (seen & mask[:, None].to(seen.device, torch.bool)) | (tokens[past:, None] == tokens)
    seen = seen.repeat_interleave(slots, dim=1).repeat_interleave(slots, dim=2).unsqueeze(1)
    lowest = torch.finfo(slots_in.dtype).min
    return torch.zeros_like(seen, dtype=slots_in.dtype).masked_fill(~seen, lowest)


def has_windows(config: PretrainedConfig) -> bool:
    """Whether some blocks attend to a sliding window only."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return "sliding_attention" in kinds
    return getattr(config, "sliding_window", None) is not None


def widen_windows(stack: PreTrainedModel, slots: int) -> None:
    """Make a window of that many tokens one of as many slots, where each token takes `slots` positions."""
    if slots == 1 or not has_windows(stack.config):
        return
    window = stack.config.sliding_window
    for holder in (stack.config, *stack.modules()):
        if getattr(holder, "sliding_window", None) == window:
            holder.sliding_window = slots * window


def _refuse_special_attention(config: PretrainedConfig) -> None:
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"the backbone {config.model_type!r} has blocks of other kinds than full and sliding-window attention "
            f"(layer_types {', '.join(sorted(kinds))}), which cannot be split around the mixer"
        )


SCALES = (
    "embedding_multiplier",
    "mup_enabled",
    "logits_scaling",
    "logit_scale",
    "final_logit_softcapping",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "softcap",
    "lm_head_multiplier",
    "logits_mup_width_multiplier",
    "output_multiplier",
)
"""Settings of decoders that scale their embeddings or logits. Without effect if absent, None, False or 1."""


def scaling_of(config: PretrainedConfig) -> str | None:
    """The first of `SCALES` that a configuration uses, or None."""
    for name in SCALES:
        value = getattr(config, name, None)
        if value is True or value not in (None, False, 1):
            return name
    return None


def _refuse_scaling(config: PretrainedConfig) -> None:
    if (name := scaling_of(config)) is not None:
        raise ValueError(
            f"the backbone {config.model_type!r} scales its embeddings or logits ({name} {getattr(config, name)}), "
            "which two stacks and a plain token head do not repeat; set it to 1 or null"
        )


def _disable_embedding_dropout(stack: PreTrainedModel) -> None:
    """Turn off the dropout that a decoder applies before its blocks, as a module or as a rate of its own."""
    for child in stack.children():
        if isinstance(child, nn.Dropout):
            child.p = 0.0
    for name, value in list(vars(stack).items()):
        if isinstance(value, float) and "drop" in name and "layer" not in name:  # layerdrop skips whole blocks
            setattr(stack, name, 0.0)


def split_decoder(decoder: PreTrainedModel, insert_layer: int) -> Stacks:
    """Cut `decoder` in two after its first `insert_layer` blocks. The decoder itself becomes `lower`.

    Weights are moved, not copied, so the two halves hold exactly what the decoder held.

    Raises:
        ValueError: the decoder is not of a form that can be cut (`decoder_blocks`, `final_norm_name`,
            blocks of a special kind, scaled embeddings or logits).
    """
    config = decoder.config
    _refuse_special_attention(config)
    _refuse_scaling(config)
    blocks, norm = decoder_blocks(decoder), final_norm_name(decoder)

    with torch.device("meta"):  # from its own blocks: some decoders look at all of them when they are made
        upper = type(decoder)._from_config(
            _with_blocks(config, slice(insert_layer, None)), attn_implementation=config._attn_implementation
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
    _disable_embedding_dropout(upper)  # the lower half applies it
    upper.config = _with_blocks(config, slice(insert_layer, None))
    for module in upper_blocks.modules():  # blocks count from 0 in their own stack, as its cache does
        if isinstance(layer := getattr(module, "layer_idx", None), int):
            module.layer_idx = layer - insert_layer  # type: ignore[assignment]  # torch types attributes as modules
        if hasattr(module, "config"):
            module.config = upper.config

    del blocks[insert_layer:]
    setattr(decoder, norm, nn.Identity())
    keep_blocks(config, slice(insert_layer))
    return Stacks(lower=decoder, upper=upper)


def _with_blocks(config: PretrainedConfig, blocks: slice) -> PretrainedConfig:
    """A copy of `config` that describes only these of its blocks."""
    cut = copy.deepcopy(config)
    keep_blocks(cut, blocks)
    return cut


def keep_blocks(config: PretrainedConfig, blocks: slice) -> None:
    """Make `config` describe only these of its blocks."""
    kept = range(config.num_hidden_layers)[blocks]
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in kept]
    config.num_hidden_layers = len(kept)
