"""Load checkpoints of the published CoCoMix code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config

from .causal_lm import CoCoMixForCausalLM
from .configuration import CoCoMixConfig

_MIXER = {
    "transformer.pre_bias": "mixer.pre_bias",
    "transformer.concept_predictor.weight": "mixer.predict.weight",
    "transformer.concept_predictor.bias": "mixer.predict.bias",
    "transformer.compress_layer.weight": "mixer.compress_weight",
    "transformer.compress_layer.bias": "mixer.compress_bias",
}
_EMBEDDINGS = ("transformer.wte.weight", "transformer.wpe.weight")


def load_reference_checkpoint(
    source: Mapping[str, Tensor] | str | Path,
    *,
    num_attention_heads: int,
    insert_layer: int,
    num_active_concepts: int,
) -> CoCoMixForCausalLM:
    """Build a `CoCoMixForCausalLM` from weights with the published code's names.

    Sizes are read from the weights, except for the arguments. Dropout is 0, as in the published settings.

    Args:
        source: a state dict, or the path of a `.safetensors` or torch file that holds one.
        num_attention_heads: attention heads per block.
        insert_layer: number of blocks before the mixer (the published `insert_layer_index`).
        num_active_concepts: K, number of concepts mixed per token.

    Raises:
        ValueError: the weights are not those of a published CoCoMix model.
    """
    state = source if isinstance(source, Mapping) else _read(Path(source))
    missing = [name for name in (*_MIXER, *_EMBEDDINGS) if name not in state]
    if missing:
        raise ValueError(f"not a published CoCoMix checkpoint: it has no {', '.join(missing)}")
    vocab_size, width = state["transformer.wte.weight"].shape
    blocks = {int(match[1]) for name in state if (match := re.match(r"transformer\.h\.(\d+)\.", name))}
    config = CoCoMixConfig(
        backbone_config=GPT2Config(
            vocab_size=vocab_size,
            n_positions=state["transformer.wpe.weight"].shape[0],
            n_embd=width,
            n_layer=len(blocks),
            n_head=num_attention_heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        ),
        insert_layer=insert_layer,
        num_concepts=state["transformer.concept_predictor.weight"].shape[0],
        num_active_concepts=num_active_concepts,
        mixing="interleave",
        concept_slot="concept",
        concept_loss_weight=0.1,
    )
    model = CoCoMixForCausalLM(config).to(state["transformer.wte.weight"].dtype)
    renamed = {_rename(name, insert_layer): _transpose(name, value) for name, value in state.items()}
    try:
        model.load_state_dict(renamed)
    except RuntimeError as error:
        raise ValueError(f"not a published CoCoMix checkpoint: {' '.join(str(error).split())}") from None
    return model.eval()


def _read(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _rename(name: str, insert_layer: int) -> str:
    if name in _MIXER:
        return _MIXER[name]
    if match := re.match(r"transformer\.h\.(\d+)\.(.*)", name):
        block, rest = int(match[1]), match[2]
        return f"lower.h.{block}.{rest}" if block < insert_layer else f"upper.h.{block - insert_layer}.{rest}"
    if name.startswith("transformer.ln_f."):
        return name.replace("transformer", "upper", 1)
    return name.replace("transformer", "lower", 1)


def _transpose(name: str, value: Tensor) -> Tensor:
    """Transpose the compress matrix from (D, C) to (C, D), whose rows can be gathered."""
    return value.T.contiguous() if name == "transformer.compress_layer.weight" else value
