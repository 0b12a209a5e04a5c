r"""Best-of-n without sampling n: what it costs in KL and what it selects, exact over all subsets of a sample.

A prompt has N responses with a proxy reward, which chooses the best of n, and a gold reward, which judges it. The mean
over all subsets of size n is a weighted mean over the N responses, unbiased for best-of-n and with far less variance
than drawing n once. Shape letters: P prompts, N samples of a prompt.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raylign.errors import DataError, ShapeError

Floats: TypeAlias = NDArray[np.float64]


def kl_bound(n: int) -> float:
    r"""Upper bound of KL(best-of-n || reference): \(\log n - (n - 1)/n\) nats, met by continuous scores.

    Args:
        n: responses that the best is chosen from.

    Raises:
        DataError: n below 1.

    Source: Hilton (2023); arXiv:2401.01879, Theorem 1.
    """
    if n < 1:
        raise DataError(f"best of n={n} needs n of at least 1")
    return math.log(n) - (n - 1) / n


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
    normalised: Floats = weights / weights.sum()  # logs of factorials are rounded
    return normalised


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
    normalised: Floats = weights / weights.sum(axis=-1, keepdims=True)
    return normalised
