r"""From reward margins to the label confidence \(\gamma\) that weighs a pair in the loss (E4).

Nothing here carries a gradient: the reward tells the loss what to believe and is not trained by it.

Shape letter: B pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from raylign.errors import DataError, ShapeError
from raylign.rewards.posterior import MarginPosterior
from raylign.types import PairConfidence

Level = Literal["pair", "batch"]
Squash = Literal["sigmoid", "none"]


@dataclass(frozen=True, slots=True)
class EmaCenter:
    """Running mean reward that E4 subtracts.

    Attributes:
        value: the mean, a tensor without dimensions; None before the first batch.
    """

    value: torch.Tensor | None = None


def update_center(state: EmaCenter, mean_reward: torch.Tensor, *, decay: float) -> EmaCenter:
    r"""The running mean after one more batch.

    Definition: \(c_{t+1} = d c_t + (1 - d) \bar r\); the first batch sets \(c = \bar r\), so there is no start to
    forget.

    Args:
        state: before the batch.
        mean_reward: mean over chosen and rejected rewards of the global batch. Shape ().
        decay: d in [0, 1), per update.

    Returns:
        The state after the batch; the given one is unchanged.
    """
    mean_reward = mean_reward.detach()
    if state.value is None:
        return EmaCenter(mean_reward.clone())
    return EmaCenter(decay * state.value + (1 - decay) * mean_reward)


def label_confidence(
    chosen_reward: torch.Tensor,
    rejected_reward: torch.Tensor,
    *,
    alpha: float,
    floor: float,
    center: torch.Tensor | float,
    level: Level,
    squash: Squash,
    temperature: float,
) -> torch.Tensor:
    r"""Probability that the stored order of each pair is right, as the reward sees it.

    Definition: \(\gamma = \max(\mathrm{floor}, \sigma(x))\) with

    - squash "sigmoid": \(x = \alpha(\tilde s_c - \tilde s_r)\), \(\tilde s = \sigma(r - \mathrm{center}) - 1/2\);
    - squash "none": \(x = (r_c - r_r)/\mathrm{temperature}\), blind to a common offset.

    Level "batch" averages x over the batch first and gives every pair the same value, as the released code does; that
    hides single flips and depends on how the batch is cut, so the whole global batch must be passed at once.

    Args:
        chosen_reward: shape (B,).
        rejected_reward: shape (B,).
        alpha: sharpness, read by squash "sigmoid" only.
        floor: smallest value; 0 allows flips, 1/2 forbids them and with them the fixed point of E7.
        center: subtracted from both rewards, read by squash "sigmoid" only.
        level: one value per pair, or one for the batch.
        squash: whether rewards pass through a sigmoid first.
        temperature: reward units, read by squash "none" only.

    Returns:
        Confidence, detached. Shape (B,).

    Raises:
        ShapeError: the two rewards differ in shape.

    Source: released code of arXiv:2503.10093; its pair form is reconstructed (E4 in docs/math.md).
    """
    if chosen_reward.shape != rejected_reward.shape:
        raise ShapeError(
            f"chosen {tuple(chosen_reward.shape)} and rejected {tuple(rejected_reward.shape)} rewards must be alike"
        )
    chosen_reward, rejected_reward = chosen_reward.detach(), rejected_reward.detach()
    if squash == "sigmoid":
        # The two halves of E4 cancel: s~_c - s~_r is a difference of plain sigmoids.
        logits = alpha * (torch.sigmoid(chosen_reward - center) - torch.sigmoid(rejected_reward - center))
    else:
        logits = (chosen_reward - rejected_reward) / temperature
    if level == "batch":
        logits = logits.mean().expand_as(logits)
    return torch.sigmoid(logits).clamp(min=floor)  # E4


def pair_confidence(
    chosen_reward: torch.Tensor,
    rejected_reward: torch.Tensor,
    margin_variance: torch.Tensor,
    *,
    alpha: float,
    floor: float,
    center: torch.Tensor | float,
    level: Level,
    squash: Squash,
    temperature: float,
) -> PairConfidence:
    r"""`label_confidence` under a posterior of the margin: what the reward is unsure of moves towards 1/2.

    Definition: both rewards move towards their mean until the margin is \(m / \sqrt{1 + \pi v / (8 T^2)}\), then E4.
    For squash "none" this is the probit approximation of \(E\,\sigma(m/T)\) under \(m \sim N(\bar m, v)\), T the
    temperature. For squash "sigmoid", which reads rewards as logits, T is 1.

    Args:
        chosen_reward: posterior mean. Shape (B,).
        rejected_reward: posterior mean. Shape (B,).
        margin_variance: v, posterior variance of the margin; 0 changes nothing. Shape (B,).
        alpha: see `label_confidence`, likewise the following.
        floor: smallest value.
        center: subtracted from both rewards.
        level: one value per pair, or one for the batch.
        squash: whether rewards pass through a sigmoid first.
        temperature: reward units.

    Returns:
        Margin mean and variance as given and the confidence, all detached, shape (B,).

    Raises:
        ShapeError: the three differ in shape.

    Source: MacKay (1992), "The evidence framework applied to classification networks".
    """
    if margin_variance.shape != chosen_reward.shape:
        raise ShapeError(
            f"margin_variance {tuple(margin_variance.shape)} must be one per pair, {tuple(chosen_reward.shape)}"
        )
    margin_mean, margin_variance = (chosen_reward - rejected_reward).detach(), margin_variance.detach()
    unit = temperature if squash == "none" else 1.0
    shrink = torch.rsqrt(1 + math.pi / 8 * margin_variance / unit**2)  # MacKay's kappa
    step = (1 - shrink) * margin_mean / 2
    gamma = label_confidence(
        chosen_reward - step,
        rejected_reward + step,
        alpha=alpha,
        floor=floor,
        center=center,
        level=level,
        squash=squash,
        temperature=temperature,
    )
    return PairConfidence(margin_mean=margin_mean, margin_variance=margin_variance, label_confidence=gamma)


def fit_temperature(margin: MarginPosterior) -> float:
    r"""Temperature that makes `MarginPosterior.preference_prob` the probability that the stored order is right.

    Minimises the cross-entropy of \(\sigma(m/\sqrt{T^2 + \pi v/8})\) over T between 1/20 and 100 root-mean-square
    margins, by bisection on the sign of its slope; without variance the loss is convex in 1/T. The target is Platt's
    \((B+1)/(B+2)\) instead of 1, which keeps T away from its bound when the reward orders all pairs rightly. A reward
    no better than chance gets the upper bound, hence \(\gamma\) near 1/2.

    Args:
        margin: belief about pairs that the reward was not fitted on, B at least 1.

    Returns:
        T in reward units; 1 when all margins are 0.

    Raises:
        DataError: no margin, or one that is not finite.

    Source: Platt (1999); Guo et al. (2017), arXiv:1706.04599, Section 4.2, for pairs.
    """
    mean, variance = margin.mean.detach().double(), margin.variance.detach().double()
    if mean.numel() == 0 or not bool(torch.isfinite(mean).all()):
        raise DataError("fitting a temperature needs finite margins of at least one held-out pair")
    scale = float(mean.square().mean().sqrt())
    if scale == 0:
        return 1.0
    mean, variance = mean / scale, variance / scale**2
    target = (mean.numel() + 1) / (mean.numel() + 2)
    low, high = math.log(1 / 100), math.log(20)  # of the inverse temperature
    for _ in range(60):
        middle = (low + high) / 2
        sharpness = torch.rsqrt(math.exp(-2 * middle) + math.pi / 8 * variance)
        # d loss / d (1/T), up to a factor above 0 that is the same for all pairs
        slope = (sharpness**3 * mean * (torch.sigmoid(sharpness * mean) - target)).mean()
        low, high = (low, middle) if bool(slope > 0) else (middle, high)
    return scale / math.exp((low + high) / 2)


def count_flips(confidence: torch.Tensor) -> torch.Tensor:
    """Number of pairs whose stored order the reward reverses, gamma below one half.

    Args:
        confidence: gamma. Shape (B,).

    Returns:
        The count. Shape (), int64.
    """
    return (confidence < 0.5).sum()
