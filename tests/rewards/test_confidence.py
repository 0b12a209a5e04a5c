from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from raylign.errors import DataError, ShapeError
from raylign.losses import preference
from raylign.losses.reward import margin_loss
from raylign.rewards import confidence
from raylign.rewards.confidence import EmaCenter, pair_confidence, update_center
from raylign.rewards.posterior import MarginPosterior

DEFAULTS = {"alpha": 7.5, "floor": 0.0, "center": 0.0, "level": "pair", "squash": "sigmoid", "temperature": 1.0}


def rewards(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def fit_temperature(margin: torch.Tensor, variance: torch.Tensor | None = None) -> float:
    variance = torch.zeros_like(margin) if variance is None else variance
    return confidence.fit_temperature(MarginPosterior(mean=margin, variance=variance))


def gamma_of(chosen: torch.Tensor, rejected: torch.Tensor, **changes) -> torch.Tensor:
    return confidence.label_confidence(chosen, rejected, **{**DEFAULTS, **changes})


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("chosen", "rejected", "center", "expected"),
    [
        (2, 1, 0, 0.754552),
        (0.5, -0.5, 0, 0.862580),
        (-1, 1, 0, 0.030299),
        (25.2, 15.2, 0, 0.500000),
        (25.2, 15.2, 20.2, 0.999389),
    ],
)
def test_closed_form(chosen, rejected, center, expected):
    by_hand = sigmoid(7.5 * (sigmoid(chosen - center) - sigmoid(rejected - center)))
    assert by_hand == pytest.approx(expected, abs=1e-6)
    found = gamma_of(rewards(chosen), rewards(rejected), center=center)
    assert found.item() == pytest.approx(by_hand, abs=1e-12)


def test_swapping_the_answers_gives_the_complement():
    chosen, rejected = rewards(2.0, -1.0, 0.3), rewards(1.0, 4.0, 0.3)
    for squash in ("sigmoid", "none"):
        total = gamma_of(chosen, rejected, squash=squash) + gamma_of(rejected, chosen, squash=squash)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)


def test_a_common_offset_saturates_only_the_uncentred_confidence():
    chosen, rejected = rewards(2.0, -1.0), rewards(1.0, 1.0)

    def centred(offset: float) -> torch.Tensor:
        both = torch.cat([chosen + offset, rejected + offset])
        fresh = update_center(EmaCenter(), both.mean(), decay=0.99)
        return gamma_of(chosen + offset, rejected + offset, center=fresh.value)

    torch.testing.assert_close(centred(100.0), centred(0.0), rtol=0, atol=1e-9)
    moved = margin_loss(chosen + 100, rejected + 100, margin_target=1.0)
    torch.testing.assert_close(moved, margin_loss(chosen, rejected, margin_target=1.0), rtol=0, atol=1e-9)
    torch.testing.assert_close(gamma_of(chosen + 100, rejected + 100), rewards(0.5, 0.5), rtol=0, atol=1e-9)
    offset_free = gamma_of(chosen + 100, rejected + 100, squash="none", temperature=2.0)
    torch.testing.assert_close(offset_free, torch.sigmoid((chosen - rejected) / 2), rtol=0, atol=1e-12)


def test_batch_level_squashes_before_it_averages_and_hides_flips():
    chosen, rejected = rewards(3.0, -1.0), rewards(-3.0, 0.0)
    gamma = gamma_of(chosen, rejected, level="batch")
    mean_margin = (sigmoid(3) - sigmoid(-3) + sigmoid(-1) - sigmoid(0)) / 2
    torch.testing.assert_close(gamma, rewards(*[sigmoid(7.5 * mean_margin)] * 2), rtol=0, atol=1e-12)
    assert confidence.count_flips(gamma).item() == 0
    assert confidence.count_flips(gamma_of(chosen, rejected)).item() == 1


@pytest.mark.parametrize("level", ["pair", "batch"])
def test_floor_of_one_half_forbids_flips(level):
    chosen, rejected = rewards(-3.0, -1.0), rewards(2.0, 0.0)
    assert (gamma_of(chosen, rejected, level=level) < 0.2).all()
    assert (gamma_of(chosen, rejected, level=level, floor=0.5) == 0.5).all()


@pytest.mark.parametrize("squash", ["sigmoid", "none"])
def test_confidence_is_detached_finite_at_extremes_and_empty_without_pairs(squash):
    far = torch.tensor([1e6, -1e6], requires_grad=True)
    gamma = gamma_of(far, -far, squash=squash)
    assert not gamma.requires_grad
    assert torch.isfinite(gamma).all()
    for level in ("pair", "batch"):
        assert gamma_of(rewards(), rewards(), squash=squash, level=level).shape == (0,)


def test_rewards_of_other_shape_are_refused():
    with pytest.raises(ShapeError, match="alike"):
        gamma_of(rewards(1.0), rewards(1.0, 2.0))


def test_a_reward_that_learns_leaves_the_policy_gradient_alone():
    """The head may train in the same step: gamma carries no gradient in either direction."""
    features = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    head = torch.nn.Linear(3, 1, bias=False)

    def policy_gradient(tracks: bool) -> torch.Tensor:
        margin = torch.tensor([0.5, -2.0], requires_grad=True)
        chosen, rejected = head(features)[:, 0].chunk(2)
        loss = preference.label_confidence(margin, gamma_of(chosen, rejected), beta=0.1).sum()
        if tracks:
            loss = loss + margin_loss(chosen, rejected, margin_target=1.0).sum()
        loss.backward()
        return margin.grad

    assert torch.equal(policy_gradient(tracks=True), policy_gradient(tracks=False))


def test_center_starts_at_the_first_batch_and_then_decays():
    state = EmaCenter()
    first = update_center(state, torch.tensor(8.0), decay=0.9)
    second = update_center(first, torch.tensor(-2.0, requires_grad=True), decay=0.9)
    assert state.value is None
    assert first.value.item() == 8.0
    assert second.value.item() == pytest.approx(0.9 * 8 + 0.1 * -2)
    assert not second.value.requires_grad
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.value = None


def test_no_variance_is_a_point_estimate_to_the_bit():
    chosen, rejected = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    posterior = pair_confidence(chosen, rejected, torch.zeros(50), **DEFAULTS)
    assert torch.equal(posterior.label_confidence, gamma_of(chosen, rejected))
    assert torch.equal(posterior.margin_mean, chosen - rejected)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_variance_gives_the_probability_averaged_over_the_posterior(temperature):
    mean, variance = rewards(-4.0, 0.5, 2.0, 6.0), rewards(9.0, 1.0, 4.0, 16.0)
    draws = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    averaged = torch.sigmoid((mean + draws * variance.sqrt()) / temperature).mean(0)
    settings = {**DEFAULTS, "squash": "none", "temperature": temperature}
    found = pair_confidence(mean / 2, -mean / 2, variance, **settings).label_confidence
    torch.testing.assert_close(found, averaged, rtol=0, atol=0.02)  # the probit approximation's own error
    point = gamma_of(mean / 2, -mean / 2, squash="none", temperature=temperature)
    assert ((found - averaged).abs() < (point - averaged).abs()).all()


def test_variance_moves_confidence_towards_a_coin_and_never_across():
    chosen, rejected = rewards(2.0, -1.0), rewards(1.0, 1.0)
    gammas = [pair_confidence(chosen, rejected, rewards(v, v), **DEFAULTS).label_confidence for v in (0.0, 1.0, 100.0)]
    distance = [(gamma - 0.5).abs() for gamma in gammas]
    assert (distance[0] > distance[1]).all()
    assert (distance[1] > distance[2]).all()
    assert all(torch.equal(gamma > 0.5, gammas[0] > 0.5) for gamma in gammas)


def test_one_variance_for_all_pairs_is_refused():
    with pytest.raises(ShapeError, match="one per pair"):
        pair_confidence(rewards(1.0, 2.0), rewards(0.0, 0.0), rewards(1.0), **DEFAULTS)


@pytest.mark.parametrize("true_temperature", [0.3, 3.0, 40.0])
def test_fitted_temperature_recovers_the_simulated_one(true_temperature):
    generator = torch.Generator().manual_seed(0)
    stored = 1.5 * true_temperature * torch.randn(20_000, generator=generator, dtype=torch.float64)
    is_right = torch.rand(20_000, generator=generator, dtype=torch.float64) < torch.sigmoid(stored / true_temperature)
    margin = torch.where(is_right, stored, -stored)
    fitted = fit_temperature(margin)
    assert fitted == pytest.approx(true_temperature, rel=0.05)
    for low, high in ((0.5, 0.7), (0.7, 0.9), (0.9, 1.0)):  # calibrated: stated probability is the observed share
        stated = torch.sigmoid(margin.abs() / fitted)
        taken = (stated >= low) & (stated < high)
        assert (margin[taken] > 0).double().mean().item() == pytest.approx(stated[taken].mean().item(), abs=0.02)


def test_temperature_of_uncertain_margins_is_the_one_with_the_lowest_loss():
    """Grid search over the same likelihood; margins whose variance differs from pair to pair."""
    generator = torch.Generator().manual_seed(1)
    variance = 4 * torch.rand(400, generator=generator, dtype=torch.float64)
    margin = torch.randn(400, generator=generator, dtype=torch.float64) + 0.8
    belief = MarginPosterior(mean=margin, variance=variance)
    target = 401 / 402

    def loss(temperature: float) -> float:
        logit = torch.logit(belief.preference_prob(temperature))
        return -(target * torch.log(torch.sigmoid(logit)) + (1 - target) * torch.log(torch.sigmoid(-logit))).sum()

    grid = torch.logspace(-1, 1.5, 2000, dtype=torch.float64).tolist()
    assert fit_temperature(margin, variance) == pytest.approx(min(grid, key=loss), rel=5e-3)
    assert fit_temperature(margin, variance) < fit_temperature(margin)  # part of the doubt is in the variance already


def test_fitted_temperature_has_the_unit_of_the_reward():
    margin = torch.tensor([3.0, 1.0, -0.5, 2.0, -1.0])
    assert fit_temperature(1000 * margin) == pytest.approx(1000 * fit_temperature(margin), rel=1e-9)


def test_degenerate_margins_have_a_temperature():
    perfect = fit_temperature(torch.tensor([1.0, 2.0, 1.5]))
    assert 0.5 < perfect < 2.0  # far inside the bounds: Platt's target keeps three pairs from claiming certainty
    useless = torch.tensor([-2.0, -1.0, -3.0])
    assert torch.sigmoid(useless / fit_temperature(useless)).min() > 0.49
    assert fit_temperature(torch.zeros(3)) == 1.0


@pytest.mark.parametrize("margin", [[], [1.0, math.nan]])
def test_temperature_needs_finite_margins(margin):
    with pytest.raises(DataError, match="finite margins"):
        fit_temperature(torch.tensor(margin))
