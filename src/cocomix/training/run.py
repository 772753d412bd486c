"""Record of a finished run: `run.json`, next to the weights."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from cocomix.common import environment, files, integrity
from cocomix.common.errors import InputError
from cocomix.data.packing import PackedInfo
from cocomix.models.building import activated_parameters
from cocomix.models.flops import training_flops_per_token
from cocomix.training import older_records
from cocomix.training.documents import LOSSES_FILE
from cocomix.training.pretrain import TrainingResult
from cocomix.training.validation import bits_per_byte

RUN_FILE = "run.json"
LAYOUTS = ("students/*", "replicate-*/students/*")
"""Folders of the runs in an output folder."""


@dataclass(frozen=True)
class Preparation:
    """An artifact that was computed once before students were trained.

    Attributes:
        fingerprint: fingerprint of the artifact; runs with equal fingerprints share its cost.
        flops: FLOPs of computing it; None for a ready-made artifact.
    """

    fingerprint: str
    flops: float | None


@dataclass(frozen=True)
class Run:
    """Record of a trained model.

    Attributes:
        name: name of the student in the recipe.
        method: training method.
        seed: seed of initial weights and data order.
        corpus: fingerprint of the packed corpus for training and validation.
        validation: fingerprint of the validation blocks.
        tokenizer: fingerprint of the tokenizer.
        block_size: tokens per block.
        bytes_per_token: mean bytes per token of the validation text.
        stored_parameters: number of weights in the file, counting tied ones once.
        activated_parameters: number of weights that one token uses.
        tokens: number of training tokens.
        training_flops_per_token: FLOPs of the model's training step, without teacher and labels.
        teacher_flops_per_token: FLOPs of the teacher inside the training steps (distillation, online labels), as a mean
            over all training tokens: a scheduled loss whose weight is 0 in half of the steps counts half.
        metrics: metrics of the last evaluation; losses in nats.
        curve: metrics by training tokens.
        timing: `seconds` of training (see `TrainingTime`), the same at every evaluation (`curve`), and
            `tokens_per_second`. Only timing differs between repetitions of a run.
        recipe: complete recipe, including default settings.
        environment: code version, package versions, hardware and date.
        preparation: artifacts computed before training, by kind.
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
    """Build the record of a model that has just been trained."""
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
            "tokens_per_second": result.tokens / result.seconds if result.seconds else 0.0,
            "curve": result.seconds_curve,
        },
        recipe=recipe,
        environment=environment.describe(),
        teacher_flops_per_token=teacher_flops_per_token,
        preparation={kind: asdict(artifact) for kind, artifact in (preparation or {}).items()},
    )


def save_run(run: Run, folder: Path) -> None:
    """Write `run.json` to `folder`."""
    files.write_json(folder / RUN_FILE, asdict(run))


def load_run(folder: Path) -> Run:
    """Read the record of the run in `folder`.

    Raises:
        InputError: there is none, or it is invalid.
    """
    if not (folder / RUN_FILE).is_file():
        raise InputError(f"no finished run in {folder}: it has no {RUN_FILE}; give folders of trained models")
    integrity.verify(
        folder,
        f"restore it, or delete {integrity.SUMS_FILE} if you changed it on purpose",
        names=(RUN_FILE, LOSSES_FILE),
    )
    try:
        run = Run(**files.read_json(folder / RUN_FILE))
        return replace(run, recipe=older_records.complete_recipe(run.recipe))
    except (TypeError, ValueError) as error:
        raise InputError(f"{folder / RUN_FILE} does not describe a run: {error}") from None


def output_folder(run: Path) -> Path:
    """Return OUTPUT of the folder OUTPUT/students/NAME of a run."""
    return run.resolve().parent.parent


def run_folders(folder: Path) -> list[Path]:
    """Return the folders of the finished runs of an output folder, in the recipe's order, or a run's own folder."""
    found = [path.parent for layout in LAYOUTS for path in sorted(folder.glob(f"{layout}/{RUN_FILE}"))]
    if (folder / RUN_FILE).is_file() or not found:
        return [folder]
    runs = {path: load_run(path) for path in found}

    def place(path: Path) -> tuple[int, int]:
        names = [*runs[path].recipe["students"]]
        return names.index(runs[path].name) if runs[path].name in names else len(names), runs[path].seed

    return sorted(found, key=place)
