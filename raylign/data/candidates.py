"""Preference pairs from scored candidates of one prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raylign.errors import ShapeError


def candidate_pairs(scores: Sequence[float] | NDArray[np.floating]) -> NDArray[np.int64]:
    """Pair each candidate of the better half with the one half the ranks below it.

    Definition: with candidates sorted ascending as l_0 .. l_{K-1}, the pairs are (l_{i + K/2}, l_i) for i < K/2, so
    that every pair has the same rank gap. An odd K drops the median; ties keep the order of the candidates.

    Args:
        scores: reward of each candidate of one prompt. Shape (K,).

    Returns:
        Rows (chosen, rejected) of candidate indices. Shape (K // 2, 2), int64.

    Raises:
        ShapeError: scores that are not one-dimensional.

    Source: released code of arXiv:2503.10093.
    """
    scores_K = np.asarray(scores)
    if scores_K.ndim != 1:
        raise ShapeError(f"scores {scores_K.shape} must be (K,), the candidates of one prompt")
    order_K = np.argsort(scores_K, kind="stable")
    half = len(order_K) // 2
    return np.stack([order_K[len(order_K) - half :], order_K[:half]], axis=1).astype(np.int64)
