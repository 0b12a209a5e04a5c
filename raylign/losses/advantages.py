r"""What a policy gradient multiplies grad log pi with: scores of responses, rewards of tokens, and their advantages.

Responses are ragged, so tokens of all of them lie flat, one after another, and `sequence_N` names the response of each:
the tokens of one response are consecutive and in order, the responses in any order. Everything here is a constant for
autograd. A penalty enters from outside: give R - lambda P as the reward, or costs as rewards of tokens.

Shape letters: N tokens, M responses, G groups.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch.nn import functional as F

from raylign.errors import ConfigError, ShapeError
from raylign.losses.logprobs import segment_sum

STD_FLOOR = 1e-4  # added to a group's deviation, so that equal scores up to rounding stay near 0 instead of near 1


def kl_estimates(logps_old_N: torch.Tensor, reference_logps_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Two estimates of KL(policy || reference) at each sampled token.

    Definition: \(k_1 = \log\pi_{old} - \log\pi_0\) and \(k_3 = e^{-k_1} - 1 + k_1 \ge 0\). Both have the divergence of
    the two next-token distributions as their mean over tokens of \(\pi_{old}\). \(k_1\) goes into the reward: its sum
    over a response is the log-ratio, whose score-function gradient is that of the divergence. \(k_3\) is for logging.

    Args:
        logps_old_N: log-probabilities under the policy at the start of the round, nats. Shape (N,).
        reference_logps_N: under the frozen reference. Shape (N,).

    Returns:
        \(k_1\) and \(k_3\) in nats, without gradient. Shapes (N,).

    Raises:
        ShapeError: the two differ in shape.

    Source: Schulman (2020), "Approximating KL divergence", joschu.net/blog/kl-approx.html.
    """
    check_alike(logps_old=logps_old_N, reference_logps=reference_logps_N)
    k1_N = (logps_old_N - reference_logps_N).detach()
    return k1_N, torch.expm1(-k1_N) + k1_N


def sequence_scores(
    reward_M: torch.Tensor,
    kl_N: torch.Tensor,
    sequence_N: torch.Tensor,
    *,
    beta: float,
    score_clip: float = math.inf,
) -> torch.Tensor:
    r"""Score of each response: its reward less the weighted divergence from the reference.

    Definition: \(S_i = \mathrm{clamp}(R_i, \pm\mathrm{score\_clip}) - \beta \sum_{t \in i} k_{1,t}\).

    Args:
        reward_M: of each response, reward units. Shape (M,).
        kl_N: \(k_1\) of `kl_estimates`, nats. Shape (N,).
        sequence_N: response of each token, in [0, M). Shape (N,), int64.
        beta: reward units per nat.
        score_clip: bound of the reward, reward units.

    Returns:
        Scores in reward units, without gradient. Shape (M,).

    Raises:
        ShapeError: kl and sequence differ in shape, or reward is not one value per response.

    Source: Ahmadian et al. (2024), arXiv:2402.14740, Eq. 3; the clamp is a choice of this project.
    """
    check_vector(reward=reward_M)
    divergence_M = segment_sum(kl_N.to(reward_M.dtype), sequence_N, reward_M.shape[0])
    return (reward_M.clamp(-score_clip, score_clip) - beta * divergence_M).detach()


def group_advantages(
    score_M: torch.Tensor, group_M: torch.Tensor, *, scale: Literal["none", "std"] = "none"
) -> torch.Tensor:
    r"""How much better each response is than the others of its prompt.

    Definition: \(A_i = S_i - \mathrm{mean}_{j \ne i} S_j\) over the group of i; "std" divides by the group's deviation
    (n - 1 in the denominator) plus `STD_FLOOR`.

    The baseline does not depend on response i, so the gradient is unbiased; a baseline that includes i would shrink it
    by (K - 1)/K. Dividing by the deviation changes the weight of prompts and of responses within one: the direction is
    biased. A response alone in its group has nothing to be compared with and gets 0, as do groups of equal scores.

    Args:
        score_M: \(S\) of `sequence_scores`, or any score with its penalties, reward units. Shape (M,).
        group_M: prompt of each response, any integers, groups of any size. Shape (M,), int64.
        scale: "none", or "std" for the GRPO scale.

    Returns:
        Advantages, reward units ("std": dimensionless), without gradient; `advantages[sequence_N]` gives every token
        its own. Shape (M,).

    Raises:
        ShapeError: score and group differ in shape or are not vectors.
        ConfigError: another scale.

    Source: Kool et al. (2019), "Buy 4 REINFORCE samples, get a baseline for free!"; Ahmadian et al. (2024),
    arXiv:2402.14740, RLOO. The scale: Shao et al. (2024), arXiv:2402.03300, 4.1.2.
    """
    check_vector(score=score_M, group=group_M)
    check_alike(score=score_M, group=group_M)
    _check_scale(scale)
    excess_M, total_M, others_M = _above_lowest(score_M, group_M)
    advantage_M = excess_M - (total_M - excess_M) / others_M.clamp(min=1)
    return advantage_M if scale == "none" else advantage_M / (_group_std(score_M, group_M) + STD_FLOOR)


def token_group_advantages(
    rewards_N: torch.Tensor,
    sequence_N: torch.Tensor,
    group_M: torch.Tensor,
    *,
    scale: Literal["none", "std"] = "none",
) -> torch.Tensor:
    r"""How much better each token's rewards to go are than those of the other responses to the prompt at its position.

    Definition: \(G_{i,t} = \sum_{s \ge t} r_{i,s}\) within response i, \(A_{i,t} = G_{i,t} - \mathrm{mean}_{j \ne i}
    G_{j,\min(t, T_j - 1)}\) over its group: a response that is over counts with what its last token got. "std" divides
    by the group's deviation of \(G_{i,0}\) (n - 1 in the denominator) plus `STD_FLOOR`, as `group_advantages` does.

    The baseline does not depend on response i and the rewards before t do not depend on its token t, so the gradient is
    that of \(E\sum_t r_t\), unbiased; but only where a reward does not look at the tokens behind its own. Counting an
    ended response with its last reward instead of 0 makes a reward that stands at the end alone that of
    `group_advantages`, whatever the lengths.

    Args:
        rewards_N: \(r_t\), the divergence from the reference taken off, reward units. Shape (N,).
        sequence_N: response of each token, in [0, M). Shape (N,), int64.
        group_M: prompt of each response, any integers, groups of any size. Shape (M,), int64.
        scale: "none", or "std" for the GRPO scale.

    Returns:
        Advantages of tokens, reward units ("std": dimensionless), without gradient; 0 where a response is alone in its
        group. Shape (N,).

    Raises:
        ShapeError: rewards and sequence differ in shape, a response without tokens or with gaps between them.
        ConfigError: another scale.

    Source: rewards to go and a baseline of the time step: Sutton et al. (2000), "Policy gradient methods for
    reinforcement learning with function approximation"; leave-one-out: Kool et al. (2019); its form here is derived.
    """
    check_vector(group=group_M)
    check_alike(rewards=rewards_N, sequence=sequence_N)
    _check_scale(scale)
    num_responses = group_M.shape[0]
    is_last_N = _ends(sequence_N, num_responses)
    to_go_N, _ = gae(rewards_N, torch.zeros_like(rewards_N), sequence_N, gae_lambda=1.0)
    lengths_M = torch.bincount(sequence_N, minlength=num_responses)
    numbers_N = torch.arange(sequence_N.shape[0], device=sequence_N.device)
    end_M = torch.empty_like(lengths_M).scatter_(0, sequence_N[is_last_N], numbers_N[is_last_N])
    first_M = end_M - lengths_M + 1
    position_N = numbers_N - first_M[sequence_N]
    num_positions = int(lengths_M.max()) if num_responses else 0
    to_go_MT = to_go_N[end_M][:, None].repeat(1, num_positions)  # behind the end what the last token got
    to_go_MT[sequence_N, position_N] = to_go_N
    _, index_M = torch.unique(group_M, return_inverse=True)
    place_MT = index_M[:, None] * num_positions + torch.arange(num_positions, device=index_M.device)
    advantage_MT = group_advantages(to_go_MT.reshape(-1), place_MT.reshape(-1)).view(to_go_MT.shape)
    if scale == "std":
        advantage_MT = advantage_MT / (_group_std(to_go_N[first_M], group_M) + STD_FLOOR)[:, None]
    return advantage_MT[sequence_N, position_N]


def rewards_at_end(reward_M: torch.Tensor, sequence_N: torch.Tensor) -> torch.Tensor:
    r"""The reward of each response on its last token, 0 on the others.

    Definition: \(u_t = R_i 1[t = \mathrm{last\ of\ } i]\). A response that the length limit cut gets its reward at the
    cut.

    Args:
        reward_M: of each response, reward units. Shape (M,).
        sequence_N: response of each token, in [0, M). Shape (N,), int64.

    Returns:
        Rewards of tokens for `token_rewards`, without gradient. Shape (N,).

    Raises:
        ShapeError: a response without tokens, whose reward would be lost, or whose tokens are not consecutive.
    """
    check_vector(reward=reward_M)
    is_last_N = is_last(sequence_N)
    num_responses = int(is_last_N.sum())
    if num_responses != reward_M.shape[0]:
        raise ShapeError(
            f"{reward_M.shape[0]} rewards for {num_responses} responses with tokens; every response needs a token"
        )
    return torch.where(is_last_N, reward_M.detach()[sequence_N], 0)


def token_rewards(rewards_N: torch.Tensor, kl_N: torch.Tensor, *, beta: float, score_clip: float) -> torch.Tensor:
    r"""Rewards of tokens with the divergence from the reference taken off, bounded.

    Definition: \(r_t = \mathrm{clamp}(u_t - \beta k_{1,t}, \pm\mathrm{score\_clip})\).

    Args:
        rewards_N: \(u\), `rewards_at_end` of a reward of responses, or a reward of each token. Shape (N,).
        kl_N: \(k_1\) of `kl_estimates`, nats. Shape (N,).
        beta: reward units per nat.
        score_clip: bound of a token's reward, reward units.

    Returns:
        Rewards for `gae`, without gradient. Shape (N,).

    Raises:
        ShapeError: the two differ in shape.

    Source: Ouyang et al. (2022), arXiv:2203.02155, Eq. 2; the bound: released code of arXiv:2310.12773.
    """
    check_alike(rewards=rewards_N, kl=kl_N)
    return (rewards_N - beta * kl_N).detach().clamp(-score_clip, score_clip)


def gae(
    token_rewards_N: torch.Tensor,
    values_N: torch.Tensor,
    sequence_N: torch.Tensor,
    *,
    gae_lambda: float,
    discount: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Generalised advantage estimation over ragged responses.

    Definition: \(\delta_t = r_t + \gamma V_{t+1} - V_t\) with \(V = 0\) after the last token, also of a response that
    the length limit cut; \(A_t = \sum_l (\gamma\lambda)^l \delta_{t+l}\) within the response; returns
    \(G_t = A_t + V_t\).

    \(\lambda = 1\) gives the rewards to go less \(V_t\), unbiased for any V that was made before token t was sampled;
    \(\lambda = 0\) gives \(\delta_t\).

    Args:
        token_rewards_N: \(r\) of `token_rewards`, reward units. Shape (N,).
        values_N: \(V_t\), of the state that the distribution of token t is computed from, reward units. Shape (N,).
        sequence_N: response of each token. Shape (N,), int64.
        gae_lambda: bias against variance, in [0, 1].
        discount: \(\gamma\) in [0, 1].

    Returns:
        Advantages and returns, reward units, without gradient. Shapes (N,).

    Raises:
        ShapeError: the three differ in shape, or the tokens of a response are not consecutive.

    Source: Schulman et al. (2016), arXiv:1506.02438, Eq. 16.
    """
    check_alike(token_rewards=token_rewards_N, values=values_N, sequence=sequence_N)
    values_N = values_N.detach()
    next_values_N = torch.where(is_last(sequence_N), 0, values_N.roll(-1))
    advantages_N = token_rewards_N.detach() + discount * next_values_N - values_N
    # Doubling: with the sum of the first s terms at every token, the first 2s are it and the decayed one s tokens on.
    shift = 1
    while shift < sequence_N.shape[0]:
        is_same = sequence_N[shift:] == sequence_N[:-shift]
        later = torch.where(is_same, advantages_N[shift:], 0)
        advantages_N = advantages_N + (discount * gae_lambda) ** shift * F.pad(later, (0, shift))
        shift *= 2
    return advantages_N, advantages_N + values_N


def check_alike(**tensors: torch.Tensor) -> None:
    """Refuse tensors that would broadcast.

    Raises:
        ShapeError: naming each tensor and its shape.
    """
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ShapeError(f"{shapes} must be alike in shape")


def check_vector(**tensors: torch.Tensor) -> None:
    """Refuse anything but one value per response.

    Raises:
        ShapeError: naming the tensor and its shape.
    """
    for name, tensor in tensors.items():
        if tensor.dim() != 1:
            raise ShapeError(f"{name} {tuple(tensor.shape)} must be a vector, one value per response")


def is_last(sequence_N: torch.Tensor) -> torch.Tensor:
    """Whether each token is the last of its response.

    Args:
        sequence_N: response of each token. Shape (N,), int64.

    Returns:
        Shape (N,), bool.

    Raises:
        ShapeError: the tokens of a response are not consecutive.
    """
    is_last_N = torch.ones_like(sequence_N, dtype=torch.bool)
    is_last_N[:-1] = sequence_N[1:] != sequence_N[:-1]
    ends = sequence_N[is_last_N]
    if torch.unique(ends).shape[0] != ends.shape[0]:
        raise ShapeError("sequence must hold the tokens of each response one after another; sort the tokens by it")
    return is_last_N


def _ends(sequence_N: torch.Tensor, num_responses: int) -> torch.Tensor:
    """`is_last` of responses that all have tokens, shape (N,)."""
    is_last_N = is_last(sequence_N)
    num_found = int(is_last_N.sum())
    if num_found != num_responses:
        raise ShapeError(f"{num_responses} rewards for {num_found} responses with tokens; every response needs a token")
    return is_last_N


def _above_lowest(score_M: torch.Tensor, group_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What each score is above the lowest of its group, the group's sum of that, and how many others it has, (M,)."""
    score_M = score_M.detach()
    names_G, group_M = torch.unique(group_M, return_inverse=True)
    num_groups = names_G.shape[0]
    # Counted from the lowest score of the group, equal scores are exact zeros whatever their size.
    lowest_G = score_M.new_full((num_groups,), math.inf).scatter_reduce(0, group_M, score_M, "amin")
    excess_M = score_M - lowest_G[group_M]
    size_M = segment_sum(torch.ones_like(score_M), group_M, num_groups)[group_M]
    return excess_M, segment_sum(excess_M, group_M, num_groups)[group_M], size_M - 1


def _group_std(score_M: torch.Tensor, group_M: torch.Tensor) -> torch.Tensor:
    """Deviation of the scores of each response's group, n - 1 in the denominator, 0 for one alone, (M,)."""
    excess_M, total_M, others_M = _above_lowest(score_M, group_M)
    names_G, index_M = torch.unique(group_M, return_inverse=True)
    squares_M = torch.square(excess_M - total_M / (others_M + 1))
    return torch.sqrt(segment_sum(squares_M, index_M, names_G.shape[0])[index_M] / others_M.clamp(min=1))


def _check_scale(scale: str) -> None:
    if scale not in ("none", "std"):
        raise ConfigError(f"scale={scale!r} must be 'none' or 'std' (config key policy_gradient.group_scale)")
