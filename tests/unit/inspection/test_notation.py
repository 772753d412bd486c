"""Steering as a person writes it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cocomix import InputError, Steering
from cocomix.inspection.notation import parse_positions, parse_steering, write_operation
from cocomix.models.steering import FOREVER

CATALOG = SimpleNamespace(find={"website address": 12, "a = b": 13}.__getitem__)


@pytest.mark.parametrize(
    ("wish", "steering"),
    [
        ("123=+4", Steering.add({123: 4.0})),
        ("123=-4.5", Steering.add({123: -4.5})),
        ("123=+1e-3", Steering.add({123: 0.001})),
        ("123=x5", Steering.scale({123: 5.0})),
        ("123=x-.5", Steering.scale({123: -0.5})),
        ("123==4", Steering.set({123: 4.0})),
        ("123==-4", Steering.set({123: -4.0})),
        ("123=off", Steering.suppress([123])),
        (" 123=OFF ", Steering.suppress([123])),
        ("name:website address=x5", Steering.scale({12: 5.0})),
        ("name:a = b==2", Steering.set({13: 2.0})),
    ],
)
def test_wishes(wish, steering):
    assert parse_steering([wish], CATALOG) == steering
    assert parse_steering([write_operation(each) for each in steering.operations], None) == steering


def test_several_wishes_somewhere_after_the_choice():
    found = parse_steering(["1=+4", "2=off"], None, "0,5-9", after_choice=True)
    expected = Steering()
    for each in (range(1), range(5, 10)):
        expected += Steering.add({1: 4.0}, positions=each, after_choice=True)
    for each in (range(1), range(5, 10)):
        expected += Steering.suppress([2], positions=each, after_choice=True)
    assert found == expected
    assert parse_steering([], None) == Steering()


@pytest.mark.parametrize(
    ("written", "positions"),
    [
        ("all", ["all"]),
        ("generated", ["generated"]),
        ("3", [range(3, 4)]),
        ("12-", [range(12, FOREVER)]),
        ("0, 5-9,12-", [range(1), range(5, 10), range(12, FOREVER)]),
    ],
)
def test_positions(written, positions):
    assert parse_positions(written) == positions


def test_overlapping_positions_are_steered_once():
    assert parse_steering(["1=+4"], None, "2,1-3") == Steering.add({1: 4.0}, positions=range(1, 4))


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ("123=4", r"cannot read --steer '123=4'; expected CONCEPT=\+4 or =-4 \(add\)"),
        ("123", "cannot read --steer '123'"),
        ("123=", "cannot read"),
        ("=+4", "cannot read"),
        ("123=+four", "cannot read"),
        ("123=+nan", "123=\\+nan: concept 123 is to be steered by nan"),
        ("123==-inf", "steered by -inf"),
        ("123=x1e9", "expected a number from -10000 to 10000"),
        (f"{10**20}=+4", "a concept to steer is 10{20}; expected a whole number"),
        ("-3=+4", "'-3' is not a concept number; for a name write name:-3"),
        ("9" * 5000 + "=+4", "is not a concept number"),
        ("website=+4", "write name:website"),
        ("name:river=+4", "names need the run's concept catalog, and there is none"),
    ],
)
def test_wishes_that_cannot_be_read_are_one_line(wish, message):
    with pytest.raises(InputError, match=message) as caught:
        parse_steering([wish], None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("written", ["", "x", "3,", "-3", "5-3", "3-x"])
def test_positions_that_cannot_be_read(written):
    with pytest.raises(InputError, match="cannot read positions"):
        parse_positions(written)
