"""What a finished run says about itself: `run.json`, beside the weights."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from cocomix import environment, files, older_records
from cocomix.data.packing import PackedInfo
from cocomix.errors import InputError
from cocomix.evaluation.flops import training_flops_per_token
from cocomix.evaluation.validation import bits_per_byte
from cocomix.models.building import activated_parameters
from cocomix.training.pretrain import TrainingResult

RUN_FILE = "run.json"


@dataclass(frozen=True)
class Preparation:
    """Something made once before students were trained.

    Attributes:
        fingerprint: of what was made; runs that have it in common shared its making.
        flops: of making it; None where somebody else did.
    """

    fingerprint: str
    flops: float | None


@dataclass(frozen=True)
class Run:
    """A trained model's figures.

    Attributes:
        name: what the recipe calls it.
        method: training method.
        seed: of initialisation and data order.
        corpus: fingerprint of the packed corpus that it was trained and evaluated on.
        validation: fingerprint of the validation blocks.
        tokenizer: fingerprint of the tokenizer.
        block_size: tokens per block.
        bytes_per_token: of the validation text.
        stored_parameters: weights in the file, tied ones once.
        activated_parameters: weights that one token uses.
        tokens: training tokens.
        training_flops_per_token: of the model's own training step, teacher and labels left out.
        teacher_flops_per_token: of what the teacher computes inside each training step (distillation, online labels).
        metrics: of the last evaluation; losses in nats.
        curve: metrics by training tokens.
        timing: `seconds` of training (see `TrainingTime`), the same at every evaluation (`curve`), and
            `tokens_per_second`; the only part that differs between repeats.
        recipe: the whole recipe, with the settings that it leaves out.
        environment: code, versions, hardware, date.
        preparation: what was made before, once for all runs that learn from it, by kind.
    """

    name: str
    method: str
    seed: int
    corpus: str
    validation: str
    tokenizer: str
    block_size: int
    bytes_per_token: float
    stored_parameters: int
    activated_parameters: int
    tokens: int
    training_flops_per_token: int
    metrics: dict[str, float]
    curve: list[dict[str, float]]
    timing: dict[str, Any]
    recipe: dict[str, Any]
    environment: dict[str, Any]
    teacher_flops_per_token: int = 0
    preparation: dict[str, dict[str, Any]] = field(default_factory=dict)


def describe_run(
    model: PreTrainedModel,
    result: TrainingResult,
    *,
    name: str,
    method: str,
    seed: int,
    corpus: PackedInfo,
    recipe: dict[str, Any],
    teacher_flops_per_token: int = 0,
    preparation: dict[str, Preparation] | None = None,
) -> Run:
    """The figures of a model that has just been trained."""
    metrics = {
        **result.metrics,
        "perplexity": math.exp(result.metrics["loss"]),
        "bits_per_byte": bits_per_byte(result.metrics["loss"], corpus.bytes_per_token),
    }
    return Run(
        name=name,
        method=method,
        seed=seed,
        corpus=corpus.fingerprint,
        validation=corpus.validation_fingerprint,
        tokenizer=corpus.tokenizer_fingerprint,
        block_size=corpus.block_size,
        bytes_per_token=corpus.bytes_per_token,
        stored_parameters=model.num_parameters(),
        activated_parameters=activated_parameters(model),
        tokens=result.tokens,
        training_flops_per_token=training_flops_per_token(model, corpus.block_size),
        metrics=metrics,
        curve=result.curve,
        timing={
            "seconds": result.seconds,
            "tokens_per_second": result.tokens / result.seconds,
            "curve": result.seconds_curve,
        },
        recipe=recipe,
        environment=environment.describe(),
        teacher_flops_per_token=teacher_flops_per_token,
        preparation={kind: asdict(made) for kind, made in (preparation or {}).items()},
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
        run = Run(**files.read_json(folder / RUN_FILE))
        return replace(run, recipe=older_records.complete_recipe(run.recipe))
    except (TypeError, ValueError) as error:
        raise InputError(f"{folder / RUN_FILE} does not describe a run: {error}") from None
