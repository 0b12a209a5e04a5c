"""Every printing rule, with numbers whose ratio and interval can be worked out by hand, and the interval's coverage."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import raylign
from raylign.cost.compare import (
    CurvePoint,
    MeasuredRatio,
    Side,
    TargetReached,
    device_seconds_to_target,
    overhead_ratio,
    refresh_overhead_ratio,
    student_t,
)
from raylign.report.data import NotMeasured
from raylign.types import Interval


def rate(mean: float, half: float = 0.02) -> Interval:
    return Interval(mean=mean, low=mean - half, high=mean + half, num_items=100)


def side(name: str, values, *, quality: Interval | None = None) -> Side:
    return Side(name=name, status="measured", fingerprint="f", values=tuple(map(float, values)), quality=quality)


def around(mean: float, spread: float, num: int = 20) -> list[float]:
    """`num` values with that mean and, for an even number, that deviation."""
    return [mean + spread * (-1) ** i for i in range(num)]


ONLINE = side("online_dpo", [110, 120, 130], quality=rate(0.12))
RERANK = side("rerank", [12, 14, 16], quality=rate(0.15))
BASELINE = side("dpo", [10, 10, 10])


def test_fresh_over_reweighted_is_the_ratio_of_means():
    ratio = refresh_overhead_ratio(side("fresh", around(30, 3)), side("reweighted", around(2, 0.1)))
    assert isinstance(ratio, MeasuredRatio)
    assert ratio.value == pytest.approx(15)
    assert ratio.low < 15 < ratio.high
    assert (ratio.numerator, ratio.denominator) == (("fresh", 30), ("reweighted", 2))
    # first order: relative variances add; 20 values of deviation s have a mean of variance s^2 / 19
    half = student_t(19) * 15 * math.hypot(3 / 30, 0.1 / 2) / math.sqrt(19)
    assert ratio.high - ratio.low == pytest.approx(2 * half, rel=0.02)
    assert str(ratio) == f"15 (95 % interval {ratio.low:.3g} to {ratio.high:.3g}, 20 repeats)"


def test_repeats_without_spread_have_no_interval_to_speak_of():
    ratio = refresh_overhead_ratio(side("fresh", [6] * 20), side("reweighted", [2] * 20))
    assert isinstance(ratio, MeasuredRatio)
    assert (ratio.low, ratio.value, ratio.high) == (3, 3, 3)


def test_a_denominator_that_may_be_zero_gives_a_lower_bound_only():
    below = around(0.1, 2)
    ratio = refresh_overhead_ratio(side("fresh", around(30, 3)), side("reweighted", below))
    assert isinstance(ratio, MeasuredRatio)
    assert ratio.value is None and ratio.high == math.inf
    limit = student_t(19) / math.sqrt(19)
    assert ratio.low == pytest.approx((30 - 3 * limit) / (0.1 + 2 * limit))
    assert str(ratio).startswith(f">= {ratio.low:.3g} (reweighted may cost nothing extra")


def test_a_denominator_below_zero_gives_nothing():
    result = refresh_overhead_ratio(side("fresh", around(30, 3)), side("reweighted", around(-2, 0.1)))
    assert isinstance(result, NotMeasured) and "reweighted cost nothing extra" in result.reason


def test_a_numerator_that_may_be_zero_gives_nothing():
    result = refresh_overhead_ratio(side("fresh", around(0.1, 3)), side("reweighted", around(2, 0.1)))
    assert isinstance(result, NotMeasured) and "fresh is not significantly above 0" in result.reason


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"status": "computed"}, "reweighted is computed, not measured"),
        ({"fingerprint": "g"}, r"different settings or devices \(fresh f, reweighted g\)"),
        ({"fingerprint": ""}, "reweighted unknown"),
        ({"values": (2.0,) * 19}, "20 repeats are needed, reweighted has 19"),
        ({"values": (2.0,) * 19 + (math.nan,)}, "reweighted has values that are not finite"),
        ({"values": ()}, "reweighted has 0"),
    ],
)
def test_what_is_not_comparable_is_not_compared(changes, told):
    fresh, reweighted = side("fresh", around(30, 3)), side("reweighted", around(2, 0.1))
    result = refresh_overhead_ratio(fresh, replace(reweighted, **changes))
    assert isinstance(result, NotMeasured)
    assert re.search(told, result.reason)


def test_unknown_settings_on_both_sides_are_not_equal_settings():
    sides = [replace(side(name, around(9, 1)), fingerprint="") for name in ("fresh", "reweighted")]
    assert isinstance(refresh_overhead_ratio(*sides), NotMeasured)


def test_overhead_is_extra_over_extra_at_stated_quality():
    """Online costs 100, 110, 120 more than plain training, re-ranking 2, 4, 6."""
    ratio = overhead_ratio(ONLINE, RERANK, BASELINE, min_repeats=3)
    assert isinstance(ratio, MeasuredRatio)
    # the extras move together: a = 110, b = 4, v_a = 100/3, v_b = 4/3, v_ab = 20/3; b's interval holds 0 at t = 4.303
    assert ratio.value is None
    assert ratio.low == pytest.approx((110 - 4.303 * math.sqrt(100 / 3)) / (4 + 4.303 * math.sqrt(4 / 3)), rel=1e-3)
    assert str(ratio).endswith("at online_dpo 0.120 [0.100, 0.140] and rerank 0.150 [0.130, 0.170]")


def test_overhead_uses_that_seeds_are_paired():
    """Both sides rise with the seed: paired the ratio is sharp, and seeds in another order blur it."""
    online = side("online_dpo", [110, 121, 132, 143], quality=rate(0.1))
    rerank = side("rerank", [20, 21, 22, 23.2], quality=rate(0.1))
    baseline = side("dpo", [10, 10, 10, 10])
    paired = overhead_ratio(online, rerank, baseline)
    shuffled = overhead_ratio(replace(online, values=online.values[::-1]), rerank, baseline)
    assert isinstance(paired, MeasuredRatio) and isinstance(shuffled, MeasuredRatio)
    assert paired.value == shuffled.value == pytest.approx(116.5 / 11.55)
    assert paired.high - paired.low < 0.3 * (shuffled.high - shuffled.low)


@pytest.mark.parametrize(
    ("online", "rerank", "baseline", "told"),
    [
        (replace(ONLINE, quality=None), RERANK, BASELINE, "quality of online_dpo was not evaluated"),
        (ONLINE, replace(RERANK, quality=None), BASELINE, "quality of rerank was not evaluated"),
        (ONLINE, RERANK, replace(BASELINE, status="computed"), "dpo is computed"),
        (ONLINE, RERANK, replace(BASELINE, fingerprint="g"), "different settings"),
        (ONLINE, RERANK, replace(BASELINE, values=(10.0,) * 4), "different numbers of seeds"),
        (ONLINE, replace(RERANK, values=(12.0, 14.0)), BASELINE, "3 repeats are needed, rerank has 2"),
        (replace(ONLINE, values=(10.0, 10.5, 9.5)), RERANK, BASELINE, "online_dpo is not significantly above 0"),
        (ONLINE, replace(RERANK, values=(5.0, 5.0, 5.0)), BASELINE, "rerank cost nothing extra"),
    ],
)
def test_overhead_is_not_guessed(online, rerank, baseline, told):
    result = overhead_ratio(online, rerank, baseline)
    assert isinstance(result, NotMeasured) and told in result.reason


def test_one_repeat_is_never_enough():
    result = refresh_overhead_ratio(side("fresh", [3]), side("reweighted", [1]), min_repeats=1)
    assert isinstance(result, NotMeasured) and "2 repeats are needed" in result.reason


def test_the_interval_covers_the_true_ratio():
    """3,000 simulated comparisons of 5 repeats; the true ratio is 50 / 4."""
    rng = np.random.default_rng(0)
    num_inside = num_bounded = 0
    for _ in range(3000):
        above, below = rng.normal(50, 10, 5), rng.normal(4, 0.8, 5)
        ratio = refresh_overhead_ratio(side("fresh", above), side("reweighted", below), min_repeats=5)
        if isinstance(ratio, MeasuredRatio) and ratio.value is not None:
            num_bounded += 1
            num_inside += ratio.low <= 12.5 <= ratio.high
    assert num_bounded > 2900
    assert 0.935 <= num_inside / num_bounded <= 0.985


def test_students_t():
    assert (student_t(1), student_t(19), student_t(30), student_t(500)) == (12.706, 2.093, 2.042, 2.042)


CURVE = [
    CurvePoint(device_s=90, rate=rate(0.1)),
    CurvePoint(device_s=30, rate=rate(0.4)),
    CurvePoint(device_s=60, rate=rate(0.19)),
]


def test_the_target_is_reached_at_the_first_evaluated_policy():
    assert device_seconds_to_target(CURVE, 0.2) == TargetReached(device_s=60, rate=rate(0.19), is_certain=False)
    assert device_seconds_to_target(CURVE, 0.21) == TargetReached(device_s=60, rate=rate(0.19), is_certain=True)


def test_a_target_that_was_not_reached_has_no_price():
    result = device_seconds_to_target(CURVE, 0.05)
    assert isinstance(result, NotMeasured)
    assert result.reason == ("a violation rate of 0.05 was not reached; the lowest was 0.1 after 90 device-seconds")
    assert isinstance(device_seconds_to_target([], 0.05), NotMeasured)


def test_no_product_text_carries_the_papers_ratio():
    root = Path(raylign.__file__).parent
    files = [path for path in root.rglob("*") if path.suffix in {".py", ".html", ".yaml", ".md", ".json"}]
    assert len(files) > 50
    assert not [path for path in files if "300x" in path.read_text(encoding="utf-8").lower()]
