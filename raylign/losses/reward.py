r"""Losses of a scalar reward on preference pairs, one value per pair.

Shape letter: B pairs.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from raylign.errors import ShapeError


def bradley_terry(margin: torch.Tensor) -> torch.Tensor:
    r"""Negative log-likelihood of the observed order.

    Definition: \(-\log\sigma(m)\), \(m = r(y_c) - r(y_r)\).

    Args:
        margin: reward difference in reward units. Shape (B,).

    Returns:
        Loss per pair in nats. Shape (B,).

    Source: Bradley and Terry (1952); Rafailov et al. (2023), arXiv:2305.18290, Eq. 2.
    """
    return -F.logsigmoid(margin)


def margin_loss(
    chosen_reward: torch.Tensor, rejected_reward: torch.Tensor, *, margin_target: float | torch.Tensor
) -> torch.Tensor:
    r"""Bradley-Terry loss that asks for a margin above zero.

    Definition: \(-\log\sigma(r_c - r_r - t)\). It does not see an offset common to both rewards; `anchor_loss` does.

    Args:
        chosen_reward: shape (B,).
        rejected_reward: shape (B,).
        margin_target: t, reward units; 0 is `bradley_terry`.

    Returns:
        Loss per pair in nats. Shape (B,).

    Raises:
        ShapeError: the two rewards differ in shape.

    Source: released code of arXiv:2503.10093 (E2 in docs/math.md).
    """
    _check_alike(chosen_reward, rejected_reward)
    return bradley_terry(chosen_reward - rejected_reward - margin_target)  # E2


def anchor_loss(chosen_reward: torch.Tensor, rejected_reward: torch.Tensor) -> torch.Tensor:
    r"""Binary cross-entropy that ties the zero of the reward to the border between chosen and rejected.

    Definition: \(-\log\sigma(r_c) - \log\sigma(-r_r)\).

    Args:
        chosen_reward: shape (B,).
        rejected_reward: shape (B,).

    Returns:
        Loss per pair in nats. Shape (B,).

    Raises:
        ShapeError: the two rewards differ in shape.

    Source: an earlier variant in the released code of arXiv:2503.10093 (E3 in docs/math.md, there times bce_weight).
    """
    _check_alike(chosen_reward, rejected_reward)
    return -F.logsigmoid(chosen_reward) - F.logsigmoid(-rejected_reward)  # E3


def _check_alike(chosen_reward: torch.Tensor, rejected_reward: torch.Tensor) -> None:
    if chosen_reward.shape != rejected_reward.shape:
        raise ShapeError(
            f"chosen {tuple(chosen_reward.shape)} and rejected {tuple(rejected_reward.shape)} rewards must be alike"
        )
