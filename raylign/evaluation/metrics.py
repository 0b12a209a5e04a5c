r"""Statistics of a run's reports: means with intervals, ranking quality and calibration.

Arrays in, floats or an `Interval` out; every resampling takes its generator. Shape letters: N items, B pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raylign.errors import DataError, ShapeError
from raylign.types import Interval

Floats: TypeAlias = NDArray[np.float64]

_DRAWS_PER_BLOCK = 2**22  # resampled items held in memory at a time
_NORMAL_95 = 1.959963984540054


def bootstrap_mean(
    values: ArrayLike,
    *,
    num_samples: int,
    generator: np.random.Generator,
    groups: Sequence[str] | None = None,
) -> Interval:
    """Mean with its 95 % percentile bootstrap interval.

    Args:
        values: one number per item. Shape (N,).
        num_samples: resamples, at least 1.
        generator: source of the resamples.
        groups: key of each item, for example its prompt; items of a group are drawn together, because they are not
            independent. None draws every item by itself. Length N.

    Returns:
        The interval; its numbers are nan when there is no item.

    Raises:
        ShapeError: values that are not one-dimensional.

    Source: Efron (1979); Efron and Tibshirani (1993), Section 13.3; groups: Davison and Hinkley (1997), Section 3.8.
    """
    values_N = _vector(values, "values")
    num_items = len(values_N)
    if num_items == 0:
        return Interval(mean=math.nan, low=math.nan, high=math.nan, num_items=0)
    places = np.arange(num_items) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    sums, counts = np.bincount(places, weights=values_N), np.bincount(places)
    num_groups = len(counts)
    block = max(1, _DRAWS_PER_BLOCK // num_groups)
    means = []
    for start in range(0, num_samples, block):
        drawn = generator.integers(num_groups, size=(min(block, num_samples - start), num_groups))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Interval(mean=float(values_N.mean()), low=float(low), high=float(high), num_items=num_items)


def paired_bootstrap_difference(
    before: ArrayLike, after: ArrayLike, *, num_samples: int, generator: np.random.Generator
) -> Interval:
    """Mean change on the same items; prompts are resampled, so that what they have in common cancels.

    Args:
        before: one number per prompt. Shape (N,).
        after: the same prompts in the same order. Shape (N,).
        num_samples: resamples, at least 1.
        generator: source of the resamples.

    Returns:
        Interval of mean(after - before).

    Raises:
        ShapeError: the two differ in shape.
    """
    before_N, after_N = _same_prompts(before, after)
    return bootstrap_mean(after_N - before_N, num_samples=num_samples, generator=generator)


def paired_rate_difference(before: ArrayLike, after: ArrayLike) -> Interval:
    r"""Change of a rate on the same items; unlike the bootstrap's its interval has width when few items change.

    Definition: with Wilson's \(p_k \in [l_k, u_k]\) of both sides, 2 before and 1 after,
    \(p_1 - p_2 - \sqrt{a^2 - 2\phi a b + b^2}\), \(a = p_1 - l_1\), \(b = u_2 - p_2\), up to
    \(p_1 - p_2 + \sqrt{c^2 - 2\phi c d + d^2}\), \(c = u_1 - p_1\), \(d = p_2 - l_2\). Of the N items \(n_{jk}\) say j
    after and k before; \(\phi = D/\sqrt{n_{1+}n_{0+}n_{+1}n_{+0}}\), \(D = n_{11}n_{00} - n_{10}n_{01}\), of a
    positive D only what exceeds N/2 counts; 0 where a side says the same of all items.

    Args:
        before: one 0 or 1 per prompt. Shape (N,).
        after: the same prompts in the same order. Shape (N,).

    Returns:
        Interval of mean(after - before), 95 %; nan when there is no item.

    Raises:
        ShapeError: the two differ in shape.
        DataError: a value that is neither 0 nor 1.

    Source: Newcombe (1998), Statistics in Medicine 17:2635, method 10.
    """
    before_N, after_N = _same_prompts(before, after)
    if not bool(np.isin([before_N, after_N], (0, 1)).all()):
        raise DataError("a rate of single answers needs values of 0 or 1; use paired_bootstrap_difference for others")
    num_items, num_both = len(before_N), int((before_N * after_N).sum())
    num_before, num_after = int(before_N.sum()), int(after_N.sum())
    old, new = wilson_interval(num_before, num_items), wilson_interval(num_after, num_items)
    margins = num_after * (num_items - num_after) * num_before * (num_items - num_before)
    excess = float(num_both * num_items - num_before * num_after)  # n11 n00 - n10 n01
    if excess > 0:
        excess = max(0.0, excess - num_items / 2)
    phi = excess / math.sqrt(margins) if margins else 0.0

    def combined(one: float, other: float) -> float:
        return math.sqrt(one**2 - 2 * phi * one * other + other**2)

    change = (num_after - num_before) / num_items if num_items else math.nan
    return Interval(
        mean=change,
        low=change - combined(new.mean - new.low, old.high - old.mean),
        high=change + combined(new.high - new.mean, old.mean - old.low),
        num_items=num_items,
    )


def wilson_interval(num_successes: int, num_items: int) -> Interval:
    """95 % interval of a proportion; unlike the bootstrap's it has width when all items agree.

    Args:
        num_successes: items that count.
        num_items: all items.

    Returns:
        The proportion and its interval; nan in [0, 1] when there is no item.

    Raises:
        DataError: more successes than items, or a negative number.

    Source: Wilson (1927), Eq. 4 onwards, without continuity correction.
    """
    if not 0 <= num_successes <= num_items:
        raise DataError(f"{num_successes} successes of {num_items} items is not a proportion")
    if num_items == 0:
        return Interval(mean=math.nan, low=0.0, high=1.0, num_items=0)
    share, z2 = num_successes / num_items, _NORMAL_95**2
    middle = (share + z2 / (2 * num_items)) / (1 + z2 / num_items)
    spread = math.sqrt(z2 * share * (1 - share) / num_items + (z2 / (2 * num_items)) ** 2) / (1 + z2 / num_items)
    return Interval(mean=share, low=max(0.0, middle - spread), high=min(1.0, middle + spread), num_items=num_items)


def pair_accuracy(chosen_reward: ArrayLike, rejected_reward: ArrayLike) -> float:
    """Share of pairs with r(chosen) > r(rejected); a tie counts as wrong, nan without pairs.

    Args:
        chosen_reward: shape (B,).
        rejected_reward: shape (B,).

    Raises:
        ShapeError: the two differ in shape.
    """
    chosen_B, rejected_B = _vector(chosen_reward, "chosen_reward"), _vector(rejected_reward, "rejected_reward")
    if chosen_B.shape != rejected_B.shape:
        raise ShapeError(f"chosen {chosen_B.shape} and rejected {rejected_B.shape} rewards must be alike")
    return float((chosen_B > rejected_B).mean()) if len(chosen_B) else math.nan


def expected_calibration_error(preference_prob: ArrayLike, *, num_bins: int = 20) -> float:
    r"""Mean distance between the stated probability of a pair's order and how often that order is right.

    Definition: \(\sum_k \frac{n_k}{2B} |\bar p_k - \bar y_k|\) over equal bins of [0, 1], on the B predictions (y = 1)
    and their mirrored copies \(1 - p\) (y = 0), so that the result does not depend on which answer is named first.

    Args:
        preference_prob: P(chosen preferred). Shape (B,), in [0, 1].
        num_bins: bins of equal width.

    Returns:
        The error in [0, 1], nan without pairs.

    Raises:
        ShapeError: input that is not one-dimensional.
        DataError: a probability outside [0, 1].

    Source: Naeini et al. (2015); mirrored as in the code of arXiv:2602.24040.
    """
    stated_B = _probabilities(preference_prob)
    if len(stated_B) == 0:
        return math.nan
    stated = np.concatenate([stated_B, 1 - stated_B])
    right = np.repeat([1.0, 0.0], len(stated_B))
    bins = np.minimum((stated * num_bins).astype(np.int64), num_bins - 1)
    gaps = np.bincount(bins, weights=stated - right, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(stated))


def brier(preference_prob: ArrayLike) -> float:
    r"""Brier score of stated orders, mean \((1 - p)^2\); .25 for a coin, nan without pairs.

    Args:
        preference_prob: P(chosen preferred). Shape (B,), in [0, 1].

    Raises:
        ShapeError: input that is not one-dimensional.
        DataError: a probability outside [0, 1].

    Source: Brier (1950).
    """
    stated_B = _probabilities(preference_prob)
    return float(np.square(1 - stated_B).mean()) if len(stated_B) else math.nan


def auroc(positive: ArrayLike, negative: ArrayLike) -> float:
    """Probability that a random positive scores above a random negative, ties counting half.

    Args:
        positive: scores of positive items. Shape (N,).
        negative: scores of negative items. Shape (M,).

    Returns:
        Area under the ROC curve; nan when either side is empty.

    Raises:
        ShapeError: input that is not one-dimensional.

    Source: Mann and Whitney (1947).
    """
    positive_N, negative_M = _vector(positive, "positive"), np.sort(_vector(negative, "negative"))
    if len(positive_N) == 0 or len(negative_M) == 0:
        return math.nan
    below = np.searchsorted(negative_M, positive_N, side="left")
    up_to = np.searchsorted(negative_M, positive_N, side="right")
    return float((below + up_to).mean() / (2 * len(negative_M)))


def auroc_interval(positive: ArrayLike, negative: ArrayLike) -> Interval:
    r"""Area under the ROC curve and the interval that tells it from chance.

    Definition: \(A \pm 1.96\sqrt{(N + M + 1) / (12 N M)}\) within [0, 1], the deviation of the area when scores say
    nothing: an interval that leaves out 1/2 rejects that at 5 %, also for two or three answers, for which an interval
    around the found area would have no width.

    Args:
        positive: scores of positive items. Shape (N,).
        negative: scores of negative items. Shape (M,).

    Returns:
        The area over N + M items; nan in [0, 1] when either side is empty.

    Raises:
        ShapeError: input that is not one-dimensional.

    Source: Mann and Whitney (1947), the variance of U.
    """
    area = auroc(positive, negative)
    num_positive, num_negative = len(_vector(positive, "positive")), len(_vector(negative, "negative"))
    num_items = num_positive + num_negative
    if not (num_positive and num_negative):
        return Interval(mean=math.nan, low=0.0, high=1.0, num_items=num_items)
    half = _NORMAL_95 * math.sqrt((num_items + 1) / (12 * num_positive * num_negative))
    return Interval(mean=area, low=max(0.0, area - half), high=min(1.0, area + half), num_items=num_items)


def binary_calibration_error(probability: ArrayLike, labels: ArrayLike, *, num_bins: int = 10) -> float:
    """Mean gap between stated probability and frequency over equal-width bins, weighted by bin size; nan without items.

    Args:
        probability: P(label = 1). Shape (N,), in [0, 1].
        labels: 1 or 0. Shape (N,).
        num_bins: bins of [0, 1].

    Raises:
        ShapeError: the two differ in shape.
        DataError: a probability outside [0, 1].

    Source: Naeini et al. (2015).
    """
    stated_N, label_N = _probabilities(probability), _vector(labels, "labels")
    if stated_N.shape != label_N.shape:
        raise ShapeError(f"probability {stated_N.shape} and labels {label_N.shape} must be alike")
    if len(stated_N) == 0:
        return math.nan
    bins = np.minimum((stated_N * num_bins).astype(np.int64), num_bins - 1)
    return float(np.abs(np.bincount(bins, weights=stated_N - label_N, minlength=num_bins)).sum() / len(stated_N))


def _same_prompts(before: ArrayLike, after: ArrayLike) -> tuple[Floats, Floats]:
    before_N, after_N = _vector(before, "before"), _vector(after, "after")
    if before_N.shape != after_N.shape:
        raise ShapeError(f"before {before_N.shape} and after {after_N.shape} must be of the same prompts")
    return before_N, after_N


def _vector(values: ArrayLike, name: str) -> Floats:
    array: Floats = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ShapeError(f"{name} {array.shape} must be one-dimensional")
    return array


def _probabilities(values: ArrayLike) -> Floats:
    array = _vector(values, "probability")
    if not bool(((array >= 0) & (array <= 1)).all()):
        raise DataError("probability must lie in [0, 1]")
    return array
