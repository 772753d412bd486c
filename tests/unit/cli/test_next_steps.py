"""What `cocomix run` proposes at its end for runs without concepts and for the text of the quickstart."""

from __future__ import annotations

import pytest
import yaml

from cocomix.cli.next_steps import _other_mixing, _reference, next_steps
from cocomix.pipeline.methods import MixerConfig, StudentConfig
from cocomix.pipeline.recipe import Recipe
from small_catalog import catalog_of

PLAIN = {"showcase": None}


def test_a_run_without_concepts_is_evaluated() -> None:
    recipe = Recipe("mine", "out", students={"ntp": StudentConfig("ntp")})
    recipe.corpus.source = "texts"
    steps = next_steps(PLAIN, recipe, ["run", "mine.yaml"])
    assert steps == "\nThings to try next:\n  Evaluate its first student:\n    cocomix evaluate out"


def test_options_are_repeated_for_text_of_ones_own() -> None:
    recipe = Recipe("mine", "out", students={"ntp": StudentConfig("ntp")})
    recipe.corpus.source = "python-stdlib"
    command = ["run", "my recipe.yaml", "--seed=1", "--output", "out", "--corpus.source=python-stdlib", "--name", "a b"]
    last = next_steps(PLAIN, recipe, command).splitlines()[-1].strip()
    expected = "--seed=1 --name 'a b' --corpus.source PATH/TO/YOUR/TEXT --output out-mine"
    assert last == f"cocomix run 'my recipe.yaml' {expected}"


@pytest.mark.parametrize(("name", "written"), [("append · get", "name:append · get"), (": · (", "3"), ("a=b", "3")])
def test_a_concept_is_proposed_by_a_name_that_reads_like_one(name: str, written: str) -> None:
    assert _reference({"concept_id": 3, "name": name}, catalog_of({3: name})) == written


@pytest.mark.parametrize(
    ("mixer", "other"),
    [(None, "add"), (MixerConfig(mixing="interleave"), "add"), (MixerConfig(mixing="add"), "interleave")],
)
def test_the_other_way_to_mix_is_proposed(mixer: MixerConfig | None, other: str) -> None:
    mixing, settings = _other_mixing(StudentConfig("cocomix", mixer=mixer, learning_rate=0.01)) or ("", "")
    assert mixing == other
    assert yaml.safe_load(settings)["mixer"].get("mixing", "interleave") == other
    assert yaml.safe_load(settings)["learning_rate"] == 0.01
