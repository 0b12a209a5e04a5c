r"""Whether an uncertain reward model is right when it claims to be, and whether it notices what it has not seen.

Everything is read off arrays, so that any reward posterior can be judged: stated probabilities of pairs, or a signal
per response. Shape letters: B pairs, K bins, N familiar and M shifted responses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raylign.errors import DataError, ShapeError
from raylign.evaluation.metrics import auroc
from raylign.types import Interval

Floats: TypeAlias = NDArray[np.float64]

_NORMAL_95 = 1.959963984540054


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfidentRanking:
    """Orders of pairs that bounds of rewards leave no doubt about, as shares of all pairs.

    Attributes:
        right: the mean reward of the chosen response is the higher one; a tie is not.
        sure_right: its lower bound lies above the upper bound of the rejected one.
        sure_wrong: its upper bound lies below the lower bound of the rejected one.
    """

    right: float
    sure_right: float
    sure_wrong: float

    def score(self, b: float) -> float:
        r"""\(CT/((1-b)T + b) - CF/((1-b)F + b)\): shares of the right orders at b = 0, of all pairs at b = 1.

        Args:
            b: in [0, 1]. A quotient with denominator 0 counts as 0.

        Source: the code of arXiv:2602.24040.
        """

        def share(sure: float, of: float) -> float:
            whole = (1 - b) * of + b
            return sure / whole if whole else 0.0

        return share(self.sure_right, self.right) - share(self.sure_wrong, 1 - self.right)


def confident_ranking(chosen: ArrayLike, rejected: ArrayLike) -> ConfidentRanking:
    """How many pairs a reward with bounds orders, and how many of these orders it is sure of.

    Args:
        chosen: mean, lower and upper bound of each chosen response. Shape (B, 3), reward units.
        rejected: likewise.

    Raises:
        ShapeError: arrays of other shapes.
        DataError: a lower bound above its mean, or a mean above its upper bound.

    Source: arXiv:2602.24040.
    """
    chosen_B3, rejected_B3 = np.asarray(chosen, np.float64), np.asarray(rejected, np.float64)
    if chosen_B3.ndim != 2 or chosen_B3.shape[1:] != (3,) or chosen_B3.shape != rejected_B3.shape:
        raise ShapeError(f"chosen {chosen_B3.shape} and rejected {rejected_B3.shape} must both be (B, 3)")
    for bounds in (chosen_B3, rejected_B3):
        if not bool(((bounds[:, 1] <= bounds[:, 0]) & (bounds[:, 0] <= bounds[:, 2])).all()):
            raise DataError("each row must be a mean, a lower bound not above it and an upper bound not below it")
    return ConfidentRanking(
        right=float((chosen_B3[:, 0] > rejected_B3[:, 0]).mean()),
        sure_right=float((chosen_B3[:, 1] > rejected_B3[:, 2]).mean()),
        sure_wrong=float((chosen_B3[:, 2] < rejected_B3[:, 1]).mean()),
    )


def margin_ranking(mean: ArrayLike, variance: ArrayLike) -> ConfidentRanking:
    """`confident_ranking` by the 95 % interval of each margin, in which what two responses share cancels.

    Args:
        mean: of each margin, reward units. Shape (B,).
        variance: likewise, squared. Shape (B,).

    Raises:
        ShapeError: input that is not one-dimensional.
    """
    mean_B, spread_B = _vector(mean, "mean"), _NORMAL_95 * np.sqrt(_vector(variance, "variance"))
    bounds_B3 = np.stack([mean_B, mean_B - spread_B, mean_B + spread_B], axis=1)
    return confident_ranking(bounds_B3, np.zeros_like(bounds_B3))


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


def _vector(values: ArrayLike, name: str) -> Floats:
    array: Floats = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ShapeError(f"{name} {array.shape} must be one-dimensional")
    return array
