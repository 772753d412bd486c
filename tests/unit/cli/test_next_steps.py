"""What `cocomix run` proposes at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cocomix.cli.recipe import next_steps


def results(method: str, mixer: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "students": {"one": {"method": method}},
        "groups": {"one": ["one"]},
        "recipe": {"students": {"one": {"mixer": mixer}}},
    }


@pytest.mark.parametrize(
    ("mixer", "other"), [(None, "add"), ({"mixing": "interleave"}, "add"), ({"mixing": "add"}, "interleave")]
)
def test_the_other_way_to_mix_is_proposed(mixer: dict[str, Any] | None, other: str) -> None:
    steps = next_steps(results("cocomix", mixer), Path("out"), "recipe.yaml")
    assert f"--students.one.mixer.mixing {other} --output out-{other}" in steps
    assert f"out-{other}/students/one --output out-mixings" in steps


def test_without_concepts_nothing_is_proposed() -> None:
    assert next_steps(results("ntp", None), Path("out"), "recipe.yaml") == ""
