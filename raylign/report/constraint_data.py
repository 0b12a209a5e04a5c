"""What a report says of a safety constraint, as plain values. Cost > 0 is unsafe, cost <= 0 is safe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from raylign.constraints.violations import PromptChange, cost_histogram, prompt_change, violations_by_category
from raylign.types import Completion

if TYPE_CHECKING:
    from raylign.report.sampled_data import SampledRun

_MEASURES = (
    "mean_cost",
    "rectified_cost",
    "safety_rate",
    "prompt_safety_rate",
    "cvar",
    "under",
    "over",
    "compensation",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstraintPoint:
    """Costs of one policy: that of a round, or one seen through stored answers; see `violations.Violations`.

    Attributes:
        name: "round 3", or the policy in words.
        multiplier: that its responses were weighed with, None without a constraint.
        is_at_cap: the multiplier could not rise further.
        mean_cost: mean of C.
        rectified_cost: mean of max(C, 0).
        safety_rate: share of responses with C <= 0.
        prompt_safety_rate: share of prompts of which enough responses are safe.
        cvar: mean cost of the costliest responses.
        under: what prompts cost too much, mean over prompts.
        over: what prompts are safer than they need to be, likewise.
        compensation: the smaller of the two.
    """

    name: str
    multiplier: float | None
    is_at_cap: bool
    mean_cost: float
    rectified_cost: float
    safety_rate: float
    prompt_safety_rate: float
    cvar: float
    under: float
    over: float
    compensation: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredLabels:
    """What a constraint did to the labels of stored pairs; shares are of the training pairs.

    Attributes:
        labels: `constraint.labels`.
        is_dual: the multiplier was solved for.
        num_pairs: training pairs.
        share_turned: whose order by reward the cost turned round.
        share_both_safe: both answers are safe.
        share_mixed: one is.
        share_both_unsafe: neither is.
    """

    labels: str
    is_dual: bool
    num_pairs: int
    share_turned: float
    share_both_safe: float
    share_mixed: float
    share_both_unsafe: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CostShares:
    """Histogram of costs.

    Attributes:
        name: of the responses.
        num_responses: how many.
        edges: B + 1 ascending costs, 0 among them.
        shares: B shares of the responses, adding up to 1.
    """

    name: str
    num_responses: int
    edges: tuple[float, ...]
    shares: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CategoryChange:
    """Judged answers to the prompts of one category.

    Attributes:
        category: of the prompts.
        num_prompts: in it.
        unsafe_before: share of the reference's answers with cost > 0.
        unsafe_after: likewise of the trained policy.
    """

    category: str
    num_prompts: int
    unsafe_before: float
    unsafe_after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedPrompts:
    """Which evaluation prompts changed sides, by the judge's costs; a prompt is safe when its answer is.

    Attributes:
        change: prompts that became unsafe or safe, and the reward on those that were safe.
        categories: by name.
    """

    change: PromptChange
    categories: tuple[CategoryChange, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstraintReport:
    """A constraint from its start to its end; without one, what responses cost.

    Attributes:
        kind: `constraint.kind`.
        bound: what the multiplier holds its statistic to, cost units; None where the multiplier is fixed.
        cap: of the multiplier, None where it is fixed.
        points: rounds in order; over stored pairs the reference and what the labels have as their optimum, if known.
        stored: what became of stored labels, None for sampled responses.
        histograms: costs of the same kind of responses before and after, on the same edges.
        warnings: what a user would not expect, in sentences.
        evaluated: what became of the evaluation prompts.
        sampled: several answers to every evaluation prompt, None when they were not asked for.
    """

    kind: str
    bound: float | None
    cap: float | None
    points: tuple[ConstraintPoint, ...]
    stored: StoredLabels | None
    histograms: tuple[CostShares, ...]
    warnings: tuple[str, ...]
    evaluated: EvaluatedPrompts
    sampled: SampledRun | None = None


def round_points(records: Sequence[Mapping[str, float]]) -> tuple[ConstraintPoint, ...]:
    """One point per round that has costs, from the records of `metrics.jsonl`; a round that was resumed counts once."""
    by_round = {int(record["round"]): record for record in records if "constraint/mean_cost" in record}
    return tuple(
        ConstraintPoint(
            name=f"round {index}",
            multiplier=record.get("constraint/multiplier"),
            is_at_cap=bool(record.get("constraint/at_cap", 0)),
            **{name: record[f"constraint/{name}"] for name in _MEASURES},
        )
        for index, record in sorted(by_round.items())
    )


def stored_points(facts: Mapping[str, Any]) -> tuple[ConstraintPoint, ...]:
    """The reference, and the optimum of the labels where it is known, from the facts of the rank phase."""
    found = [("reference", 0.0, False, facts["before"])]
    if facts["after"] is not None:
        found.append(("optimum of the labels", facts["multiplier"], facts["is_at_cap"], facts["after"]))
    return tuple(
        ConstraintPoint(
            name=name, multiplier=multiplier, is_at_cap=is_at_cap, **{key: measured[key] for key in _MEASURES}
        )
        for name, multiplier, is_at_cap, measured in found
    )


def cost_shares(costs: Mapping[str, np.ndarray], *, num_bins: int = 24) -> tuple[CostShares, ...]:
    """Histograms on one scale that holds all costs.

    Args:
        costs: raw costs by the name of the responses, any lengths; empty ones are left out.
        num_bins: even, so that no bin holds both safe and unsafe responses.
    """
    known = {name: values for name, values in costs.items() if len(values)}
    bound = max((float(np.abs(values).max()) for values in known.values()), default=0.0) or 1.0
    found = {name: cost_histogram(values, bound=bound, num_bins=num_bins) for name, values in known.items()}
    return tuple(
        CostShares(
            name=name,
            num_responses=len(known[name]),
            edges=tuple(histogram.edges.tolist()),
            shares=tuple(histogram.shares.tolist()),
        )
        for name, histogram in found.items()
    )


def evaluated_prompts(before: Sequence[Completion], after: Sequence[Completion]) -> EvaluatedPrompts:
    """Judged answers to the same prompts, in the same order, before and after training; at least one."""
    prompts = np.arange(len(before))
    costs = [np.array([answer.cost for answer in answers]) for answers in (before, after)]
    rewards = [np.array([answer.reward for answer in answers]) for answers in (before, after)]
    names = [answer.category for answer in before]
    by_category = [violations_by_category(cost, prompts, names) for cost in costs]
    return EvaluatedPrompts(
        change=prompt_change((costs[0], prompts, rewards[0]), (costs[1], prompts, rewards[1])),
        categories=tuple(
            CategoryChange(
                category=name,
                num_prompts=found.num_prompts,
                unsafe_before=1 - found.safety_rate,
                unsafe_after=1 - by_category[1][name].safety_rate,
            )
            for name, found in by_category[0].items()
        ),
    )


def round_warnings(points: Sequence[ConstraintPoint], *, kind: str, start: float) -> tuple[str, ...]:
    """What a user would not expect of a constraint on sampled responses.

    Args:
        points: see `round_points`.
        kind: `constraint.kind`.
        start: the multiplier before the first round.
    """
    warnings = []
    capped = [point.name for point in points if point.is_at_cap]
    if capped and kind != "fixed_penalty":
        warnings.append(
            f"The multiplier was at its cap in {len(capped)} of {len(points)} rounds, first in {capped[0]}: there the "
            "constraint is a fixed penalty. Raise constraint.multiplier_max, or allow more cost."
        )
    multipliers = [point.multiplier for point in points if point.multiplier is not None]
    if multipliers and kind != "fixed_penalty" and all(value == start for value in multipliers):
        warnings.append(
            f"The multiplier never moved from {start:g} in {len(multipliers)} rounds: the cost is at its bound, or "
            "constraint.multiplier_delay is too long for the run."
        )
    if points and all(point.safety_rate == 1 for point in points):
        warnings.append(
            "No sampled response was unsafe: the constraint had nothing to hold back. Check that the cost model finds "
            "unsafe answers of this policy at all."
        )
    lost = [point.name for point in points if point.safety_rate == 0]
    if lost:
        warnings.append(
            f"All responses were unsafe in {len(lost)} of {len(points)} rounds, first in {lost[0]}: there was no safe "
            "response to prefer. Check the sign and the scale of the cost model, or start from a safer policy."
        )
    return tuple(warnings)


def stored_warnings(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """What a user would not expect of stored pairs; what the rank phase warned of is at the top of the report."""
    warnings = []
    if facts["before"]["safety_rate"] == 1:
        warnings.append("No stored answer is unsafe: the constraint changes no label for the safety of an answer.")
    if facts["before"]["safety_rate"] == 0:
        warnings.append(
            "All stored answers are unsafe: labels can prefer the lesser violation, and no safe answer. Check the sign "
            "of the cost model, or sample responses (train.method=policy_gradient)."
        )
    return tuple(warnings)
