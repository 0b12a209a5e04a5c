"""What follows from a comparison: spreads over seeds, ratios under the ledger's printing rules, the cost of the target.

Device-seconds are never added over kinds of device. Intervals of costs are the least and the most of the seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raylign.cost.compare import (
    CurvePoint,
    MeasuredRatio,
    Side,
    TargetReached,
    device_seconds_to_target,
    overhead_ratio,
)
from raylign.cost.projection import ProjectionRow, project
from raylign.cost.rows import money
from raylign.errors import DataError
from raylign.report.data import NotMeasured
from raylign.types import Interval

if TYPE_CHECKING:
    from raylign.report.compare_data import ComparisonResult, MethodResult

# Phases whose own time, outside the entries nested in them, is start-up, loading and waiting. Those that fit the
# reward and the costs and rank also work outside of such entries: they are counted whole, start-up included.
CONTAINERS = frozenset({"features", "extract", "train"})
FOUND_READY = "found ready"
_LEAST_S = 1e-6  # below this, what is left of a sum is rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A quantity over the seeds.

    Attributes:
        mean: over seeds.
        low: least of them.
        high: most of them.
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodCosts:
    """What one run of a method took, with everything that it needs.

    Attributes:
        name: of the method.
        device_s: reserved device-seconds by kind.
        extra_device_s: more than the baseline with the same seed, by kind; empty for the baseline itself.
        work_device_s: device-seconds by kind without start-up, loading and waiting.
        generated_tokens: sampled tokens.
        decode_steps: sequential cached forward calls.
        passed_tokens: tokens through forwards and through backwards, those of generation apart.
        flops: model FLOPs by formula.
        synced_bytes: bytes of weights sent to samplers.
        peak_rss_mib: largest resident memory of a process.
        peak_device_mib: largest device memory of a process.
        money: price of the device-seconds; None when no prices are given.
    """

    name: str
    device_s: Mapping[str, Spread]
    extra_device_s: Mapping[str, Spread]
    work_device_s: Mapping[str, Spread]
    generated_tokens: Spread
    decode_steps: Spread
    passed_tokens: Spread
    flops: Spread | NotMeasured
    synced_bytes: Spread
    peak_rss_mib: Spread
    peak_device_mib: Spread
    money: Spread | NotMeasured | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioRow:
    """One ratio of an online method to re-ranking, or why there is none.

    Attributes:
        online: method above the line.
        rerank: method below it.
        kind: of devices.
        accounting: what is counted, in words.
        ratio: with its interval.
        violation_rate: at the last checkpoint of both sides, None where it was not evaluated.
        over_refusal: likewise.
    """

    online: str
    rerank: str
    kind: str
    accounting: str
    ratio: MeasuredRatio | NotMeasured
    violation_rate: tuple[Interval | None, Interval | None]
    over_refusal: tuple[Interval | None, Interval | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetRow:
    """What it took a method to reach the target violation rate.

    Attributes:
        method: name.
        kind: of devices.
        reached: the first evaluated policy at or below the target.
    """

    method: str
    kind: str
    reached: TargetReached | NotMeasured


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonFacts:
    """Everything that a comparison's tables show beside the result itself.

    Attributes:
        kinds: of devices that any method reserved.
        costs: by method, in order.
        phases: mean device-seconds over seeds by kind and ledger phase, one number per method.
        ratios: of every online method under every accounting; empty when no online method was compared.
        targets: by method and kind.
        projection: FLOPs of larger models by formula.
    """

    kinds: tuple[str, ...]
    costs: tuple[MethodCosts, ...]
    phases: Mapping[str, Mapping[str, tuple[float, ...]]]
    ratios: tuple[RatioRow, ...]
    targets: tuple[TargetRow, ...]
    projection: tuple[ProjectionRow, ...]


def derive(result: ComparisonResult) -> ComparisonFacts:
    """Work out the tables' numbers.

    Raises:
        ConfigError: a size of `result.projections` is not known.
    """
    methods = {method.name: method for method in result.methods}
    baseline = methods[result.baseline]
    kinds = tuple(dict.fromkeys(kind for m in result.methods for cost in m.totals for kind in cost.device_s))
    return ComparisonFacts(
        kinds=kinds,
        costs=tuple(_costs(method, baseline, kinds, result.prices) for method in result.methods),
        phases={kind: _phases(result.methods, kind) for kind in kinds},
        ratios=tuple(
            row
            for method in result.methods
            if method.kind != "offline"
            for kind in kinds
            for row in _ratios(method, methods[result.rerank], baseline, kind)
        ),
        targets=tuple(
            TargetRow(method=method.name, kind=kind, reached=_target(result, method, kind))
            for method in result.methods
            for kind in kinds
        ),
        projection=tuple(project(result.projections, result.projection_settings)),
    )


def spread(values: Sequence[float]) -> Spread:
    """Mean, least and most.

    Args:
        values: one per seed, at least one.
    """
    return Spread(mean=math.fsum(values) / len(values), low=min(values), high=max(values))


def _costs(
    method: MethodResult, baseline: MethodResult, kinds: Sequence[str], prices: Mapping[str, float] | None
) -> MethodCosts:
    counts = [cost.counts for cost in method.totals]
    flops = spread([c.flops for c in counts])
    is_baseline = method.name == baseline.name
    return MethodCosts(
        name=method.name,
        device_s={kind: spread(_device_s(method, kind)) for kind in kinds},
        extra_device_s={}
        if is_baseline
        else {
            kind: spread([a - b for a, b in zip(_device_s(method, kind), _device_s(baseline, kind), strict=True)])
            for kind in kinds
        },
        work_device_s={kind: spread(_work_s(method, kind)) for kind in kinds},
        generated_tokens=spread([c.generated_tokens for c in counts]),
        decode_steps=spread([c.decode_steps for c in counts]),
        passed_tokens=spread([c.forward_tokens + c.backward_tokens for c in counts]),
        flops=flops if flops.low > 0 else NotMeasured(reason="FLOPs of this model were not counted"),
        synced_bytes=spread([c.synced_bytes for c in counts]),
        peak_rss_mib=spread([cost.peak_rss_mib for cost in method.totals]),
        peak_device_mib=spread([cost.peak_device_mib for cost in method.totals]),
        money=None if prices is None else _money(method, prices),
    )


def _money(method: MethodResult, prices: Mapping[str, float]) -> Spread | NotMeasured:
    """Price of whole runs."""
    try:
        return spread([money(cost.device_s, prices) for cost in method.totals])
    except DataError as error:  # a missing price must not cost the report
        return NotMeasured(reason=str(error))


def _device_s(method: MethodResult, kind: str) -> tuple[float, ...]:
    """Of whole runs, by seed."""
    return tuple(cost.device_s.get(kind, 0.0) for cost in method.totals)


def _work_s(method: MethodResult, kind: str) -> tuple[float, ...]:
    """Of the phases that work, by seed."""
    return tuple(
        math.fsum(cost.device_s.get(kind, 0.0) for phase, cost in phases.items() if phase not in CONTAINERS)
        for phases in method.phases
    )


def _phases(methods: Sequence[MethodResult], kind: str) -> dict[str, tuple[float, ...]]:
    """Mean device-seconds by phase, one number per method; what was found ready is a row of its own."""
    names = dict.fromkeys(name for method in methods for phases in method.phases for name in phases)
    table = {
        name: tuple(
            spread([phases[name].device_s.get(kind, 0.0) if name in phases else 0.0 for phases in method.phases]).mean
            for method in methods
        )
        for name in names
    }
    rest = tuple(
        max(0.0, spread(_device_s(method, kind)).mean - math.fsum(row[index] for row in table.values()))
        for index, method in enumerate(methods)
    )
    if max(rest) > _LEAST_S:
        table[FOUND_READY] = rest
    return {name: row for name, row in table.items() if max(row) > 0}


def _ratios(online: MethodResult, rerank: MethodResult, baseline: MethodResult, kind: str) -> Iterator[RatioRow]:
    qualities = _last(online, "violation_rate"), _last(rerank, "violation_rate")
    refusals = _last(online, "over_refusal"), _last(rerank, "over_refusal")
    for device_s, counted in (
        (_device_s, "all reserved device-seconds, start-up and idle time included"),
        (
            _work_s,
            "phases that work only, without start-up, loading and waiting of features and training; reward and rank "
            "are whole",
        ),
    ):
        sides = [
            Side(
                name=method.name,
                status="measured",
                fingerprint=method.fingerprint,
                values=device_s(method, kind),
                quality=quality,
            )
            for method, quality in zip((online, rerank, baseline), (*qualities, None), strict=True)
        ]
        yield RatioRow(
            online=online.name,
            rerank=rerank.name,
            kind=kind,
            accounting=f"extra over {baseline.name} of a whole run; {counted}",
            ratio=overhead_ratio(*sides),
            violation_rate=qualities,
            over_refusal=refusals,
        )


def _last(method: MethodResult, name: str) -> Interval | None:
    """A metric at the last evaluated checkpoint."""
    if not method.points:
        return None
    interval: Interval = getattr(method.points[-1].comparison.after, name)
    return interval


def _target(result: ComparisonResult, method: MethodResult, kind: str) -> TargetReached | NotMeasured:
    if result.before.violation_rate.mean <= result.target:
        return NotMeasured(
            reason=f"the policy before training is at {result.before.violation_rate.mean:.3g} already, "
            f"at or below the target of {result.target:.3g}"
        )
    curve = [
        CurvePoint(
            device_s=spread([by_kind.get(kind, 0.0) for by_kind in point.device_s]).mean,
            rate=point.comparison.after.violation_rate,
        )
        for point in method.points
    ]
    return device_seconds_to_target(curve, result.target)
