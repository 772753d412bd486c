"""Transformers' own Trainer trains and evaluates these models as it does its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

from cocomix import MultiTokenConfig, MultiTokenForCausalLM


@pytest.fixture
def data() -> Dataset:
    """Four texts, with other numbers of token and concept targets in each."""
    ids, concepts = torch.randint(1, 53, (4, 6)), torch.rand(4, 6, 40).topk(3).indices
    labels = ids.clone()
    labels[0, :4] = concepts[1, 2:] = -100
    columns = {
        "input_ids": ids,
        "labels": labels,
        "concept_ids": concepts,
        "teacher_hidden_states": torch.rand(4, 6, 8),
    }
    return Dataset.from_dict({name: column.tolist() for name, column in columns.items()})


@pytest.fixture
def trainer(tmp_path: Path, data: Dataset) -> Callable[..., Trainer]:
    def make(model: PreTrainedModel, columns: tuple[str, ...] = ("concept_ids",), **settings: Any) -> Trainer:
        chosen = data.select_columns(["input_ids", "labels", *columns])
        given = {name: settings.pop(name) for name in ("compute_metrics", "compute_loss_func") if name in settings}
        settings = {"max_steps": 1, "save_strategy": "no", "optim": "sgd", "max_grad_norm": 0.0, **settings}
        arguments = TrainingArguments(
            str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True, learning_rate=1.0, **settings
        )
        return Trainer(model.float(), arguments, train_dataset=chosen, eval_dataset=chosen, **given)

    return make


CONTENTS = {
    "concept_ids": {"concept_loss_weight": 1.0},
    "teacher_hidden_states": {"content": "hidden_states", "teacher_hidden_size": 8},
}


@pytest.mark.parametrize("column", CONTENTS)
def test_a_step_does_not_depend_on_gradient_accumulation(column: str, random_model, trainer) -> None:
    steps = []
    for batch, accumulated in ((4, 1), (1, 4)):
        torch.manual_seed(0)
        model = random_model("llama", **CONTENTS[column])
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        trainer(model, (column,), **settings).train()
        steps.append(dict(model.named_parameters()))
    for name, weight in steps[0].items():
        torch.testing.assert_close(steps[1][name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_evaluation_returns_the_loss_and_passes_logits_to_metrics(random_model, trainer, data) -> None:
    model = random_model("llama")
    shapes: list[tuple[int, ...]] = []
    metrics = trainer(model, compute_metrics=lambda found: shapes.append(found.predictions.shape) or {}).evaluate()
    batch = data.with_format("torch")[:]
    targets = int((batch["labels"][:, 1:] != -100).sum())
    inputs = {name: batch[name] for name in ("input_ids", "labels", "concept_ids")}
    expected = model(**inputs, num_items_in_batch=targets).loss.item()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert shapes == [(4, 6, 53)]


def test_the_best_model_is_loaded_at_the_end(backbone_config, trainer) -> None:
    model = MultiTokenForCausalLM(MultiTokenConfig(backbone_config("llama")))
    best = trainer(model, (), eval_strategy="steps", eval_steps=1, save_strategy="steps", load_best_model_at_end=True)
    best.train()
    assert best.state.best_model_checkpoint is not None


def test_label_smoothing_is_refused(random_model, trainer) -> None:
    with pytest.raises(ValueError, match=r"without labels.*label_smoothing_factor, which this model does not support"):
        trainer(random_model("llama"), label_smoothing_factor=0.1).train()


def test_a_loss_function_gets_the_outputs(random_model, trainer) -> None:
    model = random_model("llama")
    model.accepts_loss_kwargs = False
    found: list[torch.Tensor] = []

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
        found.append(labels)
        return outputs.concept_loss

    trainer(model, compute_loss_func=loss).train()
    assert found[0].shape == (4, 6)
