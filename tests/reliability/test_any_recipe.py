"""Any recipe, with any value at any key, is read or refused in lines that name the key."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cocomix.cli.main import main
from cocomix.common.errors import InputError
from cocomix.pipeline.recipe_file import load_recipe
from property_cases import CASES, Cases
from tiny_run import tiny_recipe

RECIPE = tiny_recipe(Path("text"), Path("out"))
NUMBERS = st.one_of(
    st.integers(-(10**30), 10**30), st.floats(), st.sampled_from([0, 1, -1, 2**31, 2**63, 2**64, 10**7, 1e300])
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8), st.sampled_from(["1e6", "∞", "a\nb", "${x}"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=4,
)


def paths(content: dict[str, Any], above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key of a recipe, with those above it."""
    found = []
    for key, value in content.items():
        found += [(*above, key), *(paths(value, (*above, key)) if isinstance(value, dict) else ())]
    return found


def changed(path: tuple[str, ...], key: str | None, value: Any) -> dict[str, Any]:
    """The recipe with another value at `path`, or with another key next to it."""
    content = copy.deepcopy(RECIPE)
    place = content
    for step in path[:-1]:
        place = place[step]
    place[path[-1] if key is None else key] = value
    return content


def read(recipe: Path, options: list[str]) -> None:
    """Read a recipe and find its problems; each is one line."""
    try:
        problems = load_recipe(recipe, options).problems()
    except InputError as error:
        problems = str(error).splitlines()
        assert problems
    assert all(line.strip() and len(line) < 2000 for line in problems)


@pytest.mark.parametrize("cases", CASES)
def test_any_value_at_any_key(cases: Cases, tmp_path: Path) -> None:
    @cases.settings
    @given(st.sampled_from(paths(RECIPE)), st.none() | st.text(max_size=6), VALUES)
    def check(path: tuple[str, ...], key: str | None, value: Any) -> None:
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(changed(path, key, value)), encoding="utf-8")
        read(tmp_path / "r.yaml", [])

    check()


@pytest.mark.parametrize("cases", CASES)
def test_any_file(cases: Cases, tmp_path: Path) -> None:
    @cases.settings
    @given(st.binary(max_size=80) | st.text(alphabet="ab:{}[]-&*!|>'\"\n \t#,?%@", max_size=60).map(str.encode))
    def check(content: bytes) -> None:
        (tmp_path / "r.yaml").write_bytes(content)
        read(tmp_path / "r.yaml", [])

    check()


@pytest.mark.parametrize("cases", CASES)
def test_any_command_line(cases: Cases, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe that does not exist ends every command before it does anything."""
    words = st.one_of(
        st.sampled_from(
            ["run", "plan", "train", "label", "compare", "--json", "--only", "--training.max_tokens", "--"]
        ),
        st.sampled_from([".".join(path) for path in paths(RECIPE)]).map(lambda key: f"--{key}"),
        st.text(max_size=8).filter(lambda word: "\0" not in word),
    )

    @cases.settings
    @given(st.sampled_from(["run", "plan", "train", "sae"]), st.lists(words, max_size=4))
    def check(command: str, rest: list[str]) -> None:
        code = main([command, str(tmp_path / "none.yaml"), *rest])
        told = capsys.readouterr()
        helped = code == 0 and told.out.startswith("Usage: ")
        assert helped or (code == 2 and all(line.startswith("cocomix: ") for line in told.err.splitlines()))

    check()
