"""Constrained optima that are known exactly: a table of policies, two prompts, and 400 random tables."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from constraint_table import (
    constraint_table,
    constraint_tables,
    gibbs,
    multiplier_of_mean_cost,
    table_violations,
)

from raylign.constraints.rectified import Variant, combine, is_unsafe, weighed_cost


def optimum(reward: np.ndarray, cost: np.ndarray, multiplier: float, **variant: str) -> np.ndarray:
    """The policy that maximises what a variant makes of reward and cost, less .5 KL."""
    found = Variant(**variant)
    tensor = torch.from_numpy(cost)
    score = combine(
        torch.from_numpy(reward),
        weighed_cost(tensor, found),
        is_unsafe(tensor),
        multiplier=multiplier,
        variant=found,
    )
    return gibbs(score.numpy())


STAR = 0.385034
# mean R, mean C, E max(C, 0), safety rate, prompts with P(unsafe) < 5 %, U, O
ROWS: dict[str, tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], tuple[float, ...]]] = {
    "reference": (lambda r, c: gibbs(0 * r), (-0.034, -0.133, 0.688, 0.543, 0.031, 0.345, 0.478)),
    "reward only": (lambda r, c: gibbs(r), (1.938, 1.039, 1.445, 0.271, 0.109, 1.327, 0.288)),
    "expected": (lambda r, c: gibbs(r - STAR * c), (1.674, 0.0, 0.858, 0.506, 0.203, 0.646, 0.646)),
    "rectified 1": (
        lambda r, c: optimum(r, c, 1, kind="rectified"),
        (1.409, -0.419, 0.462, 0.599, 0.219, 0.311, 0.730),
    ),
    "rectified 5": (
        lambda r, c: optimum(r, c, 5, kind="rectified"),
        (0.810, -1.130, 0.016, 0.898, 0.734, 0.004, 1.135),
    ),
    "rectified 20": (
        lambda r, c: optimum(r, c, 20, kind="rectified"),
        (0.702, -1.208, 0.001, 0.976, 0.938, 0.0, 1.208),
    ),
    "critical limit": (lambda r, c: gibbs(np.where(c > 0, -np.inf, r)), (0.653, -1.231, 0, 1, 1, 0, 1.231)),
    "split 5": (lambda r, c: optimum(r, c, 5, kind="split"), (0.929, -0.888, 0.157, 0.769, 0.344, 0.055, 0.943)),
    "split 1e6": (lambda r, c: optimum(r, c, 1e6, kind="split"), (0.842, -0.972, 0.107, 0.808, 0.422, 0.036, 1.008)),
    "all divided 1e6": (
        lambda r, c: gibbs((r - 1e6 * np.maximum(c, 0)) / (1 + 1e6)),
        (-0.576, -1.208, 0.085, 0.834, 0.234, 0.0, 1.208),
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_table_of_exact_policies(name: str) -> None:
    reward, cost = constraint_table()
    policy_of, expected = ROWS[name]
    policy = policy_of(reward, cost)
    found = table_violations(policy, cost)
    row = ((policy * reward).sum(1).mean(), found.mean_cost, found.rectified_cost, found.safety_rate)
    row += (found.prompt_safety_rate, found.under, found.over)

    assert row == pytest.approx(expected, abs=5.1e-4)


def test_undivided_split_is_rectified_and_fixed_penalty_too() -> None:
    reward, cost = constraint_table()
    rectified = optimum(reward, cost, 5, kind="rectified")
    assert np.array_equal(optimum(reward, cost, 5, kind="split", split_normalise="none"), rectified)
    assert np.array_equal(optimum(reward, cost, 5, kind="fixed_penalty"), rectified)


def test_the_tight_expected_constraint_compensates_and_the_critical_limit_does_not() -> None:
    reward, cost = constraint_table()
    (star,) = multiplier_of_mean_cost(reward[None], cost[None])
    assert star == pytest.approx(STAR, abs=5e-7)
    tight = table_violations(gibbs(reward - star * cost), cost)
    assert abs(tight.under - tight.over) < 1e-9
    assert tight.compensation == pytest.approx(0.646, abs=5e-4)
    assert table_violations(gibbs(np.where(cost > 0, -np.inf, reward)), cost).compensation == 0.0


def test_division_holds_the_expected_optimum_closer_to_the_reference() -> None:
    """(R - lambda C) / (1 + lambda) - beta KL has the optimum of R - lambda C - (1 + lambda) beta KL."""
    reward, cost = constraint_table()
    (star,) = multiplier_of_mean_cost(reward[None], cost[None], divided=True)
    policy = optimum(reward, cost, star, kind="expected")
    np.testing.assert_allclose(policy, gibbs(reward - star * cost, beta=0.5 * (1 + star)), atol=1e-12)
    found = table_violations(policy, cost)
    assert (star, found.mean_cost) == pytest.approx((0.384929, 0), abs=5e-7)
    assert ((policy * reward).sum(1).mean(), found.compensation) == pytest.approx((1.527, 0.591), abs=5.1e-4)


def test_two_prompts() -> None:
    """The first prompt pays for the second under the expected constraint, and not under the rectified one."""
    cost, reward = np.array([[-4.0, -1.0], [2.0, -1.0]]), np.array([[0.0, 0.5], [2.0, 0.0]])

    def sigmoid(x: float) -> float:
        return 1 / (1 + np.exp(-x))

    for multiplier in (0.0, 0.034342, 0.5, 1.0, 2.0):
        expected = gibbs(reward - multiplier * cost)
        assert expected[1, 0] == pytest.approx(sigmoid(4 - 6 * multiplier))
        rectified = optimum(reward, cost, multiplier, kind="rectified")
        assert rectified[1, 0] == pytest.approx(sigmoid(4 - 4 * multiplier))
        assert rectified[0, 0] == pytest.approx(0.2689, abs=5e-5)  # the reference's, whatever the multiplier
    (star,) = multiplier_of_mean_cost(reward[None], cost[None])
    tight = gibbs(reward - star * cost)
    assert star == pytest.approx(0.034342, abs=5e-7)
    assert table_violations(tight, cost).mean_cost == pytest.approx(0, abs=1e-12)
    assert (tight[1, 0], tight[0, 0]) == pytest.approx((0.9780, 0.3113), abs=5e-5)
    assert optimum(reward, cost, 1, kind="rectified")[1, 0] == pytest.approx(0.5)
    assert optimum(reward, cost, 2, kind="rectified")[1, 0] == pytest.approx(0.0180, abs=5e-5)


def split_cost_gradient(policy: np.ndarray, cost: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Exact cost part of the split estimator with the critic `values` (..., X, 1): gradient in the logits."""
    advantage = -combine(
        torch.zeros(cost.shape, dtype=torch.float64),
        torch.from_numpy(cost - values),
        is_unsafe(torch.from_numpy(cost)),
        multiplier=1.0,
        variant=Variant(kind="split", split_normalise="none"),
    ).numpy()
    weight = policy * advantage
    return weight - policy * weight.sum(-1, keepdims=True)


def softmax_gradient(policy: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Gradient of E[score] in the logits."""
    return policy * (score - (policy * score).sum(-1, keepdims=True))


def cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Over the last two axes."""
    inner = (first * second).sum((-2, -1))
    return inner / np.sqrt((first**2).sum((-2, -1)) * (second**2).sum((-2, -1)))


def test_a_critic_of_raw_costs_bends_the_split_estimator() -> None:
    """Its cost part is grad E max(C, 0) - V grad P(unsafe); unsafe answers below V are made likelier."""
    reward, cost = constraint_table()
    policy = gibbs(reward)
    exact = softmax_gradient(policy, np.maximum(cost, 0))
    mean_cost = (policy * cost).sum(1, keepdims=True)
    mean_rectified = (policy * np.maximum(cost, 0)).sum(1, keepdims=True)
    found = []
    for values in (0 * mean_cost, mean_cost, mean_rectified):
        gradient = split_cost_gradient(policy, cost, values)
        np.testing.assert_allclose(gradient, exact - values * softmax_gradient(policy, 1.0 * (cost > 0)), atol=1e-14)
        found.append(float(cosine(gradient, exact)))
    unsafe = policy * (cost > 0)
    reinforced = (unsafe * (cost < mean_cost)).sum() / unsafe.sum()

    assert found == pytest.approx([1.0, 0.867, 0.879], abs=5.1e-4)
    assert reinforced == pytest.approx(0.208, abs=5.1e-4)


def test_four_hundred_tables() -> None:
    """Means and 95 % ranges over tables, and relations that hold in every one of them."""
    reward, cost = constraint_tables(range(400))
    rectified, star = np.maximum(cost, 0), multiplier_of_mean_cost(reward, cost)
    policies = {
        "reward": gibbs(reward),
        "expected": gibbs(reward - star[:, None, None] * cost),
        "rectified 1": gibbs(reward - rectified),
        "rectified 5": gibbs(reward - 5 * rectified),
        "rectified 20": gibbs(reward - 20 * rectified),
        "critical": gibbs(np.where(cost > 0, -np.inf, reward)),
        "split": optimum(reward, cost, 1e6, kind="split"),
    }
    rates = {name: (policy * (cost <= 0)).sum(-1).mean(-1) for name, policy in policies.items()}
    rewards = {name: (policy * reward).sum(-1).mean(-1) for name, policy in policies.items()}

    def summary(values: np.ndarray) -> tuple[float, ...]:
        return float(values.mean()), *np.quantile(values, [0.025, 0.975])

    unsafe = policies["reward"] * (cost > 0)
    mean_cost = (policies["reward"] * cost).sum(-1, keepdims=True)
    bent = split_cost_gradient(policies["reward"], cost, mean_cost)
    reinforced = (unsafe * (cost < mean_cost)).sum((1, 2)) / unsafe.sum((1, 2))
    expected = {
        "star": (star, (0.43, 0.28, 0.59)),
        "expected": (rates["expected"], (0.51, 0.46, 0.56)),
        "rectified 5": (rates["rectified 5"], (0.90, 0.84, 0.94)),
        "rectified 20": (rates["rectified 20"], (0.98, 0.95, 1.00)),
        "split": (rates["split"], (0.82, 0.76, 0.88)),
        "cosine": (cosine(bent, softmax_gradient(policies["reward"], rectified)), (0.91, 0.85, 0.95)),
        "reinforced": (reinforced, (0.20, 0.14, 0.28)),
    }
    for name, (values, numbers) in expected.items():
        assert summary(values) == pytest.approx(numbers, abs=0.006), name
    by_prompt = (policies["expected"] * cost).sum(-1)
    np.testing.assert_allclose(np.maximum(by_prompt, 0).mean(-1), np.maximum(-by_prompt, 0).mean(-1), atol=1e-9)
    assert (rates["split"] < rates["rectified 5"]).all()
    order = ["reward", "expected", "rectified 1", "rectified 5", "critical"]
    for better, worse in itertools.pairwise(order):
        assert (rewards[better] > rewards[worse]).all()
