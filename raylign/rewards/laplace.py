r"""Laplace posterior of a linear Bradley-Terry reward: the most probable weights and what the pairs leave open.

Everything is float64, by Cholesky. `laplace_statistics` adds its d x d matrix up block by block, and those of shards of
the data add up to those of all of it. A fit holds about four such matrices while it runs and keeps one, the factor; a
reward cross-fitted over K folds keeps K + 1 of them, and so does whatever loads it (0.5 GiB each at d = 8192).

Shape letters: n responses, B pairs of a block, L layers, D hidden width, d = L D weights, M draws.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from raylign.errors import DataError, ShapeError, TrainingError
from raylign.losses.reward import bradley_terry
from raylign.rewards.posterior import MarginPosterior, RewardHead, RewardPosterior
from raylign.rewards.probes import check_pairs, fit_normalizer

MAX_WEIGHTS = 8192
PRIOR_PRECISIONS = (1e5, 1e4, 1e3, 1e2, 1e1, 1.0)  # of 'fitted', each started from the solution before

_BLOCK = 512  # pairs widened to float64 at a time
_NEWTON_STEPS = 50
_TOLERANCE = 1e-12  # nats per pair promised by a step that is taken as the last


class LaplaceReward(RewardHead):
    r"""Reward linear in the normalised states of all layers, with a Gaussian posterior over its weights.

    Definition: \(r = w \cdot \phi\), \(\phi\) the states \((h_l - \mu_l)/\rho_l\) side by side; \(w \sim N(\hat w,
    H^{-1})\), \(H = L L^\top\). The deviations are \(L^{-1}\phi\), so that a margin has the exact variance
    \(x^\top H^{-1} x\) of \(x = \phi_c - \phi_r\).

    Only margins mean something: pairs say nothing of an offset, and the variance of a single reward is that of its
    difference to the mean training answer.

    Args:
        weight: \(\hat w\). Shape (d,), float64.
        hessian_factor: L, lower triangular. Shape (d, d), float64.
        layer_mean: \(\mu\). Shape (L, D).
        layer_rms: \(\rho\). Shape (L,).
        draws: M draws of w. Shape (M, d), float64.
        prior_precision: of the prior of w, a record only. Shape ().

    Attributes:
        weight, hessian_factor, layer_mean, layer_rms, draws, prior_precision: buffers; none is trained by gradient.

    Raises:
        ShapeError: tensors that do not fit together.

    Source: MacKay (1992); on adapters of a language model, arXiv:2402.13210; this last-layer form is derived.
    """

    weight: torch.Tensor
    hessian_factor: torch.Tensor
    layer_mean: torch.Tensor
    layer_rms: torch.Tensor
    draws: torch.Tensor
    prior_precision: torch.Tensor

    def __init__(
        self,
        *,
        weight: torch.Tensor,
        hessian_factor: torch.Tensor,
        layer_mean: torch.Tensor,
        layer_rms: torch.Tensor,
        draws: torch.Tensor,
        prior_precision: torch.Tensor,
    ) -> None:
        super().__init__()
        self.num_layers, self.hidden_size = layer_mean.shape
        self.num_heads, num_weights = draws.shape
        if weight.shape != (layer_mean.numel(),) or hessian_factor.shape != (num_weights, num_weights):
            raise ShapeError(
                f"weight {tuple(weight.shape)}, hessian_factor {tuple(hessian_factor.shape)} and draws "
                f"{tuple(draws.shape)} must all be of the {layer_mean.numel()} coordinates of {tuple(layer_mean.shape)}"
            )
        self.register_buffer("weight", weight)
        self.register_buffer("hessian_factor", hessian_factor)
        self.register_buffer("layer_mean", layer_mean)
        self.register_buffer("layer_rms", layer_rms)
        self.register_buffer("draws", draws)
        self.register_buffer("prior_precision", prior_precision)

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> LaplaceReward:
        """The posterior that `state_dict` describes.

        Raises:
            KeyError: a tensor is missing.
            ShapeError: tensors that do not fit together.
        """
        names = ("weight", "hessian_factor", "layer_mean", "layer_rms", "draws", "prior_precision")
        return cls(**{name: state[name].clone() for name in names})

    def forward(self, features_nLD: torch.Tensor) -> RewardPosterior:
        """Belief about n responses, float32; the members are the draws and state no scale of their own."""
        self.check_features(features_nLD)
        inputs_nd = _inputs(features_nLD, self.layer_mean, self.layer_rms)
        deviations_dn = torch.linalg.solve_triangular(self.hessian_factor, inputs_nd.T, upper=False)
        return RewardPosterior(
            mean=(inputs_nd @ self.weight).float(),
            deviations=deviations_dn.T.float(),
            head_rewards=(inputs_nd @ self.draws.T).float(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LaplaceStatistics:
    """What some pairs say about the weights at one point; without the prior, so that shards add up.

    Attributes:
        num_pairs: B.
        loss: () sum of the Bradley-Terry losses, nats.
        gradient: (d,) of it.
        hessian: (d, d) of it.
    """

    num_pairs: int
    loss: torch.Tensor
    gradient: torch.Tensor
    hessian: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LaplaceSolution:
    """Most probable weights under a prior, and the curvature there.

    Attributes:
        weight: (d,).
        hessian_factor: (d, d) lower triangular L, L L' the Hessian with the prior.
        prior_precision: of the prior N(0, 1 / prior_precision).
    """

    weight: torch.Tensor
    hessian_factor: torch.Tensor
    prior_precision: float

    def margin(self, differences: torch.Tensor) -> MarginPosterior:
        """Belief about the margins of B pairs.

        Args:
            differences: inputs of the chosen minus those of the rejected answers. Shape (B, d), float64.
        """
        deviations_dB = torch.linalg.solve_triangular(self.hessian_factor, differences.T, upper=False)
        return MarginPosterior(mean=differences @ self.weight, variance=deviations_dB.square().sum(0))


@dataclass(frozen=True, slots=True, kw_only=True)
class LaplaceFit:
    """A fitted posterior and the priors that it was chosen from.

    Attributes:
        head: the posterior.
        prior_precision: of its prior.
        valid_losses: mean of -log preference_prob over the validation pairs by prior precision, nats.
    """

    head: LaplaceReward
    prior_precision: float
    valid_losses: dict[float, float]


def laplace_statistics(differences: torch.Tensor, weight: torch.Tensor) -> LaplaceStatistics:
    r"""Loss, gradient and Hessian of the Bradley-Terry likelihood of B pairs.

    Definition: \(\sum_i -\log\sigma(m_i)\), \(-\sum_i \sigma(-m_i) x_i\), \(\sum_i \sigma(m_i)\sigma(-m_i) x_i
    x_i^\top\), \(m_i = x_i \cdot w\).

    Args:
        differences: x, inputs of the chosen minus those of the rejected answers. Shape (B, d), float64.
        weight: w. Shape (d,), float64.

    Raises:
        ShapeError: they do not fit together.
    """
    if differences.dim() != 2 or differences.shape[1:] != weight.shape:
        raise ShapeError(f"differences {tuple(differences.shape)} must be (B, d), weights {tuple(weight.shape)} (d,)")
    margin_B = differences @ weight
    wrong_B = torch.sigmoid(-margin_B)
    scaled_Bd = differences * (wrong_B * torch.sigmoid(margin_B)).sqrt()[:, None]
    return LaplaceStatistics(
        num_pairs=len(differences),
        loss=bradley_terry(margin_B).sum(),
        gradient=-(wrong_B @ differences),
        hessian=scaled_Bd.T @ scaled_Bd,
    )


def merge_statistics(parts: Sequence[LaplaceStatistics]) -> LaplaceStatistics:
    """Of all pairs, from those of shards at the same weights, at least one."""
    return LaplaceStatistics(
        num_pairs=sum(part.num_pairs for part in parts),
        loss=torch.stack([part.loss for part in parts]).sum(),
        gradient=torch.stack([part.gradient for part in parts]).sum(0),
        hessian=torch.stack([part.hessian for part in parts]).sum(0),
    )


def solve_laplace(
    statistics_at: Callable[[torch.Tensor], LaplaceStatistics], start: torch.Tensor, *, prior_precision: float
) -> LaplaceSolution:
    r"""Newton's method on \(\sum_i -\log\sigma(x_i \cdot w) + \lambda|w|^2/2\), a step halved while it does not help.

    Args:
        statistics_at: of all pairs at given weights, wherever the pairs are.
        start: weights to start from. Shape (d,), float64.
        prior_precision: \(\lambda\), above 0.

    Returns:
        The minimum and the Hessian there.

    Raises:
        TrainingError: no minimum within fifty steps.

    Source: arXiv:2402.13210 for the posterior; the method is iteratively reweighted least squares.
    """
    weight_d, statistics = start, statistics_at(start)
    for _ in range(_NEWTON_STEPS):
        gradient_d = statistics.gradient + prior_precision * weight_d
        factor_dd = _factor(statistics.hessian, prior_precision)
        step_d = torch.cholesky_solve(gradient_d[:, None], factor_dd)[:, 0]
        if bool(gradient_d @ step_d <= _TOLERANCE * statistics.num_pairs):
            weight_d = weight_d - step_d
            factor_dd = _factor(statistics_at(weight_d).hessian, prior_precision)
            return LaplaceSolution(weight=weight_d, hessian_factor=factor_dd, prior_precision=prior_precision)
        moved = statistics_at(weight_d - step_d)
        while _objective(moved, weight_d - step_d, prior_precision) > _objective(statistics, weight_d, prior_precision):
            step_d = step_d / 2
            moved = statistics_at(weight_d - step_d)
        weight_d, statistics = weight_d - step_d, moved
    raise TrainingError(
        f"the Laplace fit has not converged after {_NEWTON_STEPS} Newton steps at prior precision "
        f"{prior_precision:g}; raise reward.prior_precision"
    )


def fit_laplace(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    *,
    valid_chosen: torch.Tensor,
    valid_rejected: torch.Tensor,
    prior_precision: float | Literal["fitted"],
    num_draws: int,
    generator: torch.Generator,
) -> LaplaceFit:
    """Fit the posterior of a linear reward to labelled pairs.

    Args:
        chosen: hidden states of preferred answers, any floating dtype. Shape (N, L, D), N at least 1.
        rejected: likewise of dispreferred answers.
        valid_chosen: pairs of other prompts that choose the prior; keep reported numbers off them.
        valid_rejected: likewise.
        prior_precision: above 0, or 'fitted': `PRIOR_PRECISIONS` from the largest down, while the likelihood of
            the validation pairs rises, uncertainty of the weights included.
        num_draws: M, draws of the weights that stand for members.
        generator: CPU generator of the draws.

    Returns:
        The posterior and the losses of the priors tried; one prior when it was given.

    Raises:
        ShapeError: features disagree in shape.
        DataError: no pair, states that are not finite, or more than `MAX_WEIGHTS` weights.
        TrainingError: Newton's method has not converged.
    """
    check_pairs(chosen, rejected)
    check_pairs(valid_chosen, valid_rejected)
    check_size(*chosen.shape[1:])
    layer_mean_LD, layer_rms_L = fit_normalizer(chosen, rejected)

    def differences(some_chosen: torch.Tensor, some_rejected: torch.Tensor) -> torch.Tensor:
        chosen_Bd, rejected_Bd = (_inputs(half, layer_mean_LD, layer_rms_L) for half in (some_chosen, some_rejected))
        return chosen_Bd - rejected_Bd

    def statistics_at(weight_d: torch.Tensor) -> LaplaceStatistics:
        blocks = zip(torch.split(chosen, _BLOCK), torch.split(rejected, _BLOCK), strict=True)
        parts = (laplace_statistics(differences(*block), weight_d) for block in blocks)
        return functools.reduce(lambda pooled, part: merge_statistics([pooled, part]), parts)  # two matrices at a time

    held_out_Bd = differences(valid_chosen, valid_rejected)

    def held_out_loss(solution: LaplaceSolution) -> float:
        return float(-solution.margin(held_out_Bd).preference_prob().log().mean())

    start_d = torch.zeros(layer_mean_LD.numel(), dtype=torch.float64, device=chosen.device)
    precisions = PRIOR_PRECISIONS if prior_precision == "fitted" else (prior_precision,)
    best = solve_laplace(statistics_at, start_d, prior_precision=precisions[0])
    valid_losses = {precisions[0]: held_out_loss(best)}
    for precision in precisions[1:]:
        solution = solve_laplace(statistics_at, best.weight, prior_precision=precision)
        valid_losses[precision] = held_out_loss(solution)
        if valid_losses[precision] >= valid_losses[best.prior_precision]:
            break
        best = solution
    noise_dM = torch.randn(num_draws, len(start_d), generator=generator, dtype=torch.float64).T.to(chosen.device)
    spread_dM = torch.linalg.solve_triangular(best.hessian_factor.T, noise_dM, upper=True)
    head = LaplaceReward(
        weight=best.weight,
        hessian_factor=best.hessian_factor,
        layer_mean=layer_mean_LD,
        layer_rms=layer_rms_L,
        draws=best.weight + spread_dM.T,
        prior_precision=torch.tensor(best.prior_precision, dtype=torch.float64, device=chosen.device),
    )
    return LaplaceFit(head=head, prior_precision=best.prior_precision, valid_losses=valid_losses)


def _inputs(features_nLD: torch.Tensor, layer_mean_LD: torch.Tensor, layer_rms_L: torch.Tensor) -> torch.Tensor:
    """Normalised states of all layers, side by side, (n, d) float64."""
    return ((features_nLD.double() - layer_mean_LD) / layer_rms_L[:, None]).flatten(1)


def _objective(statistics: LaplaceStatistics, weight_d: torch.Tensor, prior_precision: float) -> float:
    return float(statistics.loss + prior_precision * weight_d.square().sum() / 2)


def _factor(hessian_dd: torch.Tensor, prior_precision: float) -> torch.Tensor:
    """Cholesky factor with the prior."""
    curved_dd = hessian_dd.clone()
    curved_dd.diagonal().add_(prior_precision)
    factor_dd: torch.Tensor = torch.linalg.cholesky(curved_dd)
    return factor_dd


def check_size(num_layers: int, width: int) -> None:
    """Refuse states whose posterior would not fit.

    Raises:
        DataError: more than `MAX_WEIGHTS` weights, with the memory that they would take.
    """
    num_weights = num_layers * width
    if num_weights > MAX_WEIGHTS:
        raise DataError(
            f"a Laplace posterior over {num_layers} layers of width {width} has {num_weights} weights, and each of its "
            f"matrices would take {num_weights**2 * 8 / 2**30:.1f} GiB; at most {MAX_WEIGHTS} weights are allowed. "
            "Keep fewer layers (features.layers=[k]) or use reward.kind=ensemble"
        )
