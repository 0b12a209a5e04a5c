r"""Best-of-n without sampling n: what it costs in KL and what it selects, exact over all subsets of a sample.

A prompt has N responses with a proxy reward, which chooses the best of n, and a gold reward, which judges it. The mean
over all subsets of size n is a weighted mean over the N responses, unbiased for best-of-n and with far less variance
than drawing n once. Shape letters: P prompts, N samples of a prompt, K candidates of a finite set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raylign.errors import DataError, ShapeError
from raylign.evaluation.metrics import bootstrap_mean
from raylign.types import Interval

Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class BestOfN:
    """One point of an over-optimisation curve.

    Attributes:
        n: responses that the best is chosen from.
        kl_bound: bound of the KL from the reference, nats; the KL itself is lower where scores tie.
        proxy: mean reward of the chosen response by the score that chose it, with its interval over prompts.
        gold: its mean gold reward, with its interval over prompts.
    """

    n: int
    kl_bound: float
    proxy: Interval
    gold: Interval


def kl_bound(n: int) -> float:
    r"""Upper bound of KL(best-of-n || reference): \(\log n - (n - 1)/n\) nats, met by scores without ties.

    Args:
        n: responses that the best is chosen from.

    Raises:
        DataError: n below 1.

    Source: Hilton (2023); arXiv:2401.01879, Theorem 1.
    """
    if n < 1:
        raise DataError(f"best of n={n} needs n of at least 1")
    return math.log(n) - (n - 1) / n


def win_rate_bound(n: int) -> float:
    """Largest P(best-of-n beats a fresh reference response by the score that chose it), n / (n + 1).

    Args:
        n: responses that the best is chosen from.

    Raises:
        DataError: n below 1.

    Source: arXiv:2401.01879.
    """
    if n < 1:
        raise DataError(f"best of n={n} needs n of at least 1")
    return n / (n + 1)


def order_statistic_weights(num_samples: int, n: int) -> Floats:
    r"""P(the i-th smallest of N is the largest of a random subset of n), \(\binom{i-1}{n-1} / \binom{N}{n}\).

    Args:
        num_samples: N.
        n: size of the subset, at most N.

    Returns:
        Weights in ascending order of the score, which sum to 1. Shape (N,).

    Raises:
        DataError: n outside 1..N.
    """
    if not 1 <= n <= num_samples:
        raise DataError(f"best of n={n} needs 1 <= n <= {num_samples} samples; sample more or lower n")
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, num_samples + 1)))])
    log_subsets = log_factorial[num_samples] - log_factorial[n] - log_factorial[num_samples - n]
    below = np.arange(n - 1, num_samples)  # i - 1 of the i-th smallest, which needs n - 1 samples below it
    weights = np.zeros(num_samples)
    weights[n - 1 :] = np.exp(log_factorial[below] - log_factorial[n - 1] - log_factorial[below - n + 1] - log_subsets)
    return weights


def selection_weights(score: ArrayLike, n: int) -> Floats:
    """P(a sample is the best of a random subset of n by its score); tied samples share their weight.

    The mean over all subsets of anything that a sample has, for example its gold reward, is its mean under these.

    Args:
        score: what chooses, of P prompts or of one. Shape (P, N) or (N,).
        n: size of the subset, at most N.

    Returns:
        Weights that sum to 1 over samples. Shape of `score`.

    Raises:
        ShapeError: score of another number of dimensions.
        DataError: n outside 1..N, or a score that is not finite.
    """
    score_PN = np.asarray(score, dtype=np.float64)
    if score_PN.ndim not in (1, 2):
        raise ShapeError(f"score {score_PN.shape} must be (P, N) or (N,)")
    if not bool(np.isfinite(score_PN).all()):
        raise DataError("a score is not finite: it cannot be ordered")
    ordered_N = order_statistic_weights(score_PN.shape[-1], n)
    weights = np.empty_like(score_PN)
    rows, filled = np.atleast_2d(score_PN), np.atleast_2d(weights)
    for row, out in zip(rows, filled, strict=True):
        _, level_of, counts = np.unique(row, return_inverse=True, return_counts=True)
        starts = np.cumsum(counts) - counts
        out[:] = (np.add.reduceat(ordered_N, starts) / counts)[level_of]
    return weights


def best_of_n_curve(
    proxy_PN: ArrayLike,
    gold_PN: ArrayLike,
    *,
    sizes: Sequence[int],
    num_samples: int,
    generator: np.random.Generator,
) -> tuple[BestOfN, ...]:
    """Proxy and gold reward of the best of n by the proxy, over all subsets of each prompt's samples.

    Args:
        proxy_PN: reward that chooses. Shape (P, N).
        gold_PN: reward that judges. Shape (P, N).
        sizes: values of n, each at most N.
        num_samples: bootstrap resamples of prompts, at least 1.
        generator: source of the resamples.

    Returns:
        One point per size.

    Raises:
        ShapeError: the two are not both (P, N).
        DataError: a size outside 1..N, or a proxy that is not finite.
    """
    proxy, gold = np.asarray(proxy_PN, dtype=np.float64), np.asarray(gold_PN, dtype=np.float64)
    if proxy.ndim != 2 or proxy.shape != gold.shape:
        raise ShapeError(f"proxy {proxy.shape} and gold {gold.shape} must both be (P, N)")
    points = []
    for n in sizes:
        weights = selection_weights(proxy, n)
        proxy_mean, gold_mean = (
            bootstrap_mean((weights * values).sum(axis=1), num_samples=num_samples, generator=generator)
            for values in (proxy, gold)
        )
        points.append(BestOfN(n=n, kl_bound=kl_bound(n), proxy=proxy_mean, gold=gold_mean))
    return tuple(points)


def best_of_n_policy(reference_prob: ArrayLike, score: ArrayLike, n: int) -> Floats:
    r"""Probability that best-of-n returns each of K candidates, n independent draws from the reference.

    Definition: candidates of one score \(s\) share \(F(s)^n - F(s^-)^n\) in proportion to their reference probability,
    \(F\) the distribution of the score under the reference.

    Args:
        reference_prob: of each candidate, summing to 1. Shape (K,).
        score: what chooses. Shape (K,).
        n: draws, at least 1.

    Returns:
        Shape (K,).

    Raises:
        ShapeError: the two are not both (K,).
        DataError: probabilities that do not sum to 1 or are not positive, or n below 1.
    """
    policy_K: Floats = _candidates(reference_prob) * np.exp(_log_ratio(reference_prob, score, n))
    return policy_K


def best_of_n_kl(reference_prob: ArrayLike, score: ArrayLike, n: int) -> float:
    """KL(best-of-n || reference) over K candidates in nats: what `kl_bound` bounds.

    Args:
        reference_prob: of each candidate, summing to 1. Shape (K,).
        score: what chooses. Shape (K,).
        n: draws, at least 1.

    Raises:
        ShapeError: the two are not both (K,).
        DataError: probabilities that do not sum to 1 or are not positive, or n below 1.
    """
    log_ratio_K = _log_ratio(reference_prob, score, n)
    return float((_candidates(reference_prob) * np.exp(log_ratio_K) * log_ratio_K).sum())


def _log_ratio(reference_prob: ArrayLike, score: ArrayLike, n: int) -> Floats:
    """Log of best-of-n over reference probability; in log space, since F^n underflows."""
    reference_K, score_K = _candidates(reference_prob), np.asarray(score, dtype=np.float64)
    if reference_K.shape != score_K.shape:
        raise ShapeError(f"reference_prob {reference_K.shape} and score {score_K.shape} must be of the same candidates")
    if n < 1:
        raise DataError(f"best of n={n} needs n of at least 1")
    levels, level_of = np.unique(score_K, return_inverse=True)
    mass = np.bincount(level_of, weights=reference_K, minlength=len(levels))
    up_to = np.cumsum(mass)
    with np.errstate(divide="ignore"):  # nothing is below the lowest level
        log_below = np.log1p(-mass / up_to)  # log F_{k-1} / F_k
    log_mass = n * np.log(up_to / up_to[-1]) + np.log(-np.expm1(n * log_below))
    log_ratio: Floats = (log_mass - np.log(mass))[level_of]
    return log_ratio


def _candidates(reference_prob: ArrayLike) -> Floats:
    reference_K: Floats = np.asarray(reference_prob, dtype=np.float64)
    if reference_K.ndim != 1:
        raise ShapeError(f"reference_prob {reference_K.shape} must be one-dimensional")
    if not bool((reference_K > 0).all()) or not math.isclose(float(reference_K.sum()), 1.0, abs_tol=1e-6):
        raise DataError(f"reference_prob must be positive and sum to 1, it sums to {float(reference_K.sum()):g}")
    return reference_K
