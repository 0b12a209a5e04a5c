r"""Fitting Gaussian heads to the rewards of a first stage: ridge start towards a random prior, then mini-batch AdamW.

All heads share every read of the features and are otherwise separate: the loss is a sum over heads of losses of their
own parameters, each head has its own draws, and AdamW works on each number alone.

Shape letters: N pairs, B pairs of a batch, I items (answers, two a pair), M heads, L layers, D hidden width, F = L D.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from raylign.errors import DataError, ShapeError
from raylign.losses.gaussian_reward import (
    beta_nll,
    expected_mse,
    gaussian_nll,
    kl_to_standard_normal,
    margin_mse,
    mse_reparam,
    mse_reparam_kl,
    purm,
)
from raylign.rewards.fit import check_finite
from raylign.rewards.gaussian import GaussianHeads, share_at_floor
from raylign.rewards.probes import check_pairs, fit_normalizer

GaussianLoss = Literal["gaussian_nll", "beta_nll", "mse_reparam", "mse_reparam_kl", "margin_mse", "purm"]

_OF_MARGINS = ("margin_mse", "purm")
_SAMPLED = ("mse_reparam", "mse_reparam_kl", "margin_mse")
_BLOCK = 512  # pairs widened to float32 at a time when all are needed
_KL_WEIGHT = 0.1  # of mse_reparam_kl: sigma settles at sqrt(.1 / 2.1) = .22 of the targets' spread
_SOLVER_STEPS = 64  # of conjugate gradients; each reads all features once
_SOLVER_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetUnits:
    """Units in which the training targets have mean 0 and standard deviation 1.

    Attributes:
        center: () reward that becomes 0.
        scale: () reward difference that becomes 1.
    """

    center: torch.Tensor
    scale: torch.Tensor

    def __call__(self, reward: torch.Tensor) -> torch.Tensor:
        """The reward in these units, any shape."""
        return (reward - self.center) / self.scale


@dataclass(frozen=True, slots=True, kw_only=True)
class GaussianEpoch:
    """State of a fit after an epoch; epoch 0 is the start.

    Attributes:
        epoch: passes over the training pairs so far.
        train_loss: mean over the epoch's batches, nan at epoch 0. Shape (M,).
        valid_loss: mean over the validation pairs; draws are replaced by their mean, beta_nll by the likelihood.
            Shape (M,).
        floor_share: share of validation answers with a sigma within twice the floor. Shape (M,).
    """

    epoch: int
    train_loss: torch.Tensor
    valid_loss: torch.Tensor
    floor_share: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class GaussianFit:
    """Fitted heads and how they came about.

    Attributes:
        heads: each head with the parameters of its best epoch, frozen (no gradient).
        best_epochs: of each head, the earliest epoch with the lowest validation loss.
        history: one record per epoch, from epoch 0.
        floor_share: of the kept parameters, see `GaussianEpoch`. Shape (M,).
        valid_error: root mean square of mean - target on the validation answers, target units. Shape (M,).
        valid_sigma: root mean square of sigma there; far from `valid_error`, it does not measure it. Shape (M,).
    """

    heads: GaussianHeads
    best_epochs: tuple[int, ...]
    history: tuple[GaussianEpoch, ...]
    floor_share: torch.Tensor
    valid_error: torch.Tensor
    valid_sigma: torch.Tensor


def standardize_targets(chosen_reward: torch.Tensor, rejected_reward: torch.Tensor) -> TargetUnits:
    """Units from the first-stage rewards of the training pairs; apply them to training and validation alike.

    Args:
        chosen_reward: of N training pairs. Shape (N,).
        rejected_reward: likewise.

    Raises:
        DataError: rewards that are all equal or not finite.
    """
    rewards_I = torch.cat([chosen_reward, rejected_reward]).double()
    scale = rewards_I.std(correction=0)
    if not bool(torch.isfinite(scale) & (scale > 0)):
        raise DataError(
            f"first-stage rewards of {len(rewards_I)} answers have spread {float(scale):g}, expected a finite one "
            "above 0: the first stage has learned nothing or has diverged (reward.learning_rate, reward.epochs)"
        )
    return TargetUnits(center=rewards_I.mean().float(), scale=scale.float())


def fit_gaussian(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    *,
    chosen_target: torch.Tensor,
    rejected_target: torch.Tensor,
    valid_chosen: torch.Tensor,
    valid_rejected: torch.Tensor,
    valid_chosen_target: torch.Tensor,
    valid_rejected_target: torch.Tensor,
    weights: torch.Tensor,
    loss: GaussianLoss,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    sigma_floor: float,
    generator: torch.Generator,
    head_seeds: Sequence[int] | None = None,
    ridge: float = 0.03,
    prior_scale: float = 1.0,
) -> GaussianFit:
    r"""Fit Gaussian heads to first-stage rewards: normaliser, start, then AdamW on a loss of mean and sigma.

    Start of a head: its mean is the weighted ridge regression of the targets, shrunk not to zero but to the head's own
    random weights, \(\min_w \sum_i m_i (w \cdot z_i + b - t_i)^2 + \lambda|w - w_0|^2 \sum_i m_i/2\), i an answer,
    \(w_0 \sim N(0, s^2/F)\).
    Where the data say something all heads agree; where they do not, heads keep what they drew, which is what makes them
    disagree about unfamiliar input even when all see the same pairs. Its sigma is its root mean square error on the
    validation pairs, not on the training pairs, which it may fit exactly.

    What sigma means afterwards, in target units. `gaussian_nll`, `beta_nll`: how far the target lies from the head's
    mean on held-out answers. With in-sample targets that is how badly a linear head mimics the first stage, with
    out-of-fold targets also how much the first stage depends on its data (.11 and .20 on 1319 real pairs, at errors of
    .11 and .19); never the noise of the labels, which the target has averaged away. `purm`: what the pairs say of it.
    `mse_reparam`, `margin_mse`: nothing, it shrinks as long as training goes on; `mse_reparam_kl`: its prior.

    The learning rate is divided by sqrt(F), so that a step moves the outputs alike at any width: undivided, steps of
    1e-3 on 1152 inputs threw the validation loss from -1.7 to 16 and back.

    Args:
        chosen: hidden states of preferred answers, any floating dtype. Shape (N, L, D), N at least 1.
        rejected: likewise of dispreferred answers.
        chosen_target: first-stage reward in `TargetUnits`; out of fold where there is a choice. Shape (N,).
        rejected_target: likewise.
        valid_chosen: pairs of other prompts that choose each head's epoch and start its sigma.
        valid_rejected: likewise.
        valid_chosen_target: in the same units.
        valid_rejected_target: likewise.
        weights: how often each head counts a pair, both answers alike; Poisson(1) draws are a bootstrap. Shape (N, M).
        loss: `purm` reads the order of the pairs, `margin_mse` the targets' differences, the others each target.
        epochs: passes over the pairs; 0 keeps the start.
        batch_size: pairs of one step.
        learning_rate: AdamW step times sqrt(F), constant.
        weight_decay: AdamW weight decay.
        sigma_floor: smallest standard deviation, target units.
        generator: CPU generator of the order of pairs, the same for all heads.
        head_seeds: of each head's start and draws, M of them; None draws them from `generator`.
        ridge: \(\lambda\), penalty per pair of the start.
        prior_scale: s, root mean square output of a random start, target units.

    Returns:
        The heads at their best epochs and the history.

    Raises:
        ShapeError: features, targets, weights or seeds disagree in shape.
        DataError: no pair, states that are not finite, or a head without pairs.

    Source: arXiv:2409.15360, stage 2; start after Osband et al. (2018), arXiv:1806.03335, and sample-then-optimise,
    Matthews et al. (2017); settings ours.
    """
    check_pairs(chosen, rejected)
    check_pairs(valid_chosen, valid_rejected)
    target_N2 = _targets(chosen, chosen_target, rejected_target)
    valid_N2 = _targets(valid_chosen, valid_chosen_target, valid_rejected_target)
    scaled_NM = _mean_one(weights.to(chosen.device), len(chosen))
    num_pairs, num_layers, width = chosen.shape
    num_heads, num_inputs = weights.shape[1], num_layers * width
    if head_seeds is None:
        head_seeds = torch.randint(2**62, (num_heads,), generator=generator).tolist()
    if len(head_seeds) != num_heads:
        raise ShapeError(f"{len(head_seeds)} head_seeds for {num_heads} heads, the columns of weights")
    sources = [torch.Generator().manual_seed(seed) for seed in head_seeds]

    heads = GaussianHeads(num_layers, width, num_heads=num_heads, sigma_floor=sigma_floor).to(chosen.device)
    heads.layer_mean, heads.layer_rms = fit_normalizer(chosen, rejected)
    with torch.no_grad():
        draws_MF = torch.stack([torch.randn(num_inputs, generator=source) for source in sources])
        heads.weight_mean.copy_(draws_MF.view_as(heads.weight_mean) * prior_scale / math.sqrt(num_inputs))
        _add_ridge_solution(heads, chosen, rejected, target_N2, scaled_NM, ridge)
        error_M = (_predict(heads, valid_chosen, valid_rejected)[0] - _items(valid_N2)).square().mean(0).sqrt()
        start_M = (error_M - sigma_floor).clamp_min(sigma_floor)
        heads.bias_scale.copy_(start_M + torch.log(-torch.expm1(-start_M)))  # inverse of softplus

    def validated(epoch: int, train_loss_M: torch.Tensor) -> GaussianEpoch:
        mu, sigma = _predict(heads, valid_chosen, valid_rejected)
        return GaussianEpoch(
            epoch=epoch,
            train_loss=train_loss_M,
            valid_loss=_expected_losses(loss, mu, sigma, _items(valid_N2)).mean(0),
            floor_share=share_at_floor(sigma, heads.sigma_floor),
        )

    if loss in _OF_MARGINS:  # they do not see an offset; Adam would blow up the rounding error that is its gradient
        heads.bias_mean.requires_grad_(False)
    trained = {name: parameter for name, parameter in heads.named_parameters() if parameter.requires_grad}
    step = learning_rate / math.sqrt(num_inputs)
    optimizer = torch.optim.AdamW(trained.values(), lr=step, weight_decay=weight_decay, foreach=False)
    history = [validated(0, torch.full_like(error_M, math.nan))]
    best_loss_M, best_epochs = history[0].valid_loss, [0] * num_heads
    best = {name: parameter.detach().clone() for name, parameter in trained.items()}
    for epoch in range(1, epochs + 1):
        order_N = torch.randperm(num_pairs, generator=generator).to(chosen.device)
        losses = []
        for batch in torch.split(order_N, batch_size):
            mu, sigma = heads.moments(heads.inputs(torch.cat([chosen[batch], rejected[batch]])))
            if loss in _SAMPLED:
                eps = torch.stack([torch.randn(len(mu), generator=source) for source in sources], dim=1).to(mu.device)
                losses_BM = _sampled_losses(loss, mu, sigma, _items(target_N2[batch]), eps)
            else:
                losses_BM = _exact_losses(loss, mu, sigma, _items(target_N2[batch]))
            loss_M = (losses_BM * scaled_NM[batch]).mean(0)
            optimizer.zero_grad()
            loss_M.sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss_M.detach())
        check_finite(losses, epoch)
        history.append(validated(epoch, torch.stack(losses).mean(0)))
        is_better_M = history[-1].valid_loss < best_loss_M
        best_loss_M = torch.where(is_better_M, history[-1].valid_loss, best_loss_M)
        best_epochs = [epoch if is_better else kept for is_better, kept in zip(is_better_M, best_epochs, strict=True)]
        for name, parameter in trained.items():
            best[name][is_better_M] = parameter.detach()[is_better_M]
    heads.load_state_dict(best, strict=False)  # the rest did not move
    mu, sigma = _predict(heads, valid_chosen, valid_rejected)
    return GaussianFit(
        heads=heads.requires_grad_(False),
        best_epochs=tuple(best_epochs),
        history=tuple(history),
        floor_share=share_at_floor(sigma, heads.sigma_floor),
        valid_error=(mu - _items(valid_N2)).square().mean(0).sqrt(),
        valid_sigma=sigma.square().mean(0).sqrt(),
    )


def _exact_losses(loss: GaussianLoss, mu: torch.Tensor, sigma: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Losses without draws per pair, (B, M), from (2B, M) moments of the chosen and then the rejected answers."""
    if loss == "purm":
        (chosen_mu, rejected_mu), (chosen_sigma, rejected_sigma) = mu.chunk(2), sigma.chunk(2)
        return purm(chosen_mu - rejected_mu, chosen_sigma.square() + rejected_sigma.square())
    return _of_pairs((beta_nll if loss == "beta_nll" else gaussian_nll)(mu, sigma, target))


def _sampled_losses(
    loss: GaussianLoss, mu: torch.Tensor, sigma: torch.Tensor, target: torch.Tensor, eps: torch.Tensor
) -> torch.Tensor:
    """Losses of draws, likewise; eps is (2B, M)."""
    if loss == "margin_mse":
        (chosen_mu, rejected_mu), (chosen_sigma, rejected_sigma) = mu.chunk(2), sigma.chunk(2)
        margin_target = torch.sub(*target.chunk(2))
        return margin_mse(chosen_mu, chosen_sigma, rejected_mu, rejected_sigma, margin_target, *eps.chunk(2))
    if loss == "mse_reparam":
        return _of_pairs(mse_reparam(mu, sigma, target, eps))
    return _of_pairs(mse_reparam_kl(mu, sigma, target, eps, kl_weight=_KL_WEIGHT))


def _expected_losses(loss: GaussianLoss, mu: torch.Tensor, sigma: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """What epochs are compared by, likewise: draws replaced by their mean, beta_nll by the likelihood."""
    if loss == "margin_mse":
        return expected_mse(torch.sub(*mu.chunk(2)), torch.hypot(*sigma.chunk(2)), torch.sub(*target.chunk(2)))
    if loss in ("mse_reparam", "mse_reparam_kl"):
        prior = _KL_WEIGHT * kl_to_standard_normal(mu, sigma) if loss == "mse_reparam_kl" else 0.0
        return _of_pairs(expected_mse(mu, sigma, target) + prior)
    return _exact_losses("gaussian_nll" if loss == "beta_nll" else loss, mu, sigma, target)


def _of_pairs(losses: torch.Tensor) -> torch.Tensor:
    """Mean of both answers, (B, M) from (2B, M)."""
    chosen, rejected = losses.chunk(2)
    return (chosen + rejected) / 2


def _items(pairs_N2: torch.Tensor) -> torch.Tensor:
    """Chosen and then rejected answers in one column, (2N, 1)."""
    return pairs_N2.T.reshape(-1, 1)


def _predict(heads: GaussianHeads, chosen: torch.Tensor, rejected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and standard deviations of all answers, chosen first, each (2N, M), a block at a time."""
    with torch.no_grad():
        parts = [
            heads.moments(heads.inputs(block)) for half in (chosen, rejected) for block in torch.split(half, _BLOCK)
        ]
    return torch.cat([mu for mu, _ in parts]), torch.cat([sigma for _, sigma in parts])


def _add_ridge_solution(
    heads: GaussianHeads,
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    target_N2: torch.Tensor,
    scaled_NM: torch.Tensor,
    ridge: float,
) -> None:
    """Move the means to the ridge regression that is shrunk towards where they are; biases are not shrunk.

    By conjugate gradients, because the F x F matrix of the normal equations outgrows memory with wide models. All heads
    share each product with the features; a head that has converged stands still.
    """
    num_pairs = len(chosen)
    start_FM = torch.cat([heads.weight_mean.flatten(1).T, heads.bias_mean[None]])  # the last row is the bias
    penalty_F1 = torch.full_like(start_FM[:, :1], ridge / 2)
    penalty_F1[-1] = 0

    def blocks() -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        for index in torch.split(torch.arange(num_pairs, device=chosen.device), _BLOCK):
            inputs_IF = heads.inputs(torch.cat([chosen[index], rejected[index]]))
            inputs_IF = torch.cat([inputs_IF, torch.ones_like(inputs_IF[:, :1])], dim=1)
            yield inputs_IF, scaled_NM[index].repeat(2, 1) / (2 * num_pairs), _items(target_N2[index])

    def product(direction_FM: torch.Tensor) -> torch.Tensor:
        out_FM = penalty_F1 * direction_FM
        for inputs_IF, weights_IM, _ in blocks():
            out_FM += inputs_IF.T @ (weights_IM * (inputs_IF @ direction_FM))
        return out_FM

    residual_FM, solution_FM = torch.zeros_like(start_FM), torch.zeros_like(start_FM)
    for inputs_IF, weights_IM, target_I1 in blocks():
        residual_FM += inputs_IF.T @ (weights_IM * (target_I1 - inputs_IF @ start_FM))
    direction_FM, norm_M = residual_FM.clone(), residual_FM.square().sum(0)
    limit_M = norm_M * _SOLVER_TOLERANCE**2
    for _ in range(_SOLVER_STEPS):
        is_active_M = norm_M > limit_M
        if not bool(is_active_M.any()):
            break
        applied_FM = product(direction_FM)
        size_M = torch.where(is_active_M, norm_M / (direction_FM * applied_FM).sum(0), 0.0)
        solution_FM += size_M * direction_FM
        residual_FM -= size_M * applied_FM
        next_M = residual_FM.square().sum(0)
        direction_FM = residual_FM + torch.where(is_active_M, next_M / norm_M, 0.0) * direction_FM
        norm_M = torch.where(is_active_M, next_M, norm_M)
    heads.weight_mean.add_(solution_FM[:-1].T.reshape(heads.weight_mean.shape))
    heads.bias_mean.add_(solution_FM[-1])


def _targets(chosen: torch.Tensor, chosen_target: torch.Tensor, rejected_target: torch.Tensor) -> torch.Tensor:
    if chosen_target.shape != (len(chosen),) or rejected_target.shape != (len(chosen),):
        raise ShapeError(
            f"targets {tuple(chosen_target.shape)} and {tuple(rejected_target.shape)} must both be ({len(chosen)},), "
            "one per pair"
        )
    return torch.stack([chosen_target, rejected_target], dim=1).to(chosen.device, torch.float32)


def _mean_one(weights_NM: torch.Tensor, num_pairs: int) -> torch.Tensor:
    """Weights over each head's mean weight, not over the batch's, which would bias small batches."""
    if weights_NM.dim() != 2 or len(weights_NM) != num_pairs or weights_NM.shape[1] < 1:
        raise ShapeError(f"weights {tuple(weights_NM.shape)} must be ({num_pairs} pairs, at least one head)")
    mean_M = weights_NM.float().mean(0)
    if not bool((mean_M > 0).all()):
        raise DataError(f"head {int(mean_M.argmin())} has no pair of positive weight; draw its weights again")
    return weights_NM / mean_M
