"""The rank phase under a safety constraint: reward less multiplier times cost orders the pairs, and sets their labels.

Rewards and costs of all pairs are computed once. From those of the training pairs follows the multiplier, and from it
the label of every pair: two passes over numbers, none over models.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from raylign.config import ConfidenceSection, ConstraintSection, RunConfig
from raylign.constraints.offline import (
    StoredResponses,
    TiltedPolicy,
    constrained_margin,
    dual_ascent,
    pair_labels,
    tilted_policy,
    weighed_belief,
)
from raylign.constraints.violations import violations
from raylign.errors import DataError
from raylign.rewards.confidence import pair_confidence
from raylign.rewards.posterior import MarginPosterior, RewardPosterior, ensemble_posterior, margin_posterior
from raylign.runtime.execution import execution
from raylign.runtime.fitted_cost import COST_COLUMNS, HEAD_COST_COLUMNS
from raylign.runtime.fitted_reward import RewardFacts, resolve_temperature

if TYPE_CHECKING:
    import ray.data

LOG = logging.getLogger(__name__)

_REWARD_COLUMNS = ("chosen_reward", "rejected_reward")
_REPLACED = ("margin_mean", "margin_variance", "label_confidence")


@dataclass(frozen=True, slots=True, kw_only=True)
class PairConstraint:
    r"""What the labels of pairs follow from, besides their rewards and costs.

    Attributes:
        settings: kind and labels.
        multiplier: \(\lambda\), reward units per unit of cost.
        cost_center: mean of X over the training answers, cost units; belongs to the center of the rewards.
        confidence: how margins become confidence.
        reward: fitted; its center and temperature are read.
        seed: of sampled labels.
    """

    settings: ConstraintSection
    multiplier: float
    cost_center: float
    confidence: ConfidenceSection
    reward: RewardFacts
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstraintFacts:
    r"""What a constraint did to the training pairs, for the manifest and the report.

    Attributes:
        kind: `constraint.kind`.
        labels: `constraint.labels`.
        multiplier: \(\lambda\) of the run.
        is_dual: it was solved for.
        is_at_cap: the dual loop ended at the cap, with the constraint not met.
        num_pairs: training pairs.
        share_turned: of them, whose order by reward the cost turned round.
        share_both_safe: both answers are safe; a rectified cost says nothing of such a pair.
        share_mixed: one answer is safe.
        share_both_unsafe: neither is: the loss can choose the lesser violation, and no safe answer.
        before: what the reference does, seen through the stored answers; see `_policy_facts`.
        after: likewise the policy that the labels have as their optimum, None where that is not the tilted reference
            (a squash, hard labels).
    """

    kind: str
    labels: str
    multiplier: float
    is_dual: bool
    is_at_cap: bool
    num_pairs: int
    share_turned: float
    share_both_safe: float
    share_mixed: float
    share_both_unsafe: float
    before: dict[str, Any]
    after: dict[str, Any] | None

    @property
    def warnings(self) -> list[str]:
        """What a user would not expect of a constraint."""
        if self.is_at_cap:
            return [
                f"the constraint is out of reach on stored answers: the multiplier is at its cap, {self.multiplier:g}, "
                "with the cost still above its bound; see constraint.after in the manifest of the rank phase"
            ]
        if self.is_dual and self.multiplier == 0:
            return [
                "the reward alone meets the constraint on stored answers: the multiplier is 0 and pairs are ranked as "
                "without a constraint; lower constraint.threshold or constraint.tolerance to ask for more"
            ]
        return []

    def to_dict(self) -> dict[str, Any]:
        """JSON-like."""
        return {**asdict(self), "warnings": self.warnings}


def constraint_key(config: RunConfig) -> dict[str, Any]:
    """The part of the rank phase's key that a constraint is; {} without one."""
    if config.constraint.kind == "none":
        return {}
    return {"constraint": config.constraint.model_dump(), "beta": config.train.beta, "seed": config.run.seed}


def constrain_pairs(
    pairs: ray.data.Dataset, *, reward: RewardFacts, config: RunConfig
) -> tuple[ray.data.Dataset, ConstraintFacts]:
    """Labels of ranked pairs under the constraint of the run.

    The pairs are computed here, so that rewards and costs are computed once; the labels are lazy.

    Args:
        pairs: of `rank_pairs`, with `COST_COLUMNS`; with `HEAD_COST_COLUMNS` the variance of the costs counts too.
        reward: fitted.
        config: sections constraint (whose kind is "rectified" or "expected"), confidence and train, and the seed.

    Returns:
        The pairs, whose margins and label confidence are those of reward less multiplier times cost, and the facts.

    Raises:
        DataError: pairs without a cost, no training pair, numbers that are not finite, or a threshold out of reach.
    """
    import ray

    with execution(pairs):
        pairs = pairs.materialize()
    names = pairs.schema().names
    missing = [name for name in COST_COLUMNS if name not in names]
    if missing:
        raise DataError(
            f"the pairs have no {' and '.join(missing)}, which constraint.kind={config.constraint.kind} weighs: give "
            "the run a cost model (section cost_model)"
        )
    heads = [name for name in HEAD_COST_COLUMNS if name in names]
    columns = pairs.select_columns(["row_id", "split", "prompt_key", *_REWARD_COLUMNS, *COST_COLUMNS, *heads])
    table = pa.concat_tables(columns.iter_batches(batch_format="pyarrow", batch_size=None))
    constraint, facts = solve_constraint(table, reward=reward, config=config)
    for text in facts.warnings:
        LOG.warning(text)
    shared = ray.put(constraint)
    options: dict[str, Any] = {"batch_format": "pyarrow", "batch_size": 4096, "fn_kwargs": {"shared": shared}}
    return pairs.map_batches(constrain_table, **options), facts


def solve_constraint(
    table: pa.Table, *, reward: RewardFacts, config: RunConfig
) -> tuple[PairConstraint, ConstraintFacts]:
    """The multiplier of a run, from the rewards and costs of its training pairs.

    Args:
        table: columns row_id, split, prompt_key, rewards and costs of all pairs, in any order: sums are of rows that
            are sorted by their ids.
        reward: fitted.
        config: see `constrain_pairs`.

    Raises:
        DataError: see `constrain_pairs`.
    """
    settings, confidence = config.constraint, config.confidence
    assert settings.kind in ("rectified", "expected")  # refused by the configuration
    table = table.filter(pc.equal(table["split"], "train")).sort_by("row_id")
    costs, weighed = _beliefs(table, settings)
    rewards = [_vector(table, name) for name in _REWARD_COLUMNS]
    _, prompt = np.unique(np.asarray(table["prompt_key"]), return_inverse=True)
    stored = StoredResponses(
        reward=torch.cat(rewards),
        weighed=torch.cat([belief.mean for belief in weighed]),
        prompt=torch.from_numpy(np.tile(prompt, 2)),
    )
    cost = torch.cat([belief.mean for belief in costs])
    beta = resolve_temperature(confidence, reward) * config.train.beta
    is_dual = settings.multiplier == "dual"
    is_tilted = confidence.squash == "none" and settings.labels != "hard"
    policy, is_at_cap = None, False
    if is_dual:
        target = settings.threshold if settings.kind == "expected" else settings.tolerance
        solution = dual_ascent(stored, kind=settings.kind, beta=beta, target=target, maximum=settings.multiplier_max)
        multiplier, policy, is_at_cap = solution.multiplier, solution.policy, solution.is_at_cap
    else:
        multiplier = float(settings.multiplier)
        policy = tilted_policy(stored, multiplier, beta=beta) if is_tilted else None
    constraint = PairConstraint(
        settings=settings,
        multiplier=multiplier,
        cost_center=float(stored.weighed.mean()),
        confidence=confidence,
        reward=reward,
        seed=config.run.seed,
    )
    free = rewards[0] - rewards[1]
    bound = free - multiplier * (weighed[0].mean - weighed[1].mean)
    is_safe = [belief.mean <= 0 for belief in costs]
    facts = ConstraintFacts(
        kind=settings.kind,
        labels=settings.labels,
        multiplier=multiplier,
        is_dual=is_dual,
        is_at_cap=is_at_cap,
        num_pairs=len(table),
        share_turned=_share(free * bound < 0),
        share_both_safe=_share(is_safe[0] & is_safe[1]),
        share_mixed=_share(is_safe[0] ^ is_safe[1]),
        share_both_unsafe=_share(~is_safe[0] & ~is_safe[1]),
        before=_policy_facts(tilted_policy(stored, 0.0, beta=float("inf")), cost, stored, settings),
        after=None if policy is None else {"beta": beta, **_policy_facts(policy, cost, stored, settings)},
    )
    return constraint, facts


def constrain_table(table: pa.Table, *, shared: Any) -> pa.Table:
    """Margins and labels of one block of ranked pairs."""
    import ray

    found: PairConstraint = ray.get(shared) if isinstance(shared, ray.ObjectRef) else shared
    confidence, multiplier = found.confidence, found.multiplier
    _, weighed = _beliefs(table, found.settings)
    reward = MarginPosterior(mean=_vector(table, "margin_mean"), variance=_vector(table, "margin_variance"))
    margin = constrained_margin(reward, margin_posterior(*weighed), multiplier)
    rewards = [_vector(table, name) - multiplier * x.mean for name, x in zip(_REWARD_COLUMNS, weighed, strict=True)]
    fold = torch.from_numpy(table["fold"].to_numpy().astype(np.int64))
    has_center = confidence.center == "ema"
    belief = pair_confidence(
        rewards[0],
        rewards[1],
        margin.variance,
        alpha=confidence.alpha,
        floor=confidence.floor,
        center=found.reward.center_of(fold) - multiplier * found.cost_center if has_center else 0.0,
        level="pair",
        squash=confidence.squash,
        temperature=resolve_temperature(confidence, found.reward),
    )
    row_ids = table["row_id"].to_pylist()
    labels = pair_labels(belief.label_confidence, margin.mean, row_ids, labels=found.settings.labels, seed=found.seed)
    dropped = [name for name in HEAD_COST_COLUMNS if name in table.column_names]
    for name, values in zip(_REPLACED, (margin.mean, margin.variance, labels), strict=True):
        index = table.schema.get_field_index(name)
        table = table.set_column(index, name, pa.array(values.float().numpy()))
    return table.drop_columns(dropped)


def _beliefs(table: pa.Table, settings: ConstraintSection) -> tuple[list[RewardPosterior], list[RewardPosterior]]:
    """Of the costs of chosen and rejected answers, and of what the multiplier weighs of them."""
    assert settings.kind in ("rectified", "expected")
    has_members = all(name in table.column_names for name in HEAD_COST_COLUMNS)
    costs = []
    for name, heads in zip(COST_COLUMNS, HEAD_COST_COLUMNS, strict=True):
        if has_members and len(table):
            members = torch.from_numpy(np.stack(table[heads].to_numpy(zero_copy_only=False)))
        else:
            members = _vector(table, name)[:, None]
        costs.append(ensemble_posterior(members))
    return costs, [weighed_belief(cost, settings.kind) for cost in costs]


def _policy_facts(
    policy: TiltedPolicy, cost: torch.Tensor, stored: StoredResponses, settings: ConstraintSection
) -> dict[str, Any]:
    """J, mean reward, `Violations` by name, and how many answers speak for a prompt."""
    found = violations(
        cost.numpy(),
        stored.prompt.numpy(),
        weight=policy.weight.numpy(),
        prompt_safety=settings.prompt_safety,
        cvar_level=settings.cvar_level,
    )
    return {
        "statistic": policy.statistic,
        "mean_reward": policy.mean_reward,
        "effective_responses": policy.effective_responses,
        **asdict(found),
    }


def _vector(table: pa.Table, name: str) -> torch.Tensor:
    return torch.from_numpy(table[name].to_numpy().astype(np.float32))


def _share(claim: torch.Tensor) -> float:
    return float(claim.double().mean())
