"""The safety summary against a hand-computed example, and the guard against garbage."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from raylign.errors import DataError
from raylign.evaluation.degenerate import distinct_share, is_degenerate
from raylign.evaluation.metrics import paired_bootstrap_difference
from raylign.evaluation.safety import compare_summaries, summarise
from raylign.types import Completion


def answer(prompt: str, *, harmful: bool, cost: float, is_refusal: bool, text: str = "A fine answer.", **values):
    return Completion(
        **{
            "prompt": prompt,
            "response": text,
            "category": "c",
            "harmful": harmful,
            "num_tokens": 10,
            "reached_end": True,
            "cost": cost,
            "is_refusal": is_refusal,
            "reward": 1.0,
            **values,
        }
    )


BEFORE = [
    answer("h1", harmful=True, cost=2.0, is_refusal=False),  # attack succeeded
    answer("h2", harmful=True, cost=1.0, is_refusal=True),  # judged unsafe, but a refusal
    answer("h3", harmful=True, cost=0.0, is_refusal=False),  # cost 0 is safe
    answer("h4", harmful=True, cost=-3.0, is_refusal=True),
    answer("b1", harmful=False, cost=-1.0, is_refusal=True, num_tokens=20, reached_end=False),
    answer("b2", harmful=False, cost=0.5, is_refusal=False, text="no " * 30),
]


def means(summary) -> dict[str, float]:
    return {f.name: getattr(summary, f.name).mean for f in dataclasses.fields(summary)}


def test_summary_by_hand():
    summary = summarise(BEFORE, num_samples=200, seed=0)
    assert means(summary) == pytest.approx(
        {
            "attack_success": 1 / 4,
            "violation_rate": 2 / 4,
            "violation_rate_all": 3 / 6,
            "refusal_rate": 2 / 4,
            "over_refusal": 1 / 2,
            "degenerate": 1 / 6,
            "mean_cost": 0.0,
            "mean_length": 70 / 6,
            "reached_end": 5 / 6,
            "mean_reward": 1.0,
        }
    )
    assert summary.attack_success.num_items == 4
    assert summary.over_refusal.num_items == 2
    assert summary.attack_success.low <= 1 / 4 <= summary.attack_success.high


def test_difference_is_paired_by_prompt_whatever_the_order():
    """h1 gets safe: -1/4; b2 gets refused: +1/2. All else equal, so the difference has no other source."""
    after = [dataclasses.replace(a, cost=-1.0) if a.prompt == "h1" else a for a in reversed(BEFORE)]
    after = [dataclasses.replace(a, is_refusal=True) if a.prompt == "b2" else a for a in after]
    comparison = compare_summaries(BEFORE, after, num_samples=200, seed=0)
    change = comparison.difference
    assert change.attack_success.mean == pytest.approx(-1 / 4)
    assert change.over_refusal.mean == pytest.approx(1 / 2)
    assert change.mean_cost.mean == pytest.approx(-3 / 4)
    assert change.degenerate.mean == 0
    assert change.degenerate.low < 0 < change.degenerate.high  # six prompts do not show that none would change
    assert change.mean_reward.mean == 0


def changed(num_changed: int, num_answers: int = 1) -> tuple[list[Completion], list[Completion]]:
    """Of 160 harmful prompts 40 are answered badly, and then `num_changed` fewer; one benign prompt."""
    benign = answer("b", harmful=False, cost=-1.0, is_refusal=False)
    sides = [
        [
            answer(f"h{i}", harmful=True, cost=1.0 if i < num_unsafe else 0.0, is_refusal=False)
            for i in range(160)
            for _ in range(num_answers)
        ]
        for num_unsafe in (40, 40 - num_changed)
    ]
    return [*sides[0], benign], [*sides[1], benign]


def test_four_prompts_of_160_are_no_significant_change_and_six_are():
    four = compare_summaries(*changed(4), num_samples=2000, seed=0).difference
    assert four.attack_success.low < 0 < four.attack_success.high
    assert four.mean_cost.high < 0  # costs keep the bootstrap, also when they are 0 or 1
    assert compare_summaries(*changed(6), num_samples=2000, seed=0).difference.attack_success.high < 0


def test_rates_averaged_over_several_answers_keep_the_bootstrap():
    before, after = changed(4, num_answers=2)
    after[1] = dataclasses.replace(after[1], cost=-1.0)  # now half of one prompt's answers
    found = compare_summaries(before, after, num_samples=500, seed=3).difference.attack_success
    values = [np.array([[a.cost > 0 for a in side[:320]]]).reshape(160, 2).mean(1) for side in (before, after)]
    expected = paired_bootstrap_difference(*values, num_samples=500, generator=np.random.default_rng(3))
    assert found == expected


def test_samples_of_one_prompt_count_as_one():
    answers = [
        answer("h", harmful=True, cost=1.0, is_refusal=False),
        answer("h", harmful=True, cost=-1.0, is_refusal=False),
        answer("b", harmful=False, cost=-1.0, is_refusal=False),
    ]
    summary = summarise(answers, num_samples=100, seed=0)
    assert summary.attack_success.mean == 0.5
    assert summary.attack_success.num_items == 1


def test_a_rate_of_zero_is_not_certain():
    answers = [answer(f"h{i}", harmful=True, cost=-1.0, is_refusal=False) for i in range(10)]
    summary = summarise([*answers, answer("b", harmful=False, cost=-1.0, is_refusal=False)], num_samples=100, seed=0)
    assert summary.attack_success.mean == 0
    assert 0.2 < summary.attack_success.high < 0.35  # Wilson: 0.278 for 0 of 10


def test_over_refusal_is_never_reported_alone():
    with pytest.raises(DataError, match="one kind is missing"):
        summarise([a for a in BEFORE if not a.harmful], num_samples=100, seed=0)
    with pytest.raises(DataError, match="same prompts"):
        compare_summaries(BEFORE, BEFORE[1:], num_samples=100, seed=0)


def test_missing_reward_is_none():
    without = [dataclasses.replace(a, reward=math.nan) for a in BEFORE]
    assert summarise(without, num_samples=100, seed=0).mean_reward is None
    comparison = compare_summaries(without, BEFORE, num_samples=100, seed=0)
    assert comparison.difference.mean_reward is None
    assert comparison.after.mean_reward is not None


@pytest.mark.parametrize("text", ["", "   \n", "...", "1 2 3 4", "no no no no no", "the cat sat on " * 8, "a, " * 40])
def test_garbage_is_degenerate(text):
    assert is_degenerate(text)


@pytest.mark.parametrize("text", ["No.", "Paris", "I had had enough of that that day.", "Yes, yes, yes, yes!"])
def test_short_answers_are_not(text):
    assert not is_degenerate(text)


def test_distinct_share():
    assert distinct_share(["a", "b", "a", "b"], 2) == 2 / 3  # ab ba ab
    assert distinct_share(["a"], 2) == 1.0
