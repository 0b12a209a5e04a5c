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
    if scale not in ("none", "std"):
        raise ConfigError(f"scale={scale!r} must be 'none' or 'std' (config key policy_gradient.group_scale)")
    score_M = score_M.detach()
    names_G, group_M = torch.unique(group_M, return_inverse=True)
    num_groups = names_G.shape[0]
    # Counted from the lowest score of the group, equal scores are exact zeros whatever their size.
    lowest_G = score_M.new_full((num_groups,), math.inf).scatter_reduce(0, group_M, score_M, "amin")
    excess_M = score_M - lowest_G[group_M]
    size_M = segment_sum(torch.ones_like(score_M), group_M, num_groups)[group_M]
    total_M = segment_sum(excess_M, group_M, num_groups)[group_M]
    others_M = (size_M - 1).clamp(min=1)
    advantage_M = excess_M - (total_M - excess_M) / others_M
    if scale == "none":
        return advantage_M
    squares_M = torch.square(excess_M - total_M / size_M)
    std_M = torch.sqrt(segment_sum(squares_M, group_M, num_groups)[group_M] / others_M)
    return advantage_M / (std_M + STD_FLOOR)


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
    is_last_N = _is_last(sequence_N)
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
    next_values_N = torch.where(_is_last(sequence_N), 0, values_N.roll(-1))
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


def _is_last(sequence_N: torch.Tensor) -> torch.Tensor:
    """Whether each token is the last of its response, shape (N,); refuses responses with gaps."""
    is_last_N = torch.ones_like(sequence_N, dtype=torch.bool)
    is_last_N[:-1] = sequence_N[1:] != sequence_N[:-1]
    ends = sequence_N[is_last_N]
    if torch.unique(ends).shape[0] != ends.shape[0]:
        raise ShapeError("sequence must hold the tokens of each response one after another; sort the tokens by it")
    return is_last_N
