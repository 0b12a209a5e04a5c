"""What robust rewards do to exact policies: duals, order statistics, over- and under-scoring, drift, three regimes.

Everything is closed form, quadrature, or simulation of tabular policies, vectorised over instances; the rules under
test are those of `raylign.rewards.aggregate`. Numbers are of this file's seeds; tolerances cover other seeds.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from robust_policies import global_objective, kl_to_uniform, objective, play, soft_maximum, tilted
from torch.nn import functional as F

from raylign.losses.advantages import group_advantages
from raylign.rewards.aggregate import brme, global_rewards, mean, minimum, worst_head

# Means, and variances v, of the minimum of M standard normals; the weight of least variance, and that variance.
ORDER_STATISTICS = {
    2: (-0.56419, 0.68169, 0.26653, 0.63326),
    3: (-0.84628, 0.55947, 0.25329, 0.50219),
    5: (-1.16296, 0.44753, 0.23630, 0.38904),
    8: (-1.42360, 0.37290, 0.22077, 0.31817),
    10: (-1.53875, 0.34434, 0.21352, 0.29217),
}
VARIANCE_OF_FIVE = {0.0: 0.4475, 0.2: 0.3904, 0.4: 0.4171, 0.6: 0.5276, 0.8: 0.7219, 1.0: 1.0}
W_FIVE = ORDER_STATISTICS[5][2]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape: int, seed: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixture_variance(w: float, v: float, num_heads: int) -> float:
    """Of w r_1 + (1 - w) min_i r_i for iid unit-variance heads; the M covariances cov(r_i, min) add up to 1."""
    return w**2 + (1 - w) ** 2 * v + 2 * w * (1 - w) / num_heads


def standard_error(x: torch.Tensor) -> float:
    return (x.std() / math.sqrt(len(x))).item()


# --- order statistics: why a small weight of the nominal reward lowers the variance ---


@pytest.mark.parametrize("num_heads", ORDER_STATISTICS)
def test_moments_of_the_minimum_by_quadrature(num_heads):
    expected_mean, expected_v, expected_w, expected_variance = ORDER_STATISTICS[num_heads]
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    above = torch.special.ndtr(-x)  # P(r > x)
    density = num_heads * torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi) * above ** (num_heads - 1)
    first = torch.trapezoid(density * x, x).item()
    v = torch.trapezoid(density * x.square(), x).item() - first**2
    best_w = (v - 1 / num_heads) / (1 + v - 2 / num_heads)
    found = (first, v, best_w, mixture_variance(best_w, v, num_heads))
    assert found == pytest.approx((expected_mean, expected_v, expected_w, expected_variance), abs=1e-5)
    # The derivative of the variance vanishes there; the mean over heads has a lower variance still.
    assert mixture_variance(best_w + 1e-4, v, num_heads) > found[3] < mixture_variance(best_w - 1e-4, v, num_heads)
    assert found[3] > 1 / num_heads


@pytest.mark.parametrize("num_heads", ORDER_STATISTICS)
def test_moments_of_the_rules_by_simulation(num_heads):
    expected_mean, expected_v, expected_w, expected_variance = ORDER_STATISTICS[num_heads]
    mu, sigma = normal(400_000, num_heads), uniform(400_000, num_heads, seed=1)
    assert minimum(mu).mean().item() == pytest.approx(expected_mean, abs=1e-2)
    assert minimum(mu).var().item() == pytest.approx(expected_v, abs=1e-2)
    assert brme(mu, sigma, w_nominal=expected_w).var().item() == pytest.approx(expected_variance, abs=1e-2)
    assert mean(mu).var().item() == pytest.approx(1 / num_heads, abs=1e-2)


def test_variance_of_the_mixture_over_the_weight():
    mu, sigma = normal(400_000, 5), uniform(400_000, 5, seed=1)
    for w, expected in VARIANCE_OF_FIVE.items():
        assert mixture_variance(w, ORDER_STATISTICS[5][1], 5) == pytest.approx(expected, abs=6e-5)
        assert brme(mu, sigma, w_nominal=w).var().item() == pytest.approx(expected, abs=1e-2)


# --- optimal policies on one prompt of eight answers, three heads ---


@pytest.fixture
def heads() -> torch.Tensor:
    """(3, 8); the nominal reward is the first."""
    rewards = torch.from_numpy(np.random.default_rng(11).normal(size=(3, 8)))
    assert rewards.sum().item() == pytest.approx(1.288752, abs=1e-6)
    assert rewards[0, 1].item() == pytest.approx(1.359748, abs=1e-6)
    return rewards


def test_gradient_ascent_on_the_pointwise_objective_ends_at_the_tilted_reference(heads):
    sigma = torch.tensor([0.1, 1.0, 1.0]).double().expand(8, 3)
    reward = brme(heads.T, sigma, w_nominal=0.2)
    logits = torch.zeros(8, dtype=torch.float64)
    for _ in range(4000):
        p = torch.softmax(logits, 0)
        advantage = reward - 0.5 * (8 * p).log()  # the gradient of the objective in p, up to a constant
        logits = logits + 2.0 * p * (advantage - (p * advantage).sum())
    best = tilted(0.2 * heads[0] + 0.8 * heads.amin(0), 0.5)
    torch.testing.assert_close(torch.softmax(logits, 0), best, atol=1e-3, rtol=0)
    assert objective(best, reward, 0.5).item() == pytest.approx(soft_maximum(reward, 0.5).item(), abs=1e-12)


@pytest.mark.parametrize(
    ("w", "value", "weights"),
    [
        (0.0, 0.173867, (0.2195, 0.1250, 0.6555)),
        (0.2, 0.173867, (0.0244, 0.1563, 0.8194)),
        (1.0, 0.710106, None),
    ],
)
def test_game_against_the_adversary_ends_at_the_dual(heads, w, value, weights):
    """Its value is that of the policy under the worst head; below weight .2195 the nominal head changes nothing."""
    found = play(heads, heads[0], w, 0.5)
    reward = w * heads[0] + (1 - w) * found @ heads
    assert soft_maximum(reward, 0.5).item() == pytest.approx(value, abs=1e-6)
    assert global_objective(tilted(reward, 0.5), heads, heads[0], w, 0.5) == pytest.approx(value, abs=1e-6)
    if weights is not None:
        assert found.tolist() == pytest.approx(weights, abs=5.1e-5)


def test_a_member_of_the_set_as_nominal_changes_nothing_up_to_its_weight_in_the_dual(heads):
    u = play(heads, heads[0], 0.0, 0.5)
    for w in (0.1, 0.2):
        mixed = play(heads, heads[0], w, 0.5)
        expected = (u - w * F.one_hot(torch.tensor(0), 3)) / (1 - w)
        torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(w * heads[0] + (1 - w) * mixed @ heads, u @ heads, atol=1e-5, rtol=0)
    above = play(heads, heads[0], 0.25, 0.5)
    value = soft_maximum(0.25 * heads[0] + 0.75 * above @ heads, 0.5).item()
    assert value > 0.17387 + 5e-4
    assert above[0].item() < 1e-9


def test_pointwise_and_global_sets_have_different_optima(heads):
    reward = minimum(heads.T)
    p = tilted(reward, 0.5)
    assert objective(p, reward, 0.5).item() == pytest.approx(-0.466568, abs=1e-6)
    assert global_objective(p, heads, heads[0], 0.0, 0.5) == pytest.approx(0.067610, abs=1e-6)
    assert (p * reward).sum().item() == pytest.approx(-0.2812, abs=5e-5)
    assert (heads @ p).min().item() == pytest.approx(0.2530, abs=5e-5)


def test_worst_head_on_rollouts_of_a_policy_is_the_worst_in_expectation(heads):
    p = tilted(minimum(heads.T), 0.5)
    answers = torch.multinomial(p, 50_000, replacement=True, generator=torch.Generator().manual_seed(0))
    mu = heads.T[answers]
    assert worst_head(mu) == (heads @ p).argmin().item() == 2
    assert global_rewards(mu, None, head=2).mean().item() == pytest.approx(0.2530, abs=0.02)
    assert minimum(mu).mean().item() == pytest.approx(-0.2812, abs=0.02)


def test_constant_reward_leaves_the_policy_and_gives_no_advantage():
    mu, sigma = torch.full((8, 5), 0.7, dtype=torch.float64), uniform(8, 5, seed=0)
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    for reward in (brme(mu, sigma, w_nominal=0.2), mean(mu), global_rewards(mu, sigma, head=3, w_nominal=0.2)):
        torch.testing.assert_close(tilted(reward, 0.3), torch.full((8,), 1 / 8, dtype=torch.float64))
        for scale in ("none", "std"):
            assert group_advantages(reward, group, scale=scale).abs().max().item() < 1e-8


# --- over-scoring costs more than under-scoring, which the variance alone does not say ---


def test_over_scoring_one_answer_costs_more_than_under_scoring_it():
    num = 200_000
    gold = normal(num, 8, seed=3)
    arm = F.one_hot(torch.randint(8, (num,), generator=torch.Generator().manual_seed(4)), 8)
    best = (tilted(gold, 0.3) * gold).sum(-1)
    ratios = []
    for delta, expected in ((1, 3.34), (2, 8.70), (4, 19.2)):
        over, under = (best - (tilted(gold + shift * arm, 0.3) * gold).sum(-1) for shift in (delta, -delta))
        ratios.append((over.mean() / under.mean()).item())
        assert ratios[-1] == pytest.approx(expected, rel=0.05)
    assert ratios == sorted(ratios)


# --- drift of a policy that maximises noise ---


def test_drift_grows_with_the_variance_of_the_reward():
    mu, sigma = normal(1500, 256, 5, seed=5), uniform(1500 * 256, 5, seed=6)
    flat = mu.view(-1, 5)
    rewards = {
        "constant": torch.zeros(len(flat), dtype=torch.float64),
        "mean": mean(flat),
        "mixture": brme(flat, sigma, w_nominal=W_FIVE),
        "minimum": minimum(flat),
        "nominal": brme(flat, sigma, w_nominal=1.0),
    }
    expected = {"constant": 0.0, "mean": 0.100, "mixture": 0.175, "minimum": 0.197, "nominal": 0.493}
    drift = {name: kl_to_uniform(tilted(reward.view(1500, 256), 1.0)).mean() for name, reward in rewards.items()}
    for name, reward in rewards.items():
        assert drift[name].item() == pytest.approx(expected[name], abs=0.006)
        assert drift[name].item() == pytest.approx(reward.view(1500, 256).var(-1).mean().item() / 2, rel=0.13)
    assert sorted(drift, key=drift.__getitem__) == list(rewards)


# --- gold reward of tabular policies in three regimes of error ---

WEIGHTS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def policies_by_rule(
    q_common: float, q_own: float, num: int = 8000
) -> tuple[torch.Tensor, dict[str | float, torch.Tensor]]:
    """Gold reward (num, 8, 8) of 8 prompts x 8 answers, and tilted policies likewise by rule and by w_nominal."""
    cells, heads = num * 64, 5
    gold = normal(cells, seed=7)
    sigma = torch.where(uniform(cells, heads, seed=8) < q_own, 2.0, 0.3).double()
    shared = (uniform(cells, 1, seed=9) < q_common) * 2 * math.sqrt(0.5)
    mu = gold[:, None] + sigma * normal(cells, heads, seed=10)
    mu += shared * (normal(cells, 1, seed=11) + normal(cells, heads, seed=12))
    shuffled = sigma.gather(1, uniform(cells, heads, seed=13).argsort(1))
    rewards: dict[str | float, torch.Tensor] = {"oracle": gold, "single": mu[:, 0], "mean": mean(mu)}
    rewards |= {w: brme(mu, sigma, w_nominal=w) for w in WEIGHTS}
    rewards["shuffled"] = brme(mu, shuffled, w_nominal=1.0)
    return gold.view(num, 8, 8), {name: tilted(r.view(num, 8, 8), 0.3) for name, r in rewards.items()}


@pytest.mark.parametrize(
    ("q_common", "q_own", "best", "expected"),
    [
        (0.25, 0.0, 0.0, (1.307, 0.950, 1.058, 1.146, 1.138, 1.115, 1.076, 1.019, 0.950, 0.950)),
        (0.0, 0.25, 1.0, (1.307, 0.957, 1.204, 1.134, 1.161, 1.192, 1.225, 1.254, 1.259, 0.959)),
        (0.25, 0.25, 0.4, (1.307, 0.778, 1.003, 1.011, 1.027, 1.033, 1.025, 1.000, 0.950, 0.778)),
    ],
    ids=["shared_errors", "own_errors", "both"],
)
def test_best_weight_is_none_all_or_between_by_the_kind_of_error(q_common, q_own, best, expected):
    table, policies = policies_by_rule(q_common, q_own)
    gold = {name: (p * table).sum(-1).mean(-1) for name, p in policies.items()}
    names = ("oracle", "single", "mean", *WEIGHTS, "shuffled")
    assert [gold[name].mean().item() for name in names] == pytest.approx(expected, abs=0.02)
    assert max(WEIGHTS, key=lambda w: gold[w].mean()) == best
    for end in {0.0, 1.0} - {best}:  # paired over instances
        difference = gold[best] - gold[end]
        assert difference.mean() > 4 * standard_error(difference)
    # Only a sigma that knows which head errs makes the nominal head better than any head.
    assert gold["shuffled"].mean().item() == pytest.approx(gold["single"].mean().item(), abs=0.02)
    assert (gold[1.0].mean() > gold["single"].mean() + 0.1).item() == (q_own > 0)


def test_the_mixture_ends_nearest_to_the_best_policy_where_errors_are_of_both_kinds():
    _, policies = policies_by_rule(0.25, 0.25)
    distance = {name: (p - policies["oracle"]).abs().sum(-1).mean().item() for name, p in policies.items()}
    found = [distance[name] for name in ("single", 1.0, 0.0, 0.4)]
    assert found == pytest.approx([1.114, 0.868, 0.896, 0.832], abs=0.02)
