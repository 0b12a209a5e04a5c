"""Which points of a sweep no other point beats in both reward and cost, and how sure that is.

Pure numpy. Shape letters: P points, N prompts, S resamples.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raylign.errors import DataError, ShapeError

Floats = NDArray[np.float64]


def on_front(reward: Floats, cost: Floats) -> NDArray[np.bool_]:
    """Points that no other point dominates.

    Definition: q dominates p when reward(q) >= reward(p) and cost(q) <= cost(p), one of them strictly.

    Args:
        reward: higher is better. Shape (..., P).
        cost: lower is better. Shape (..., P).

    Returns:
        Shape (..., P).

    Raises:
        ShapeError: the two differ in shape.
    """
    reward, cost = np.asarray(reward, np.float64), np.asarray(cost, np.float64)
    if reward.shape != cost.shape:
        raise ShapeError(f"reward {reward.shape} and cost {cost.shape} must be of the same points")
    no_worse = (reward[..., None, :] >= reward[..., :, None]) & (cost[..., None, :] <= cost[..., :, None])
    better = (reward[..., None, :] > reward[..., :, None]) | (cost[..., None, :] < cost[..., :, None])
    front: NDArray[np.bool_] = np.logical_not((no_worse & better).any(-1))
    return front


def front_shares(
    reward: Floats,
    cost: Floats,
    is_costed: NDArray[np.bool_],
    *,
    num_samples: int,
    generator: np.random.Generator,
) -> Floats:
    """How often each point is on the front when the prompts are drawn again.

    All points answered the same prompts, which are drawn together, so that what makes a prompt hard for all of them
    cancels. The spread between trainings is not in it.

    Args:
        reward: mean over seeds of the reward of each prompt's answer. Shape (P, N).
        cost: likewise of the cost. Shape (P, N).
        is_costed: prompts whose cost counts, the harmful ones. Shape (N,).
        num_samples: S, at least 1.
        generator: of the resampling.

    Returns:
        Share of the resamples. Shape (P,).

    Raises:
        ShapeError: the arrays disagree.
        DataError: no prompt whose cost counts.

    Source: Efron and Tibshirani (1993), Section 13.3, for the resampling.
    """
    if reward.shape != cost.shape or reward.shape[1:] != is_costed.shape:
        raise ShapeError(f"reward {reward.shape}, cost {cost.shape} and prompts {is_costed.shape} disagree")
    if not is_costed.any():
        raise DataError("a front of reward and cost needs prompts whose cost counts; none is harmful")
    num_prompts = reward.shape[1]
    counts_SN = generator.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=num_samples)
    costed_SN = counts_SN * is_costed
    total_S = costed_SN.sum(1, keepdims=True)
    kept_S = total_S[:, 0] > 0  # a draw without any harmful prompt says nothing
    reward_SP = counts_SN @ reward.T / num_prompts
    cost_SP = costed_SN @ cost.T / np.maximum(total_S, 1)
    shares: Floats = on_front(reward_SP[kept_S], cost_SP[kept_S]).mean(0)
    return shares
