r"""How far a policy is from its constraint: rates, tails, and which prompts pay for which.

All functions take responses of many prompts, flat. A weight per response makes the same numbers exact where the
probabilities of all answers are known.

Shape letters: n responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raylign.errors import ShapeError

_ROUNDING = 1e-12  # a share that rounding left below its level still reaches it


@dataclass(frozen=True, slots=True, kw_only=True)
class Violations:
    r"""Costs of one policy over prompts; \(c_x\) is the mean cost of the responses to prompt x.

    Attributes:
        num_responses: n.
        num_prompts: distinct prompts.
        safety_rate: share of responses with C <= 0.
        mean_cost: mean of C.
        rectified_cost: mean of max(C, 0); 0 if and only if every response is safe.
        cvar: mean of C over the costliest share of responses.
        prompt_safety_rate: share of prompts of whose responses at least a given share is safe.
        under: U, mean over prompts of \(\max(c_x, 0)\): what prompts cost too much.
        over: O, mean over prompts of \(\max(-c_x, 0)\): what prompts are safer than they need to be.
        compensation: K = min(U, O), the excess of some prompts that is paid for by others.
    """

    num_responses: int
    num_prompts: int
    safety_rate: float
    mean_cost: float
    rectified_cost: float
    cvar: float
    prompt_safety_rate: float
    under: float
    over: float
    compensation: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptChange:
    """What became of the same prompts under another policy; a prompt is safe when enough of its responses are.

    Attributes:
        num_safe_before: prompts that were safe.
        num_unsafe_before: prompts that were not.
        became_unsafe: share of the former that no longer are, 0 when there were none.
        became_safe: share of the latter that now are, 0 when there were none.
        reward_before: mean reward on prompts that were safe, over prompts; nan when there were none.
        reward_after: the same under the other policy: lower means that safe prompts pay for the constraint.
    """

    num_safe_before: int
    num_unsafe_before: int
    became_unsafe: float
    became_safe: float
    reward_before: float
    reward_after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CostHistogram:
    """Shares of responses by cost; 0 is an edge, so no bin holds both safe and unsafe ones.

    Attributes:
        edges: (B + 1,) ascending; bins take their right edge, the first also its left.
        shares: (B,) adding up to 1; responses beyond an end are in its bin.
    """

    edges: np.ndarray
    shares: np.ndarray


def violations(
    cost: np.ndarray,
    prompt: np.ndarray,
    *,
    weight: np.ndarray | None = None,
    prompt_safety: float = 0.95,
    cvar_level: float = 0.05,
) -> Violations:
    """Summarise the costs of responses.

    Args:
        cost: raw cost, > 0 unsafe. Shape (n,), n >= 1.
        prompt: prompt of each response, any integers. Shape (n,).
        weight: how often each response counts, for example its probability. Shape (n,), >= 0, above 0 for a response of
            every prompt. None counts each once.
        prompt_safety: share of safe responses that makes a prompt safe, in (0, 1].
        cvar_level: share of the costliest responses that `cvar` averages, in (0, 1]; the boundary counts by its
            fraction.

    Raises:
        ShapeError: the arrays are not vectors of one length, or empty.

    Source: CVaR: Rockafellar and Uryasev (2002); U, O and K are reconstructed from the problem that arXiv:2410.19933
    names (safety compensation).
    """
    cost, weight = _checked(cost, prompt, weight)
    mean_X, safe_X = prompt_means(prompt, weight, cost, cost <= 0)
    under, over = float(np.maximum(mean_X, 0).mean()), float(np.maximum(-mean_X, 0).mean())
    return Violations(
        num_responses=len(cost),
        num_prompts=len(mean_X),
        safety_rate=float(np.average(cost <= 0, weights=weight)),
        mean_cost=float(np.average(cost, weights=weight)),
        rectified_cost=float(np.average(np.maximum(cost, 0), weights=weight)),
        cvar=_upper_tail(cost, weight, cvar_level),
        prompt_safety_rate=float((safe_X >= prompt_safety - _ROUNDING).mean()),
        under=under,
        over=over,
        compensation=min(under, over),
    )


def violations_by_category(
    cost: np.ndarray, prompt: np.ndarray, category: Sequence[str], *, prompt_safety: float = 0.95
) -> dict[str, Violations]:
    """`violations` of the responses of each category, by its name, sorted.

    Args:
        cost: raw cost. Shape (n,).
        prompt: prompt of each response. Shape (n,).
        category: of each response. Length n.
        prompt_safety: as for `violations`.

    Raises:
        ShapeError: the three differ in length, or are empty.
    """
    names = np.asarray(category)
    _checked(cost, prompt, None)
    if names.shape != cost.shape:
        raise ShapeError(f"{len(names)} categories for {len(cost)} responses; give one per response")
    found = {str(name): names == name for name in np.unique(names)}
    return {name: violations(cost[own], prompt[own], prompt_safety=prompt_safety) for name, own in found.items()}


def prompt_change(
    before: tuple[np.ndarray, np.ndarray, np.ndarray],
    after: tuple[np.ndarray, np.ndarray, np.ndarray],
    *,
    prompt_safety: float = 0.95,
) -> PromptChange:
    """Which prompts a policy made unsafe that were safe, and the reverse, and what the safe ones lost in reward.

    Args:
        before: costs, prompts and rewards of responses of the first policy, shapes (n,).
        after: the same of the second, on the same prompts; other numbers of responses are fine.
        prompt_safety: share of safe responses that makes a prompt safe.

    Raises:
        ShapeError: arrays of different lengths, or different prompts.
    """
    prompts_before, prompts_after = (np.unique(prompt) for _, prompt, _ in (before, after))
    if not np.array_equal(prompts_before, prompts_after):
        raise ShapeError(f"{len(prompts_before)} prompts before and {len(prompts_after)} after must be the same ones")
    is_safe, rewards = [], []
    for cost, prompt, reward in (before, after):
        checked, weight = _checked(cost, prompt, None)
        _checked(reward, prompt, None)
        safe_X, reward_X = prompt_means(prompt, weight, checked <= 0, reward)
        is_safe.append(safe_X >= prompt_safety - _ROUNDING)
        rewards.append(reward_X)
    was_safe, now_safe = is_safe
    return PromptChange(
        num_safe_before=int(was_safe.sum()),
        num_unsafe_before=int((~was_safe).sum()),
        became_unsafe=float((~now_safe[was_safe]).mean()) if was_safe.any() else 0.0,
        became_safe=float(now_safe[~was_safe].mean()) if not was_safe.all() else 0.0,
        reward_before=float(rewards[0][was_safe].mean()) if was_safe.any() else float("nan"),
        reward_after=float(rewards[1][was_safe].mean()) if was_safe.any() else float("nan"),
    )


def cost_histogram(
    cost: np.ndarray, *, bound: float, num_bins: int = 20, weight: np.ndarray | None = None
) -> CostHistogram:
    """Histogram of costs between -bound and bound.

    Args:
        cost: raw cost. Shape (n,), n >= 1.
        bound: end of the scale, cost units, above 0; the same for policies that are compared.
        num_bins: an even number, so that 0 is an edge.
        weight: as for `violations`.

    Raises:
        ShapeError: no costs, another length of weights, or an odd number of bins.
    """
    if num_bins < 2 or num_bins % 2:
        raise ShapeError(f"num_bins={num_bins} must be even and at least 2, so that 0 is an edge between bins")
    cost, weight = _checked(cost, np.zeros(len(cost), np.int64), weight)
    edges = np.linspace(-bound, bound, num_bins + 1)
    edges[num_bins // 2] = 0.0
    # side "left": a cost on an edge belongs to the bin below it, so that a cost of 0 is with the safe ones
    index = np.clip(np.searchsorted(edges, cost, side="left") - 1, 0, num_bins - 1)
    return CostHistogram(edges=edges, shares=np.bincount(index, weight, num_bins) / weight.sum())


def _checked(values: np.ndarray, prompt: np.ndarray, weight: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Values and weights as float64 vectors of one length."""
    weight = np.ones(len(values)) if weight is None else weight
    shapes = {np.shape(array) for array in (values, prompt, weight)}
    if len(shapes) > 1 or np.ndim(values) != 1 or not len(values):
        raise ShapeError(f"shapes {sorted(shapes)} must be one (n,) with n >= 1, one value per response")
    return np.asarray(values, np.float64), np.asarray(weight, np.float64)


def prompt_means(prompt: np.ndarray, weight: np.ndarray, *values: np.ndarray) -> list[np.ndarray]:
    """Weighted mean of each of the values over the responses to each prompt, prompts ascending."""
    _, index = np.unique(prompt, return_inverse=True)
    total = np.bincount(index, weight)
    return [np.bincount(index, weight * value) / total for value in values]


def _upper_tail(cost: np.ndarray, weight: np.ndarray, level: float) -> float:
    """Mean of the costliest `level` of the weight."""
    order = np.argsort(-cost, kind="stable")
    wanted = level * weight.sum()
    before = np.cumsum(weight[order]) - weight[order]
    taken = np.clip(wanted - before, 0, weight[order])
    return float((taken * cost[order]).sum() / wanted)
