"""The contract of reward posteriors: moments of members, and what cancels in a margin."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raylign.errors import DataError, ShapeError
from raylign.rewards.posterior import (
    MarginPosterior,
    RewardPosterior,
    concat_posteriors,
    ensemble_posterior,
    margin_posterior,
    standardization,
)


def members(num_responses: int = 6, num_heads: int = 4, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_responses, num_heads, generator=generator, dtype=torch.float64)


def test_moments_of_members_are_their_mean_and_their_variance_with_one_over_m():
    rewards = members()
    belief = ensemble_posterior(rewards)
    torch.testing.assert_close(belief.mean, rewards.mean(1))
    torch.testing.assert_close(belief.variance, rewards.var(1, correction=0))
    torch.testing.assert_close(belief.disagreement, rewards.std(1, correction=0))
    assert (len(belief), belief.num_heads) == (6, 4)


def test_margin_variance_is_that_of_the_members_margins():
    chosen, rejected = members(seed=1), members(seed=2)
    margin = margin_posterior(ensemble_posterior(chosen), ensemble_posterior(rejected))
    torch.testing.assert_close(margin.mean, (chosen - rejected).mean(1))
    torch.testing.assert_close(margin.variance, (chosen - rejected).var(1, correction=0))


def test_what_a_member_adds_to_all_responses_cancels_in_the_margin_and_not_in_the_reward():
    chosen, rejected, offsets = members(seed=1), members(seed=2), 5 * members(1, seed=3)
    plain = margin_posterior(ensemble_posterior(chosen), ensemble_posterior(rejected))
    shifted = [ensemble_posterior(side + offsets) for side in (chosen, rejected)]
    torch.testing.assert_close(margin_posterior(*shifted).variance, plain.variance)
    assert (shifted[0].variance > 2 * ensemble_posterior(chosen).variance).any()


def test_one_member_is_certain():
    margin = margin_posterior(ensemble_posterior(members(5, 1)), ensemble_posterior(members(5, 1, seed=1)))
    assert not margin.variance.any()
    torch.testing.assert_close(margin.preference_prob(2.0), torch.sigmoid(margin.mean / 2.0))


def test_preference_prob_is_the_expectation_of_the_sigmoid():
    """Against Gauss-Hermite quadrature; the probit form is good to a percent."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    mean = torch.linspace(-4, 4, 17, dtype=torch.float64)
    for variance, temperature in ((0.25, 1.0), (1.0, 0.5), (9.0, 1.0), (9.0, 4.0)):
        draws = mean[:, None] + variance**0.5 * torch.from_numpy(nodes)
        expected = (torch.sigmoid(draws / temperature) * torch.from_numpy(weights / weights.sum())).sum(1)
        stated = MarginPosterior(mean=mean, variance=torch.full_like(mean, variance)).preference_prob(temperature)
        torch.testing.assert_close(stated, expected, rtol=0, atol=0.02)


def test_parts_put_together_are_the_whole():
    rewards, scales = members(), members(seed=4).abs()
    whole = ensemble_posterior(rewards, scales)
    again = concat_posteriors([whole[:2], whole[torch.tensor([2, 3, 4, 5])]])
    for name in ("mean", "deviations", "head_rewards", "head_scales"):
        assert torch.equal(getattr(again, name), getattr(whole, name))
    assert concat_posteriors([ensemble_posterior(rewards)]).head_scales is None


def test_shapes_that_do_not_belong_together_are_refused():
    with pytest.raises(ShapeError, match=r"must be \(n, M\)"):
        ensemble_posterior(torch.zeros(3))
    with pytest.raises(ShapeError, match="one per reward"):
        ensemble_posterior(torch.zeros(3, 2), torch.zeros(3, 1))
    with pytest.raises(ShapeError, match="by one reward model"):
        margin_posterior(ensemble_posterior(members(3, 2)), ensemble_posterior(members(3, 4)))
    assert isinstance(ensemble_posterior(members()), RewardPosterior)


def test_standardised_members_share_mean_and_spread():
    rewards_nM = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 4.0, 0.5])
    rewards_nM += torch.tensor([3.0, -1.0, 0.0])
    scale, shift = standardization(rewards_nM)
    after = rewards_nM * scale + shift
    torch.testing.assert_close(after.mean(0), rewards_nM.mean().expand(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(after.std(0), rewards_nM.std(0).mean().expand(3), rtol=0, atol=1e-5)
    assert torch.equal(rewards_nM.argsort(0), after.argsort(0))
    assert [part.tolist() for part in standardization(rewards_nM[:, :1])] == [[1.0], [0.0]]
    with pytest.raises(DataError, match="rewards alike"):
        standardization(torch.tensor([[1.0, 2.0], [1.0, 3.0]]))
