"""Whether members can be compared at all, and which of them decide: what to warn of and to log beside the rules.

Shape letters: n responses, M members (heads).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from raylign.errors import ShapeError
from raylign.rewards.aggregate import check_members, nominal_head, nominal_rewards

ANCHOR_LIMIT = 0.5
"""`anchor_spread` above which members have no common zero.

Members standardised on one set differ by sampling error alone, about 1/sqrt(n): 0.13 on 64 responses. Five members
0.5 apart let one of them supply 44 % (independent members) to 72 % (correlation 0.9) of the minima instead of 20 %.
"""

FLOOR_FACTOR = 2.0
"""A sigma up to so many times its floor counts as lying on it."""


def anchor_spread(mu: torch.Tensor) -> float:
    """How far the members' zeros lie apart, in units of what a member says between responses.

    Definition: standard deviation over heads of a head's mean, over the pooled standard deviation within heads (both
    with 1/count). Bradley-Terry leaves the offset of each member open; above `ANCHOR_LIMIT` a minimum over members is
    mostly a choice of the member with the lowest offset.

    Args:
        mu: of enough responses that means are known, 64 or more. Shape (n, M), n at least 1.

    Returns:
        0 for one member or equal means; infinite when means differ and no member tells responses apart.

    Raises:
        ShapeError: mu is not (n, M) or has no rows.
    """
    mu, _ = _checked(mu, None)
    means_M = mu.double().mean(0)
    if means_M.max() == means_M.min():
        return 0.0
    within = mu.double().var(0, correction=0).mean().sqrt().item()
    return means_M.std(correction=0).item() / within if within > 0 else math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberFacts:
    """Which members decide, and how far they are apart, over one round of responses.

    Attributes:
        nominal_share: share of responses of which each head is the most confident, adding up to 1; None without sigma.
        argmin_share: share of responses of which each head gives the minimum, adding up to 1.
        mean_gap: mean of nominal reward - minimum, or of mean - minimum without sigma; at least 0, reward units.
        mean_disagreement: mean over responses of the standard deviation over heads (1/M), reward units.
        mean_sigma: mean of what heads state, reward units; None without sigma.
        sigma_floor_share: share of sigmas up to `FLOOR_FACTOR` times their floor; None without sigma or floor.
    """

    nominal_share: tuple[float, ...] | None
    argmin_share: tuple[float, ...]
    mean_gap: float
    mean_disagreement: float
    mean_sigma: float | None
    sigma_floor_share: float | None


def member_facts(
    mu: torch.Tensor, sigma: torch.Tensor | None = None, *, sigma_floor: float | None = None
) -> MemberFacts:
    """What to log of a round about its members.

    Args:
        mu: shape (n, M), n at least 1.
        sigma: standard deviations that the heads state, or None. Shape (n, M).
        sigma_floor: smallest sigma that the heads can state, reward units.

    Raises:
        ShapeError: mu is not (n, M) or has no rows, or sigma has another shape.
    """
    mu, sigma = _checked(mu, sigma)
    num_heads = mu.shape[1]
    reference_n = mu.mean(-1) if sigma is None else nominal_rewards(mu, sigma)
    on_floor = None if sigma is None or sigma_floor is None else (sigma <= FLOOR_FACTOR * sigma_floor).double()
    return MemberFacts(
        nominal_share=None if sigma is None else _shares(nominal_head(sigma), num_heads),
        argmin_share=_shares(mu.argmin(-1), num_heads),
        mean_gap=(reference_n - mu.amin(-1)).mean().item(),
        mean_disagreement=mu.std(-1, correction=0).mean().item(),
        mean_sigma=None if sigma is None else sigma.mean().item(),
        sigma_floor_share=None if on_floor is None else on_floor.mean().item(),
    )


def _shares(head_n: torch.Tensor, num_heads: int) -> tuple[float, ...]:
    return tuple((torch.bincount(head_n, minlength=num_heads).double() / len(head_n)).tolist())


def _checked(mu: torch.Tensor, sigma: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    if mu.dim() == 2 and not len(mu):
        raise ShapeError(f"mu {tuple(mu.shape)} must have at least one response")
    return check_members(mu, sigma)
