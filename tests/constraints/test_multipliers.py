"""The multiplier by hand, and its path when every round is solved exactly."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
from constraint_table import constraint_table, gibbs

from raylign.constraints.multipliers import (
    MultiplierRule,
    MultiplierState,
    advance,
    cost_statistic,
    is_at_cap,
    moved_multiplier,
)
from raylign.errors import ConfigError, ShapeError


@pytest.mark.parametrize(
    ("value", "excess", "log", "linear"),
    [(1.0, 0.4, 1.040811, 1.04), (1.0, -0.3, 0.970446, 0.97), (3.0, 0.4, 3.382491, 3.04), (2.0, 0.0, 2.0, 2.0)],
)
def test_one_step_by_hand(value, excess, log, linear):
    for space, expected in (("log", log), ("linear", linear)):
        rule = MultiplierRule(statistic="rectified", space=space)
        assert moved_multiplier(value, excess, rule) == pytest.approx(expected, abs=1e-6)
    assert moved_multiplier(value, excess, MultiplierRule(statistic="rectified")) == pytest.approx(
        value * math.exp(0.1 * value * excess), rel=1e-14
    )


@pytest.mark.parametrize("space", ["log", "linear"])
def test_the_cap_is_reached_exactly_and_left_again(space):
    rule = MultiplierRule(statistic="expected", space=space, maximum=5.0)
    state = advance(MultiplierState(value=4.9), [1e6], rule)
    assert state.value == 5.0
    assert is_at_cap(state, rule)
    state = advance(state, [-1e7], rule)
    assert 0 <= state.value < 5.0
    assert not is_at_cap(state, rule)


def test_linear_space_stops_at_zero_and_leaves_it_log_space_never_gets_there():
    linear = MultiplierRule(statistic="expected", space="linear")
    assert moved_multiplier(0.01, -1.0, linear) == 0.0
    assert moved_multiplier(0.0, 1.0, linear) == 0.1
    log = MultiplierRule(statistic="expected")
    assert moved_multiplier(1.0, -1e9, log) > 0
    assert moved_multiplier(moved_multiplier(1.0, -1e9, log), 1.0, log) > 0
    assert math.isfinite(moved_multiplier(1e200, 1e200, log))
    with pytest.raises(ConfigError, match=r"multiplier is 0.*constraint\.multiplier_space=linear"):
        moved_multiplier(0.0, 1.0, log)


def test_statistics_and_the_costs_they_see():
    costs = [-3.0, 1.0, 0.0, 0.5]
    assert cost_statistic(costs, "rectified") == 0.375
    assert cost_statistic(costs, "expected") == -0.375
    assert cost_statistic(costs, "rectified_mean") == 0.0
    assert cost_statistic([1.0, -0.5], "rectified_mean") == 0.25
    with pytest.raises(ShapeError, match="at least one cost"):
        cost_statistic([], "rectified")


def test_the_target_is_what_the_statistic_may_be():
    for statistic, cost in (("rectified", 0.4), ("expected", -0.3)):
        at_target = MultiplierRule(statistic=statistic, target=cost)
        assert advance(MultiplierState(value=2.0), [cost], at_target).value == 2.0
        below = MultiplierRule(statistic=statistic, target=cost + 0.1)
        assert advance(MultiplierState(value=2.0), [cost], below).value < 2.0


def test_the_window_keeps_the_newest_costs_and_a_whole_round():
    rule = MultiplierRule(statistic="rectified", space="linear", learning_rate=1.0, window=3)
    state = advance(MultiplierState(value=1.0), [4.0, 2.0], rule)
    assert (state.value, state.costs) == (4.0, (4.0, 2.0))
    state = advance(state, [1.0, -7.0], rule)
    assert (state.value, state.costs) == (5.0, (2.0, 1.0, -7.0))
    # five responses of one round count alike, though the window is of three
    state = advance(state, [5.0, 0.0, 0.0, 0.0, 0.0], rule)
    assert (state.value, state.costs) == (6.0, (5.0, 0.0, 0.0, 0.0, 0.0))


def test_the_delay_sees_costs_but_does_not_move():
    rule = MultiplierRule(statistic="rectified", space="linear", delay=2)
    state = MultiplierState(value=1.0)
    values = []
    for _ in range(4):
        state = advance(state, [2.0], rule)
        values.append(state.value)
    assert values == pytest.approx([1.0, 1.0, 1.2, 1.4])
    assert state.num_steps == 4
    assert state.costs == (2.0,) * 4


@pytest.mark.parametrize("space", ["log", "linear"])
def test_a_safe_window_leaves_the_rectified_multiplier_to_the_bit(space):
    rule = MultiplierRule(statistic="rectified", space=space, window=2)
    assert advance(MultiplierState(value=1.7), [-1.0, 0.0], rule).value == 1.7
    # what was unsafe before the window is forgotten
    assert advance(MultiplierState(value=1.7, costs=(9.0,)), [-1.0, 0.0], rule).value == 1.7
    # with no tolerance it never falls
    assert advance(MultiplierState(value=1.7), [-50.0, 0.1], rule).value > 1.7
    assert advance(MultiplierState(value=1.7), [-50.0, -0.1], MultiplierRule(statistic="expected")).value < 1.7


def test_the_order_of_the_costs_does_not_matter_to_the_bit():
    costs = [*np.random.default_rng(0).normal(0, 1e3, 999).tolist(), 1e16, 1.0, -1e16]
    shuffled = random.Random(0).sample(costs, len(costs))
    for statistic in ("rectified", "expected", "rectified_mean"):
        rule = MultiplierRule(statistic=statistic, maximum=1e300)
        first, second = (advance(MultiplierState(value=1e-4), order, rule) for order in (costs, shuffled))
        assert first.value == second.value


def test_the_state_survives_plain_text_to_the_bit():
    rule = MultiplierRule(statistic="rectified", window=5)
    state = MultiplierState(value=1.0)
    for seed in range(7):
        state = advance(state, np.random.default_rng(seed).normal(size=3), rule)
        again = MultiplierState.from_state_dict(json.loads(json.dumps(state.state_dict())))
        assert again == state


PATHS = {
    ("expected", "log"): [1, 0.643, 0.539, 0.487, 0.457, 0.437, 0.424, 0.414, 0.407, 0.402],
    ("expected", "linear"): [1, 0.522, 0.408, 0.389, 0.386, 0.385, 0.385, 0.385, 0.385, 0.385],
    ("rectified", "log"): [1, 1.303, 1.631, 1.953, 2.265, 2.566, 2.844, 3.091, 3.316, 3.528],
    ("rectified", "linear"): [1, 1.242, 1.425, 1.571, 1.693, 1.799, 1.892, 1.976, 2.053, 2.124],
}


@pytest.mark.parametrize(("statistic", "space"), PATHS)
def test_dual_paths_of_exactly_solved_rounds(statistic, space):
    """Every sixth of sixty multipliers, the policy solved exactly in between."""
    reward, cost = constraint_table()
    weighed = np.maximum(cost, 0) if statistic == "rectified" else cost
    rule = MultiplierRule(statistic=statistic, space=space)
    value, path = 1.0, []
    for _ in range(60):
        path.append(value)
        policy = gibbs(reward - value * weighed)
        value = moved_multiplier(value, float((policy * weighed).sum(1).mean()), rule)

    assert path[::6] == pytest.approx(PATHS[statistic, space], abs=5.1e-4)
