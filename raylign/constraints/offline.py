r"""A safety constraint over stored pairs: offline it is a choice of reward and of label confidence, not another loss.

With \(r_\lambda = r - \lambda X\), where X is C or \(P = \max(C, 0)\), and \(\gamma = \sigma(m_\lambda / T)\) for the
margin \(m_\lambda\) of \(r_\lambda\), the label-confidence loss of inverse temperature b has the fixed point
\(\pi_0 e^{r_\lambda/\beta}\), \(\beta = Tb\): the constrained optimum of the online methods at that multiplier. What is
exact in this and what is not: docs/constraints-offline.md.

Shape letters: B pairs, n responses, M members of the cost model, K columns of a covariance root.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from raylign.constraints.multipliers import MultiplierRule, moved_multiplier
from raylign.errors import ConfigError, DataError, ShapeError
from raylign.losses.advantages import check_alike, check_vector
from raylign.rewards.posterior import MarginPosterior, RewardPosterior, ensemble_posterior

OfflineKind = Literal["expected", "rectified"]
Labels = Literal["confidence", "sampled", "hard"]

_ASCENT_STEPS = 60  # plain steps before bisection closes the bracket
_MAX_STEPS = 200
_CLOSED = 1e-10  # width of the bracket, relative to the multiplier


def weighed_belief(cost: RewardPosterior, kind: OfflineKind) -> RewardPosterior:
    r"""Belief about X, what the multiplier weighs: C, or \(P = \max(C, 0)\) of every member.

    The mean of P over members is its posterior mean; \(\max(\bar C, 0)\) would be lower wherever members disagree about
    the sign. For a posterior over weights the members are draws.

    Args:
        cost: belief about raw costs, > 0 unsafe, of n responses.
        kind: "expected" is C, "rectified" P.
    """
    return cost if kind == "expected" else ensemble_posterior(cost.head_rewards.clamp(min=0))


def constrained_margin(reward: MarginPosterior, weighed: MarginPosterior, multiplier: float) -> MarginPosterior:
    r"""Belief about the margin of \(r_\lambda = r - \lambda X\).

    Definition: mean \(m_r - \lambda m_X\), variance \(v_r + \lambda^2 v_X\). Within each of the two models what the
    answers of a pair share has cancelled already. Between the two, errors are assumed independent: they are fitted to
    different labels, but to the same states, and an error that they share is counted twice or not at all.

    Args:
        reward: of r. Shapes (B,).
        weighed: of X, the belief of `weighed_belief`. Shapes (B,).
        multiplier: \(\lambda\), reward units per unit of cost.

    Raises:
        ShapeError: the two are of different numbers of pairs.
    """
    check_alike(reward=reward.mean, weighed=weighed.mean)
    return MarginPosterior(
        mean=reward.mean - multiplier * weighed.mean, variance=reward.variance + multiplier**2 * weighed.variance
    )


def pair_labels(
    confidence: torch.Tensor, margin: torch.Tensor, row_ids: Sequence[str], *, labels: Labels, seed: int
) -> torch.Tensor:
    r"""What the loss is told of each pair: \(\gamma\) itself, a draw from it, or the sign of the margin.

    A label of 1 is DPO on the stored order, 0 on the pair turned round. Draws have \(\gamma\) as their mean, and the
    loss is linear in \(\gamma\), so that "sampled" has the expected loss of "confidence" and only adds noise.

    Args:
        confidence: \(\gamma\). Shape (B,).
        margin: mean of the constrained margin. Shape (B,).
        row_ids: of the pairs; a draw depends on its id and the seed alone, whatever the order of rows.
        labels: which.
        seed: of the draws.

    Returns:
        In [0, 1], 1/2 for a hard label of a margin of 0. Shape (B,), dtype of the confidence.

    Raises:
        ShapeError: the three differ in length.

    Source: "sampled" and "hard": Liu et al. (2024), arXiv:2403.02475 (C-DPO).
    """
    check_vector(confidence=confidence, margin=margin)
    check_alike(confidence=confidence, margin=margin)
    if len(row_ids) != len(confidence):
        raise ShapeError(f"{len(row_ids)} row ids for {len(confidence)} pairs; give one per pair")
    if labels == "hard":
        return (margin.sign().to(confidence.dtype) + 1) / 2
    if labels == "sampled":
        uniform = torch.tensor([_uniform(row_id, seed) for row_id in row_ids], dtype=torch.float64)
        return (uniform.to(confidence.device) < confidence.double()).to(confidence.dtype)
    return confidence


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredResponses:
    """Responses whose tilted policies the dual loop looks at.

    Attributes:
        reward: (n,) reward units.
        weighed: (n,) X, cost units.
        prompt: (n,) prompt of each, any integers.

    Raises:
        ShapeError: the three are not vectors of one length.
        DataError: no response, or numbers that are not finite.
    """

    reward: torch.Tensor
    weighed: torch.Tensor
    prompt: torch.Tensor

    def __post_init__(self) -> None:
        """Refuse what has no tilted policy."""
        check_vector(reward=self.reward, weighed=self.weighed, prompt=self.prompt)
        check_alike(reward=self.reward, weighed=self.weighed, prompt=self.prompt)
        num_bad = int((~torch.isfinite(self.reward) | ~torch.isfinite(self.weighed)).sum())
        if num_bad or not len(self.reward):
            raise DataError(
                f"{num_bad} of {len(self.reward)} stored responses have a reward or cost that is not finite; a "
                "multiplier needs finite ones of at least one response"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TiltedPolicy:
    r"""What \(\pi_\lambda\) does, seen through stored responses.

    Attributes:
        weight: (n,) probability of each response, adding up to 1 in every prompt, float64.
        statistic: J, mean over prompts of \(E_{\pi_\lambda}[X]\), cost units.
        mean_reward: the same of r, reward units.
        effective_responses: mean over prompts of \((\sum w)^2/\sum w^2\), between 1 and the responses of a prompt;
            near 1 a single response speaks for its prompt.
        num_prompts: distinct prompts.
    """

    weight: torch.Tensor
    statistic: float
    mean_reward: float
    effective_responses: float
    num_prompts: int


def tilted_policy(stored: StoredResponses, multiplier: float, *, beta: float) -> TiltedPolicy:
    r"""The policy \(\pi_\lambda \propto \pi_0 e^{(r - \lambda X)/\beta}\) by self-normalised importance weights.

    Definition: \(w_i = e^{r_{\lambda,i}/\beta} / \sum_j e^{r_{\lambda,j}/\beta}\), j over the responses to the prompt.

    Exact when the responses are all answers and the reference is uniform, consistent as samples of the reference grow
    in number, and biased towards the reference with few: K responses cannot tilt further than to the best of K.

    Args:
        stored: responses that count as samples of the reference.
        multiplier: \(\lambda\).
        beta: reward units per nat, of the fixed point.

    Source: self-normalised importance sampling, Owen (2013), "Monte Carlo theory, methods and examples", 9.2; effective
    sample size: Kish (1965).
    """
    _, group = torch.unique(stored.prompt, return_inverse=True)
    num_prompts = int(group.max()) + 1
    score = (stored.reward.double() - multiplier * stored.weighed.double()) / beta
    peak = torch.full((num_prompts,), -math.inf, dtype=torch.float64).scatter_reduce(0, group, score, "amax")
    raw = torch.exp(score - peak[group])
    weight = raw / _group_sum(raw, group, num_prompts)[group]
    return TiltedPolicy(
        weight=weight,
        statistic=float((weight * stored.weighed.double()).sum() / num_prompts),
        mean_reward=float((weight * stored.reward.double()).sum() / num_prompts),
        effective_responses=float(_group_sum(weight.square(), group, num_prompts).reciprocal().mean()),
        num_prompts=num_prompts,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DualSolution:
    r"""The multiplier of a constraint over stored responses.

    Attributes:
        multiplier: \(\lambda\); 0 when the reward alone keeps the constraint.
        policy: what \(\pi_\lambda\) does.
        is_at_cap: the cap was reached with J above its target: the constraint is weighed, not enforced.
        path: multipliers of all steps, the first being the start.
    """

    multiplier: float
    policy: TiltedPolicy
    is_at_cap: bool
    path: tuple[float, ...]


def dual_ascent(
    stored: StoredResponses,
    *,
    kind: OfflineKind,
    beta: float,
    target: float,
    maximum: float,
    start: float = 1.0,
    learning_rate: float = 0.1,
) -> DualSolution:
    r"""The multiplier at which \(\pi_\lambda\) meets its constraint: the dual loop of C-DPO, without training.

    Definition: \(\lambda \leftarrow [\lambda + \eta(J(\lambda) - d)]^+\) from `start`, until \(J(\lambda^*) = d\).

    J falls in \(\lambda\) (its slope is minus the mean variance of X under \(\pi_\lambda\), over beta), so every step
    also tells on which side the solution is. After sixty steps bisection of what is left finishes, because fixed steps
    oscillate where the slope is steep: the solution does not depend on `learning_rate`.

    A rectified constraint may be out of reach on stored responses (a prompt with unsafe ones only) and always is for
    d = 0: the multiplier is then the cap, as online. An expected one that is out of reach is an error.

    Args:
        stored: responses, their rewards and X.
        kind: what X is.
        beta: reward units per nat, of the fixed point.
        target: d, the threshold or tolerance, cost units.
        maximum: cap, above 0 and finite.
        start: first multiplier, between 0 and the cap.
        learning_rate: \(\eta\).

    Raises:
        DataError: an expected constraint that no multiplier up to the cap reaches.

    Source: Liu et al. (2024), arXiv:2403.02475 (C-DPO), its gradient step on the multiplier; estimating J by
    reweighting stored responses instead of sampling from a trained policy is derived here.
    """
    free = tilted_policy(stored, 0.0, beta=beta)
    if free.statistic <= target:
        return DualSolution(multiplier=0.0, policy=free, is_at_cap=False, path=(0.0,))
    capped = tilted_policy(stored, maximum, beta=beta)
    if capped.statistic > target:
        if kind == "expected":
            raise DataError(_unreachable(stored, free, capped, target=target, maximum=maximum))
        return DualSolution(multiplier=maximum, policy=capped, is_at_cap=True, path=(maximum,))
    rule = MultiplierRule(statistic=kind, target=target, space="linear", learning_rate=learning_rate, maximum=maximum)
    low, high = 0.0, maximum
    path = [min(start, maximum)]
    while len(path) < _MAX_STEPS:
        policy = tilted_policy(stored, path[-1], beta=beta)
        excess = policy.statistic - target
        low, high = (max(low, path[-1]), high) if excess > 0 else (low, min(high, path[-1]))
        if high - low <= _CLOSED * high:
            break
        is_plain = len(path) < _ASCENT_STEPS
        path.append(moved_multiplier(path[-1], excess, rule) if is_plain else (low + high) / 2)
    return DualSolution(
        multiplier=high, policy=tilted_policy(stored, high, beta=beta), is_at_cap=False, path=tuple(path)
    )


def stepwise_beta(beta: float, multiplier: float) -> float:
    r"""Inverse temperature of the second, safety stage of SACPO: \(\beta_s = \beta/\lambda\).

    Definition: \(\pi_0 e^{(r - \lambda c)/\beta} = (\pi_0 e^{r/\beta})\, e^{-c/\beta_s}\), so DPO on safety pairs with
    the helpful policy as its reference and \(\beta_s\) ends where one stage on \(r - \lambda c\) would.

    Args:
        beta: of the first, helpfulness stage.
        multiplier: \(\lambda\), above 0.

    Raises:
        ConfigError: a number that is not above 0 and finite.

    Source: Wachi et al. (2024), arXiv:2404.11049.
    """
    if not (0 < beta < math.inf and 0 < multiplier < math.inf):
        raise ConfigError(f"beta={beta:g} and multiplier={multiplier:g} must both be above 0 and finite")
    return beta / multiplier


def _uniform(row_id: str, seed: int) -> float:
    """A number in [0, 1) that depends on the id and the seed alone."""
    digest = hashlib.blake2b(f"{seed}:{row_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _group_sum(values: torch.Tensor, group: torch.Tensor, num_groups: int) -> torch.Tensor:
    return torch.zeros(num_groups, dtype=values.dtype).index_add(0, group, values)


def _unreachable(
    stored: StoredResponses, free: TiltedPolicy, capped: TiltedPolicy, *, target: float, maximum: float
) -> str:
    _, group = torch.unique(stored.prompt, return_inverse=True)
    least = torch.full((free.num_prompts,), math.inf, dtype=torch.float64)
    least = least.scatter_reduce(0, group, stored.weighed.double(), "amin")
    reachable = float(least.mean())
    cure = (
        "raise constraint.multiplier_max"
        if reachable < target
        else f"raise constraint.threshold above {reachable:.4g}, the mean over prompts of their least cost, or store "
        "safer answers"
    )
    return (
        f"no multiplier up to {maximum:g} brings the mean cost over {free.num_prompts} prompts to {target:g}: it is "
        f"{free.statistic:.4g} at 0 and {capped.statistic:.4g} at the cap; {cure}"
    )
