"""Try out whether an unknown backbone can be trained and split."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PretrainedConfig, PreTrainedModel

from cocomix.common.errors import InputError, error_message
from cocomix.models.backbones import keep_blocks
from cocomix.models.building import build_plain
from cocomix.models.causal_lm import CoCoMixForCausalLM

TOLERANCE = 1e-4
"""Largest difference between logits, relative to the largest logit, that rounding explains."""
TRIAL_TOKENS = 8
"""Smallest context length that can be checked, and so the smallest that a recipe may have."""


@torch.no_grad()
def check_backbone(config: PretrainedConfig, is_split: bool) -> None:
    """Raise InputError unless decoders of this configuration can be trained and, with `is_split`, split around a mixer.

    Builds a decoder of two blocks, which must be causal and have finite logits and gradients. Splitting it must not
    change its predictions, nor must reading a text in pieces with a cache.
    """
    problem = None
    with torch.random.fork_rng(devices=[]):
        try:
            small = copy.deepcopy(config)
            try:
                keep_blocks(small, slice(2))
            except Exception:  # types other than stacks of blocks are too expensive to try
                if is_split:
                    raise
                return
            plain = build_plain(small).float().eval()
            ids = torch.arange(1, TRIAL_TOKENS + 1).unsqueeze(0) % config.vocab_size
            problem = _not_causal(plain, ids) or _not_trainable(plain, ids)
            if problem is None and is_split:
                middle = plain.config.num_hidden_layers // 2
                split = CoCoMixForCausalLM.from_backbone(
                    plain, middle, num_concepts=2, num_active_concepts=1, mixing="none"
                )
                problem = _not_cached(split, ids)
        except ValueError as error:
            problem = error_message(error)
        except Exception as error:  # unknown decoders fail in many ways
            problem = f"a trial fails ({type(error).__name__}: {error_message(error)})"
    if problem is not None:
        named = f"the backbone {config.model_type!r} "
        reason = f"it {problem.removeprefix(named)}" if problem.startswith(named) else problem
        raise InputError(f"{named}cannot be {'split around the mixer' if is_split else 'trained'}: {reason}")


def _not_causal(plain: PreTrainedModel, ids: Tensor) -> str | None:
    changed = ids.clone()
    changed[:, -1] = 0
    before, after = (plain(input_ids=x, use_cache=False).logits[:, :-1] for x in (ids, changed))
    return None if _alike(before, after) else "a later token changes its predictions at earlier ones"


@torch.enable_grad()
def _not_trainable(plain: PreTrainedModel, ids: Tensor) -> str | None:
    logits = plain.train()(input_ids=ids, use_cache=False).logits
    cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = [weight.grad for weight in plain.parameters() if weight.grad is not None]
    plain.zero_grad()
    plain.eval()
    return (
        None
        if all(each.isfinite().all() for each in (logits, *gradients))
        else "its logits or gradients are not finite"
    )


def _not_cached(split: PreTrainedModel, ids: Tensor) -> str | None:
    first = split(input_ids=ids[:, :5], use_cache=True)
    rest = split(input_ids=ids[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    whole = split(input_ids=ids, use_cache=False).logits
    pieces = torch.cat([first.logits, rest.logits], dim=1)
    return None if _alike(pieces, whole) else "its predictions with a cache differ from those of a single pass"


def _alike(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= TOLERANCE * other.abs().max())
