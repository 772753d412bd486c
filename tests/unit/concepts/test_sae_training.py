"""Training an SAE: each architecture learns, and an interrupted training ends as an undisturbed one does."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from cocomix.common import console, files
from cocomix.common.errors import InputError
from cocomix.concepts import sae_training
from cocomix.concepts.activations import ActivationStream
from cocomix.concepts.sae_loading import load_sae
from cocomix.concepts.sae_quality import sae_quality
from cocomix.concepts.sae_training import SAEConfig, SAETrainer, train_sae

ARCHITECTURES = ("topk", "batchtopk", "jumprelu")
LAYER, STEPS, STEPS_PER_CHECKPOINT = 1, 120, 6
SETTINGS = {
    "teacher_layer": LAYER,
    "d_sae": 64,
    "training_tokens": STEPS * 64,
    "tokens_per_step": 64,
    "buffer_tokens": 256,
    "learning_rate": 5e-3,
}
OUTCOME = ("sae_weights.safetensors", "cfg.json")


def config_of(architecture: str, **changes) -> SAEConfig:
    own = {"l0_coefficient": 0.2} if architecture == "jumprelu" else {"k": 4}
    return SAEConfig(**{"architecture": architecture, **SETTINGS, **own, **changes})


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def blocks() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    return Dataset.from_dict({"input_ids": torch.randint(40, (50, 16), generator=generator).tolist()})


@pytest.fixture(scope="module")
def undisturbed(teacher, blocks, tmp_path_factory):
    """Folder of the trained SAE of each architecture, and of every checkpoint on its way."""
    folders = {}
    for architecture in ARCHITECTURES:
        folders[architecture] = tmp_path_factory.mktemp(architecture)
        train_sae(teacher, blocks, config_of(architecture), folders[architecture], seed=1)
    return folders


def assert_same_outcome(found: Path, expected: Path) -> None:
    for name in OUTCOME:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


# What comes out


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_lowers_the_variance_unexplained(architecture, teacher, blocks, undisturbed, tmp_path):
    begun = config_of(architecture, training_tokens=128)
    train_sae(teacher, blocks, begun, tmp_path, seed=1)
    before, after = (
        sae_quality(teacher, load_sae(folder), blocks, LAYER, 10).quality
        for folder in (tmp_path, undisturbed[architecture])
    )
    assert after.fraction_variance_unexplained < 0.5 * before.fraction_variance_unexplained
    assert after.fraction_variance_unexplained < 0.3
    assert 1 < after.mean_active < 12


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_saved_sae_says_what_it_is_and_reads_unscaled_activations(architecture, undisturbed):
    config = json.loads((undisturbed[architecture] / "cfg.json").read_text())
    assert config["architecture"] == ("topk" if architecture == "topk" else "jumprelu")
    assert config["normalize_activations"] == "none"
    sae = load_sae(undisturbed[architecture])
    assert (sae.d_in, sae.d_sae, sae.teacher_layer) == (16, 64, LAYER)
    assert (sae.k == 4) if architecture == "topk" else (sae.threshold > 0).any()


def test_batchtopk_is_about_as_sparse_after_training_as_in_it(teacher, blocks, undisturbed):
    quality = sae_quality(teacher, load_sae(undisturbed["batchtopk"]), blocks, LAYER, 10).quality
    assert quality.mean_active == pytest.approx(4, rel=0.25)


def test_a_higher_coefficient_makes_jumprelu_sparser(teacher, blocks, undisturbed, tmp_path):
    train_sae(teacher, blocks, config_of("jumprelu", l0_coefficient=1.5), tmp_path, seed=1)
    sparser, as_it_was = (
        sae_quality(teacher, load_sae(folder), blocks, LAYER, 10).quality.mean_active
        for folder in (tmp_path, undisturbed["jumprelu"])
    )
    assert sparser < as_it_was


def test_another_seed_gives_another_sae(teacher, blocks, undisturbed, tmp_path):
    train_sae(teacher, blocks, config_of("topk"), tmp_path, seed=2)
    weights = OUTCOME[0]
    assert (tmp_path / weights).read_bytes() != (undisturbed["topk"] / weights).read_bytes()


# Interruptions


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def kill_at(monkeypatch, owner: object, name: str, call: int, *, after: bool = False) -> None:
    """Die at the `call`th call (from 1) of a function, before it does anything or when it has."""
    original, calls = getattr(owner, name), []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == call and not after:
            raise Killed
        result = original(*args, **kwargs)
        if len(calls) == call:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, dying)


MOMENTS = {
    "while the input is measured": (ActivationStream, "__next__", 3),
    "before the first checkpoint": (SAETrainer, "run_step", 3),
    "in the warm-up": (SAETrainer, "run_step", STEPS_PER_CHECKPOINT + 2),
    "in the middle": (SAETrainer, "run_step", STEPS // 2),
    "in the decay": (SAETrainer, "run_step", STEPS - 5),
    "before a checkpoint's state": (torch, "save", 4),
    "before it is called whole": (files, "finish", 4),
    "before an older one is deleted": (sae_training, "_discard", 4),
    "in the deletion of an older one": (shutil, "rmtree", 4),
    "after the last step": (sae_training, "save_sae", 1),
    "between the weights and their description": (files, "write_json", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_started_again_it_ends_the_same(moment, teacher, blocks, undisturbed, monkeypatch, tmp_path):
    owner, name, call = MOMENTS[moment]
    with monkeypatch.context() as killing, pytest.raises(Killed):
        kill_at(killing, owner, name, call)
        train_sae(teacher, blocks, config_of("topk"), tmp_path, seed=1)
    torch.manual_seed(99)  # another process has another state
    train_sae(teacher, blocks, config_of("topk"), tmp_path, seed=1)
    assert_same_outcome(tmp_path, undisturbed["topk"])
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_killed_again_and_again_every_architecture_ends_the_same(
    architecture, teacher, blocks, undisturbed, monkeypatch, tmp_path
):
    kills = 0
    while True:
        try:
            with monkeypatch.context() as killing:
                kill_at(killing, SAETrainer, "run_step", 23, after=True)
                train_sae(teacher, blocks, config_of(architecture), tmp_path, seed=1)
            break
        except Killed:
            kills += 1
    assert kills == 6  # 23 steps, less those after the last checkpoint: 18 of 120 each time
    assert_same_outcome(tmp_path, undisturbed[architecture])


def test_a_resumed_training_repeats_no_step_before_its_checkpoint(teacher, blocks, monkeypatch, tmp_path, capsys):
    with monkeypatch.context() as killing, pytest.raises(Killed):
        kill_at(killing, SAETrainer, "run_step", 100)
        train_sae(teacher, blocks, config_of("topk"), tmp_path, seed=1)
    capsys.readouterr()
    steps, step = [], SAETrainer.run_step
    monkeypatch.setattr(SAETrainer, "run_step", lambda *args: steps.append(1) or step(*args))
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 1e-9)
    train_sae(teacher, blocks, config_of("topk"), tmp_path, seed=1)
    assert len(steps) == STEPS - 96
    first = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("SAE"))
    assert "80%" in first or "81%" in first  # where it resumes
    assert "tok/s" in first


def test_a_damaged_checkpoint_is_named(teacher, blocks, monkeypatch, tmp_path):
    with monkeypatch.context() as killing, pytest.raises(Killed):
        kill_at(killing, SAETrainer, "run_step", STEPS_PER_CHECKPOINT + 1)
        train_sae(teacher, blocks, config_of("topk"), tmp_path, seed=1)
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    state = checkpoint / sae_training.STATE_FILE
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"checkpoint-6/sae_training.pt is damaged: its content has changed"):
        train_sae(teacher, blocks, config_of("topk"), tmp_path, seed=1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_checkpoint_restores_the_whole_state_of_the_trainer(architecture, teacher, blocks, monkeypatch, tmp_path):
    """Also what has no effect on the weights of a training as short as these, or will have one later."""
    trainers = []
    construct = SAETrainer.__init__
    monkeypatch.setattr(SAETrainer, "__init__", lambda self, *args: trainers.append(self) or construct(self, *args))
    for owner, name, call, after in ((sae_training, "_save_checkpoint", 14, True), (sae_training, "_train", 1, False)):
        with monkeypatch.context() as killing, pytest.raises(Killed):
            kill_at(killing, owner, name, call, after=after)
            train_sae(teacher, blocks, config_of(architecture), tmp_path, seed=1)
    saved, restored = (trainer.state_dict() for trainer in trainers)
    assert saved["step"] == 14 * STEPS_PER_CHECKPOINT
    assert {*vars(trainers[0])} - {"config", "dead_after", "revives"} == {*saved}, "or an attribute is not saved"
    torch.testing.assert_close(restored, saved, rtol=0, atol=0)


def test_a_checkpoint_of_another_version_is_ignored(teacher, blocks, undisturbed, tmp_path):
    (tmp_path / "checkpoint-96").mkdir()
    (tmp_path / "checkpoint-96" / "sae_weights.safetensors").write_bytes(b"of SAELens")
    train_sae(teacher, blocks, config_of("topk"), tmp_path, seed=1)
    assert_same_outcome(tmp_path, undisturbed["topk"])


# What is refused


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_training_that_diverges_is_refused_in_one_line(architecture, teacher, blocks, tmp_path):
    with pytest.raises(
        InputError, match=r"diverged: after \d+ tokens its loss is (nan|inf); lower sae\.learning_rate"
    ) as e:
        train_sae(teacher, blocks, config_of(architecture, learning_rate=1e30), tmp_path, seed=1)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "cfg.json").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"architecture": "batchtopk", "k": 7}, []),
        ({"architecture": "jumprelu", "l0_coefficient": 3.0}, []),
        (
            {"architecture": "batch-topk"},
            ["architecture is 'batch-topk'; expected one of topk, batchtopk, jumprelu; did"],
        ),
        ({"architecture": "jumprelu", "k": 16}, ["sae.k is 16, which has no effect with sae.architecture jumprelu"]),
        ({"l0_coefficient": 3.0}, ["sae.l0_coefficient is 3.0, which has no effect with sae.architecture topk"]),
        (
            {"architecture": "jumprelu", "auxiliary_loss_weight": 0.0},
            ["sae.auxiliary_loss_weight is 0.0, which has"],
        ),
        ({"k": 0}, ["sae.k is 0; with sae.d_sae 2048 it must be 1 to 2048"]),
        ({"architecture": "batchtopk", "d_sae": 8}, ["sae.k is 32; with sae.d_sae 8"]),
        ({"architecture": "jumprelu", "d_sae": 8}, []),
        ({"training_tokens": 10}, ["sae.training_tokens is 10, less than one step of 2048"]),
        ({"buffer_tokens": 10}, ["sae.buffer_tokens is 10, less than one step of 2048"]),
    ],
)
def test_problems(changes, expected):
    found = dataclasses.replace(SAEConfig(), **changes).problems()
    assert len(found) == len(expected)
    for line, start in zip(found, expected, strict=True):
        assert start in line
