r"""Rewards of tokens from a reward of responses: differences of prefix scores (RED) and attention (ABC).

Both spread a response's reward over its tokens and leave its sum as it was (RED up to the score of the empty response),
so that they help where tokens have returns of their own, and change no advantage that only reads sums.

Conventions as in `raylign.losses.advantages`: tokens lie flat, those of one response consecutive and in order; nothing
here has a gradient. Shape letters: N tokens, M responses.
"""

from __future__ import annotations

import torch

from raylign.losses.advantages import check_alike, check_vector, is_last, rewards_at_end
from raylign.losses.logprobs import segment_sum


def score_differences(
    prefix_scores_N: torch.Tensor, empty_scores_M: torch.Tensor, sequence_N: torch.Tensor
) -> torch.Tensor:
    r"""What each token changes in the score of the response so far.

    Definition: \(r_t = R(x, y_{\le t}) - R(x, y_{<t})\); they add up to R(response) - R(empty), which is R(response) up
    to a constant of the prompt. As a potential they leave the optimal policy unchanged. Reward models trained on whole
    responses only give noisy scores of prefixes.

    Args:
        prefix_scores_N: R of the response up to and with each token, reward units. Shape (N,).
        empty_scores_M: R of the prompt with an empty response. Shape (M,).
        sequence_N: response of each token, in [0, M). Shape (N,), int64.

    Returns:
        Reward units. Shape (N,).

    Raises:
        ShapeError: scores and sequence differ in shape, empty scores are no vector, or tokens of a response are not
            consecutive.

    Source: arXiv:2411.08302 (RED).
    """
    check_alike(prefix_scores=prefix_scores_N, sequence=sequence_N)
    check_vector(empty_scores=empty_scores_M)
    scores_N, empty_M = prefix_scores_N.detach(), empty_scores_M.detach()
    follows_N = is_last(sequence_N).roll(1)  # the last token overall ends a response, so that the first one starts one
    return scores_N - torch.where(follows_N, empty_M[sequence_N], scores_N.roll(1))


def attention_credit(attention_N: torch.Tensor, reward_M: torch.Tensor, sequence_N: torch.Tensor) -> torch.Tensor:
    r"""Each response's reward, shared out by the attention that its tokens got from the scored position.

    Definition: \(a_t R\), a renormalised over the response (attention on the prompt does not count). Where the whole
    response got none, its tokens share alike.

    Args:
        attention_N: of the reward model's last layer from the scored position to each token, mean over heads, at least
            0. Shape (N,).
        reward_M: of each response, reward units. Shape (M,).
        sequence_N: response of each token, in [0, M). Shape (N,), int64.

    Returns:
        Reward units; a response's tokens add up to its reward. Shape (N,).

    Raises:
        ShapeError: attention and sequence differ in shape, or reward is no vector.

    Source: Chan et al. (2024), arXiv:2402.00782 (ABC), and its released code.
    """
    check_alike(attention=attention_N, sequence=sequence_N)
    check_vector(reward=reward_M)
    attention_N, num_responses = attention_N.detach().to(reward_M.dtype), reward_M.shape[0]
    mass_M = segment_sum(attention_N, sequence_N, num_responses)
    attention_N = torch.where(mass_M[sequence_N] > 0, attention_N, 1)
    mass_M = segment_sum(attention_N, sequence_N, num_responses)
    return attention_N / mass_M[sequence_N] * reward_M.detach()[sequence_N]


def mix_with_end(
    credit_N: torch.Tensor, reward_M: torch.Tensor, sequence_N: torch.Tensor, *, dense_weight: float
) -> torch.Tensor:
    r"""A share of the credit of tokens, and the rest of the reward at the end of the response.

    Definition: \(w c_t + (1 - w) R 1[t = \mathrm{last}]\).

    Args:
        credit_N: c, `score_differences` or `attention_credit`. Shape (N,).
        reward_M: of each response, reward units. Shape (M,).
        sequence_N: response of each token, in [0, M). Shape (N,), int64.
        dense_weight: w in [0, 1]; 0 gives `rewards_at_end` to the bit.

    Returns:
        Rewards for `token_rewards`, without gradient. Shape (N,).

    Raises:
        ShapeError: credit and sequence differ in shape, or a response has no tokens.

    Source: arXiv:2411.08302 (w = 1), arXiv:2402.00782 (w = 1/2).
    """
    check_alike(credit=credit_N, sequence=sequence_N)
    return dense_weight * credit_N.detach() + (1 - dense_weight) * rewards_at_end(reward_M, sequence_N)
