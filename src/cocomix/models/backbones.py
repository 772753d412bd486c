"""Split any Hugging Face decoder into two, whatever its type.

A decoder qualifies by its structure: one list of `num_hidden_layers` blocks, one final norm, a token embedding, and
either rotary positions or a learned position table.

Dimensions: B sequences, T tokens, D width.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.masking_utils import find_packed_sequence_indices
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention


class Stacks(NamedTuple):
    """The two halves of a decoder, each an ordinary Hugging Face decoder."""

    lower: PreTrainedModel
    """Token and position embeddings and the first blocks; its final norm is the identity."""
    upper: PreTrainedModel
    """The other blocks and the final norm; takes `inputs_embeds` and has no embeddings."""


class NoPositions(nn.Module):
    """Replaces a learned position table and adds nothing at any position."""

    def forward(self, position_ids: Tensor) -> Tensor:
        return torch.zeros((), device=position_ids.device)


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """Find the list of a decoder's blocks: the outermost list of `num_hidden_layers` modules.

    Blocks may contain further lists (experts), and a model may hold its decoder one level down.

    Raises:
        ValueError: there is no such list, or more than one at the outermost level.
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
    """Find the attribute that holds the norm after the last block.

    Raises:
        ValueError: there is not exactly one norm outside the blocks.
    """
    names = [name for name, child in decoder.named_children() if "norm" in type(child).__name__.lower()]
    if len(names) != 1:
        raise ValueError(
            f"{type(decoder).__name__} has {len(names)} norms outside its blocks; exactly one final norm is needed"
        )
    return names[0]


def fuse_activations(model: PreTrainedModel) -> PreTrainedModel:
    """Replace GPT-2's activation, eight operations in Transformers, by torch's fused kernel, in place.

    Both compute the same function up to rounding. Each unfused operation would store four times the hidden states.
    """
    unfused = type(ACT2FN["gelu_new"])
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is unfused:
                setattr(module, name, ACT2FN["gelu_pytorch_tanh"])
    return model


def take_flat_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Let GPT-2's blocks take attention (T, D) of one row of tokens, as engines return it, in place.

    They reshape it for (B, T, heads, D / heads), which leaves a vector of T·D numbers.
    """

    def restore(projection: Any, inputs: tuple[Tensor]) -> Tensor:
        return inputs[0].view(1, -1, projection.weight.shape[0])

    for module in model.modules():
        if isinstance(module, GPT2Attention):
            module.c_proj.register_forward_pre_hook(restore)
    return model


def padded_positions(attention_mask: Tensor) -> Tensor:
    """(B, T) positions of tokens in a padded batch, counting unmasked tokens only."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def packed_texts(position_ids: Tensor | None, mask: Tensor | None, cached: bool) -> Tensor | None:
    """(B, T) index of the text that each token belongs to, if rows hold several texts; None if each holds one.

    As in Transformers, a text starts where `position_ids` do not continue, if there is neither a mask nor a cache.

    Raises:
        ValueError: positions restart within a row together with a mask or a cache, where Transformers' decoders would
            read one text.
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
            "position_ids restart within a row, so it holds several texts, which a cache or an attention_mask "
            "would read as one; leave out attention_mask and past_key_values, and set use_cache to False"
        )
    return None


def pair_mask(
    mask: Tensor | None,
    slots_in: Tensor,
    slots: int,
    past: int | Tensor,
    texts: Tensor | None = None,
    max_tokens: int | None = None,
) -> Tensor:
    """(B, 1, slots·T, slots·length) additive mask with which the slots of a token attend to each other.

    Attention stays causal over tokens. If all slots of a token are equal, each attends to every earlier key equally
    often, and so reads what one slot per token would read.

    Args:
        mask: (B, length), 0 at padding; None without padding.
        slots_in: (B, slots·T, D) input of the stack, for its shape and dtype.
        slots: slots per token.
        past: number of tokens in the cache.
        texts: (B, T) or (1, T), as `packed_texts` returns them; a token attends to its own text only.
        max_tokens: length if it is fixed by a static cache; by default past + T.
    """
    rows, new = slots_in.shape[0], slots_in.shape[1] // slots
    reading = past + torch.arange(new, device=slots_in.device)[:, None]  # (T, 1)
    length: Any = past + new if max_tokens is None else max_tokens
    tokens = torch.arange(length, device=slots_in.device)
    seen = (reading >= tokens).expand(rows, -1, -1)  # (B, T, length)
    if texts is not None:
        seen = seen & (texts[:, :, None] == texts[:, None]).to(seen.device)
    if mask is not None:
        # Padding attends to itself: a softmax over nothing would be NaN.
        seen = (seen & mask[:, None].to(seen.device, torch.bool)) | (reading == tokens)
    seen = seen.repeat_interleave(slots, dim=1).repeat_interleave(slots, dim=2).unsqueeze(1)  # one mask for all heads
    lowest = torch.finfo(slots_in.dtype).min
    return torch.zeros_like(seen, dtype=slots_in.dtype).masked_fill(~seen, lowest)


def has_windows(config: PretrainedConfig) -> bool:
    """Whether some blocks attend to a sliding window."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return "sliding_attention" in kinds
    return getattr(config, "sliding_window", None) is not None


def widen_windows(stack: PreTrainedModel, slots: int) -> None:
    """Multiply a stack's sliding window by `slots`, so that it spans as many tokens as before, in place."""
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
            f"the backbone {config.model_type!r} has other blocks than full and sliding-window attention "
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
"""Settings with which decoders scale their embeddings or logits. No effect if absent, None, False or 1."""


def scaling_setting(config: PretrainedConfig) -> str | None:
    """Return the first of `SCALES` that a configuration uses, or None."""
    for name in SCALES:
        value = getattr(config, name, None)
        if value is True or value not in (None, False, 1):
            return name
    return None


def _refuse_scaling(config: PretrainedConfig) -> None:
    if (name := scaling_setting(config)) is not None:
        raise ValueError(
            f"the backbone {config.model_type!r} scales its embeddings or logits ({name} {getattr(config, name)}), "
            "which two stacks with a plain token head do not reproduce; set it to 1 or null"
        )


def _disable_embedding_dropout(stack: PreTrainedModel) -> None:
    """Turn off the dropout that a decoder applies before its blocks, a module or a rate attribute."""
    for child in stack.children():
        if isinstance(child, nn.Dropout):
            child.p = 0.0
    for name, value in list(vars(stack).items()):
        if isinstance(value, float) and "drop" in name and "layer" not in name:  # layerdrop skips whole blocks
            setattr(stack, name, 0.0)


def split_decoder(decoder: PreTrainedModel, insert_layer: int) -> Stacks:
    """Split `decoder` after its first `insert_layer` blocks. The decoder itself becomes `lower`.

    Weights are moved, not copied. Blocks keep the number (`layer_idx`) that they have in the decoder.

    Raises:
        ValueError: the decoder cannot be split: see `decoder_blocks` and `final_norm_name`, or it has other blocks than
            attention, or it scales its embeddings or logits.
    """
    config = decoder.config
    _refuse_special_attention(config)
    _refuse_scaling(config)
    blocks, norm = decoder_blocks(decoder), final_norm_name(decoder)

    with torch.device("meta"):  # with its own blocks only: some decoders look at all blocks when they are built
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
    for module in upper_blocks.modules():
        if hasattr(module, "config"):
            module.config = upper.config

    del blocks[insert_layer:]
    setattr(decoder, norm, nn.Identity())
    keep_blocks(config, slice(insert_layer))
    return Stacks(lower=decoder, upper=upper)


def _with_blocks(config: PretrainedConfig, blocks: slice) -> PretrainedConfig:
    """Copy `config` and reduce it to some of its blocks."""
    cut = copy.deepcopy(config)
    keep_blocks(cut, blocks)
    return cut


def keep_blocks(config: PretrainedConfig, blocks: slice) -> None:
    """Reduce `config` to some of its blocks, in place."""
    kept = range(config.num_hidden_layers)[blocks]
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in kept]
    config.num_hidden_layers = len(kept)
