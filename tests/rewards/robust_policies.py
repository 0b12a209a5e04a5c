"""Exact policies on a finite answer set: what an optimiser of a reward with a KL tie would end at.

The last axis is the answers; axes before it are prompts or instances. The reference is uniform.
"""

from __future__ import annotations

import math

import torch


def tilted(reward: torch.Tensor, beta: float) -> torch.Tensor:
    """argmax over p of E_p[reward] - beta KL(p || uniform): p proportional to exp(reward / beta)."""
    return torch.softmax(reward / beta, -1)


def kl_to_uniform(p: torch.Tensor) -> torch.Tensor:
    return torch.special.xlogy(p, p).sum(-1) + math.log(p.shape[-1])


def objective(p: torch.Tensor, reward: torch.Tensor, beta: float) -> torch.Tensor:
    """E_p[reward] - beta KL(p || uniform)."""
    return (p * reward).sum(-1) - beta * kl_to_uniform(p)


def soft_maximum(reward: torch.Tensor, beta: float) -> torch.Tensor:
    """beta log E_uniform exp(reward / beta), the value of `objective` at `tilted`."""
    return beta * (torch.logsumexp(reward / beta, -1) - math.log(reward.shape[-1]))


def global_objective(p: torch.Tensor, heads: torch.Tensor, nominal: torch.Tensor, w: float, beta: float) -> float:
    """w E_p[nominal] + (1 - w) min_j E_p[heads_j] - beta KL(p || uniform), the minimum outside the expectation."""
    worst = (heads * p).sum(-1).min()
    return float(w * (p * nominal).sum() + (1 - w) * worst - beta * kl_to_uniform(p))


def play(
    heads: torch.Tensor, nominal: torch.Tensor, w: float, beta: float, *, eta: float = 2.0, num_rounds: int = 1500
) -> torch.Tensor:
    """Weights (M,) of an adversary over heads (M, A) whose every round is answered with the best policy."""
    means = heads.new_zeros(num_rounds, len(heads))
    for t in range(num_rounds):
        mixture = _weights(means[:t], eta * (1 - w)) @ heads
        means[t] = heads @ tilted(w * nominal + (1 - w) * mixture, beta)
    return _weights(means, eta * (1 - w))


def _weights(means: torch.Tensor, eta: float) -> torch.Tensor:
    """Exponentiated gradient from uniform after the rounds whose mean rewards are `means` (T, M)."""
    return torch.softmax(-eta * means.sum(0), 0)
