"""Sampled rounds on the table: estimator and multiplier together end at the optima that are known exactly."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from constraint_table import NUM_ANSWERS, NUM_PROMPTS, constraint_table, table_violations

from raylign.constraints.multipliers import MultiplierRule, MultiplierState, advance
from raylign.constraints.rectified import Variant, constrained_rewards
from raylign.losses.advantages import group_advantages, kl_estimates, sequence_scores

BETA, NUM_SAMPLES, NUM_ROUNDS, STEP = 0.5, 8, 200, 0.8
FIXED = MultiplierRule(statistic="rectified", space="linear", learning_rate=0.0)


def learn(variant: Variant, rule: MultiplierRule, start: float) -> tuple[list[float], np.ndarray]:
    """Path of the multiplier and the policy (64, 8) after rounds of eight samples and one step each."""
    reward, cost = (torch.from_numpy(table) for table in constraint_table())
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(NUM_PROMPTS, NUM_ANSWERS, dtype=torch.float64)
    state, path = MultiplierState(value=start), []
    group = torch.arange(NUM_PROMPTS).repeat_interleave(NUM_SAMPLES)
    sequence = torch.arange(len(group))
    reference = torch.full((len(group),), -math.log(NUM_ANSWERS), dtype=torch.float64)
    for _ in range(NUM_ROUNDS):
        logps = torch.log_softmax(logits, 1)
        answers = torch.multinomial(logps.exp(), NUM_SAMPLES, replacement=True, generator=generator)
        rewards, costs, sampled = (table.gather(1, answers).reshape(-1) for table in (reward, cost, logps))
        state = advance(state, costs.tolist(), rule)
        path.append(state.value)
        kl, _ = kl_estimates(sampled, reference)
        shaped = constrained_rewards(rewards, costs, multiplier=state.value, variant=variant, score_clip=50.0)
        score = sequence_scores(shaped, kl, sequence, beta=BETA)
        advantages = group_advantages(score, group).view(NUM_PROMPTS, NUM_SAMPLES) / NUM_SAMPLES
        ascent = torch.zeros_like(logits).scatter_add_(1, answers, advantages)
        logits = logits + STEP * (ascent - advantages.sum(1, keepdim=True) * logps.exp())
    return path, torch.softmax(logits, 1).numpy()


@pytest.mark.parametrize(
    ("kind", "rule", "start", "reward", "safety_rate", "under", "over"),
    [
        ("fixed_penalty", FIXED, 0.0, 1.938, 0.271, 1.327, 0.288),
        ("fixed_penalty", FIXED, 5.0, 0.810, 0.898, 0.004, 1.135),
        ("expected", MultiplierRule(statistic="expected", maximum=5.0), 1.0, 1.527, 0.503, 0.591, 0.591),
        ("rectified", MultiplierRule(statistic="rectified", maximum=20.0), 1.0, 0.702, 0.976, 0.000, 1.208),
    ],
)
def test_rounds_end_at_the_exact_optimum(
    kind: str, rule: MultiplierRule, start: float, reward: float, safety_rate: float, under: float, over: float
) -> None:
    path, policy = learn(Variant(kind=kind), rule, start)
    rewards, cost = constraint_table()
    found = table_violations(policy, cost)
    assert (policy * rewards).sum(1).mean() == pytest.approx(reward, abs=0.06)
    assert found.safety_rate == pytest.approx(safety_rate, abs=0.02)
    assert (found.under, found.over) == pytest.approx((under, over), abs=0.03)
    if kind == "expected":  # the constraint of the mean is tight, and every second answer is unsafe
        assert path[-1] == pytest.approx(0.385, abs=0.02)
        assert found.mean_cost == pytest.approx(0, abs=0.03)
        assert found.compensation > 0.5
    if kind == "rectified":  # it never falls, and ends at its cap
        assert all(later >= earlier for earlier, later in itertools.pairwise(path))
        assert path[-1] == 20.0
        assert found.compensation < 0.01


def test_a_multiplier_of_the_rectified_mean_stops_where_prompts_still_pay_for_each_other() -> None:
    rule = MultiplierRule(statistic="rectified_mean", maximum=5.0)
    path, policy = learn(Variant(kind="rectified_mean"), rule, 0.2)
    found = table_violations(policy, constraint_table()[1])
    assert all(later >= earlier for earlier, later in itertools.pairwise(path))
    assert path[-1] < 0.7
    assert found.safety_rate < 0.6
    assert found.compensation > 0.3
