"""A safety constraint in the online loop: costs of a round in, multiplier and numbers for the metrics out.

The multiplier moves when a round is opened, before the policy does. Every worker reads the same round and so finds the
same multiplier; how many rounds it has seen is part of its state, so that a run that is resumed in the middle of a
round does not move it twice.

Shape letters: n responses of a round.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from raylign.config import ConstraintSection
from raylign.constraints.multipliers import MultiplierRule, MultiplierState, Statistic, advance, is_at_cap
from raylign.constraints.rectified import Variant, is_unsafe
from raylign.constraints.violations import violations
from raylign.errors import CheckpointError, TrainingError
from raylign.training.rounds import Round


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundConstraint:
    """What the targets of a round read of its constraint.

    Attributes:
        cost: (n,) raw costs, float64, > 0 unsafe.
        multiplier: of this round, reward units per unit of cost.
        variant: how reward and cost become one.
        has_parts: whether the loss is the mean of the safe plus that of the unsafe responses.
    """

    cost: torch.Tensor
    multiplier: float
    variant: Variant
    has_parts: bool

    @property
    def unsafe(self) -> torch.Tensor:
        """(n,) bool."""
        return is_unsafe(self.cost)


def start_multiplier(settings: ConstraintSection) -> MultiplierState | None:
    """The multiplier before the first round, None without a constraint."""
    if settings.kind == "none":
        return None
    assert settings.multiplier != "dual"  # of stored pairs; check_effects has refused it here
    return MultiplierState(value=settings.multiplier)


def multiplier_rule(settings: ConstraintSection) -> MultiplierRule:
    """How the multiplier of a constraint moves; that of a fixed penalty does not."""
    if settings.kind == "fixed_penalty":
        return MultiplierRule(statistic="rectified", space="linear", learning_rate=0.0)
    of_mean: dict[str, Statistic] = {"expected": "expected", "rectified_mean": "rectified_mean"}
    return MultiplierRule(
        statistic=of_mean.get(settings.kind, "rectified"),
        target=settings.threshold if settings.kind in of_mean else settings.tolerance,
        space=settings.multiplier_space,
        learning_rate=settings.multiplier_learning_rate,
        maximum=settings.multiplier_max,
        window=settings.multiplier_window,
        delay=settings.multiplier_delay,
    )


def open_multiplier(state: MultiplierState, round_: Round, *, settings: ConstraintSection) -> MultiplierState:
    """The multiplier that the updates of a round use; the one given, when it has seen the round.

    Args:
        state: after the round before, or restored from a checkpoint inside of the round.
        round_: with a cost of every response.
        settings: of the constraint.

    Raises:
        TrainingError: a response without a cost.
        CheckpointError: the state is of another round.
    """
    costs = _required_costs(round_, settings)
    if state.num_steps == round_.index + 1:
        return state
    if state.num_steps != round_.index:
        raise CheckpointError(
            f"the multiplier has seen {state.num_steps} rounds, and round {round_.index + 1} is next; restore the "
            "checkpoint from a backup, or start under a new run.name"
        )
    return advance(state, costs.tolist(), multiplier_rule(settings))


def round_constraint(round_: Round, state: MultiplierState, *, settings: ConstraintSection) -> RoundConstraint:
    """What the targets of a round read.

    Args:
        round_: with a cost of every response.
        state: see `open_multiplier`.
        settings: of the constraint, whose kind is not "none".

    Raises:
        TrainingError: a response without a cost.
    """
    assert settings.kind != "none"
    return RoundConstraint(
        cost=torch.from_numpy(_required_costs(round_, settings)),
        multiplier=state.value,
        variant=Variant(kind=settings.kind, split_normalise=settings.split_normalise),
        has_parts=settings.kind == "split" and settings.split_reduction == "per_part",
    )


def cost_facts(round_: Round, *, settings: ConstraintSection) -> dict[str, float]:
    """What the costs of a round say, constrained or not; nothing where responses have no cost.

    Args:
        round_: responses.
        settings: levels of the metrics.

    Returns:
        Floats under constraint/*, see `raylign.constraints.violations.Violations`.
    """
    costs = round_.costs
    if not np.isfinite(costs).all():
        return {}
    prompts = np.array([item.rollout.prompt_index for item in round_.scored])
    found = violations(costs, prompts, prompt_safety=settings.prompt_safety, cvar_level=settings.cvar_level)
    names = ("mean_cost", "rectified_cost", "safety_rate", "prompt_safety_rate", "cvar", "under", "over")
    return {f"constraint/{name}": getattr(found, name) for name in (*names, "compensation")}


def multiplier_facts(state: MultiplierState, *, settings: ConstraintSection) -> dict[str, float]:
    """The multiplier of a round and whether it is at its cap (1) or not (0)."""
    at_cap = is_at_cap(state, multiplier_rule(settings))
    return {"constraint/multiplier": state.value, "constraint/at_cap": float(at_cap)}


def _required_costs(round_: Round, settings: ConstraintSection) -> np.ndarray:
    costs = round_.costs
    num_missing = int((~np.isfinite(costs)).sum())
    if num_missing:
        raise TrainingError(
            f"constraint.kind={settings.kind} needs a cost of every response; {num_missing} of the {len(costs)} "
            f"responses of round {round_.index + 1} have none: give the run a cost model (section cost_model), or set "
            "constraint.kind=none"
        )
    return costs
