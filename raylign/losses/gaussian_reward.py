r"""Losses of rewards stated as a mean and a standard deviation, one value per item and head.

Shape letters: n items (responses or pairs), M heads.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F

from raylign.errors import ShapeError
from raylign.losses.reward import bradley_terry

_NODES = 32


def mse_reparam(mu: torch.Tensor, sigma: torch.Tensor, target: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    r"""Squared error of a sampled reward.

    Definition: \((\mu + \sigma\epsilon - t)^2\), \(\epsilon \sim N(0, 1)\). Its mean is `expected_mse`, so that the
    best sigma is 0 whatever the noise of the target: sigma learned by it says nothing.

    Args:
        mu: shape (n, M).
        sigma: above 0. Shape (n, M).
        target: reward to learn. Shape (n, 1) shared by the heads, or (n, M).
        eps: standard normal draws. Shape (n, M).

    Returns:
        Shape (n, M), squared reward units.

    Raises:
        ShapeError: shapes do not fit.

    Source: arXiv:2409.15360, stage 2, whose equation is not public; this form is reconstructed.
    """
    _check(mu, sigma, target)
    _check(mu, eps, target)
    return (mu + sigma * eps - target).square()


def expected_mse(mu: torch.Tensor, sigma: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    r"""Mean of `mse_reparam` over its draws: \((\mu - t)^2 + \sigma^2\).

    Args:
        mu: shape (n, M).
        sigma: shape (n, M).
        target: shape (n, 1) or (n, M).

    Returns:
        Shape (n, M), squared reward units.

    Raises:
        ShapeError: shapes do not fit.
    """
    _check(mu, sigma, target)
    return (mu - target).square() + sigma.square()


def mse_reparam_kl(
    mu: torch.Tensor, sigma: torch.Tensor, target: torch.Tensor, eps: torch.Tensor, *, kl_weight: float
) -> torch.Tensor:
    r"""`mse_reparam` with a pull of the stated Gaussian towards N(0, 1).

    Definition: `mse_reparam` + kl_weight x `kl_to_standard_normal`. The best sigma is
    \(\sqrt{w/(2 + w)}\) and the best mean \(2\bar t/(2 + w)\), w the weight: sigma stays off its floor but still does
    not depend on the noise of the target.

    Args:
        mu: shape (n, M).
        sigma: above 0. Shape (n, M).
        target: shape (n, 1) or (n, M), in units in which N(0, 1) is a sensible prior.
        eps: standard normal draws. Shape (n, M).
        kl_weight: w, at least 0.

    Returns:
        Shape (n, M).

    Raises:
        ShapeError: shapes do not fit.

    Source: ours, against the collapse of `mse_reparam`.
    """
    return mse_reparam(mu, sigma, target, eps) + kl_weight * kl_to_standard_normal(mu, sigma)


def kl_to_standard_normal(mu: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    r"""\(KL(N(\mu, \sigma^2) \Vert N(0, 1)) = \tfrac12(\mu^2 + \sigma^2 - 1) - \log\sigma\).

    Args:
        mu: shape (n, M).
        sigma: above 0. Shape (n, M).

    Returns:
        Shape (n, M), nats.
    """
    return (mu.square() + sigma.square() - 1) / 2 - sigma.log()


def gaussian_nll(mu: torch.Tensor, sigma: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    r"""Negative log-likelihood of the target without its constant: \((\mu - t)^2/(2\sigma^2) + \log\sigma\).

    Args:
        mu: shape (n, M).
        sigma: above 0. Shape (n, M).
        target: shape (n, 1) or (n, M).

    Returns:
        Shape (n, M), nats.

    Raises:
        ShapeError: shapes do not fit.

    Source: Nix and Weigend (1994).
    """
    _check(mu, sigma, target)
    return ((mu - target) / sigma).square() / 2 + sigma.log()


def beta_nll(mu: torch.Tensor, sigma: torch.Tensor, target: torch.Tensor, *, beta: float = 0.5) -> torch.Tensor:
    r"""`gaussian_nll` times \(\sigma^{2\beta}\) without gradient: items of large sigma keep pulling on the mean.

    Args:
        mu: shape (n, M).
        sigma: above 0. Shape (n, M).
        target: shape (n, 1) or (n, M).
        beta: 0 is `gaussian_nll`, 1 gives the mean the gradient of a squared error.

    Returns:
        Shape (n, M). Its gradient is what is meant, its value is no likelihood.

    Raises:
        ShapeError: shapes do not fit.

    Source: Seitzer et al. (2022), arXiv:2203.09168, Eq. 5.
    """
    return gaussian_nll(mu, sigma, target) * sigma.detach().square() ** beta


def margin_mse(
    chosen_mu: torch.Tensor,
    chosen_sigma: torch.Tensor,
    rejected_mu: torch.Tensor,
    rejected_sigma: torch.Tensor,
    margin_target: torch.Tensor,
    chosen_eps: torch.Tensor,
    rejected_eps: torch.Tensor,
) -> torch.Tensor:
    r"""Squared error of the difference of two sampled rewards: \((z_c - z_r - t)^2\), \(z = \mu + \sigma\epsilon\).

    It does not see an offset common to both, nor the noise of the target in sigma.

    Args:
        chosen_mu: shape (n, M), n pairs.
        chosen_sigma: shape (n, M).
        rejected_mu: shape (n, M).
        rejected_sigma: shape (n, M).
        margin_target: shape (n, 1) or (n, M), reward units.
        chosen_eps: standard normal draws. Shape (n, M).
        rejected_eps: others. Shape (n, M).

    Returns:
        Shape (n, M), squared reward units.

    Raises:
        ShapeError: shapes do not fit.

    Source: ours, the pair form of `mse_reparam`.
    """
    for other in (chosen_sigma, rejected_mu, rejected_sigma, chosen_eps, rejected_eps):
        _check(chosen_mu, other, margin_target)
    chosen, rejected = chosen_mu + chosen_sigma * chosen_eps, rejected_mu + rejected_sigma * rejected_eps
    return (chosen - rejected - margin_target).square()


def purm(
    margin_mean: torch.Tensor,
    margin_variance: torch.Tensor,
    *,
    form: Literal["log_mean", "mean_log", "probit"] = "log_mean",
) -> torch.Tensor:
    r"""Negative log-probability of the observed order when the margin is Gaussian.

    Definition, `log_mean`: \(-\log E\,\sigma(z)\), \(z \sim N(m, v)\), by 32-point Gauss-Hermite quadrature (to 1e-6
    up to v = 4, 1e-4 at 9, 1e-3 at 16). `mean_log`: \(-E \log\sigma(z)\), an upper bound of it that punishes every
    variance. `probit`: \(-\log\sigma(m/\sqrt{1 + \pi v/8})\).

    Args:
        margin_mean: m, difference of the two means. Shape (n, M) or any other.
        margin_variance: v, sum of the two variances, at least 0; its gradient at 0 is taken as 0. Same shape.
        form: how the average is taken.

    Returns:
        Loss per pair and head in nats, shape of the margins.

    Raises:
        ShapeError: mean and variance differ in shape.

    Source: arXiv:2503.22480; reviews note that the released code has `mean_log`. Probit: MacKay (1992).
    """
    _check(margin_mean, margin_variance, margin_mean)
    if form == "probit":
        return bradley_terry(margin_mean * torch.rsqrt(1 + math.pi / 8 * margin_variance))
    nodes, weights = (
        torch.tensor(part, dtype=margin_mean.dtype, device=margin_mean.device) for part in _standard_normal_rule()
    )
    scale = margin_variance.clamp_min(torch.finfo(margin_variance.dtype).tiny).sqrt()  # sqrt has no slope at 0
    log_probs = F.logsigmoid(margin_mean[..., None] + scale[..., None] * nodes)
    if form == "mean_log":
        return -(log_probs * weights).sum(-1)
    return -torch.logsumexp(log_probs + weights.log(), dim=-1)


def overlap(
    first_mu: torch.Tensor, first_sigma: torch.Tensor, second_mu: torch.Tensor, second_sigma: torch.Tensor
) -> torch.Tensor:
    r"""How much two stated rewards have in common, from 0 to 1 (Bhattacharyya coefficient).

    Definition: \(\sqrt{2 s_1 s_2/(s_1^2 + s_2^2)}\,\exp(-(m_1 - m_2)^2/(4(s_1^2 + s_2^2)))\).

    Args:
        first_mu: any shape.
        first_sigma: above 0. Same shape.
        second_mu: same shape.
        second_sigma: above 0. Same shape.

    Returns:
        Same shape; 1 for equal Gaussians.

    Raises:
        ShapeError: shapes differ.

    Source: Bhattacharyya (1943); as an uncertainty of a pair: arXiv:2503.22480, form reconstructed.
    """
    for other in (first_sigma, second_mu, second_sigma):
        _check(first_mu, other, first_mu)
    sum_of_squares = first_sigma.square() + second_sigma.square()
    narrowing = (2 * first_sigma * second_sigma / sum_of_squares).sqrt()
    return narrowing * torch.exp(-(first_mu - second_mu).square() / (4 * sum_of_squares))


@cache
def _standard_normal_rule() -> tuple[list[float], list[float]]:
    """Nodes and weights whose weighted sum is a mean under N(0, 1)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    return nodes.tolist(), (weights / weights.sum()).tolist()


def _check(mu: torch.Tensor, other: torch.Tensor, target: torch.Tensor) -> None:
    """A target of shape (n,) would silently pair items with heads."""
    fits = target.dim() == mu.dim() and all(t in (1, m) for t, m in zip(target.shape, mu.shape, strict=True))
    if mu.shape != other.shape or not fits:
        raise ShapeError(
            f"means {tuple(mu.shape)}, scales or draws {tuple(other.shape)} and targets {tuple(target.shape)} must be "
            "(items, heads), targets (items, 1) where the heads share them"
        )
