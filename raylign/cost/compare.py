"""What methods cost in relation to each other, and when nothing may be said about it.

A ratio is printed only when both of its sides were measured, on comparable settings (equal fingerprints), often enough,
and with its interval. When the denominator may be 0, only a lower bound is printed. Everything else is a `NotMeasured`
with its reason. FLOPs are computed, so they are shown side by side and never divided by each other here.

Intervals are at 95 %. A ratio of means a / b of n repeats has Fieller's interval: all r for which a - r b is not
significantly different from 0 by Student's t. With variances of the means v_a, v_b and covariance v_ab,

    r = [ab - t^2 v_ab -+ sqrt((ab - t^2 v_ab)^2 - (a^2 - t^2 v_a)(b^2 - t^2 v_b))] / (b^2 - t^2 v_b)

which is bounded exactly when the interval of b leaves out 0.

Source: Fieller (1954), Some problems in interval estimation, J. R. Stat. Soc. B 16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from raylign.cost.rows import Status
from raylign.report.data import NotMeasured
from raylign.types import Interval

MIN_REPEATS = 20  # of steps or rounds within a run
MIN_SEEDS = 3  # of whole runs

# 97.5 % points of Student's t by degrees of freedom; the last holds from there on and errs on the wide side.
_T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One side of a comparison: the same quantity in n repeats.

    Attributes:
        name: for messages, for example "online_dpo".
        status: "measured" or "computed".
        fingerprint: of what must be equal on both sides.
        values: device-seconds of one kind, in all or per pair, one value per repeat.
        quality: what was reached for it, for example the violation rate on harmful prompts; None when not evaluated.
    """

    name: str
    status: Status
    fingerprint: str
    values: tuple[float, ...]
    quality: Interval | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRatio:
    """A ratio that may be printed, with everything that must be printed beside it.

    Attributes:
        numerator: name and mean of the side above.
        denominator: name and mean of the side below.
        value: ratio of the means; None when only a lower bound holds.
        low: lower end of its 95 % interval.
        high: upper end; infinite for a lower bound.
        num_repeats: on each side.
        qualities: of the sides above and below, where the ratio is at stated quality.
    """

    numerator: tuple[str, float]
    denominator: tuple[str, float]
    value: float | None
    low: float
    high: float
    num_repeats: tuple[int, int]
    qualities: tuple[Interval, Interval] | None = None

    def __str__(self) -> str:
        shown = (
            f">= {self.low:.3g} ({self.denominator[0]} may cost nothing extra"
            if self.value is None
            else f"{self.value:.3g} (95 % interval {self.low:.3g} to {self.high:.3g}"
        )
        repeats = " and ".join(str(n) for n in dict.fromkeys(self.num_repeats))
        text = f"{shown}, {repeats} repeats)"
        if self.qualities is not None:
            rates = (
                f"{name} {rate.mean:.3f} [{rate.low:.3f}, {rate.high:.3f}]"
                for (name, _), rate in zip((self.numerator, self.denominator), self.qualities, strict=True)
            )
            text += f" at {' and '.join(rates)}"
        return text


def refresh_overhead_ratio(
    fresh: Side, reweighted: Side, *, min_repeats: int = MIN_REPEATS
) -> MeasuredRatio | NotMeasured:
    """Cost of a freshly sampled and labelled pair over the cost of a re-weighted stored pair.

    Definition: device_s(generate + score + weight_sync) per fresh pair used by the loss, over
    device_s(feature_forward + reward_head + reward_head_update + anchor_forward) per re-weighted pair used by the loss.

    Args:
        fresh: per pair, one value per round.
        reweighted: per pair, one value per update. When features ride on the policy's forward, the value is the paired
            difference of interleaved updates with and without the head, which may be negative by chance.
        min_repeats: fewer on either side are not enough.
    """
    reason = _why_not((fresh, reweighted), min_repeats)
    if reason is not None:
        return NotMeasured(reason=reason)
    return _ratio(fresh, reweighted, covariance=0.0)


def overhead_ratio(
    online: Side, rerank: Side, baseline: Side, *, min_repeats: int = MIN_SEEDS
) -> MeasuredRatio | NotMeasured:
    """Extra cost of the online method over plain preference training, over the extra cost of re-ranking over the same.

    Args:
        online: device-seconds of whole runs, one per seed, with the quality reached.
        rerank: likewise for the same seeds in the same order.
        baseline: plain training on the stored order, likewise; its quality is not read.
        min_repeats: fewer seeds are not enough.
    """
    sides = (online, rerank, baseline)
    reason = _why_not(sides, min_repeats)
    if reason is None and len({len(side.values) for side in sides}) > 1:
        reason = "the sides ran different numbers of seeds: " + ", ".join(f"{s.name} {len(s.values)}" for s in sides)
    if reason is None and (online.quality is None or rerank.quality is None):
        missing = [side.name for side in (online, rerank) if side.quality is None]
        reason = f"the quality of {' and '.join(missing)} was not evaluated"
    if reason is not None:
        return NotMeasured(reason=reason)
    extras = [
        Side(
            name=side.name,
            status="measured",
            fingerprint=side.fingerprint,
            values=tuple(value - base for value, base in zip(side.values, baseline.values, strict=True)),
            quality=side.quality,
        )
        for side in (online, rerank)
    ]
    return _ratio(*extras, covariance=_covariance(extras[0].values, extras[1].values) / len(online.values))


def _why_not(sides: Sequence[Side], min_repeats: int) -> str | None:
    computed = [side.name for side in sides if side.status != "measured"]
    if computed:
        return f"{' and '.join(computed)} is computed, not measured"
    if len({side.fingerprint for side in sides}) > 1 or not sides[0].fingerprint:
        return (
            "the sides ran on different settings or devices ("
            + ", ".join(f"{side.name} {side.fingerprint or 'unknown'}" for side in sides)
            + ")"
        )
    min_repeats = max(2, min_repeats)  # one repeat has no interval
    few = [f"{side.name} has {len(side.values)}" for side in sides if len(side.values) < min_repeats]
    if few:
        return f"{min_repeats} repeats are needed, {' and '.join(few)}"
    broken = [side.name for side in sides if not all(math.isfinite(value) for value in side.values)]
    return f"{' and '.join(broken)} has values that are not finite" if broken else None


def _ratio(above: Side, below: Side, *, covariance: float) -> MeasuredRatio | NotMeasured:
    """Fieller's interval, or a lower bound, of mean(above) / mean(below).

    Args:
        above: n_a repeats.
        below: n_b repeats.
        covariance: of the two means; 0 for independent sides.
    """
    a, b = _mean(above.values), _mean(below.values)
    v_a = _covariance(above.values, above.values) / len(above.values)
    v_b = _covariance(below.values, below.values) / len(below.values)
    t = student_t(min(len(above.values), len(below.values)) - 1)
    a_low, b_high = a - t * math.sqrt(v_a), b + t * math.sqrt(v_b)
    if a_low <= 0:
        return NotMeasured(reason=f"the cost of {above.name} is not significantly above 0: {a:.3g} device-seconds")
    if b_high <= 0:
        return NotMeasured(reason=f"{below.name} cost nothing extra: {b:.3g} device-seconds")
    qualities = None if above.quality is None or below.quality is None else (above.quality, below.quality)
    names = (above.name, a), (below.name, b)
    repeats = len(above.values), len(below.values)
    if b - t * math.sqrt(v_b) <= 0:
        return MeasuredRatio(
            numerator=names[0],
            denominator=names[1],
            value=None,
            low=a_low / b_high,
            high=math.inf,
            num_repeats=repeats,
            qualities=qualities,
        )
    middle = a * b - t**2 * covariance
    scale = b**2 - t**2 * v_b
    spread = math.sqrt(max(0.0, middle**2 - (a**2 - t**2 * v_a) * scale))
    return MeasuredRatio(
        numerator=names[0],
        denominator=names[1],
        value=a / b,
        low=(middle - spread) / scale,
        high=(middle + spread) / scale,
        num_repeats=repeats,
        qualities=qualities,
    )


def student_t(degrees: int) -> float:
    """97.5 % point of Student's t; from 30 degrees of freedom on, that of 30.

    Args:
        degrees: of freedom, at least 1.
    """
    return _T_975[min(degrees, len(_T_975)) - 1]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _covariance(first: Sequence[float], second: Sequence[float]) -> float:
    """Of single values, unbiased; 0 for one value."""
    mean_first, mean_second = _mean(first), _mean(second)
    products = ((x - mean_first) * (y - mean_second) for x, y in zip(first, second, strict=True))
    return math.fsum(products) / max(1, len(first) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """A policy that was evaluated, and what it had cost until then.

    Attributes:
        device_s: reserved device-seconds of one kind.
        rate: violation rate on harmful prompts.
    """

    device_s: float
    rate: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetReached:
    """The first evaluated policy at or below a target rate.

    Attributes:
        device_s: what it had cost.
        rate: of that policy.
        is_certain: the whole interval of the rate is at or below the target.
    """

    device_s: float
    rate: Interval
    is_certain: bool


def device_seconds_to_target(curve: Sequence[CurvePoint], target: float) -> TargetReached | NotMeasured:
    """What it took until the violation rate was at or below a target; nothing is interpolated between evaluations.

    Args:
        curve: evaluated policies, in any order.
        target: rate in [0, 1].
    """
    for point in sorted(curve, key=lambda point: point.device_s):
        if point.rate.mean <= target:
            return TargetReached(device_s=point.device_s, rate=point.rate, is_certain=point.rate.high <= target)
    if not curve:
        return NotMeasured(reason="no policy was evaluated")
    best = min(curve, key=lambda point: point.rate.mean)
    return NotMeasured(
        reason=f"a violation rate of {target:.3g} was not reached; the lowest was {best.rate.mean:.3g} after "
        f"{best.device_s:.3g} device-seconds"
    )
