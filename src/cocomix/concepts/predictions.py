"""Store the teacher's most probable next tokens at every training token.

    predictions.json       how they were computed (`PredictionsInfo`)
    train/                 the fields of `TopTokens` (`concepts.teacher_outputs`)

T tokens per block, k top tokens.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass

from datasets import Features, List, Value
from torch import Tensor
from transformers import PreTrainedModel

from cocomix.common.errors import InputError
from cocomix.concepts.teacher_outputs import TeacherOutputs
from cocomix.data.shards import Part
from cocomix.models.divergence import top_tokens


@dataclass(frozen=True)
class PredictionsInfo:
    """How stored predictions were computed.

    Attributes:
        corpus: fingerprint of the packed corpus.
        teacher: fingerprint of the teacher's weights.
        top_k: k.
        temperature: τ.
        mean_rest: mean mass of the tokens outside the top k.
        shards: number of shards.
    """

    corpus: str
    teacher: str
    top_k: int
    temperature: float
    mean_rest: float = 0.0
    shards: int = 0


class Predictions(TeacherOutputs[PredictionsInfo]):
    """The teacher's top tokens; InputError if top_k is not smaller than the vocabulary."""

    INFO_FILE, INFO, WHAT = "predictions.json", PredictionsInfo, "predictions"
    REMEDY = "lower distillation.top_k, or leave it out: the teacher then runs in every training step"

    def __init__(self, teacher: PreTrainedModel, plan: PredictionsInfo, vocab_size: int) -> None:
        if plan.top_k >= vocab_size:
            raise InputError(
                f"distillation.top_k is {plan.top_k}, but there are only {vocab_size} tokens: lower it, or leave it out"
            )
        super().__init__(teacher, plan, vocab_size)

    def columns(self, ids: List) -> Features:
        """Return the columns of `TopTokens`."""
        return prediction_columns(ids, self.plan.top_k)

    def compute(self, tokens: Tensor) -> Part:
        """Return the top tokens after each of `tokens`, and the mass outside them."""
        logits = self.teacher(input_ids=tokens, use_cache=False).logits
        top = top_tokens(logits[..., : self.vocab_size], self.plan.top_k, self.plan.temperature)
        arrays = {f"teacher_{name}": tensor.cpu().numpy() for name, tensor in top._asdict().items()}
        return Part(arrays, {"tokens": tokens.numel(), "rest_in_millionths": int(top.log_rest.exp().sum() * 1e6)})

    def described(self, counts: Counter[str], shards: int) -> PredictionsInfo:
        """Return the plan with `mean_rest` and `shards`."""
        mean_rest = counts["rest_in_millionths"] / counts["tokens"] / 1e6
        return dataclasses.replace(self.plan, mean_rest=mean_rest, shards=shards)


def prediction_columns(ids: List, k: int) -> Features:
    """Return the columns of stored predictions; `ids` is the type of the corpus column `input_ids`."""
    per_token = {
        "teacher_ids": List(Value(ids.feature.dtype), length=k),
        "teacher_log_probs": List(Value("float32"), length=k),
        "teacher_log_rest": Value("float32"),
    }
    return Features({"input_ids": ids, **{name: List(column, length=ids.length) for name, column in per_token.items()}})
