"""A recipe small enough to run whole in a few seconds, on text made here."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml

from cocomix.cli import main

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
            "ntp": {"method": "ntp", "match": "cocomix"},
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
