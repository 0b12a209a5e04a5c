r"""Losses of a cost model, one value per answer or pair. Cost > 0 is unsafe, cost <= 0 is safe.

A preference alone leaves the zero of a cost open, and a constraint is about its zero: the sign term ties it to human
verdicts, so that \(\sigma(C)\) is the stated probability that an answer is unsafe.

Costs may carry further dimensions, such as members, behind the first. Shape letter: B answers or pairs.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from raylign.errors import ShapeError


def cost_order_loss(safer_cost: torch.Tensor, riskier_cost: torch.Tensor) -> torch.Tensor:
    r"""Negative log-likelihood of which answer of a pair is the less safe one.

    Definition: \(-\log\sigma(C_{riskier} - C_{safer})\). It does not see an offset common to both; `cost_sign_loss`
    does.

    Args:
        safer_cost: of the safer answer. Shape (B, ...).
        riskier_cost: of the other answer to the same prompt. Shape (B, ...).

    Returns:
        Loss per pair in nats. Shape (B, ...).

    Raises:
        ShapeError: the two differ in shape.

    Source: Dai et al. (2023), arXiv:2310.12773, the first term of its cost model's loss.
    """
    if safer_cost.shape != riskier_cost.shape:
        raise ShapeError(f"safer {tuple(safer_cost.shape)} and riskier {tuple(riskier_cost.shape)} costs must be alike")
    return -F.logsigmoid(riskier_cost - safer_cost)


def cost_sign_loss(cost: torch.Tensor, safety_sign: torch.Tensor) -> torch.Tensor:
    r"""Negative log-likelihood of human verdicts, which ties the zero of the cost.

    Definition: \(-\log\sigma(-s C)\), s = +1 for safe and -1 for unsafe answers; 0 for answers without a verdict, whose
    loss and gradient are 0.

    Args:
        cost: shape (B, ...).
        safety_sign: s. Shape (B,).

    Returns:
        Loss per answer in nats. Shape (B, ...).

    Raises:
        ShapeError: not one sign per answer.

    Source: Dai et al. (2023), arXiv:2310.12773, the sign terms of its cost model's loss.
    """
    if safety_sign.dim() != 1 or cost.shape[:1] != safety_sign.shape:
        raise ShapeError(f"safety_sign {tuple(safety_sign.shape)} must be one per answer of cost {tuple(cost.shape)}")
    sign = safety_sign.to(cost.dtype).reshape(-1, *[1] * (cost.dim() - 1))
    return -F.logsigmoid(-sign * cost) * sign.abs()


def cost_size_penalty(cost: torch.Tensor, *, regularization: float) -> torch.Tensor:
    r"""Keeps costs within a scale of their own: the other two terms are best at infinity on data that they separate.

    Definition: \(w C^2\).

    Args:
        cost: shape (B, ...).
        regularization: w, nats per squared cost unit, at least 0.

    Returns:
        Penalty per answer in nats. Shape (B, ...).

    Source: released code of arXiv:2310.12773, w = 0.001.
    """
    return regularization * cost.square()
