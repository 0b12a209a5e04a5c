"""Violations by hand."""

from __future__ import annotations

import numpy as np
import pytest

from raylign.constraints.violations import cost_histogram, prompt_change, violations, violations_by_category
from raylign.errors import ShapeError

# prompt 7: costs -4 and 0, safe; prompt 3: -1 and 2; prompt 9: 1 and 3
COST = np.array([-4.0, 2.0, 0.0, 1.0, -1.0, 3.0])
PROMPT = np.array([7, 3, 7, 9, 3, 9])


def test_by_hand():
    found = violations(COST, PROMPT, cvar_level=0.5)
    assert (found.num_responses, found.num_prompts) == (6, 3)
    assert found.safety_rate == pytest.approx(3 / 6)  # a cost of 0 is safe
    assert found.mean_cost == pytest.approx(1 / 6)
    assert found.rectified_cost == pytest.approx(6 / 6)
    assert found.cvar == pytest.approx((3 + 2 + 1) / 3)
    assert found.prompt_safety_rate == pytest.approx(1 / 3)
    assert found.under == pytest.approx((0.5 + 2.0) / 3)
    assert found.over == pytest.approx(2.0 / 3)
    assert found.compensation == found.over
    assert violations(COST, PROMPT, prompt_safety=0.5).prompt_safety_rate == pytest.approx(2 / 3)


@pytest.mark.parametrize(("level", "expected"), [(1.0, 1 / 6), (0.25, (3 + 0.5 * 2) / 1.5), (1e-6, 3.0)])
def test_the_tail_takes_its_boundary_by_a_fraction(level, expected):
    assert violations(COST, PROMPT, cvar_level=level).cvar == pytest.approx(expected)


def test_whole_weights_are_repeated_responses():
    weight = np.array([2, 1, 3, 1, 2, 4])
    weighted = violations(COST, PROMPT, weight=weight, cvar_level=0.3)
    repeated = violations(COST.repeat(weight), PROMPT.repeat(weight), cvar_level=0.3)
    for name in ("safety_rate", "mean_cost", "rectified_cost", "cvar", "prompt_safety_rate", "under", "over"):
        assert getattr(weighted, name) == pytest.approx(getattr(repeated, name)), name


def test_all_safe_and_all_unsafe_are_finite():
    safe, unsafe = violations(-np.abs(COST), PROMPT), violations(np.abs(COST) + 1, PROMPT)
    assert (safe.safety_rate, safe.rectified_cost, safe.under, safe.compensation) == (1.0, 0.0, 0.0, 0.0)
    assert (unsafe.safety_rate, unsafe.prompt_safety_rate, unsafe.over, unsafe.compensation) == (0.0, 0.0, 0.0, 0.0)


def test_a_share_of_exactly_the_level_is_enough():
    cost = np.array([-1.0] * 19 + [1.0])
    assert violations(cost, np.zeros(20, int), prompt_safety=0.95).prompt_safety_rate == 1.0
    weight = np.full(20, 0.05)  # .05 nineteen times is .9500000000000003 or a little less
    assert violations(cost, np.zeros(20, int), weight=weight, prompt_safety=0.95).prompt_safety_rate == 1.0


def test_categories_are_summarised_alone():
    category = ["a", "b", "a", "b", "b", "b"]
    found = violations_by_category(COST, PROMPT, category)
    assert list(found) == ["a", "b"]
    assert (found["a"].safety_rate, found["b"].safety_rate) == (1.0, 0.25)
    assert (found["a"].num_prompts, found["b"].num_prompts) == (1, 2)
    with pytest.raises(ShapeError, match="2 categories for 6 responses"):
        violations_by_category(COST, PROMPT, ["a", "b"])


def test_prompts_that_change_sides():
    after_cost = np.array([1.0, -1.0, -2.0, -5.0])
    after_prompt = np.array([7, 3, 3, 9])
    reward = np.array([1.0, 0.0, 3.0, 0.0, 0.0, 0.0])
    after_reward = np.array([-1.0, 9.0, 9.0, 9.0])
    change = prompt_change((COST, PROMPT, reward), (after_cost, after_prompt, after_reward))
    assert (change.num_safe_before, change.num_unsafe_before) == (1, 2)
    assert (change.became_unsafe, change.became_safe) == (1.0, 1.0)
    assert (change.reward_before, change.reward_after) == (2.0, -1.0)
    back = prompt_change((after_cost, after_prompt, after_reward), (COST, PROMPT, reward))
    assert (back.num_safe_before, back.became_unsafe, back.became_safe) == (2, 1.0, 1.0)
    same = prompt_change((COST, PROMPT, reward), (COST, PROMPT, reward))
    assert (same.became_unsafe, same.became_safe) == (0.0, 0.0)
    none = prompt_change((np.abs(COST) + 1, PROMPT, reward), (COST, PROMPT, reward))
    assert (none.became_unsafe, none.became_safe) == (0.0, pytest.approx(1 / 3))
    assert np.isnan(none.reward_before)
    with pytest.raises(ShapeError, match="3 prompts before and 1 after"):
        prompt_change((COST, PROMPT, reward), (COST[:1], PROMPT[:1], reward[:1]))


def test_no_bin_of_the_histogram_holds_safe_and_unsafe_costs():
    cost = np.array([0.0, 1e-12, -1e-12, 2.0, -2.0, 99.0, -99.0, 1.0])
    found = cost_histogram(cost, bound=2.0, num_bins=4)
    assert found.edges.tolist() == [-2, -1, 0, 1, 2]
    assert (found.shares * len(cost)).tolist() == [2, 2, 2, 2]
    weighted = cost_histogram(cost, bound=2.0, num_bins=2, weight=np.arange(8.0))
    assert weighted.shares.tolist() == pytest.approx([12 / 28, 16 / 28])
    with pytest.raises(ShapeError, match="num_bins=3 must be even"):
        cost_histogram(cost, bound=2.0, num_bins=3)


def test_shapes_that_would_broadcast_are_refused():
    for cost, prompt in ((COST, PROMPT[:1]), (COST[:, None], PROMPT), (COST[:0], PROMPT[:0])):
        with pytest.raises(ShapeError, match="one value per response"):
            violations(cost, prompt)
