"""The safety summary against a hand-computed example, and the guard against garbage."""

from __future__ import annotations

import dataclasses
import math

import pytest

from raylign.errors import DataError
from raylign.evaluation.degenerate import distinct_share, is_degenerate
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
    assert (change.degenerate.mean, change.degenerate.low, change.degenerate.high) == (0, 0, 0)
    assert change.mean_reward.mean == 0


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
