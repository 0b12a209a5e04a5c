"""The configured rule over members: each is the function of its name, and one member leaves nothing to choose."""

from __future__ import annotations

import pytest
import torch

from raylign.config import RobustSection
from raylign.rewards import aggregate
from raylign.rewards.posterior import RewardPosterior, ensemble_posterior
from raylign.runtime.robust import robust_rewards

RULES = ("mean", "min", "uwo", "lcb", "cvar", "entropic", "brme")


def belief(num_responses: int = 7, num_heads: int = 4, *, requires_grad: bool = False):
    generator = torch.Generator().manual_seed(0)
    mu = torch.randn(num_responses, num_heads, generator=generator)
    sigma = 0.1 + torch.rand(num_responses, num_heads, generator=generator)
    return ensemble_posterior(mu.requires_grad_(requires_grad), sigma)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rule": "mean"}, lambda mu, sigma: mu.mean(1)),
        ({"rule": "min"}, lambda mu, sigma: mu.amin(1)),
        ({"rule": "uwo", "uncertainty_weight": 2.0}, lambda mu, sigma: mu.mean(1) - 2 * mu.var(1, correction=0)),
        ({"rule": "lcb", "lcb_k": 2.0}, lambda mu, sigma: mu.mean(1) - 2 * mu.std(1, correction=0)),
        ({"rule": "cvar", "cvar_level": 0.5}, lambda mu, sigma: mu.sort(1).values[:, :2].mean(1)),
        ({"rule": "entropic", "entropic_b": 0.5}, lambda mu, sigma: -0.5 * torch.log(torch.exp(-mu / 0.5).mean(1))),
        (
            {"rule": "brme", "w_nominal": 0.3},
            lambda mu, sigma: 0.3 * mu.gather(1, sigma.argmin(1)[:, None])[:, 0] + 0.7 * mu.amin(1),
        ),
    ],
)
def test_every_rule_and_its_knob_reach_the_rewards(settings, expected):
    posterior = belief()
    rewards = robust_rewards(posterior, RobustSection(**settings))
    torch.testing.assert_close(rewards, expected(posterior.head_rewards, posterior.head_scales))


@pytest.mark.parametrize("rule", RULES)
def test_one_member_is_the_single_reward_bitwise_under_every_rule(rule):
    """What lets a run with one member and any w_nominal be the run with that reward alone."""
    posterior = belief(num_heads=1)
    for w_nominal in (0.0, 0.2, 1.0):
        rewards = robust_rewards(posterior, RobustSection(rule=rule, w_nominal=w_nominal))
        assert torch.equal(rewards, posterior.head_rewards[:, 0])


@pytest.mark.parametrize("rule", RULES)
def test_no_gradient_reaches_the_reward_model(rule):
    assert not robust_rewards(belief(requires_grad=True), RobustSection(rule=rule)).requires_grad


def test_the_global_set_takes_one_member_for_all_responses():
    posterior = belief()
    worst = int(posterior.head_rewards.mean(0).argmin())
    rewards = robust_rewards(posterior, RobustSection(rule="min", set_type="heads_global"))
    assert torch.equal(rewards, posterior.head_rewards[:, worst])
    mixed = robust_rewards(posterior, RobustSection(rule="brme", w_nominal=0.3, set_type="heads_global"))
    nominal = aggregate.nominal_rewards(posterior.head_rewards, posterior.head_scales)
    torch.testing.assert_close(mixed, 0.3 * nominal + 0.7 * posterior.head_rewards[:, worst])
    assert (robust_rewards(posterior, RobustSection(rule="min")) <= rewards).all()


@pytest.mark.parametrize("draws", [[0.9, 1.0], [1.4]])
@pytest.mark.parametrize("settings", [{"rule": "uwo", "uncertainty_weight": 2.0}, {"rule": "lcb", "lcb_k": 2.0}])
def test_rules_of_moments_read_the_exact_ones_and_not_those_of_a_few_draws(settings, draws):
    """A posterior over weights: standard deviation 3 whatever its draws say, one as well as two."""
    posterior = RewardPosterior(
        mean=torch.tensor([1.0]), deviations=torch.tensor([[3.0]]), head_rewards=torch.tensor([draws])
    )
    expected = 1 - 2 * (9.0 if settings["rule"] == "uwo" else 3.0)
    torch.testing.assert_close(robust_rewards(posterior, RobustSection(**settings)), torch.tensor([expected]))
