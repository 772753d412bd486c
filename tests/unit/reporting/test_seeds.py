"""Differences over seeds, in pairs."""

from __future__ import annotations

import numpy as np
import pytest

from cocomix.reporting.seeds import Curve, cost_difference, loss_difference, over_seeds


def curve(*losses: float, costs: tuple[float, ...] = (100.0, 200.0, 300.0)) -> Curve:
    return Curve(np.array(costs), np.array(losses))


def test_three_values_have_students_interval() -> None:
    found = over_seeds([-0.10, -0.12, -0.11])
    assert (found.mean, found.sd, found.seeds) == (pytest.approx(-0.11), pytest.approx(0.01), 3)
    half = 4.302653 * 0.01 / np.sqrt(3)  # t of two degrees of freedom at 97.5 %
    assert found.interval == pytest.approx((-0.11 - half, -0.11 + half), rel=1e-5)


def test_of_one_value_chance_is_unknown_and_of_equal_ones_none() -> None:
    alone = over_seeds([0.5])
    assert (alone.mean, alone.sd, alone.interval, alone.seeds) == (0.5, None, None, 1)
    assert over_seeds([0.25, 0.25]).interval == (0.25, 0.25)
    assert over_seeds([0.1] * 3).interval == pytest.approx((0.1, 0.1))


def test_each_seed_is_held_against_its_own_pair() -> None:
    theirs = [curve(4.0, 3.0, 2.8), curve(5.0, 4.0, 3.8)]
    ours = [curve(3.0, 2.6, 2.5), curve(4.0, 3.6, 3.5)]
    loss = loss_difference(ours, theirs)
    assert (loss.mean, loss.sd) == (pytest.approx(-0.3), pytest.approx(0.0, abs=1e-12))
    cost = cost_difference(ours, theirs)
    assert cost.difference is not None
    assert cost.difference.mean == pytest.approx(150 / 300 - 1)  # both at 150 of 300
    assert (cost.reached, cost.seeds) == (2, 2)


def test_cost_is_unknown_where_one_seed_never_reaches_the_loss() -> None:
    theirs = [curve(4.0, 3.0, 2.8), curve(4.0, 3.0, 2.8)]
    found = cost_difference([curve(4.0, 3.0, 2.7), curve(4.0, 3.0, 2.9)], theirs)
    assert (found.difference, found.reached, found.seeds) == (None, 1, 2)


def test_a_cost_reached_by_the_first_evaluation_is_an_upper_bound_without_an_interval() -> None:
    theirs = [curve(4.0, 3.0, 2.8), curve(4.0, 3.0, 2.8)]
    found = cost_difference([curve(2.7, 2.6, 2.5), curve(3.0, 2.7, 2.6)], theirs)
    assert found.at_most and found.difference is not None
    assert found.difference.mean == pytest.approx((100 / 300 + 166.67 / 300) / 2 - 1, abs=1e-4)
    assert (found.difference.sd, found.difference.interval) == (None, None)


def test_no_interval_of_a_cost_goes_below_nothing() -> None:
    theirs = [curve(4.0, 3.0, 2.8), curve(4.0, 3.0, 2.8)]
    found = cost_difference([curve(4.0, 2.7, 2.6), curve(4.0, 3.0, 2.8)], theirs)
    assert found.difference is not None and found.difference.interval is not None
    assert found.difference.interval[0] == -1.0


def test_a_dearer_training_may_cost_more_for_the_same_loss() -> None:
    found = cost_difference([curve(4.0, 3.0, 2.8, costs=(200.0, 400.0, 600.0))], [curve(4.0, 3.0, 2.8)])
    assert found.difference is not None
    assert found.difference.mean == pytest.approx(1.0)
