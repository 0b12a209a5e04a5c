"""Losses of Gaussian rewards against closed forms, quadrature on a fine grid, and the optima they are known for."""

from __future__ import annotations

import math

import pytest
import torch

from raylign.errors import ShapeError
from raylign.losses.gaussian_reward import (
    beta_nll,
    expected_mse,
    gaussian_nll,
    kl_to_standard_normal,
    margin_mse,
    mse_reparam,
    mse_reparam_kl,
    overlap,
    purm,
)

FORMS = ("log_mean", "mean_log", "probit")


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LOSSES = {
    "mse_reparam": lambda mu, sigma: mse_reparam(mu, sigma, 1 + 0 * mu.detach(), noise(*mu.shape)),
    "mse_reparam_kl": lambda mu, sigma: mse_reparam_kl(mu, sigma, 1 + 0 * mu.detach(), noise(*mu.shape), kl_weight=0.3),
    "gaussian_nll": lambda mu, sigma: gaussian_nll(mu, sigma, 1 + 0 * mu.detach()),
    "margin_mse": lambda mu, sigma: margin_mse(
        mu, sigma, -mu, 2 * sigma, 1 + 0 * mu.detach(), noise(*mu.shape), noise(*mu.shape, seed=1)
    ),
    **{f"purm {form}": lambda mu, sigma, form=form: purm(mu, sigma.square(), form=form) for form in FORMS},
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


@every_loss
def test_gradient_is_right(loss):
    mu, sigma = noise(4, 3).requires_grad_(), (noise(4, 3, seed=2).abs() + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(loss, (mu, sigma))


@every_loss
def test_extremes_have_finite_loss_and_gradient(loss):
    mu = column(-1e4, 0.0, 1e4).requires_grad_()
    sigma = column(1e-3, 1e3, 1e-3).requires_grad_()
    value = loss(mu, sigma)
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(mu.grad).all() and torch.isfinite(sigma.grad).all()


@every_loss
def test_no_items_give_no_loss(loss):
    assert loss(column()[:, :1], column()[:, :1]).shape == (0, 1)


def test_mean_of_the_sampled_error_is_the_squared_error_plus_the_variance():
    """Error of the mean of 200,000 draws: 2.4e-3."""
    mu, sigma, target = column(0.3), column(0.8), column(1.1)
    draws = noise(200_000, 1)
    sampled = mse_reparam(mu.expand_as(draws), sigma.expand_as(draws), target, draws).mean().item()
    assert expected_mse(mu, sigma, target).item() == pytest.approx(1.28, abs=1e-12)  # E6
    assert sampled == pytest.approx(1.28, abs=1e-2)


def test_margin_error_has_the_mean_of_the_margins_moments():
    draws = noise(2, 200_000, 1)
    mu, sigma = torch.ones_like(draws[0]), torch.full_like(draws[0], 0.6)
    sampled = margin_mse(mu, sigma, -mu, sigma * 4 / 3, column(1.5), *draws).mean().item()
    assert sampled == pytest.approx(expected_mse(column(2.0), column(1.0), column(1.5)).item(), abs=2e-2)


@pytest.mark.parametrize("noise_scale", [0.1, 0.5, 2.0])
def test_only_the_likelihood_finds_the_noise_of_the_target(noise_scale):
    """Minimised over a grid of sigma at the true mean, draws replaced by their mean."""
    target = 0.7 + noise_scale * noise(4000, 1)
    sigmas = torch.logspace(-3, 1, 2001, dtype=torch.float64)[None, :]
    mu = torch.full_like(sigmas, 0.7)

    def best(losses: torch.Tensor) -> float:
        return sigmas[0, losses.mean(0).argmin()].item()

    shape = (4000, sigmas.shape[1])
    wide = mu.expand(shape), sigmas.expand(shape), target
    assert best(gaussian_nll(*wide)) == pytest.approx(noise_scale, rel=0.04)
    assert best(expected_mse(*wide)) == pytest.approx(1e-3)
    with_prior = expected_mse(*wide) + 0.1 * kl_to_standard_normal(*wide[:2])
    assert best(with_prior) == pytest.approx(math.sqrt(0.1 / 2.1), rel=0.01)


def test_beta_nll_has_the_optimum_of_the_likelihood_and_weighs_its_gradient():
    mu, sigma = noise(5, 2).requires_grad_(), (noise(5, 2, seed=1).abs() + 0.2).requires_grad_()
    plain = torch.autograd.grad(gaussian_nll(mu, sigma, column(*range(5))).sum(), (mu, sigma))
    scaled = torch.autograd.grad(beta_nll(mu, sigma, column(*range(5)), beta=0.5).sum(), (mu, sigma))
    for before, after in zip(plain, scaled, strict=True):
        torch.testing.assert_close(after, before * sigma.detach(), rtol=1e-12, atol=0)


def test_closed_forms():
    mu, sigma, target = column(0.3), column(0.8), column(1.1)
    assert mse_reparam(mu, sigma, target, column(-0.5)).item() == pytest.approx((0.3 - 0.4 - 1.1) ** 2, abs=1e-12)
    assert gaussian_nll(mu, sigma, target).item() == pytest.approx(0.8**2 / (2 * 0.8**2) + math.log(0.8), abs=1e-12)
    divergence = (0.3**2 + 0.8**2 - 1) / 2 - math.log(0.8)
    assert kl_to_standard_normal(mu, sigma).item() == pytest.approx(divergence, abs=1e-12)
    with_kl = mse_reparam_kl(mu, sigma, target, column(-0.5), kl_weight=0.25).item()
    assert with_kl == pytest.approx((0.3 - 0.4 - 1.1) ** 2 + 0.25 * divergence, abs=1e-12)
    exact = torch.distributions.kl_divergence(
        torch.distributions.Normal(mu, sigma), torch.distributions.Normal(0.0, 1.0)
    )
    assert exact.item() == pytest.approx(divergence, abs=1e-6)


@pytest.mark.parametrize(("form", "loss"), [("log_mean", 0.434287), ("mean_log", 0.642495)])
def test_uncertain_margin_numbers(form, loss):
    assert purm(column(1.0), column(4.0), form=form).item() == pytest.approx(loss, abs=1e-6)
    assert purm(column(1.0), column(0.0), form=form).item() == pytest.approx(0.313262, abs=1e-6)


def test_uncertain_margin_probabilities():
    assert purm(column(1.0), column(4.0)).neg().exp().item() == pytest.approx(0.647726, abs=1e-6)
    assert purm(column(1.0), column(4.0), form="probit").neg().exp().item() == pytest.approx(0.651056, abs=1e-6)
    assert purm(column(1.0), column(0.0), form="probit").item() == pytest.approx(0.313262, abs=1e-6)
    for form in ("log_mean", "probit"):
        assert purm(column(0.0), column(9.0), form=form).neg().exp().item() == pytest.approx(0.5, abs=1e-12)


def test_uncertain_margin_against_a_fine_grid():
    grid = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = torch.exp(-grid.square() / 2)
    for mean, variance in ((-5.0, 1.0), (0.3, 4.0), (3.0, 2.5)):
        prob = (density * torch.sigmoid(mean + math.sqrt(variance) * grid)).sum() / density.sum()
        assert purm(column(mean), column(variance)).item() == pytest.approx(-math.log(prob), abs=2e-6)


def test_average_of_logs_is_an_upper_bound_and_punishes_variance():
    mean, variance = noise(50, 4), 4 * noise(50, 4, seed=1).square()
    assert (purm(mean, variance, form="mean_log") >= purm(mean, variance) - 1e-9).all()
    wrong_order = torch.full((1, 1), -2.0, dtype=torch.float64)
    assert purm(wrong_order, column(4.0)) < purm(wrong_order, column(0.0))
    assert purm(wrong_order, column(4.0), form="mean_log") > purm(wrong_order, column(0.0), form="mean_log")


@pytest.mark.parametrize("form", FORMS)
def test_certain_margin_has_a_finite_gradient(form):
    mean, variance = column(1.0).requires_grad_(), column(0.0).requires_grad_()
    purm(mean, variance, form=form).sum().backward()
    assert mean.grad.item() == pytest.approx(-1 / (1 + math.e), abs=1e-9)
    assert torch.isfinite(variance.grad).all()


def test_overlap_numbers():
    found = overlap(column(0.0, 1.0, 1.0), column(1.0, 1.0, 2.0), column(0.0, 0.0, 0.0), column(1.0, 1.0, 1.0))
    torch.testing.assert_close(found, column(1.0, 0.882497, 0.850805), rtol=0, atol=1e-6)


def test_overlap_is_the_integral_of_the_root_of_both_densities():
    grid = torch.linspace(-40, 40, 200_001, dtype=torch.float64)
    densities = [torch.distributions.Normal(m, s).log_prob(grid) for m, s in ((1.0, 2.0), (-0.5, 0.7))]
    area = torch.trapezoid((sum(densities) / 2).exp(), grid).item()
    assert overlap(column(1.0), column(2.0), column(-0.5), column(0.7)).item() == pytest.approx(area, abs=1e-6)


def test_a_target_without_its_head_axis_is_refused():
    """Three items and three heads: broadcasting would pair items with heads."""
    mu, sigma = noise(3, 3), torch.ones(3, 3)
    with pytest.raises(ShapeError, match=r"targets \(3,\)"):
        gaussian_nll(mu, sigma, torch.zeros(3))
    with pytest.raises(ShapeError, match="items, heads"):
        mse_reparam(mu, sigma, torch.zeros(3, 1), torch.zeros(3, 1))
