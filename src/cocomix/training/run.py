"""What a finished run says about itself: `run.json`, beside the weights."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from cocomix import environment, files
from cocomix.errors import InputError
from cocomix.evaluation.flops import training_flops_per_token
from cocomix.evaluation.validation import bits_per_byte
from cocomix.models.causal_lm import CoCoMixForCausalLM
from cocomix.training.pretrain import TrainingResult

RUN_FILE = "run.json"


@dataclass(frozen=True)
class Run:
    """A trained model's figures.

    Attributes:
        name: what the recipe calls it.
        method: training method.
        seed: of initialisation and data order.
        corpus: fingerprint of the packed corpus that it was trained and evaluated on.
        block_size: tokens per block.
        bytes_per_token: of the validation text.
        stored_parameters: weights in the file, tied ones once.
        activated_parameters: weights that one token uses.
        tokens: training tokens.
        training_flops_per_token: of the model's own training step, teacher and labels left out.
        teacher_flops_per_token: of what the teacher computes inside each training step (distillation, online labels).
        metrics: of the last evaluation; losses in nats.
        curve: metrics by training tokens.
        timing: `seconds` in training steps and `tokens_per_second`; the only part that differs between repeats.
        recipe: the whole recipe.
        environment: code, versions, hardware, date.
    """

    name: str
    method: str
    seed: int
    corpus: str
    block_size: int
    bytes_per_token: float
    stored_parameters: int
    activated_parameters: int
    tokens: int
    training_flops_per_token: int
    metrics: dict[str, float]
    curve: list[dict[str, float]]
    timing: dict[str, float]
    recipe: dict[str, Any]
    environment: dict[str, Any]
    teacher_flops_per_token: int = 0


def activated_parameters(model: PreTrainedModel) -> int:
    """Weights that one token uses."""
    if isinstance(model, CoCoMixForCausalLM):
        return model.num_activated_parameters()
    return model.num_parameters()


def describe_run(
    model: PreTrainedModel,
    result: TrainingResult,
    *,
    name: str,
    method: str,
    seed: int,
    corpus: str,
    block_size: int,
    bytes_per_token: float,
    recipe: dict[str, Any],
    teacher_flops_per_token: int = 0,
) -> Run:
    """The figures of a model that has just been trained."""
    metrics = {
        **result.metrics,
        "perplexity": math.exp(result.metrics["loss"]),
        "bits_per_byte": bits_per_byte(result.metrics["loss"], bytes_per_token),
    }
    return Run(
        name=name,
        method=method,
        seed=seed,
        corpus=corpus,
        block_size=block_size,
        bytes_per_token=bytes_per_token,
        stored_parameters=model.num_parameters(),
        activated_parameters=activated_parameters(model),
        tokens=result.tokens,
        training_flops_per_token=training_flops_per_token(model, block_size),
        metrics=metrics,
        curve=result.curve,
        timing={"seconds": result.seconds, "tokens_per_second": result.tokens / result.seconds},
        recipe=recipe,
        environment=environment.describe(),
        teacher_flops_per_token=teacher_flops_per_token,
    )


def save_run(run: Run, folder: Path) -> None:
    """Write `run.json` into `folder`."""
    files.write_json(folder / RUN_FILE, asdict(run))


def load_run(folder: Path) -> Run:
    """Read the run in `folder`.

    Raises:
        InputError: there is none.
    """
    if not (folder / RUN_FILE).is_file():
        raise InputError(f"no finished run in {folder}: it has no {RUN_FILE}; give folders of trained models")
    try:
        return Run(**files.read_json(folder / RUN_FILE))
    except (TypeError, ValueError) as error:
        raise InputError(f"{folder / RUN_FILE} does not describe a run: {error}") from None
