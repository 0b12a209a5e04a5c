"""What a comparison of methods says, as plain values: the one input of its table, its HTML and its JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raylign.report.compare_facts import derive
from raylign.report.data import to_plain
from raylign.types import Method

if TYPE_CHECKING:
    from raylign.cost.projection import ProjectionSettings
    from raylign.cost.rows import Cost
    from raylign.evaluation.safety import SafetyComparison, SafetySummary
    from raylign.report.sampled_data import SampledMeasures, SampledSettings


@dataclass(frozen=True, kw_only=True)
class Point:
    """A method at one of its checkpoints, over all seeds.

    Attributes:
        step: updates done.
        comparison: with the policy before training, prompts of all seeds pooled.
        device_s: reserved device-seconds until then, by seed and kind, shared phases included.
        flops: model FLOPs counted until then, by seed, shared phases included; 0 where none were counted.
    """

    step: int
    comparison: SafetyComparison
    device_s: tuple[Mapping[str, float], ...]
    flops: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """A method: what it reached and what it took.

    Attributes:
        name: as configured.
        points: by step.
        kind: `train.method`.
        totals: of one run with everything that it needs, by seed.
        phases: cost by ledger phase ("generate", "policy_update", ...), by seed.
        fingerprint: of what makes costs comparable; "" when the rows of its ledgers differ in it.
        num_killed: ledger rows, over all seeds, in which a session was killed; those of shared phases once.
        sampled: several answers to every prompt at the last checkpoint, None when there are none.
    """

    name: str
    kind: Method
    points: tuple[Point, ...]
    totals: tuple[Cost, ...]
    phases: tuple[Mapping[str, Cost], ...]
    fingerprint: str
    num_killed: int = 0
    sampled: SampledMeasures | None = None


@dataclass(frozen=True, kw_only=True)
class ComparisonResult:
    """All methods on one page.

    Attributes:
        name: of the comparison.
        methods: in the order of the configuration.
        seeds: that were run.
        before: the policy before training, prompts of all seeds pooled.
        baseline: method whose cost the others' extra cost is counted from.
        rerank: method whose extra cost is the denominator of the overhead ratio.
        target: violation rate whose cost is looked up.
        projections: model sizes that FLOPs are projected to.
        projection_settings: of the refresh that is projected.
        sampling: how the judged answers were sampled, one sentence.
        prices: per device-hour by kind, None when none are given.
        currency: of the prices.
        samples: how several answers to every prompt were sampled, None when they were not.
    """

    name: str
    methods: tuple[MethodResult, ...]
    seeds: tuple[int, ...]
    before: SafetySummary
    baseline: str
    rerank: str
    target: float
    projections: tuple[str, ...]
    projection_settings: ProjectionSettings
    sampling: str
    prices: Mapping[str, float] | None = None
    currency: str = ""
    samples: SampledSettings | None = None


def comparison_json(result: ComparisonResult) -> dict[str, Any]:
    """The content of `comparison.json`: the result, and under "derived" what the tables make of it.

    Values that are nan or infinite become null; `NotMeasured` becomes {"not_measured": reason}.

    Raises:
        ConfigError: a size of `projections` is not known.
    """
    content: dict[str, Any] = to_plain(result)
    return {**content, "derived": to_plain(derive(result))}
