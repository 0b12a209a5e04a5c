"""Measures of sampled answers: by hand, against `violations`, and their intervals on prompts of several trainings."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from raylign.constraints.violations import prompt_change, violations
from raylign.errors import ShapeError
from raylign.evaluation.metrics import wilson_interval
from raylign.evaluation.sampled_costs import PricedAnswers, measure_constraint

SAFETY = 0.75
NAMES = [f"{index:04d}" for index in range(2000)]


def answers(costs, *, prompts="abcd", rewards=None, refused="") -> PricedAnswers:
    """Rows of costs, one row per prompt; the first half of the prompts is harmful."""
    costs = np.asarray(costs, dtype=float)
    rewards = np.zeros_like(costs) if rewards is None else np.asarray(rewards, dtype=float)
    names = np.repeat(list(prompts), costs.shape[1])
    harmful = np.repeat(np.arange(len(prompts)) < len(prompts) // 2, costs.shape[1])
    return PricedAnswers(
        prompt=names,
        is_harmful=harmful,
        is_refusal=np.isin(names, list(refused)),
        reward=rewards.ravel(),
        cost=costs.ravel(),
    )


def drawn(seed: int, *, prompts: int = 30, samples: int = 8, shift: float = 0.0) -> PricedAnswers:
    rng = np.random.default_rng(seed)
    middle = rng.normal(shift, 1, (prompts, 1))
    names = [f"{index}" for index in rng.permutation(prompts)]
    harmful = np.arange(prompts) % 2 == 0
    return PricedAnswers(
        prompt=np.repeat(names, samples),
        is_harmful=np.repeat(harmful[np.argsort(np.argsort(names))], samples),
        is_refusal=rng.random(prompts * samples) < 0.2,
        reward=rng.normal(size=prompts * samples),
        cost=(middle + rng.normal(size=(prompts, samples))).ravel(),
    )


def measure(before, after=None, *, safety=SAFETY, num_samples=200, seed=0):
    return measure_constraint(before, after, prompt_safety=safety, num_samples=num_samples, seed=seed)


# prompt a: 3 of 4 safe, on average 0; b: never safe; c: always, one cost is 0; d: half
BEFORE = answers([[-1, -1, -1, 3], [1, 2, 3, 2], [-2, -2, 0, -4], [1, -1, 1, -1]], refused="c")
AFTER = answers(
    [[3, 3, -1, -1], [-1, -1, -1, -1], [-1, -1, -1, -1], [-1, -1, -1, 1]], rewards=[[1] * 4, [2] * 4, [3] * 4, [4] * 4]
)


def test_by_hand():
    found = measure([BEFORE], [AFTER])
    values = {field.name: getattr(found, field.name).value.mean for field in dataclasses.fields(found)}
    assert values == {
        "safety_rate": 13 / 16,
        "unsafe_prompts": 1 / 4,  # a: with a share of exactly 0.75 a prompt would be safe, as d is
        "unsafe_harmful": 1 / 2,
        "mean_cost": (1 - 1 - 1 - 0.5) / 4,
        "rectified_cost": (6 + 1) / 16,
        "under": 1 / 4,
        "over": 2.5 / 4,
        "compensation": 1 / 4,
        "mean_reward": 2.5,
        "over_refusal": 0.0,
        "became_unsafe": 1 / 2,  # a of a and c
        "became_safe": 1.0,
        # of 4 + 4 answers a and d have 3 unsafe ones, b has 4; safe is up to 1 of 4, and never both sides of a, b or d
        "chance_unsafe": pytest.approx((1 / 2 + 17 / 70 + 1 / 2) / (1 / 2 + 17 / 70 + 1 + 1 / 2)),
        "chance_safe": pytest.approx((1 / 2 + 17 / 70 + 1 / 2) / (1 / 2 + 53 / 70 + 1 / 2)),
        "safe_reward": (1 + 3) / 2,
    }
    before = measure([BEFORE])
    assert (before.became_unsafe, before.became_safe, before.safe_reward) == (None, None, None)
    assert before.over_refusal.value.mean == 0.5
    assert before.safety_rate.change is None
    assert found.safety_rate.change.mean == pytest.approx(13 / 16 - 9 / 16)
    assert found.compensation.change.mean == pytest.approx(1 / 4 - min(0.5, 0.5))


def test_values_are_those_of_violations_and_of_changed_prompts():
    before, after = drawn(1), dataclasses.replace(drawn(2, shift=-0.5), prompt=drawn(1).prompt)
    found = measure([before], [after])
    exact = violations(after.cost, after.prompt, prompt_safety=SAFETY)
    for name in ("safety_rate", "mean_cost", "rectified_cost", "under", "over", "compensation"):
        assert getattr(found, name).value.mean == pytest.approx(getattr(exact, name), abs=1e-12), name
    assert found.unsafe_prompts.value.mean == pytest.approx(1 - exact.prompt_safety_rate)
    change = prompt_change(
        (before.cost, before.prompt, before.reward), (after.cost, after.prompt, after.reward), prompt_safety=SAFETY
    )
    assert found.became_unsafe.value.mean == pytest.approx(change.became_unsafe)
    assert found.became_safe.value.mean == pytest.approx(change.became_safe)
    assert found.safe_reward.value.mean == pytest.approx(change.reward_after - change.reward_before)
    assert found.became_safe.value.num_items == change.num_unsafe_before


def test_chance_is_what_shuffled_answers_give():
    """The same policy twice, samples of its own each time: as many prompts change sides as chance says."""
    rng = np.random.default_rng(5)
    share = rng.beta(0.5, 1.5, size=(2000, 1))
    twice = [answers(np.where(rng.random((2000, 8)) < share, 1, -1), prompts=NAMES) for _ in range(2)]
    found = measure([twice[0]], [twice[1]], num_samples=400)
    for name in ("unsafe", "safe"):
        changed, chance = getattr(found, f"became_{name}").value, getattr(found, f"chance_{name}").value
        assert changed.low < chance.mean < changed.high
        assert chance.mean > 0.05


def test_trainings_are_averaged_and_one_without_the_measure_is_left_out():
    safe = answers([[-1, -1], [-1, -1]], prompts="xy")
    mixed = answers([[1, 1], [-1, -1]], prompts="yz")
    found = measure([safe, mixed], [mixed_at("xy"), safe_at("yz")])
    assert found.safety_rate.by_seed == (0.5, 1.0)
    assert found.safety_rate.value.mean == 0.75
    assert found.became_unsafe.by_seed == (0.5, 0.0)
    assert math.isnan(found.became_safe.by_seed[0]) and found.became_safe.by_seed[1] == 1.0
    assert found.became_safe.value == wilson_interval(1, 1)  # of y alone, in one of the trainings
    assert found.became_unsafe.value.num_items == 3


def mixed_at(prompts: str) -> PricedAnswers:
    return answers([[1, 1], [-1, -1]], prompts=prompts)


def safe_at(prompts: str) -> PricedAnswers:
    return answers([[-1, -1], [-1, -1]], prompts=prompts)


def test_the_interval_is_over_prompts_not_over_answers():
    """All answers to a prompt alike: the deviation is that of as many draws as there are prompts."""
    rng = np.random.default_rng(0)
    costs = np.repeat(rng.choice([-1.0, 1.0], size=(400, 1)), 16, axis=1)
    part = answers(costs, prompts=[f"p{index}" for index in range(400)])
    found = measure([part], num_samples=2000).safety_rate.value
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * math.sqrt(0.25 / 400), rel=0.1)
    # the same prompts in every training are the same draws
    thrice = measure([part] * 3, num_samples=2000).safety_rate.value
    assert (thrice.low, thrice.high) == pytest.approx((found.low, found.high))
    # other prompts in every training are three times as many
    others = [dataclasses.replace(part, prompt=np.char.add(part.prompt, f"-{seed}")) for seed in range(3)]
    wide = measure(others, num_samples=2000).safety_rate.value
    assert (wide.high - wide.low) == pytest.approx((found.high - found.low) / math.sqrt(3), rel=0.1)


def test_what_prompts_have_in_common_cancels_in_a_change():
    before = drawn(3, prompts=200)
    after = dataclasses.replace(before, cost=before.cost - 0.25)
    found = measure([before], [after]).mean_cost
    assert (found.change.low, found.change.high) == pytest.approx((-0.25, -0.25))
    assert found.value.high - found.value.low > 0.2


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Of 200 draws of 60 prompts, about 95 % hold the share of safe answers and the compensation of all prompts."""
    rng = np.random.default_rng(4)
    covered = np.zeros(2)
    # mean cost of a prompt is N(0, 1): under = over = E max(c, 0) = 1 / sqrt(2 pi)
    truth = np.array([0.5, 1 / math.sqrt(2 * math.pi)])
    for trial in range(200):
        costs = np.repeat(rng.normal(size=(60, 1)), 2, axis=1)
        found = measure([answers(costs, prompts=[f"{index}" for index in range(60)])], seed=trial)
        # U alone: the smaller of two equal means is biased downwards
        intervals = (found.safety_rate.value, found.under.value)
        covered += [interval.low <= value <= interval.high for interval, value in zip(intervals, truth, strict=True)]
    assert (covered / 200 > 0.9).all() and (covered / 200 < 0.99).all()


def test_without_a_reward_there_is_none():
    blind = dataclasses.replace(AFTER, reward=np.full(16, np.nan))
    found = measure([BEFORE], [blind])
    assert (found.mean_reward, found.safe_reward) == (None, None)
    assert found.safety_rate.value.mean == 13 / 16


def test_all_safe_has_the_interval_of_wilson_and_no_compensation():
    found = measure([safe_at("xy")])
    assert found.safety_rate.value == wilson_interval(2, 2)
    assert found.unsafe_prompts.value == wilson_interval(0, 2)
    assert (found.compensation.value.low, found.compensation.value.high) == (0, 0)


def test_other_prompts_or_trainings_are_refused():
    with pytest.raises(ShapeError, match="same prompts"):
        measure([safe_at("xy")], [safe_at("yz")])
    with pytest.raises(ShapeError, match="1 trainings before and 2 after"):
        measure([safe_at("xy")], [safe_at("xy"), safe_at("xy")])
    with pytest.raises(ShapeError, match="one value of each kind"):
        PricedAnswers(
            prompt=np.array(["a"]),
            is_harmful=np.array([True]),
            is_refusal=np.array([True]),
            reward=np.zeros(1),
            cost=np.zeros(2),
        )
