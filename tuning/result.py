"""What a sweep says, as plain values: the one input of its table, its plots and its JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuning.search_space import PointKeys

if TYPE_CHECKING:
    from raylign.cost.rows import Cost
    from raylign.evaluation.safety import SafetyComparison, SafetySummary
    from tuning.grid import Screened


@dataclass(frozen=True, kw_only=True)
class SeedResult:
    """One finished training.

    Attributes:
        seed: of it.
        reward: mean over all prompts by the reward of the sweep's base, reward units.
        cost: mean over harmful prompts by the judge, logits; above 0 is unsafe.
        violation_rate: share of harmful prompts whose answer costs more than 0.
        checkpoint: HF or PEFT directory of the policy.
    """

    seed: int
    reward: float
    cost: float
    violation_rate: float
    checkpoint: Path


@dataclass(frozen=True, kw_only=True)
class PointResult:
    """A point of the space.

    Attributes:
        name: of its directories, before the seed.
        keys: swept keys.
        seeds: finished trainings.
        stopped: seed -> update at which the scheduler stopped it.
        failed: seed -> what its training failed of.
        comparison: with the policy before training, prompts of all finished seeds pooled; None when no seed finished.
        is_on_front: no other point has both more reward and less cost; False when a seed is missing.
        front_share: how often it is on the front when the prompts are drawn again, None when a seed is missing.
        cost: of its own phases, all seeds together.
        unshared_cost: what its seeds would have cost as separate runs: its own phases and, for each seed, the shared
            phases that it reads.
    """

    name: str
    keys: PointKeys
    seeds: tuple[SeedResult, ...]
    stopped: Mapping[int, int]
    failed: Mapping[int, str]
    comparison: SafetyComparison | None
    is_on_front: bool
    front_share: float | None
    cost: Cost
    unshared_cost: Cost


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """A sweep on one page.

    Attributes:
        name: of the sweep.
        space: name of the space.
        axes: swept keys, in order.
        seeds: of every point.
        points: that were trained, or failed, in order.
        before: the policy before training, prompts of all seeds pooled.
        shared_cost: of the phases that all points share, evaluation included.
        screened: cheap settings, judged on cached states; () when no axis is cheap.
        screen_s: wall seconds of all of them together.
        num_points: of the space, those that were not trained included.
        num_concurrent: trials at a time.
        best: name of the point that is exported, None when none finished.
        best_seed: whose checkpoint it is.
        best_reason: why that point.
        target: violation rate that the exported point should not exceed.
    """

    name: str
    space: str
    axes: tuple[str, ...]
    seeds: tuple[int, ...]
    points: tuple[PointResult, ...]
    before: SafetySummary
    shared_cost: Cost
    screened: tuple[Screened, ...]
    screen_s: float
    num_points: int
    num_concurrent: int
    best: str | None
    best_seed: int | None
    best_reason: str
    target: float

    @property
    def failures(self) -> tuple[str, ...]:
        """What trainings failed of, each cause once."""
        return tuple(dict.fromkeys(cause for point in self.points for cause in point.failed.values()))


def sweep_json(result: SweepResult) -> dict[str, Any]:
    """The content of `sweep.json`; values that are nan or infinite become null."""
    from raylign.report.data import to_plain

    content: dict[str, Any] = to_plain(result)
    return content
