from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from raylign.errors import DataError, ShapeError
from raylign.evaluation import metrics


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_bootstrap_interval_of_a_normal_sample_is_the_textbook_one():
    values = rng().normal(3.0, 2.0, 400)
    interval = metrics.bootstrap_mean(values, num_samples=4000, generator=rng(1))
    spread = 1.96 * values.std() / math.sqrt(400)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - spread, abs=0.1 * spread)
    assert interval.high == pytest.approx(values.mean() + spread, abs=0.1 * spread)
    assert interval.num_items == 400


def test_bootstrap_interval_covers_the_true_mean_at_its_rate():
    generator, covered = rng(), 0
    for _ in range(400):
        interval = metrics.bootstrap_mean(generator.normal(1.0, 1.0, 60), num_samples=200, generator=generator)
        covered += interval.low <= 1.0 <= interval.high
    assert 0.90 <= covered / 400 <= 0.98


def test_bootstrap_is_a_function_of_its_generator_and_independent_of_blocks(monkeypatch):
    values = rng().normal(size=50)
    whole = metrics.bootstrap_mean(values, num_samples=100, generator=rng(1))
    assert whole == metrics.bootstrap_mean(values, num_samples=100, generator=rng(1))
    assert whole != metrics.bootstrap_mean(values, num_samples=100, generator=rng(2))
    monkeypatch.setattr(metrics, "_DRAWS_PER_BLOCK", 50 * 7)
    assert whole == metrics.bootstrap_mean(values, num_samples=100, generator=rng(1))


def test_bootstrap_of_one_or_no_item():
    one = metrics.bootstrap_mean([2.0], num_samples=10, generator=rng())
    assert (one.mean, one.low, one.high, one.num_items) == (2.0, 2.0, 2.0, 1)
    none = metrics.bootstrap_mean([], num_samples=10, generator=rng())
    assert math.isnan(none.mean) and math.isnan(none.low) and none.num_items == 0


def test_pairing_removes_what_prompts_have_in_common():
    hardness = rng().normal(0, 10, 200)
    before, after = hardness + rng(1).normal(0, 0.1, 200), hardness + 0.5 + rng(2).normal(0, 0.1, 200)
    change = metrics.paired_bootstrap_difference(before, after, num_samples=500, generator=rng())
    assert change.low > 0.4
    assert change.high < 0.6
    back = metrics.paired_bootstrap_difference(after, before, num_samples=500, generator=rng())
    assert back.mean == pytest.approx(-change.mean)


def test_other_prompts_cannot_be_paired():
    with pytest.raises(ShapeError, match="same prompts"):
        metrics.paired_bootstrap_difference([1.0], [1.0, 2.0], num_samples=10, generator=rng())


def paired(both: int, only_after: int, only_before: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Before and after of the prompts of a paired table."""
    counts = (both, only_after, only_before, neither)
    return np.repeat([1.0, 0.0, 1.0, 0.0], counts), np.repeat([1.0, 1.0, 0.0, 0.0], counts)


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        ((14, 5, 0, 22), 0.011, 0.226),  # Altman et al. (2000), Statistics with Confidence, p. 52
        ((59, 6, 16, 80), -0.1186, -0.0046),  # Fagerland et al. (2017), Chapter 8, by the R package contingencytables
    ],
)
def test_changed_rates_have_the_published_intervals(table, low, high):
    change = metrics.paired_rate_difference(*paired(*table))
    assert change.mean == pytest.approx((table[1] - table[2]) / sum(table))
    assert (change.low, change.high) == pytest.approx((low, high), abs=5e-4)
    assert change.num_items == sum(table)


@pytest.mark.parametrize("table", [(14, 5, 0, 22), (0, 3, 9, 0), (5, 0, 0, 0), (0, 7, 0, 3), (30, 8, 8, 30)])
def test_swapping_the_sides_mirrors_the_change_of_a_rate(table):
    before, after = paired(*table)
    there, back = metrics.paired_rate_difference(before, after), metrics.paired_rate_difference(after, before)
    assert (back.mean, back.low, back.high) == pytest.approx((-there.mean, -there.high, -there.low))
    assert -1 <= there.low <= there.mean <= there.high <= 1


def test_a_rate_that_nothing_changed_is_uncertain_on_both_sides_alike():
    change = metrics.paired_rate_difference(*paired(30, 0, 0, 130))
    assert change.mean == 0
    assert change.high == pytest.approx(-change.low)
    assert change.high > 0.005
    # no margin to correlate: the widths of both Wilson intervals, squared and added
    none = metrics.paired_rate_difference(*paired(0, 0, 0, 20))
    assert none.high == pytest.approx(metrics.wilson_interval(0, 20).high)


@pytest.mark.parametrize("num_successes", [6, 8, 30, 80, 150, 160])
def test_four_changes_one_way_may_be_chance_and_six_are_not(num_successes):
    """Of 160 prompts; exact McNemar p is .125 and .031."""
    four, six = (paired(num_successes - n, 0, n, 160 - num_successes) for n in (4, 6))
    assert metrics.paired_rate_difference(*four).high > 0
    assert metrics.paired_bootstrap_difference(*four, num_samples=4000, generator=rng()).high < 0
    assert metrics.paired_rate_difference(*six).high < 0


def test_many_changed_prompts_have_the_interval_of_the_bootstrap():
    sides = paired(100, 150, 90, 260)
    score = metrics.paired_rate_difference(*sides)
    resampled = metrics.paired_bootstrap_difference(*sides, num_samples=20_000, generator=rng())
    assert (score.mean, score.low, score.high) == pytest.approx(
        (resampled.mean, resampled.low, resampled.high), abs=0.01
    )


@pytest.mark.parametrize("shares", [(0.2, 0.02, 0.02, 0.76), (0.3, 0.03, 0.01, 0.66), (0.0, 0.025, 0.025, 0.95)])
def test_changed_rates_are_covered_when_few_prompts_change(shares):
    """Four to eight of 160 prompts."""
    tables = rng().multinomial(160, shares, size=1500)
    changes = [metrics.paired_rate_difference(*paired(*table)) for table in tables]
    covered = np.mean([change.low <= shares[1] - shares[2] <= change.high for change in changes])
    assert 0.94 <= covered <= 0.985


def test_only_zeros_and_ones_are_a_rate_of_single_answers():
    with pytest.raises(DataError, match="0 or 1"):
        metrics.paired_rate_difference([0.5], [1.0])
    with pytest.raises(ShapeError, match="same prompts"):
        metrics.paired_rate_difference([1.0], [1.0, 0.0])
    assert math.isnan(metrics.paired_rate_difference([], []).mean)


def test_wilson_interval_solves_its_quadratic_and_has_width_at_the_ends():
    interval = metrics.wilson_interval(7, 20)
    for bound in (interval.low, interval.high):  # |share - p| = z sqrt(p (1 - p) / n)
        assert abs(7 / 20 - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / 20), abs=1e-6)
    none = metrics.wilson_interval(0, 20)
    assert none.low == 0.0
    assert 0.1 < none.high < 0.2
    empty = metrics.wilson_interval(0, 0)
    assert (empty.low, empty.high) == (0.0, 1.0)
    with pytest.raises(DataError, match="not a proportion"):
        metrics.wilson_interval(3, 2)


def test_ties_are_wrong_in_pair_accuracy():
    assert metrics.pair_accuracy([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 4.0, -1.0]) == 0.5
    assert math.isnan(metrics.pair_accuracy([], []))
    with pytest.raises(ShapeError, match="alike"):
        metrics.pair_accuracy([1.0], [1.0, 2.0])


def test_calibration_error_by_hand():
    # .92 .92 share a bin with y = 1, .08 .08 with y = 0: four items, each .08 away; .52 and .48: .48 away.
    assert metrics.expected_calibration_error([0.92, 0.92, 0.52]) == pytest.approx((4 * 0.08 + 2 * 0.48) / 6)
    # 0 and .04 share the first bin, .96 and 1 the last, each once with y = 1 and once with y = 0.
    assert metrics.expected_calibration_error([0.0, 0.96]) == pytest.approx(2 * 0.96 / 4)
    assert metrics.expected_calibration_error([1.0]) == 0.0
    assert metrics.expected_calibration_error([0.0]) == 1.0
    assert math.isnan(metrics.expected_calibration_error([]))


def test_calibration_error_is_small_for_true_probabilities_and_grows_when_they_are_sharpened():
    generator = rng()
    logit = generator.normal(0, 2, 20_000)
    is_right = generator.random(20_000) < 1 / (1 + np.exp(-logit))
    stated = 1 / (1 + np.exp(-np.where(is_right, logit, -logit)))
    sharpened = 1 / (1 + np.exp(-3 * np.where(is_right, logit, -logit)))
    assert metrics.expected_calibration_error(stated) < 0.01
    assert metrics.expected_calibration_error(sharpened) > 0.08
    assert metrics.brier(stated) < metrics.brier(sharpened)


def test_calibration_error_does_not_depend_on_which_answer_is_named_first():
    """Mirroring every prediction is what renaming does: the pooled predictions are the same set."""
    stated = rng().random(500)
    naive = 0.0
    pooled, right = np.concatenate([stated, 1 - stated]), np.repeat([1.0, 0.0], 500)
    for k in range(20):
        inside = (pooled >= k / 20) & (pooled < (k + 1) / 20)
        if inside.any():
            naive += inside.mean() * abs(pooled[inside].mean() - right[inside].mean())
    assert metrics.expected_calibration_error(stated) == pytest.approx(naive, abs=1e-12)


@pytest.mark.parametrize("metric", [metrics.expected_calibration_error, metrics.brier])
@pytest.mark.parametrize("stated", [1.1, -0.1, math.nan])
def test_probabilities_outside_the_unit_interval_are_refused(metric, stated):
    with pytest.raises(DataError, match=r"\[0, 1\]"):
        metric([0.5, stated])


def test_brier_by_hand():
    assert metrics.brier([1.0, 0.5, 0.0]) == pytest.approx((0 + 0.25 + 1) / 3)
    assert math.isnan(metrics.brier([]))


def test_auroc_is_the_share_of_ordered_pairs():
    positive, negative = rng().integers(0, 6, 40), rng(1).integers(0, 5, 30)
    naive = np.mean([(p > n) + 0.5 * (p == n) for p in positive for n in negative])
    assert metrics.auroc(positive, negative) == pytest.approx(naive)
    assert metrics.auroc([1.0], [1.0]) == 0.5
    assert math.isnan(metrics.auroc([], [1.0]))


def test_area_interval_is_what_scores_without_meaning_spread_over():
    interval = metrics.auroc_interval([2.0, 3.0, 0.0], [1.0, 1.0])
    assert interval.mean == pytest.approx(4 / 6)
    assert interval.low == pytest.approx(4 / 6 - 1.959964 * math.sqrt(6 / (12 * 3 * 2)), abs=1e-6)
    assert (interval.high, interval.num_items) == (1.0, 5)
    nothing = metrics.auroc_interval([], [1.0])
    assert math.isnan(nothing.mean)
    assert (nothing.low, nothing.high) == (0.0, 1.0)


def test_binary_calibration_error_by_hand():
    probability, labels = np.array([0.95, 0.95, 0.05, 0.05]), np.array([1, 0, 0, 0])
    # the upper bin is off by |1.9 - 1| / 4, the lower by 0.1 / 4
    assert metrics.binary_calibration_error(probability, labels) == pytest.approx(1.0 / 4)
    assert math.isnan(metrics.binary_calibration_error([], []))
    with pytest.raises(ShapeError, match="must be alike"):
        metrics.binary_calibration_error([0.5], [1, 0])


def test_tensors_are_arrays_too_and_matrices_are_refused():
    assert metrics.pair_accuracy(torch.ones(3), torch.zeros(3)) == 1.0
    with pytest.raises(ShapeError, match="one-dimensional"):
        metrics.auroc(np.zeros((2, 2)), [1.0])


def test_items_of_a_group_are_drawn_together():
    """Twenty pairs of each of ten prompts that say the same are worth ten items, not two hundred."""
    of_prompts = np.random.default_rng(0).normal(size=10)
    repeated, keys = np.repeat(of_prompts, 20), [str(i) for i in np.repeat(np.arange(10), 20)]
    alone = metrics.bootstrap_mean(of_prompts, num_samples=2000, generator=np.random.default_rng(1))
    grouped = metrics.bootstrap_mean(repeated, num_samples=2000, generator=np.random.default_rng(1), groups=keys)
    assert (grouped.low, grouped.high) == pytest.approx((alone.low, alone.high))
    each = metrics.bootstrap_mean(repeated, num_samples=2000, generator=np.random.default_rng(1))
    assert each.high - each.low < 0.4 * (grouped.high - grouped.low)
    assert grouped.num_items == 200
