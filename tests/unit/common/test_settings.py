"""Every number that a person can set has a range, and whatever is outside of it is refused in one line."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml

from cocomix.app.limits import Limits
from cocomix.cli.main import main
from cocomix.common import settings, strict_yaml
from cocomix.common.errors import InputError
from cocomix.common.settings import Partial, Range
from cocomix.evaluation.prediction import ConceptSettings
from cocomix.evaluation.steering_score import ScoreSettings
from cocomix.evaluation.text import TextSettings
from cocomix.inspection.generation import GenerationSettings
from cocomix.pipeline.recipe import Recipe
from cocomix.pipeline.recipe_file import load_recipe
from tiny_run import tiny_recipe

Number = tuple[str, type, Range | None]


def numbers(kind: Any, key: str = "") -> Iterator[Number]:
    """The numbers below an annotated type: dotted key, type and range."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(each for each in typing.get_args(kind) if each is not types.NoneType)
    if dataclasses.is_dataclass(kind):
        for name, hint in typing.get_type_hints(kind, include_extras=True).items():
            yield from numbers(hint, f"{key}.{name}".lstrip("."))
    elif typing.get_origin(kind) is dict:
        yield from numbers(typing.get_args(kind)[1], f"{key}.cocomix")
    elif typing.get_origin(kind) is list and dataclasses.is_dataclass(typing.get_args(kind)[0]):
        return  # corpus.sources, in tests/unit/data/test_corpus.py
    elif typing.get_origin(kind) in (list, tuple):
        yield from numbers(typing.get_args(kind)[0], f"{key}[0]")
    elif typing.get_origin(kind) is Annotated:
        plain, limits = typing.get_args(kind)
        if isinstance(limits, Partial):
            yield from numbers(limits.section, key)
        else:
            yield key, plain, limits
    elif kind in (int, float):
        yield key, kind, None


NUMBERS = list(numbers(Recipe))
ZERO_IS_ALLOWED = {
    "concept_loss_weight",
    "insert_layer",
    "teacher_layer",
    "seed",
    "seeds[0]",
    "min_learning_rate_ratio",
    "warmup_ratio",
    "decay_ratio",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "max_grad_norm",
    "start",
    "end",
    "auxiliary_loss_weight",
    "offset",
    "window",
}


@pytest.fixture
def content() -> dict[str, Any]:
    return tiny_recipe(Path("text"), Path("out"))


def with_value(content: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """`content` with a dotted key set; `[0]` puts the value into a list."""
    *sections, last = key.split(".")
    inner = content
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[last.removesuffix("[0]")] = [value] if last.endswith("[0]") else value
    return content


@pytest.mark.parametrize(("key", "kind", "limits"), NUMBERS, ids=[key for key, *_ in NUMBERS])
def test_a_number_of_a_recipe_is_refused_outside_its_range(
    key: str, kind: type, limits: Range | None, content: dict[str, Any]
) -> None:
    assert limits is not None, f"{key} has no range"
    assert math.isfinite(limits.low) and math.isfinite(limits.high)
    zero = () if key.rpartition(".")[2] in ZERO_IS_ALLOWED else (0,)
    fraction = (1.5,) if kind is int else ()
    wrong = (math.nan, math.inf, -math.inf, -1, 10**30, 1e300, "many", "8", True, {}, *zero, *fraction)
    for value in (*wrong, *(() if key.endswith("[0]") else ([1],))):
        _, (line,) = settings.read(Recipe, with_value(content, key, value))
        assert line.startswith(f"{key} is {settings.short_repr(value)}; expected a "), line
        assert line.endswith(str(limits))


@pytest.mark.parametrize(("key", "kind", "limits"), NUMBERS, ids=[key for key, *_ in NUMBERS])
def test_the_ends_of_a_range_are_as_it_states_them(
    key: str, kind: type, limits: Range, content: dict[str, Any]
) -> None:
    for end, is_open in ((limits.low, limits.open_low), (limits.high, limits.open_high)):
        _, problems = settings.read(Recipe, with_value(content, key, end))
        assert bool(problems) == is_open


@pytest.mark.parametrize("section", [GenerationSettings, ScoreSettings, TextSettings, ConceptSettings, Limits])
def test_every_number_of_a_command_has_a_range(section: type) -> None:
    given = {field.name for field in dataclasses.fields(section)} - {"characters", "read_tokens", "new_tokens"}
    found = [each for each in numbers(section) if section is not Limits or each[0] in given]
    assert found and all(limits is not None for _, _, limits in found)


def test_whole_numbers_may_be_written_with_an_exponent(content: dict[str, Any]) -> None:
    recipe, problems = settings.read(Recipe, with_value(content, "training.max_tokens", 1e9))
    assert problems == [] and isinstance(recipe.training.max_tokens, int) and recipe.training.max_tokens == 10**9


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("name", 7, "name is 7; expected text of one line, in quotes"),
        ("output", "a\0b", r"output is 'a\x00b'; expected text"),
        ("output", "", "output is ''; expected text"),
        ("training", None, "training is None; expected keys such as max_tokens"),
        ("training.keep_best", 1, "training.keep_best is 1; expected true or false"),
        ("training.report_to", 5, "training.report_to is 5; expected a list"),
        ("students", ["ntp"], "students is ['ntp']; expected names with their settings"),
        ("students.ntp", None, "students.ntp is None; expected keys such as method"),
        ("students.new", {}, "students.new.method is missing"),
        ("backbone.options", {1: 2}, "backbone.options has the key 1; expected text"),
        ("backbone.options", {"rope_theta": math.inf}, "backbone.options.rope_theta is inf; expected a number"),
        ("students.ntp.training", {"max_token": 1}, "unknown key students.ntp.training.max_token; did you mean"),
        ("students.ntp.training", {"a\n\x1c": 1}, r"unknown key students.ntp.training.'a\n\x1c'"),
        ("students.ntp.training", 3, "students.ntp.training is 3; expected keys such as max_tokens"),
        ("trainig", {}, "unknown key trainig; did you mean 'training'?"),
    ],
)
def test_a_value_of_another_type_is_named(key: str, value: Any, expected: str, content: dict[str, Any]) -> None:
    _, (line,) = settings.read(Recipe, with_value(content, key, value))
    assert line.startswith(expected)


def loaded(folder: Path, text: str, *overrides: str) -> Recipe:
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return load_recipe(folder / "recipe.yaml", overrides)


MINIMAL = "name: x\noutput: out\nstudents: {ntp: {method: ntp}}\n"


def test_numbers_and_texts_are_read_as_in_yaml_1_2(tmp_path: Path) -> None:
    text = "name: on\noutput: 2020-01-01\nstudents: {on: {method: ntp, learning_rate: 1e-3}}\nseed: 0x10"
    recipe = loaded(tmp_path, text)
    assert (recipe.name, recipe.output, recipe.seed) == ("on", "2020-01-01", 16)
    assert recipe.students["on"].learning_rate == 0.001


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\nseed: 2", ["line 5: seed is given a second time, first in line 4"]),
        ("training: {max_tokens: 1, max_tokens: 2}", ["line 4: max_tokens is given a second time"]),
        ("1: 2", ["line 4: the key 1 is not text; put it in quotes"]),
        ("seed: 010", ["seed is '010'; expected a whole number"]),
        ("seed: 1:30", ["seed is '1:30'; expected a whole number"]),
        ("seed: &a [*a]", ["line 4", "contains itself"]),
        ("seed: [", ["not valid YAML: line 4: expected the node content"]),
        ("seed: !!python/name:os.system", ["not valid YAML: line 4"]),
        ("seed: !!timestamp x", ["not valid YAML"]),
        ("seed: " + "9" * 5000, ["seed is inf; expected a whole number"]),
        ("seed: " + "[" * 1000, ["nested too deeply"]),
        ("---\nname: y", ["not valid YAML: line 4: but found another document"]),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_recipe_that_is_ambiguous_is_refused_in_one_line(text: str, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        loaded(tmp_path, MINIMAL + text)
    assert "\n" not in str(caught.value)
    for word in ("recipe.yaml", *words):
        assert word in str(caught.value)


def test_merged_keys_may_be_given_again(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, MINIMAL + "training: &t {max_tokens: 8}\nteacher: {training: {<<: *t, max_tokens: 9}}")
    assert (recipe.training.max_tokens, recipe.teacher.training.max_tokens) == (8, 9)


def test_aliases_that_stand_for_millions_of_values_are_refused() -> None:
    lines = ["a0: &a0 [1, 1]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9))]
    with pytest.raises(InputError, match="r: its aliases expand to more than 100,000 values"):
        strict_yaml.parse("\n".join(lines), "r")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--seed", "1", "--seed=2"], "--seed is given 2 times; give it once"),
        (["--seed", "-1"], "command line: seed is -1; expected a whole number from 0"),
        (["--seed"], "command line: --seed has no value"),
        (["--name", "x", "y"], "command line: unexpected 'y'"),
        (["--training", "3"], "command line: training is 3; expected keys such as max_tokens"),
        (["--backbone.hiden_size", "3"], "unknown key backbone.hiden_size; did you mean 'hidden_size'?"),
        (["--training.max_tokens", "[1"], "--training.max_tokens is not valid YAML"),
        (["--seed", "-1", "--name", "- x"], "command line: seed is -1; expected a whole number from 0"),
    ],
)
def test_a_wrong_option_of_a_recipe_is_refused_in_one_line(
    options: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text(MINIMAL)
    recipe = str(tmp_path / "r.yaml")
    for arguments in (["run", recipe, *options], ["plan", recipe, *options], ["train", "--json", recipe, *options]):
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert expected in line


def test_options_are_read_by_the_type_of_their_key(tmp_path: Path) -> None:
    options = ("--name", "1e3", "--training.max_tokens", "1e7", "--seeds=1,2", "--corpus.validation_source", "null")
    recipe = loaded(tmp_path, MINIMAL, *options)
    assert (recipe.name, recipe.training.max_tokens, recipe.seeds) == ("1e3", 10**7, [1, 2])
    assert recipe.corpus.validation_source is None
    text = MINIMAL + "\nseeds: 1,2\ntraining: {max_tokens: 1_000_000, report_to: 'tensorboard, wandb'}\n"
    recipe = loaded(tmp_path, text)
    assert (recipe.seeds, recipe.training.max_tokens) == ([1, 2], 10**6)
    assert recipe.training.report_to == ["tensorboard", "wandb"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["generate", "x", "--seed", "1", "--seed", "2"], "--seed is given 2 times"),
        (["generate", "x", "--sed", "1"], "unknown argument --sed; did you mean '--seed'?"),
        (["generate", "x", "--top-p", "nan"], "--top-p is 'nan'; expected a number above 0 to 1"),
        (["generate", "x", "--num-beams", "1e30"], "--num-beams is 1e+30; expected a whole number from 1"),
        (["generate", "x", "--max-new-tokens", ""], "--max-new-tokens is None; expected a whole number"),
        (["inspect", "x", "--concepts", "-1"], "--concepts"),
        (["evaluate", "x", "--limit", "0"], "--limit is 0; expected a whole number from 1"),
        (["evaluate", "x", "--stride", "two"], "--stride is 'two'; expected a whole number"),
        (["evaluate", "steering", "x", "--strengths", "1,.inf"], "--strengths[1] is inf; expected a number above 0"),
        (["evaluate", "concepts", "x", "--batch-size", "0"], "--batch-size is 0; expected a whole number"),
        (["concepts", "show", "-3"], "-3"),
        (["concepts", "search", "x", "--limit", "0"], "--limit is 0; expected a whole number"),
        (["app", "x", "--port", "70000"], "--port is 70000; expected a whole number from 1 to 65,535"),
        (["app", "x", "--time-limit", ".nan"], "--time-limit is nan; expected a number from 1 to 3,600"),
        (["plan", "x", "--gpus", "0"], "--gpus is 0; expected a whole number from 1"),
        (["plan", "x", "--utilization", "nan"], "--utilization is 'nan'; expected a number above 0 to 1"),
        (["trian", "x"], "unknown command 'trian'; did you mean 'train'? (see cocomix --help)"),
        (["compare"], "the following arguments are required: RUN (see cocomix compare --help)"),
        ([], "Missing command (see cocomix --help)"),
        (["compare", "--output"], "--output has no value (see cocomix compare --help)"),
        (["evaluate", "x", "y"], "unknown argument y (see cocomix evaluate --help)"),
        (["evaluate", "x", "--precision=fp8"], "--precision: 'fp8' is not one of 'fp32', 'bf16'"),
        (["concepts", "search", "- a text", "--catalog", "nowhere"], "in nowhere"),
        (["concepts", "search", "--catalog=nowhere", "--", "--text"], "in nowhere"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_wrong_option_of_a_command_is_refused_in_one_line(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert expected in line


def test_every_key_of_a_recipe_is_listed_with_its_range(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for key, _, limits in NUMBERS:
        key = key.replace("students.cocomix.training.", "training.")  # described once, as keys of the recipe
        option = key.replace("students.cocomix", "students.NAME").removesuffix("[0]")
        assert re.search(rf"--{re.escape(option)} [^-].*?{re.escape(str(limits))}", said), option
    assert main(["keys", "corpus.streaming"]) == 0
    assert capsys.readouterr().out.count("--") == 3
    assert main(["keys", "trainig"]) == 2
    assert "a recipe has no section 'trainig'; did you mean 'training'?" in capsys.readouterr().err


VALUES = (None, True, "", "x", "\0", -1, 0, 3, 10**30, 1e-30, math.nan, math.inf, [], [None], {}, {"a": {1: 2}}, b"x")


def test_a_mutated_recipe_is_valid_or_refused_in_lines(content: dict[str, Any], tmp_path: Path) -> None:
    draw = random.Random(0)
    outcomes = set()
    for _ in range(60):
        mutated = copy.deepcopy(content)
        for _ in range(draw.choice((1, 1, 2))):
            inner: Any = mutated
            while isinstance(inner[key := draw.choice(sorted(inner))], dict) and inner[key] and draw.random() < 0.8:
                inner = inner[key]
            inner[draw.choice((key, key, "new"))] = draw.choice(VALUES)
        try:
            outcomes.add(bool(loaded(tmp_path, yaml.safe_dump(mutated)).problems()))
        except InputError as error:
            outcomes.add(True)
            assert str(error)
    assert outcomes == {True, False}
