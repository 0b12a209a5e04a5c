r"""The Lagrange multiplier of a constraint: a number that rises while the responses cost too much.

It moves once per round of responses, before the policy does, from the costs of all workers. Sums are exactly rounded,
so the order of the responses cannot change it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from raylign.errors import ConfigError, ShapeError

Statistic = Literal["rectified", "expected", "rectified_mean"]
Space = Literal["log", "linear"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiplierRule:
    r"""How a multiplier follows the costs.

    Attributes:
        statistic: J of the window: "rectified" the mean of \(\max(C, 0)\), "expected" the mean of C, "rectified_mean"
            the larger of 0 and that mean, which sees no prompt that others compensate.
        target: d, what J may be, cost units: a threshold of the mean, or a tolerance of the rectified mean.
        space: "log" moves \(\log\lambda\) by \(\eta\lambda(J - d)\), "linear" \(\lambda\) by \(\eta(J - d)\).
        learning_rate: \(\eta\); 0 holds the multiplier.
        maximum: cap of \(\lambda\); math.inf for none.
        window: W, newest costs that J averages; those of the last round always count, however many.
        delay: rounds before the multiplier first moves; their costs are seen.
    """

    statistic: Statistic
    target: float = 0.0
    space: Space = "log"
    learning_rate: float = 0.1
    maximum: float = math.inf
    window: int = 128
    delay: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiplierState:
    r"""A multiplier and what its next value depends on.

    Attributes:
        value: \(\lambda \ge 0\), reward units per unit of cost.
        costs: window of raw costs, oldest first.
        num_steps: rounds seen.
    """

    value: float
    costs: tuple[float, ...] = ()
    num_steps: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain values, exact."""
        return {"value": self.value, "costs": list(self.costs), "num_steps": self.num_steps}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> MultiplierState:
        """What `state_dict` gave."""
        return cls(value=state["value"], costs=tuple(state["costs"]), num_steps=state["num_steps"])


def cost_statistic(costs: Sequence[float], statistic: Statistic) -> float:
    """J of some raw costs, see `MultiplierRule`.

    Args:
        costs: at least one, > 0 unsafe.
        statistic: which.

    Raises:
        ShapeError: no cost at all.
    """
    if not costs:
        raise ShapeError(f"the multiplier's statistic {statistic!r} needs at least one cost, found none")
    if statistic == "rectified":
        return math.fsum(max(cost, 0.0) for cost in costs) / len(costs)
    mean = math.fsum(costs) / len(costs)
    return max(mean, 0.0) if statistic == "rectified_mean" else mean


def moved_multiplier(value: float, excess: float, rule: MultiplierRule) -> float:
    r"""The multiplier after one step of dual ascent.

    Definition: log space \(\log\lambda \leftarrow \min(\log\lambda + \eta\lambda(J - d), \log\lambda_{max})\); linear
    space \(\lambda \leftarrow \mathrm{clip}(\lambda + \eta(J - d), 0, \lambda_{max})\).

    Log space cannot reach 0 and is held at the smallest normal number.

    Args:
        value: \(\lambda\).
        excess: J - d, cost units.
        rule: space, step and cap.

    Raises:
        ConfigError: log space and a multiplier that is not above 0.

    Source: log space: released code of Dai et al. (2023), arXiv:2310.12773; linear: projected gradient ascent.
    """
    if rule.space == "linear":
        return min(max(value + rule.learning_rate * excess, 0.0), rule.maximum)
    if value <= 0:
        raise ConfigError(
            f"the multiplier is {value:g}, and log space never leaves 0: start above 0 (constraint.multiplier), or set "
            "constraint.multiplier_space=linear"
        )
    if rule.learning_rate * excess == 0:
        return min(value, rule.maximum)  # exp(log) would round
    log_value = math.log(value) + rule.learning_rate * value * excess
    cap = min(rule.maximum, sys.float_info.max)
    if log_value >= math.log(cap):  # before exp, which overflows and rounds
        return cap
    return max(math.exp(log_value), sys.float_info.min)


def advance(state: MultiplierState, costs: Sequence[float], rule: MultiplierRule) -> MultiplierState:
    """The multiplier that the policy steps of a round use.

    Args:
        state: after the round before.
        costs: raw costs of all responses of the round, of every worker, in their order.
        rule: see `MultiplierRule`.

    Returns:
        The state with the round seen; its value moved unless the delay lasts.

    Raises:
        ShapeError: no cost at all.
        ConfigError: log space and a multiplier that is not above 0.
    """
    window = (*state.costs, *(float(cost) for cost in costs))[-max(rule.window, len(costs), 1) :]
    seen = replace(state, costs=window, num_steps=state.num_steps + 1)
    if state.num_steps < rule.delay:
        return seen
    excess = cost_statistic(window, rule.statistic) - rule.target
    return replace(seen, value=moved_multiplier(state.value, excess, rule))


def is_at_cap(state: MultiplierState, rule: MultiplierRule) -> bool:
    """Whether the multiplier cannot rise, so that the constraint is no longer enforced but only weighed."""
    return state.value >= rule.maximum
