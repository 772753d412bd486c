"""Links to a state of the page, and what others write into them."""

from __future__ import annotations

import pytest

from cocomix import InputError
from cocomix.app.links import Link, write_link
from cocomix.app.steering_controls import steered_concepts
from cocomix.models.steering import Operation


def test_values_come_back():
    link = Link(write_link("generate", prompt="a b\n&=#é", seed=3, steer=["5=+4", "7=off"]))
    assert (link.text("tab"), link.text("prompt"), link.number("seed")) == ("generate", "a b\n&=#é", 3)
    assert link.values["steer"] == ["5=+4", "7=off"]


@pytest.mark.parametrize("written", ["nan", "inf", "1e400", "x", ""])
def test_only_finite_numbers(written):
    assert Link(f"seed={written}").number("seed") is None
    assert Link("").number("seed") is None


def test_too_many_fields():
    with pytest.raises(InputError, match="more than 64 fields"):
        Link("a=1&" * 65)


def test_steered_concepts(opened):
    wishes = ["5=+4", "7=x0.5", "8==-2", "9=off"]
    found = steered_concepts(opened(), wishes)
    assert found == [
        Operation("add", 5, 4),
        Operation("scale", 7, 0.5),
        Operation("set", 8, -2),
        Operation("suppress", 9),
    ]


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        (["5"], "cannot read steer '5'"),
        (["40=+1"], "there is no concept 40"),
        (["5=+1", "5=x2"], "twice"),
        ([f"{concept}=+1" for concept in range(9)], "more than 8 concepts"),
        (["5=+21"], "by more than 20"),
    ],
)
def test_steering_that_the_page_cannot_show(opened, wishes, message):
    with pytest.raises(InputError, match=message):
        steered_concepts(opened(), wishes)
