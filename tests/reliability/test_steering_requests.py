"""Any notation of steering is read exactly, or refused in one line."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocomix.common.errors import InputError
from cocomix.inspection.notation import parse_steering
from property_cases import CASES, Cases
from small_catalog import CONCEPTS, catalog_of

CATALOG = catalog_of({3: "fire · flame", 4: "fire · water", 5: "lake"})
NUMBERS = st.one_of(
    st.floats(-1e3, 1e3).map(lambda number: f"{number:.3f}"),
    st.sampled_from(["nan", "inf", "1e999", "-0", "9" * 400, "1e-400", "٣", "", "1e", "0x1"]),
)
CONCEPT = st.one_of(
    st.integers(-2, 2 * CONCEPTS).map(str),
    st.sampled_from(["name:fire", "name:lake", "name:", "name:fire · water", "9" * 40, "٣", " 7 ", "=", "1=2"]),
    st.text(max_size=8),
)
FORM = st.sampled_from(["=+{}", "=-{}", "=x{}", "=x-{}", "=={}", "=off", "={}", "{}", "=", "=+{}=+{}"])
WISHES = st.one_of(
    st.builds(lambda concept, form, number: concept + form.replace("{}", number), CONCEPT, FORM, NUMBERS),
    st.text(max_size=15),
)
SPAN = st.one_of(
    st.integers(0, 99).map(str),
    st.tuples(st.integers(0, 50), st.integers(0, 50)).map(lambda span: f"{span[0]}-{span[1]}"),
    st.sampled_from(["7-", "-3", "", "9" * 40, "1-2-3", "٣", "all"]),
)
POSITIONS = st.sampled_from(["all", "generated"]) | st.lists(SPAN, min_size=1, max_size=4).map(",".join)


@pytest.mark.parametrize("cases", CASES)
def test_steering_of_any_form(cases: Cases, run_of) -> None:
    model = run_of(CATALOG).model

    @cases.settings
    @given(st.lists(WISHES, min_size=1, max_size=3), POSITIONS, st.booleans())
    def check(wishes: list[str], positions: str, after_choice: bool) -> None:
        try:
            steering = parse_steering(wishes, CATALOG, positions, after_choice)
        except InputError as error:
            assert "\n" not in str(error).strip() or any("\n" in wish for wish in wishes)
            return
        assert {operation.concept for operation in steering.operations} >= set()
        assert all(math.isfinite(operation.value) for operation in steering.operations)
        try:
            model.check_steering(steering)
        except ValueError as error:
            assert "\n" not in str(error)
            assert any(operation.concept >= CONCEPTS for operation in steering.operations)
        else:
            assert all(operation.concept < CONCEPTS for operation in steering.operations)

    check()
