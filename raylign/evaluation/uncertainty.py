r"""Whether an uncertain reward model is right when it claims to be, and whether it notices what it has not seen.

Everything is read off arrays, so that any reward posterior can be judged: intervals of rewards, margins with their
variance, or a signal per response. A tie counts as wrong. Shape letters: B pairs, K bins, n responses, M members.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raylign.errors import DataError, ShapeError
from raylign.evaluation.metrics import auroc, bootstrap_mean, expected_calibration_error
from raylign.types import Interval

Floats: TypeAlias = NDArray[np.float64]

RANKING_SCORE_WEIGHTS = (0.0, 0.01, 0.2, 1.0)
_REWARD, _LOWER, _UPPER = range(3)
_NORMAL_95 = 1.959963984540054


@dataclass(frozen=True, slots=True, kw_only=True)
class IntervalRanking:
    """How often the order of B pairs is right, and how often intervals that do not overlap vouch for it.

    Attributes:
        accuracy: share of pairs with r(chosen) > r(rejected), T.
        confident_right: share with lower(chosen) > upper(rejected), CT.
        confident_wrong: share with upper(chosen) < lower(rejected), CF.
        num_pairs: B.
    """

    accuracy: float
    confident_right: float
    confident_wrong: float
    num_pairs: int

    @property
    def error(self) -> float:
        """F = 1 - T."""
        return 1 - self.accuracy

    def score(self, weight: float) -> float:
        r"""Ranking score: confidence when right minus confidence when wrong, higher is better.

        Definition: \(CT/((1 - b) T + b) - CF/((1 - b) F + b)\), a quotient over 0 counting 0.

        Args:
            weight: b in [0, 1]: 0 weighs being right and being wrong alike however rare either is, 1 weighs pairs.

        Source: code of arXiv:2602.24040.
        """
        return _share(self.confident_right, (1 - weight) * self.accuracy + weight) - _share(
            self.confident_wrong, (1 - weight) * self.error + weight
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReliabilityCurve:
    """Stated against observed probability in equal bins of [0, 1], over B predictions and their mirrored copies.

    Attributes:
        edges: (K + 1,) of the bins.
        stated: (K,) mean stated probability, nan in an empty bin.
        observed: (K,) share of orders that are right, nan in an empty bin.
        counts: (K,) predictions and mirrored copies in the bin; their sum is 2 B.
    """

    edges: Floats
    stated: Floats
    observed: Floats
    counts: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class MarginQuality:
    """How good margins with their variance are on held-out pairs, each with its 95 % interval over pairs.

    Attributes:
        accuracy: share of pairs with a positive mean margin.
        calibration_error: of the preference probability, mirrored (see `expected_calibration_error`).
        calibration_limit: error that a calibrated model of the same probabilities stays below in 95 % of samples.
        brier: mean squared distance of that probability from 1; .25 for a coin.
        log_likelihood: mean log of that probability, nats; -log 2 for a coin.
    """

    accuracy: Interval
    calibration_error: Interval
    calibration_limit: float
    brier: Interval
    log_likelihood: Interval


def reward_bounds(mean_B2: ArrayLike, deviation_B2: ArrayLike, *, num_deviations: float = 1.0) -> Floats:
    """Rewards with symmetric bounds, as the interval metrics take them.

    Args:
        mean_B2: rewards of chosen and rejected responses. Shape (B, 2).
        deviation_B2: posterior standard deviations. Shape (B, 2).
        num_deviations: half width in standard deviations.

    Returns:
        Reward, lower and upper bound. Shape (B, 2, 3).

    Raises:
        ShapeError: the two are not both (B, 2).
    """
    mean, deviation = np.asarray(mean_B2, dtype=np.float64), np.asarray(deviation_B2, dtype=np.float64)
    if mean.ndim != 2 or mean.shape[1] != 2 or mean.shape != deviation.shape:
        raise ShapeError(f"means {mean.shape} and deviations {deviation.shape} must both be (B, 2)")
    return np.stack([mean, mean - num_deviations * deviation, mean + num_deviations * deviation], axis=-1)


def interval_ranking(rewards_B23: ArrayLike) -> IntervalRanking:
    """Share of pairs that are ordered rightly, confidently rightly and confidently wrongly; nan without pairs.

    Args:
        rewards_B23: reward, lower and upper bound of chosen and rejected responses. Shape (B, 2, 3).

    Raises:
        ShapeError: another shape.
        DataError: a lower bound above its upper bound.

    Source: code of arXiv:2602.24040.
    """
    rewards = _bounds(rewards_B23)
    if len(rewards) == 0:
        return IntervalRanking(accuracy=math.nan, confident_right=math.nan, confident_wrong=math.nan, num_pairs=0)
    chosen, rejected = rewards[:, 0], rewards[:, 1]
    return IntervalRanking(
        accuracy=float((chosen[:, _REWARD] > rejected[:, _REWARD]).mean()),
        confident_right=float((chosen[:, _LOWER] > rejected[:, _UPPER]).mean()),
        confident_wrong=float((chosen[:, _UPPER] < rejected[:, _LOWER]).mean()),
        num_pairs=len(rewards),
    )


def bound_calibration_error(rewards_B23: ArrayLike, *, num_bins: int = 20) -> float:
    r"""By how much the lower bound of the preference probability exceeds how often the order is right.

    Definition: \(\sum_k \frac{n_k}{2B} \max(\bar p_k - \bar y_k, 0)\) over bins of the lower bound
    \(\sigma(\mathrm{lower}_c - \mathrm{upper}_r)\) (y = 1) and of its mirrored copy, one minus the upper bound (y = 0).
    The error of the upper bound is the same number, since mirroring turns one into the other.

    Args:
        rewards_B23: reward, lower and upper bound of chosen and rejected responses. Shape (B, 2, 3).
        num_bins: bins of equal width.

    Returns:
        The error in [0, 1], nan without pairs. Wide intervals have none: read it beside `interval_ranking`.

    Raises:
        ShapeError: another shape.
        DataError: a lower bound above its upper bound.

    Source: code of arXiv:2602.24040.
    """
    rewards = _bounds(rewards_B23)
    if len(rewards) == 0:
        return math.nan
    lower = _sigmoid(rewards[:, 0, _LOWER] - rewards[:, 1, _UPPER])
    mirrored = _sigmoid(rewards[:, 1, _LOWER] - rewards[:, 0, _UPPER])
    curve = _curve(np.concatenate([lower, mirrored]), np.repeat([1.0, 0.0], len(rewards)), num_bins)
    excess = np.maximum(np.nan_to_num(curve.stated - curve.observed), 0)
    return float((curve.counts * excess).sum() / curve.counts.sum())


def reliability_curve(preference_prob: ArrayLike, *, num_bins: int = 20) -> ReliabilityCurve:
    """The curve whose mean distance from the diagonal is `expected_calibration_error`.

    Args:
        preference_prob: P(chosen preferred). Shape (B,), in [0, 1].
        num_bins: bins of equal width.

    Raises:
        ShapeError: input that is not one-dimensional.
        DataError: a probability outside [0, 1].

    Source: Niculescu-Mizil and Caruana (2005); mirrored as in the code of arXiv:2602.24040.
    """
    stated_B = _vector(preference_prob, "preference_prob")
    if not bool(((stated_B >= 0) & (stated_B <= 1)).all()):
        raise DataError("preference_prob must lie in [0, 1]")
    return _curve(np.concatenate([stated_B, 1 - stated_B]), np.repeat([1.0, 0.0], len(stated_B)), num_bins)


def accuracy_rejection(margin_mean: ArrayLike, uncertainty: ArrayLike, *, shares: Sequence[float]) -> Floats:
    """Accuracy of what is left when the least certain pairs are set aside; it rises if the uncertainty means something.

    Pairs of one uncertainty are set aside in random order; what is returned is the mean over such orders.

    Args:
        margin_mean: r(chosen) - r(rejected). Shape (B,).
        uncertainty: anything that is larger where the model is less sure. Shape (B,).
        shares: of pairs that are set aside, in [0, 1); at least one pair is kept.

    Returns:
        Accuracy for each share; nan without pairs. Shape (len(shares),).

    Raises:
        ShapeError: the two differ in shape.
        DataError: a share outside [0, 1).

    Source: Nadeem, Zucker and Hanczar (2009).
    """
    margin_B, uncertainty_B = _vector(margin_mean, "margin_mean"), _vector(uncertainty, "uncertainty")
    if margin_B.shape != uncertainty_B.shape:
        raise ShapeError(
            f"margin_mean {margin_B.shape} and uncertainty {uncertainty_B.shape} must be of the same pairs"
        )
    if not all(0 <= share < 1 for share in shares):
        raise DataError(f"shares {list(shares)} must lie in [0, 1)")
    if len(margin_B) == 0:
        return np.full(len(shares), math.nan)
    levels, level_of, counts = np.unique(uncertainty_B, return_inverse=True, return_counts=True)
    right_of_level = np.bincount(level_of, weights=margin_B > 0, minlength=len(levels)) / counts
    num_right = np.cumsum(np.repeat(right_of_level, counts))
    kept = np.maximum(len(margin_B) - np.round(np.asarray(shares) * len(margin_B)).astype(np.int64), 1)
    accuracy: Floats = num_right[kept - 1] / kept
    return accuracy


def shift_auroc(familiar: ArrayLike, shifted: ArrayLike) -> Interval:
    r"""How well a signal tells shifted responses from familiar ones, with DeLong's 95 % interval.

    Use it on disagreement between members and on the least deviation that a member states: the second describes label
    noise and need not grow away from the data.

    Args:
        familiar: the signal on responses like the training data. Shape (N,).
        shifted: the signal on responses from elsewhere. Shape (M,).

    Returns:
        AUROC, above 1/2 if the signal is larger on shifted responses; nan when either side is empty.

    Raises:
        ShapeError: input that is not one-dimensional.

    Source: DeLong, DeLong and Clarke-Pearson (1988), Eqs. 3-5.
    """
    familiar_N, shifted_M = _vector(familiar, "familiar"), _vector(shifted, "shifted")
    area, num_items = auroc(shifted_M, familiar_N), len(familiar_N) + len(shifted_M)
    if min(len(familiar_N), len(shifted_M)) < 2:
        return Interval(mean=area, low=math.nan, high=math.nan, num_items=num_items)
    variance = sum(
        _placements(values, others).var(ddof=1) / len(values)
        for values, others in ((shifted_M, familiar_N), (familiar_N, shifted_M))
    )
    spread = _NORMAL_95 * math.sqrt(variance)
    return Interval(mean=area, low=max(0.0, area - spread), high=min(1.0, area + spread), num_items=num_items)


def margin_quality(
    margin_mean: ArrayLike,
    margin_variance: ArrayLike,
    *,
    temperature: float = 1.0,
    num_samples: int,
    generator: np.random.Generator,
) -> MarginQuality:
    r"""Accuracy, calibration error, Brier score and log-likelihood of margins whose first answer is the chosen one.

    Definition: \(P = \sigma(m / \sqrt{T^2 + \pi v / 8})\). The calibration error is biased upward by the noise of its
    bins, and resampling adds noise again, so its interval is the basic bootstrap (the estimate twice, minus the
    resampled quantile), widened where needed to contain the estimate. Near 0 that does not undo the whole bias: whether
    the error is more than noise is what the limit says, from orders drawn with the stated probabilities.

    Args:
        margin_mean: m, reward units. Shape (B,).
        margin_variance: v, squared reward units, 0 for a point estimate. Shape (B,).
        temperature: T, reward units.
        num_samples: resamples, at least 1.
        generator: source of the resamples; equal states give equal resamples, so that models on the same pairs differ
            only by their margins.

    Returns:
        All four; nan without pairs.

    Raises:
        ShapeError: the two differ in shape.
        DataError: a negative variance.

    Source: MacKay (1992) for P; Davison and Hinkley (1997), Section 5.2, for the basic bootstrap; Bröcker and Smith
    (2007) for the limit.
    """
    mean_B, variance_B = _vector(margin_mean, "margin_mean"), _vector(margin_variance, "margin_variance")
    if mean_B.shape != variance_B.shape:
        raise ShapeError(f"margin_mean {mean_B.shape} and margin_variance {variance_B.shape} must be of the same pairs")
    if bool((variance_B < 0).any()):
        raise DataError(f"margin_variance has {float(variance_B.min()):g}, it must not be negative")
    logit_B = mean_B / np.sqrt(temperature**2 + math.pi / 8 * variance_B)
    stated_B = _sigmoid(logit_B)

    def interval(values: Floats) -> Interval:
        return bootstrap_mean(values, num_samples=num_samples, generator=generator)

    return MarginQuality(
        accuracy=interval((mean_B > 0).astype(np.float64)),
        calibration_error=_calibration_interval(stated_B, num_samples=num_samples, generator=generator),
        calibration_limit=_calibration_limit(stated_B, num_samples=num_samples, generator=generator),
        brier=interval(np.square(1 - stated_B)),
        log_likelihood=interval(-np.logaddexp(0, -logit_B)),
    )


def _calibration_interval(stated_B: Floats, *, num_samples: int, generator: np.random.Generator) -> Interval:
    num_pairs = len(stated_B)
    estimate = expected_calibration_error(stated_B)
    if num_pairs == 0:
        return Interval(mean=estimate, low=math.nan, high=math.nan, num_items=0)
    resampled = [
        expected_calibration_error(stated_B[generator.integers(num_pairs, size=num_pairs)]) for _ in range(num_samples)
    ]
    high, low = 2 * estimate - np.quantile(resampled, [0.025, 0.975])
    return Interval(
        mean=estimate, low=max(0.0, min(float(low), estimate)), high=max(float(high), estimate), num_items=num_pairs
    )


def _calibration_limit(stated_B: Floats, *, num_samples: int, generator: np.random.Generator) -> float:
    drawn = [
        expected_calibration_error(np.where(generator.random(len(stated_B)) < stated_B, stated_B, 1 - stated_B))
        for _ in range(num_samples)
    ]
    return float(np.quantile(drawn, 0.95))


def _curve(stated: Floats, right: Floats, num_bins: int) -> ReliabilityCurve:
    bins = np.minimum((stated * num_bins).astype(np.int64), num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    with np.errstate(invalid="ignore"):  # 0 / 0 in an empty bin is nan, as promised
        return ReliabilityCurve(
            edges=np.linspace(0, 1, num_bins + 1),
            stated=np.bincount(bins, weights=stated, minlength=num_bins) / counts,
            observed=np.bincount(bins, weights=right, minlength=num_bins) / counts,
            counts=counts,
        )


def _placements(values: Floats, others: Floats) -> Floats:
    """Share of `others` below each value, ties counting half."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, values, side="left") + np.searchsorted(ordered, values, side="right")
    share: Floats = below / (2 * len(others))
    return share


def _bounds(rewards_B23: ArrayLike) -> Floats:
    rewards: Floats = np.asarray(rewards_B23, dtype=np.float64)
    if rewards.ndim != 3 or rewards.shape[1:] != (2, 3):
        raise ShapeError(
            f"rewards {rewards.shape} must be (B, 2, 3): chosen and rejected; reward, lower and upper bound"
        )
    if bool((rewards[..., _LOWER] > rewards[..., _UPPER]).any()):
        raise DataError("a lower bound lies above its upper bound; the last axis is reward, lower, upper")
    return rewards


def _share(part: float, whole: float) -> float:
    return part / whole if whole != 0 else 0.0


def _sigmoid(values: Floats) -> Floats:
    probability: Floats = np.exp(-np.logaddexp(0, -values))
    return probability


def _vector(values: ArrayLike, name: str) -> Floats:
    array: Floats = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ShapeError(f"{name} {array.shape} must be one-dimensional")
    return array
