"""Store the teacher's next-token loss at every training token.

    losses.json            how they were computed (`LossesInfo`)
    train/                 `teacher_losses` (T,), float16, in nats (`concepts.teacher_outputs`)

T tokens per block. The last token of a block has no next token, and the loss 0.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from datasets import Features, List, Value
from torch import Tensor

from cocomix.concepts.teacher_outputs import TeacherOutputs
from cocomix.data.shards import Part
from cocomix.models.next_token_loss import token_losses
from cocomix.objectives.distillation import PredictTokens, predictor
from cocomix.objectives.gate import COLUMN


@dataclass(frozen=True)
class LossesInfo:
    """How stored losses of a teacher were computed.

    Attributes:
        corpus: fingerprint of the packed corpus.
        teacher: fingerprint of the teacher's weights.
        mean_loss: in nats per token with a next token.
        shards: number of shards.
    """

    corpus: str
    teacher: str
    mean_loss: float = 0.0
    shards: int = 0


class TeacherLosses(TeacherOutputs[LossesInfo]):
    """The teacher's next-token losses."""

    INFO_FILE, INFO, WHAT = "losses.json", LossesInfo, "losses"
    REMEDY = "free some, or leave out the students' gate"

    @cached_property
    def predict(self) -> PredictTokens:
        """Computes the teacher's logits."""
        return predictor(self.teacher, self.vocab_size)

    def columns(self, ids: List) -> Features:
        """Return the column of the losses."""
        return loss_columns(ids)

    def compute(self, tokens: Tensor) -> Part:
        """Return the loss of the token after each of `tokens`."""
        losses = token_losses(self.predict(tokens), tokens).half().cpu()
        counts = {"tokens": tokens[:, 1:].numel(), "nats_in_millionths": int(losses.double().sum() * 1e6)}
        return Part({COLUMN: losses.numpy()}, counts)

    def described(self, counts: Counter[str], shards: int) -> LossesInfo:
        """Return the plan with `mean_loss` and `shards`."""
        mean_loss = counts["nats_in_millionths"] / counts["tokens"] / 1e6
        return dataclasses.replace(self.plan, mean_loss=mean_loss, shards=shards)


def loss_columns(ids: List) -> Features:
    """Return the columns of stored losses; `ids` is the type of the corpus column `input_ids`."""
    return Features({"input_ids": ids, COLUMN: List(Value("float16"), length=ids.length)})
