"""64 prompts with 8 answers each, whose policies, costs and gradients are sums: an oracle for constraints."""

from __future__ import annotations

import numpy as np

from raylign.constraints.violations import Violations, violations

NUM_PROMPTS, NUM_ANSWERS, BETA = 64, 8, 0.5


def constraint_tables(seeds: range) -> tuple[np.ndarray, np.ndarray]:
    """Rewards and costs (seeds, 64, 8); riskier answers are better, and every prompt has a safe one."""
    rewards, costs = [], []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        cost = rng.normal(0, 1.5, (NUM_PROMPTS, NUM_ANSWERS))
        cost += rng.normal(0, 1, (NUM_PROMPTS, 1))
        rewards.append(0.8 * cost + rng.normal(0, 1, (NUM_PROMPTS, NUM_ANSWERS)))
        cost[:, 0] = -np.abs(cost[:, 0]) - 0.2
        costs.append(cost)
    return np.stack(rewards), np.stack(costs)


def constraint_table() -> tuple[np.ndarray, np.ndarray]:
    """Reward and cost (64, 8) of seed 0, with the check values of their construction."""
    reward, cost = (table[0] for table in constraint_tables(range(1)))
    assert (round(cost.sum(), 6), round(reward.sum(), 6)) == (-68.088984, -17.433567)
    assert (round(cost[0, 1], 6), round(reward[63, 7], 6)) == (-0.742115, 2.350930)
    assert (cost > 0).sum() == 234
    return reward, cost


def gibbs(score: np.ndarray, beta: float = BETA) -> np.ndarray:
    """What maximises E[score] - beta KL from the uniform policy, exactly: exp(score / beta) over its sum."""
    weight = np.exp((score - score.max(-1, keepdims=True)) / beta)
    return weight / weight.sum(-1, keepdims=True)


def table_violations(policy: np.ndarray, cost: np.ndarray) -> Violations:
    """Exact numbers of a policy (X, V)."""
    prompt = np.repeat(np.arange(len(cost)), cost.shape[1])
    return violations(cost.reshape(-1), prompt, weight=policy.reshape(-1), cvar_level=0.05)


def multiplier_of_mean_cost(reward: np.ndarray, cost: np.ndarray, divided: bool = False) -> np.ndarray:
    """(seeds,) by bisection: the multiplier at which the expected constraint is tight; tables (seeds, X, V)."""
    low, high = np.zeros(len(cost)), np.full(len(cost), 20.0)
    for _ in range(80):
        middle = (low + high) / 2
        lam = middle[:, None, None]
        policy = gibbs((reward - lam * cost) / (1 + lam if divided else 1.0))
        too_costly = (policy * cost).sum(-1).mean(-1) > 0
        low, high = np.where(too_costly, middle, low), np.where(too_costly, high, middle)
    return (low + high) / 2
