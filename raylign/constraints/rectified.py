r"""What a cost does to the reward that a policy gradient follows: one place for every variant of the constraint.

A response with cost C is unsafe when C > 0. The rectified cost \(P = \max(C, 0)\) is 0 on every safe response, so no
response is paid for being safer than safe; with C itself, very safe answers to easy prompts pay for unsafe answers to
hard ones. Which of the two is weighed against the reward, and whether the sum is divided by \(1 + \lambda\), is the
`Variant`.

Everything here is a constant for autograd, the multiplier \(\lambda\) a plain number.

Shape letters: N tokens, M responses.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from raylign.losses.advantages import check_alike, check_vector, rewards_at_end, token_rewards
from raylign.losses.logprobs import segment_sum

Kind = Literal["rectified", "split", "expected", "rectified_mean", "fixed_penalty"]
SplitNormalise = Literal["one_plus_multiplier", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    r"""How reward and cost become one number.

    | kind | combination | cost X |
    |---|---|---|
    | rectified, fixed_penalty | \(R - \lambda X\) | P |
    | split | safe: \(R\); unsafe: \((R - \lambda X)/(1 + \lambda)\), or undivided | C |
    | expected, rectified_mean | \((R - \lambda X)/(1 + \lambda)\) | C |

    Only the first has the gradient of \(E[R] - \lambda E\{C\}^+\). `rectified_mean` differs from `expected` in what the
    multiplier sees, `fixed_penalty` from `rectified` in a multiplier that never moves.

    Attributes:
        kind: see the table.
        split_normalise: divisor of the unsafe responses, for split alone.
    """

    kind: Kind
    split_normalise: SplitNormalise = "one_plus_multiplier"

    @property
    def is_rectified(self) -> bool:
        """Whether X is P; else it is C."""
        return self.kind in ("rectified", "fixed_penalty")

    @property
    def is_divided(self) -> bool:
        r"""Whether responses are divided by \(1 + \lambda\), in `split` the unsafe ones."""
        return not self.is_rectified and (self.kind != "split" or self.split_normalise == "one_plus_multiplier")


def is_unsafe(cost: torch.Tensor) -> torch.Tensor:
    """Whether a raw cost violates the constraint: C > 0, so that a cost of 0 is safe. Any shape, bool.

    Args:
        cost: as the cost model gave it, before any clamp, divergence or scale. Any shape.
    """
    return cost > 0


def rectified_cost(cost: torch.Tensor) -> torch.Tensor:
    r"""The part of a cost that violates: \(P = \max(C, 0)\). Any shape, without gradient.

    Args:
        cost: raw cost, > 0 unsafe. Any shape.

    Source: Peng et al. (2024), arXiv:2410.19933, as described in public summaries.
    """
    return cost.detach().clamp(min=0)


def weighed_cost(cost: torch.Tensor, variant: Variant) -> torch.Tensor:
    """X of the variant, P or C: what the multiplier weighs and what the cost critic learns. Without gradient.

    Args:
        cost: raw cost. Any shape.
        variant: see `Variant`.
    """
    return rectified_cost(cost) if variant.is_rectified else cost.detach()


def combine(
    reward: torch.Tensor, cost: torch.Tensor, unsafe: torch.Tensor, *, multiplier: float, variant: Variant
) -> torch.Tensor:
    r"""Reward and cost as one number, by the table of `Variant`.

    The same for responses (reward R, cost X) and for tokens (advantages \(A_R\), \(A_X\) of two critics).

    Where every response is safe, `split` gives the reward to the bit, and so does `rectified` with X = P; where all are
    unsafe, a divided `split` gives `expected` to the bit.

    Args:
        reward: R or \(A_R\), reward units. Any shape.
        cost: X or \(A_X\), cost units. Same shape.
        unsafe: `is_unsafe` of the raw cost of the whole response. Same shape, bool.
        multiplier: \(\lambda \ge 0\), reward units per unit of cost.
        variant: see `Variant`.

    Returns:
        Reward units, without gradient. Same shape.

    Raises:
        ShapeError: the three differ in shape.

    Source: the division: released code of Dai et al. (2023), arXiv:2310.12773 (Safe-RLHF); `split` is reconstructed
    from summaries of arXiv:2410.19933; `rectified` is the unbiased form derived here.
    """
    check_alike(reward=reward, cost=cost, unsafe=unsafe)
    penalised = (reward - multiplier * cost).detach()
    if variant.is_divided:
        penalised = penalised / (1 + multiplier)
    return torch.where(unsafe, penalised, reward.detach()) if variant.kind == "split" else penalised


def constrained_rewards(
    reward_M: torch.Tensor, cost_M: torch.Tensor, *, multiplier: float, variant: Variant, score_clip: float
) -> torch.Tensor:
    r"""Rewards of responses with their cost, for `sequence_scores` and the leave-one-out advantage.

    The divergence from the reference comes off afterwards and is never divided: its weight is beta for every response.

    Args:
        reward_M: R, reward units. Shape (M,).
        cost_M: raw cost, > 0 unsafe. Shape (M,).
        multiplier: \(\lambda\).
        variant: see `Variant`.
        score_clip: bound of the reward and of the cost, each in its units.

    Returns:
        Reward units, without gradient. Shape (M,).

    Raises:
        ShapeError: the two differ in shape or are not vectors.
    """
    check_vector(reward=reward_M, cost=cost_M)
    clipped_M = reward_M.clamp(-score_clip, score_clip)
    weighed_M = weighed_cost(cost_M, variant).clamp(-score_clip, score_clip)
    return combine(clipped_M, weighed_M, is_unsafe(cost_M), multiplier=multiplier, variant=variant)


def constrained_token_rewards(
    reward_N: torch.Tensor,
    cost_M: torch.Tensor,
    sequence_N: torch.Tensor,
    *,
    multiplier: float,
    variant: Variant,
    score_clip: float,
) -> torch.Tensor:
    r"""Rewards of tokens with the cost of their response, for `token_group_advantages`.

    Definition: \(r_t\) and the cost at the last token as `combine` has them, so that a response adds up to what
    `combine` makes of \(\sum_t r_t\). For `split` all that the combination changes stands at the last token: whether
    the response is unsafe, and its rewards hence divided, is known only there, and rewards to go forget what stands
    before a token. With that the gradient is that of the combination, for every variant.

    The divergence from the reference comes off afterwards and is never divided.

    Args:
        reward_N: reward of each token, reward units. Shape (N,).
        cost_M: raw cost of each response, > 0 unsafe. Shape (M,).
        sequence_N: response of each token. Shape (N,), int64.
        multiplier: \(\lambda\).
        variant: see `Variant`.
        score_clip: bound of a token's reward and of a response's cost, each in its units.

    Returns:
        Reward units, without gradient. Shape (N,).

    Raises:
        ShapeError: the tensors disagree in shape.
    """
    check_alike(reward=reward_N, sequence=sequence_N)
    clipped_N = reward_N.detach().clamp(-score_clip, score_clip)
    weighed_M = weighed_cost(cost_M, variant).clamp(-score_clip, score_clip)
    unsafe_M, combined = is_unsafe(cost_M), partial(combine, multiplier=multiplier, variant=variant)
    if variant.kind != "split":
        return combined(clipped_N, rewards_at_end(weighed_M, sequence_N), unsafe_M[sequence_N])
    total_M = segment_sum(clipped_N, sequence_N, cost_M.shape[0])
    return clipped_N + rewards_at_end(combined(total_M, weighed_M, unsafe_M) - total_M, sequence_N)


def cost_token_rewards(
    cost_M: torch.Tensor,
    kl_N: torch.Tensor,
    sequence_N: torch.Tensor,
    *,
    beta: float,
    score_clip: float,
    variant: Variant,
) -> torch.Tensor:
    r"""Costs of tokens, for the cost critic.

    Definition: \(c_t = \mathrm{clamp}(X\,1[t\ \mathrm{last}] + b\,k_{1,t}, \pm\mathrm{score\_clip})\), where
    \(b = \beta\) for a divided variant and 0 otherwise. Rewards carry \(-\beta k_1\), so the combination has the
    weight beta on every token: \((-\beta k_1 - \lambda\beta k_1)/(1 + \lambda) = -\beta k_1\).

    Args:
        cost_M: raw cost of each response. Shape (M,).
        kl_N: \(k_1\) of `kl_estimates`, nats. Shape (N,).
        sequence_N: response of each token. Shape (N,), int64.
        beta: units per nat.
        score_clip: bound of a token's cost.
        variant: see `Variant`.

    Returns:
        Cost units, for `gae`, without gradient. Shape (N,).

    Raises:
        ShapeError: the tensors disagree in shape.

    Source: released code of Dai et al. (2023), arXiv:2310.12773; without the divergence: derived.
    """
    at_end_N = rewards_at_end(weighed_cost(cost_M, variant), sequence_N)
    return token_rewards(at_end_N, kl_N, beta=-beta if variant.is_divided else 0.0, score_clip=score_clip)


def part_weights(unsafe_M: torch.Tensor, size_M: torch.Tensor) -> torch.Tensor:
    r"""Weights that turn the mean over a batch into the sum of the means over its safe and its unsafe part.

    Definition: \(w_i = \sum_j s_j / \sum_{j:\,u_j = u_i} s_j\). A batch of one part keeps weights of 1, so an empty
    part adds nothing and divides nothing.

    Args:
        unsafe_M: part of each response of the whole batch. Shape (M,), bool.
        size_M: what the mean counts, tokens or 1 per response. Shape (M,).

    Returns:
        Weight of each response's tokens. Shape (M,), float64.

    Raises:
        ShapeError: the two differ in shape.
    """
    check_alike(unsafe=unsafe_M, size=size_M)
    size_M = size_M.double()
    unsafe_size = torch.where(unsafe_M, size_M, 0).sum()
    own_M = torch.where(unsafe_M, unsafe_size, size_M.sum() - unsafe_size)
    return size_M.sum() / own_M
