"""Training tools, on small students."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

MIXINGS = pytest.mark.parametrize("mixing", ["add", "interleave"])
QUIET = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 2}


@pytest.fixture
def labeled() -> Dataset:
    """Eight texts with token and concept labels."""
    ids, concepts = torch.randint(1, 53, (8, 6)), torch.randint(40, (8, 6, 2))
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist(), "concept_ids": concepts.tolist()})


@pytest.fixture
def texts() -> Dataset:
    return Dataset.from_dict(
        {"text": [" ".join(f"w{n}" for n in row) for row in torch.randint(1, 52, (8, 6)).tolist()]}
    )


def state(model) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


@pytest.mark.compat("transformers", "Trainer with labels and concept_ids: loss, evaluation, resume")
@MIXINGS
def test_trainer(mixing, student, labeled, tmp_path: Path) -> None:
    def trained(resume: str | None, seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        model = student(mixing=mixing)
        settings = {**QUIET, "max_steps": 4, "save_steps": 2, "logging_steps": 1}
        trainer = Trainer(
            model, TrainingArguments(str(tmp_path), **settings), train_dataset=labeled, eval_dataset=labeled
        )
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.evaluate()["eval_loss"] > 0
        assert all(row["loss"] > 0 for row in trainer.state.log_history if "loss" in row)
        return state(model)

    expected = trained(None, 0)
    found = trained(str(tmp_path / "checkpoint-2"), 1)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.compat("trl", "SFTTrainer, with and without packing")
@MIXINGS
@pytest.mark.parametrize("packing", [False, True], ids=["", "packing"])
def test_trl(packing, mixing, student, texts, tokenizer, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    model = student(mixing=mixing)
    before = state(model)
    settings = {**QUIET, "max_steps": 2, "logging_steps": 1, "save_strategy": "no", "bf16": False, "max_length": 16}
    config = SFTConfig(str(tmp_path), packing=packing, packing_strategy="wrapped", **settings)
    trainer = SFTTrainer(model, config, train_dataset=texts, processing_class=tokenizer)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 2 and all(1 < loss < 10 for loss in losses)
    assert any(not torch.equal(before[name], weight) for name, weight in state(model).items())


@pytest.mark.compat("peft", "LoRA on all linear layers: train, save, load, merge")
@MIXINGS
def test_peft(mixing, student, labeled, ids, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(1)
    model = student(mixing=mixing)
    start = state(model)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2))
    arguments = TrainingArguments(str(tmp_path / "run"), max_steps=2, save_strategy="no", learning_rate=0.1, **QUIET)
    Trainer(adapted, arguments, train_dataset=labeled).train()
    adapted.eval().save_pretrained(tmp_path / "adapter")
    expected = adapted(ids).logits
    again = student(mixing=mixing)
    again.load_state_dict(start)
    loaded = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(ids).logits, expected)
    assert not torch.allclose(loaded.merge_and_unload()(ids).logits, model.to(torch.float32).eval()(ids).logits * 0)
    torch.testing.assert_close(again(ids).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.compat("accelerate", "accelerate launch, one process; torchrun with Accelerator, two")
@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        (["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"], 1),
        (["torch.distributed.run", "--standalone", "--nproc_per_node", "2"], 2),
    ],
    ids=["accelerate", "torchrun"],
)
def test_accelerate_launch(launcher, processes, folder, tmp_path: Path) -> None:
    path = folder(mixing="add")
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, torch\n"
        "from accelerate import Accelerator\n"
        "from transformers import AutoModelForCausalLM\n"
        "accelerator = Accelerator(cpu=True)\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))\n"
        "torch.manual_seed(accelerator.process_index)\n"
        "ids = torch.randint(1, 53, (2, 6))\n"
        "loss = model(ids, labels=ids, concept_ids=torch.randint(40, (2, 6, 2))).loss\n"
        "accelerator.backward(loss)\n"
        "optimizer.step()\n"
        "sums = accelerator.gather(sum(p.double().sum() for p in model.parameters()).reshape(1))\n"
        "print('weights equal' if (sums == sums[0]).all() else sums)\n"
    )
    command = [sys.executable, "-m", *launcher, str(script), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.count("weights equal") == processes, done.stderr[-2000:]


@pytest.mark.parametrize(
    "tracker",
    [
        pytest.param(name, marks=pytest.mark.compat(name, f"Trainer with report_to={name!r}"))
        for name in ("tensorboard", "trackio", "wandb", "mlflow")
    ],
)
def test_trackers(tracker, student, labeled, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "TENSORBOARD_LOGGING_DIR": str(tmp_path / "tensorboard"),
    }.items():
        monkeypatch.setenv(name, value)
    settings = {**QUIET, "report_to": tracker, "max_steps": 1, "logging_steps": 1, "save_strategy": "no"}
    trainer = Trainer(
        student(mixing="add"), TrainingArguments(str(tmp_path / "run"), **settings), train_dataset=labeled
    )
    trainer.train()
    assert trainer.state.global_step == 1
