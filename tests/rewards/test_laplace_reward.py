"""The Laplace posterior against numbers worked out by hand, autograd, explicit inverses and simulated calibration."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from raylign.errors import DataError, ShapeError
from raylign.rewards.laplace import (
    PRIOR_PRECISIONS,
    LaplaceFit,
    LaplaceReward,
    LaplaceSolution,
    fit_laplace,
    laplace_statistics,
    merge_statistics,
    solve_laplace,
)
from raylign.rewards.posterior import margin_posterior


def solved(differences: torch.Tensor, *, prior_precision: float = 1.0, start: float = 0.0) -> LaplaceSolution:
    weight = torch.full(differences.shape[1:], start, dtype=torch.float64)
    return solve_laplace(lambda at: laplace_statistics(differences, at), weight, prior_precision=prior_precision)


def counted(num_chosen: int, num_rejected: int) -> torch.Tensor:
    """One coordinate that differs by 1; the answer that has it won `num_chosen` times."""
    return torch.cat([torch.ones(num_chosen, 1), -torch.ones(num_rejected, 1)]).double()


def seeded() -> torch.Tensor:
    rng = np.random.default_rng(0)
    weight, inputs = rng.standard_normal(5), rng.standard_normal((400, 5))
    is_first = rng.random(400) < 1 / (1 + np.exp(-inputs @ weight))
    return torch.from_numpy(np.where(is_first[:, None], inputs, -inputs))


def states(num_pairs: int, *, seed: int, strength: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Chosen and rejected states (N, 2, 3) of correlated coordinates, ordered by a logistic choice."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, num_pairs, 2, 3, generator=generator) @ torch.tensor([[1.0, 2, 0], [0, 1, 2], [0, 0, 1]])
    direction = strength * torch.tensor([[1.0, -0.5, 0.0], [0.5, 0.0, 1.0]])
    prob = torch.sigmoid(((both[0] - both[1]) * direction).sum((1, 2)))
    is_first = torch.rand(num_pairs, generator=generator) < prob
    pick = is_first[:, None, None]
    return torch.where(pick, both[0], both[1]), torch.where(pick, both[1], both[0])


def fitted(*, prior_precision: float | str = 1.0, num_draws: int = 4, strength: float = 1.0) -> LaplaceFit:
    chosen, rejected = states(200, seed=0, strength=strength)
    valid_chosen, valid_rejected = states(300, seed=1, strength=strength)
    return fit_laplace(
        2 + 3 * chosen,
        2 + 3 * rejected,
        valid_chosen=2 + 3 * valid_chosen,
        valid_rejected=2 + 3 * valid_rejected,
        prior_precision=prior_precision,
        num_draws=num_draws,
        generator=torch.Generator().manual_seed(0),
    )


def test_one_weight_and_a_hundred_pairs():
    """75 of 100: without the prior the weight would be log 3 = 1.0986."""
    solution = solved(counted(75, 25))
    assert solution.weight.item() == pytest.approx(1.043699, abs=1e-6)
    assert solution.hessian_factor.square().item() == pytest.approx(20.260956, abs=1e-5)
    margin = solution.margin(torch.tensor([[1.0], [2.0]]).double())
    assert margin.variance.sqrt().tolist() == pytest.approx([0.222162, 2 * 0.222162], abs=2e-6)
    assert margin.preference_prob()[1].item() == pytest.approx(0.881937, abs=1e-6)
    assert torch.sigmoid(margin.mean)[1].item() == pytest.approx(0.889672, abs=1e-6)
    assert solved(counted(75, 25), prior_precision=1e-9).weight.item() == pytest.approx(math.log(3), abs=1e-6)


def test_ten_times_the_pairs_leave_a_third_of_the_doubt():
    variance = solved(counted(750, 250)).margin(torch.ones(1, 1).double()).variance
    assert variance.sqrt().item() == pytest.approx(0.072731, abs=1e-6)


def test_seeded_pairs():
    solution = solved(seeded())
    expected = [0.03065, -0.23947, 0.51127, 0.17334, -0.43212]
    assert solution.weight.tolist() == pytest.approx(expected, abs=1e-5)
    assert torch.cholesky_inverse(solution.hessian_factor).trace().item() == pytest.approx(0.057790, abs=1e-6)
    at_ones = solution.margin(torch.ones(1, 5).double())
    assert at_ones.variance.sqrt().item() == pytest.approx(0.237944, abs=1e-6)


def test_statistics_are_the_derivatives_that_autograd_finds():
    differences, weight = seeded()[:20], torch.linspace(-1, 1, 5, dtype=torch.float64)

    def loss(at: torch.Tensor) -> torch.Tensor:
        return torch.log1p(torch.exp(-differences @ at)).sum()

    found = laplace_statistics(differences, weight)
    torch.testing.assert_close(found.loss, loss(weight), rtol=1e-12, atol=0)
    gradient = torch.autograd.functional.jacobian(loss, weight)
    torch.testing.assert_close(found.gradient, gradient, rtol=1e-10, atol=1e-12)
    hessian = torch.autograd.functional.hessian(loss, weight)
    torch.testing.assert_close(found.hessian, hessian, rtol=1e-10, atol=1e-12)


def test_merged_shards_are_the_pooled_fit():
    pairs = seeded()
    pooled = solved(pairs)
    shards = pairs[:130], pairs[130:131], pairs[131:]

    def statistics_at(weight: torch.Tensor):
        return merge_statistics([laplace_statistics(shard, weight) for shard in shards])

    assert statistics_at(pooled.weight).num_pairs == 400
    merged = solve_laplace(statistics_at, torch.zeros(5).double(), prior_precision=1.0)
    torch.testing.assert_close(merged.weight, pooled.weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(merged.hessian_factor, pooled.hessian_factor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("start", [-20.0, 20.0])
def test_newton_comes_back_from_where_its_first_step_overshoots(start):
    """At 20 the curvature is the prior's 1e-3 alone, and the full step lands at -25,000."""
    solution = solved(counted(75, 25), prior_precision=1e-3, start=start)
    assert solution.weight.item() == pytest.approx(solved(counted(75, 25), prior_precision=1e-3).weight.item())


def test_separable_pairs_have_a_finite_fit():
    solution = solved(counted(100, 0), prior_precision=1e-4)
    assert math.isfinite(solution.weight.item()) and solution.weight.item() > 5


def test_head_has_the_exact_moments_of_margins():
    fit = fitted()
    chosen, rejected = (2 + 3 * half for half in states(50, seed=2))
    head = fit.head
    differences = ((chosen - rejected) / head.layer_rms[:, None]).flatten(1).double()
    covariance = torch.linalg.inv(head.hessian_factor @ head.hessian_factor.T)
    margin = margin_posterior(head(chosen), head(rejected))
    exact = torch.einsum("bi,ij,bj->b", differences, covariance, differences)
    torch.testing.assert_close(margin.variance.double(), exact, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(margin.mean.double(), differences @ head.weight, rtol=1e-4, atol=1e-5)
    assert head(chosen).head_scales is None


def test_fit_is_the_solution_on_normalised_differences():
    fit = fitted()
    chosen, rejected = (2 + 3 * half for half in states(200, seed=0))
    differences = ((chosen - rejected) / fit.head.layer_rms[:, None]).flatten(1).double()
    torch.testing.assert_close(fit.head.weight, solved(differences).weight, rtol=0, atol=1e-6)


def test_doubt_is_linear_in_the_distance_of_two_answers():
    head, states_near = fitted().head, states(20, seed=2)[0]
    center = head.layer_mean.expand_as(states_near)
    near, far = (margin_posterior(head(center + k * states_near), head(center)) for k in (1, 3))
    torch.testing.assert_close(far.variance.sqrt(), 3 * near.variance.sqrt(), rtol=1e-4, atol=1e-6)


def test_draws_are_the_members_and_spread_like_the_posterior():
    head = fitted(num_draws=50_000).head
    answers = states(5, seed=3)[0]
    posterior = head(answers)
    assert posterior.head_rewards.shape == (5, 50_000)
    torch.testing.assert_close(posterior.head_rewards.mean(1), posterior.mean, rtol=0, atol=3e-2)
    torch.testing.assert_close(posterior.head_rewards.std(1), posterior.disagreement, rtol=2e-2, atol=0)


def test_posterior_is_calibrated_when_the_prior_is_right():
    """150 weights from the prior N(0, 1), 100 pairs each: (truth - mean)^2 / variance has mean 1; found 1.16 (.12)."""
    rng, squares = np.random.default_rng(5), []
    for _ in range(150):
        weight, inputs, direction = rng.standard_normal(3), rng.standard_normal((100, 3)), rng.standard_normal((1, 3))
        is_first = rng.random(100) < 1 / (1 + np.exp(-inputs @ weight))
        margin = solved(torch.from_numpy(np.where(is_first[:, None], inputs, -inputs))).margin(
            torch.from_numpy(direction)
        )
        squares.append(((margin.mean - float((direction @ weight)[0])).square() / margin.variance).item())
    assert sum(squares) / 150 == pytest.approx(1.0, abs=0.3)


def test_fitted_prior_follows_the_strength_of_the_preference():
    strong, none = (fitted(prior_precision="fitted", strength=strength) for strength in (2.0, 0.0))
    assert strong.prior_precision < none.prior_precision
    for fit in (strong, none):
        tried = list(fit.valid_losses)
        assert tried == list(PRIOR_PRECISIONS[: len(tried)])
        assert min(fit.valid_losses, key=fit.valid_losses.get) == fit.prior_precision


def test_a_given_prior_is_the_only_one_tried():
    assert list(fitted(prior_precision=7.0).valid_losses) == [7.0]


def test_head_comes_back_from_its_tensors_and_scores_alike_twice():
    head, answers = fitted().head, states(9, seed=2)[0].half()
    again = LaplaceReward.from_state(head.state_dict())
    first, second = again(answers), again(answers)
    assert torch.equal(first.head_rewards, second.head_rewards) and torch.equal(first.deviations, second.deviations)
    assert torch.equal(first.deviations, head(answers).deviations) and torch.equal(first.mean, head(answers).mean)
    assert not first.mean.requires_grad and first.mean.dtype == torch.float32
    assert (again.num_heads, again.num_layers, again.hidden_size) == (4, 2, 3)
    assert again.prior_precision.item() == fitted().prior_precision


def test_too_many_weights_are_refused_with_the_memory_they_would_take():
    features = torch.zeros(1, 1, 1).expand(2, 32, 4096)
    with pytest.raises(DataError, match=r"131072 weights.* 128\.0 GiB.*features\.layers=\[k\]"):
        fit_laplace(
            features,
            features,
            valid_chosen=features,
            valid_rejected=features,
            prior_precision=1.0,
            num_draws=1,
            generator=torch.Generator(),
        )


def test_tensors_that_do_not_fit_are_refused():
    state = fitted().head.state_dict()
    with pytest.raises(ShapeError, match="coordinates"):
        LaplaceReward.from_state({**state, "weight": state["weight"][:-1]})
    with pytest.raises(ShapeError, match=r"\(B, d\)"):
        laplace_statistics(torch.zeros(3, 2).double(), torch.zeros(3).double())
    with pytest.raises(ShapeError, match="another model"):
        fitted().head(torch.zeros(2, 2, 4))
