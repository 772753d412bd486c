"""What is recorded of the costs of what was prepared for a student."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cocomix.pipeline.costs import preparation
from cocomix.pipeline.methods import StudentConfig


def packed(train_blocks: int, validation_blocks: int) -> SimpleNamespace:
    sizes = {"train_blocks": train_blocks, "validation_blocks": validation_blocks, "block_size": 8}
    return SimpleNamespace(info=SimpleNamespace(**sizes))


def stage(**summary: Any) -> SimpleNamespace:
    return SimpleNamespace(record=lambda: SimpleNamespace(fingerprint="f", summary=summary))


@pytest.mark.parametrize(("online", "blocks"), [(False, 150 + 20), (True, 20)])
def test_labels_cost_what_the_teacher_reads_in_its_own_tokens(online: bool, blocks: int) -> None:
    labels = SimpleNamespace(online=online, source=None, base=lambda: labels)
    pipeline: Any = SimpleNamespace(
        recipe=SimpleNamespace(labels=labels, labels_of=lambda student: labels, reads_losses=lambda student: False),
        corpus=lambda: packed(100, 10),
        teacher_corpus=lambda: packed(150, 20),
        labels_stage_of=lambda config: stage(flops_per_token=7),
        sae_stage=stage(training_flops=11.0),
        teacher_stage=stage(tokens=3, training_flops_per_token=5),
    )
    found = preparation(pipeline, StudentConfig(method="cocomix"))
    assert {kind: made.flops for kind, made in found.items()} == {
        "labels": 7.0 * blocks * 8,
        "sae": 11.0,
        "teacher": 15,
    }
