"""A recipe small enough to run whole in a few seconds, on text made here."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cocomix.cli.main import main
from cocomix.common import integrity

NOUNS = ["river", "stone", "garden", "letter", "window", "engine", "market", "winter", "shadow", "paper"]
VERBS = [
    "crosses",
    "holds",
    "paints",
    "answers",
    "opens",
    "follows",
    "counts",
    "breaks",
    "remembers",
    "sells",
]
PREPARED = ("corpus", "teacher", "sae", "labels")
"""Stages that students are trained from."""


def write_text(folder: Path, documents: int = 240) -> Path:
    """A folder of short documents whose words can be learnt, the same every time."""
    choose = random.Random(0)
    folder.mkdir(parents=True)
    for index in range(documents):
        sentences = [
            f"The {choose.choice(NOUNS)} {choose.choice(VERBS)} the {choose.choice(NOUNS)}."
            for _ in range(choose.randint(20, 40))
        ]
        (folder / f"{index:03d}.txt").write_text(" ".join(sentences), encoding="utf-8")
    return folder


def training(tokens: int) -> dict[str, Any]:
    return {
        "max_tokens": tokens,
        "tokens_per_step": 512,
        "blocks_per_batch": 8,
        "learning_rate": 3e-3,
        "tokens_per_evaluation": 2048,
    }


def tiny_recipe(text: Path, output: Path) -> dict[str, Any]:
    """All stages, two students."""
    return {
        "name": "tiny",
        "output": str(output),
        "block_size": 32,
        "corpus": {"source": str(text), "validation_fraction": 0.1},
        "tokenizer": {"vocab_size": 300},
        "teacher": {
            "backbone": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2},
            "training": training(8192),
        },
        "sae": {
            "teacher_layer": 1,
            "d_sae": 64,
            "k": 8,
            "training_tokens": 8192,
            "tokens_per_step": 256,
            "buffer_tokens": 1024,
        },
        "labels": {"labels_per_token": 2, "selection": "attribution", "blocks_per_batch": 16, "blocks_per_shard": 100},
        "backbone": {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2},
        "training": training(8192),
        "students": {
            "ntp": {"method": "ntp"},
            "cocomix": {
                "method": "cocomix",
                "mixer": {
                    "insert_layer": 1,
                    "num_active_concepts": 8,
                    "concept_slot": "residual",
                    "concept_loss_weight": 0.1,
                },
            },
        },
    }


def rewrite(record: Path, **changes: Any) -> None:
    """Change a JSON record of a finished folder as if it had been written so."""
    with integrity.replaced(record.parent, record.name):
        record.write_text(json.dumps({**json.loads(record.read_text()), **changes}))


class Runner:
    """Writes recipes and runs commands on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = folder / "recipe.yaml"

    def write(self, content: dict[str, Any]) -> Path:
        self.recipe.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        return self.recipe

    def __call__(self, command: str, *options: str) -> int:
        return main([command, str(self.recipe), *options])


def once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], object]) -> Path:
    """Return a folder, for reading, that `build` fills in whichever of pytest's processes needs it first."""
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, done = shared / f"{name}-once", shared / f"{name}-once.done"
    with (shared / f"{name}-once.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            build(folder)
            done.touch()
    return folder


def finished_run(
    factory: pytest.TempPathFactory, name: str, recipe: Callable[[Path], dict[str, Any]], prepared: Path | None = None
) -> Runner:
    """Return the runner of a recipe that has run to its end, once for all of pytest's processes.

    Args:
        factory: where to.
        name: of the folder.
        recipe: returns the recipe for an output folder.
        prepared: an output folder with the corpus, teacher, SAE and labels of this recipe, so that they are not made.
    """

    def build(folder: Path) -> None:
        for stage in PREPARED if prepared else ():
            shutil.copytree(prepared / stage, folder / "out" / stage)
        runner = Runner(folder)
        runner.write(recipe(folder / "out"))
        assert runner("run") == 0

    built = once(factory, name, build)
    runner = Runner(factory.mktemp(name))
    shutil.copytree(built / "out", runner.folder / "out")
    runner.write(recipe(runner.folder / "out"))
    return runner
