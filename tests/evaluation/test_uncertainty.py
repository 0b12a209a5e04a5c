"""Uncertain rewards: numbers by hand, slow oracles, and calibration on simulated pairs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from raylign.errors import DataError, ShapeError
from raylign.evaluation import metrics, uncertainty
from raylign.evaluation.uncertainty import IntervalRanking, interval_ranking, reward_bounds


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x)))


# Two pairs surely right, one right without being sure, one surely wrong.
REWARDS = reward_bounds(
    np.array([[3.0, 0.0], [2.0, -1.0], [1.0, 0.5], [-2.0, 1.0]]), np.array([[1, 1], [1, 1], [1, 1], [1, 1.5]])
)


def test_interval_ranking_by_hand():
    ranking = interval_ranking(REWARDS)
    expected = IntervalRanking(accuracy=0.75, confident_right=0.5, confident_wrong=0.25, num_pairs=4)
    assert ranking == expected
    assert ranking.error == 0.25
    scores = [ranking.score(weight) for weight in uncertainty.RANKING_SCORE_WEIGHTS]
    assert scores == pytest.approx([-0.333333, -0.306422, 0.0, 0.25], abs=1e-6)


def test_intervals_without_width_are_confident_of_every_order():
    point = reward_bounds(rng().normal(size=(50, 2)), np.zeros((50, 2)))
    ranking = interval_ranking(point)
    assert ranking.confident_right == ranking.accuracy
    assert ranking.confident_wrong == ranking.error
    assert ranking.score(0) == 0  # confident always: the shares of right and wrong that are confident are both 1


def test_ties_count_as_false_and_touching_intervals_as_unsure():
    tie = interval_ranking(reward_bounds([[1.0, 1.0]], [[0.0, 0.0]]))
    assert (tie.accuracy, tie.confident_right, tie.confident_wrong) == (0, 0, 0)
    touching = interval_ranking(reward_bounds([[1.0, 0.0]], [[0.5, 0.5]]))
    assert (touching.accuracy, touching.confident_right) == (1, 0)


def test_a_perfect_model_has_no_quotient_over_nothing():
    ranking = interval_ranking(reward_bounds([[1.0, 0.0]], [[0.1, 0.1]]))
    assert ranking.score(0) == 1.0
    assert math.isnan(interval_ranking(np.empty((0, 2, 3))).accuracy)


def naive_bound_error(stated, right, exceeds, num_bins=20) -> float:
    total = 0.0
    for k in range(num_bins):
        rows = [i for i, p in enumerate(stated) if min(int(p * num_bins), num_bins - 1) == k]
        if rows:
            total += len(rows) * max(exceeds(np.mean([stated[i] for i in rows]), np.mean([right[i] for i in rows])), 0)
    return total / len(stated)


def test_bound_error_against_the_naive_sum_and_equal_for_both_bounds():
    rewards = reward_bounds(rng().normal(size=(300, 2)), rng(1).random((300, 2)))
    lower = sigmoid(rewards[:, 0, 1] - rewards[:, 1, 2])
    upper = sigmoid(rewards[:, 0, 2] - rewards[:, 1, 1])
    right = np.repeat([1, 0], 300)
    found = uncertainty.bound_calibration_error(rewards)
    below = naive_bound_error(np.r_[lower, 1 - upper], right, lambda stated, observed: stated - observed)
    above = naive_bound_error(np.r_[upper, 1 - lower], right, lambda stated, observed: observed - stated)
    assert found == pytest.approx(below)
    assert found == pytest.approx(above)


def test_bound_error_is_nil_for_honest_bounds_and_the_calibration_error_splits_without_width():
    margin = rng().normal(size=4000)
    flipped = np.where(rng(1).random(4000) < sigmoid(margin), margin, -margin)  # labelled by the model itself
    means = np.stack([flipped / 2, -flipped / 2], axis=1)
    assert uncertainty.bound_calibration_error(reward_bounds(means, np.full_like(means, 0.3))) < 1e-3
    # mirrored bins err by as much above as below: half of the two-sided error is excess
    narrow = uncertainty.bound_calibration_error(reward_bounds(3 * means, np.zeros_like(means)))
    assert narrow == pytest.approx(metrics.expected_calibration_error(sigmoid(3 * flipped)) / 2, abs=1e-9)
    assert narrow > 0.05


def test_reliability_curve_sums_to_the_calibration_error():
    stated = rng().beta(3, 2, size=500)
    curve = uncertainty.reliability_curve(stated, num_bins=20)
    filled = curve.counts > 0
    gaps = np.abs(curve.stated - curve.observed)[filled]
    assert curve.counts.sum() == 1000
    assert (curve.counts[filled] * gaps).sum() / 1000 == pytest.approx(metrics.expected_calibration_error(stated))
    inside = (curve.stated[filled] >= curve.edges[:-1][filled]) & (curve.stated[filled] <= curve.edges[1:][filled])
    assert inside.all()


def test_reliability_curve_by_hand():
    curve = uncertainty.reliability_curve([0.9, 0.9, 0.9, 0.2], num_bins=2)
    np.testing.assert_array_equal(curve.counts, [4, 4])
    np.testing.assert_allclose(curve.stated, [(3 * 0.1 + 0.2) / 4, (3 * 0.9 + 0.8) / 4])
    np.testing.assert_allclose(curve.observed, [0.25, 0.75])
    np.testing.assert_allclose(curve.edges, [0, 0.5, 1])
    empty = uncertainty.reliability_curve([1.0], num_bins=4)
    assert np.isnan(empty.observed[1:3]).all()


def test_accuracy_rejection_by_hand():
    margins, unsure = [1.0, -1.0, 2.0, -0.5], [0.1, 0.4, 0.2, 0.3]
    found = uncertainty.accuracy_rejection(margins, unsure, shares=(0, 0.25, 0.5, 0.99))
    np.testing.assert_allclose(found, [0.5, 2 / 3, 1, 1])


def test_accuracy_rejection_is_the_mean_over_orders_of_tied_pairs():
    margins, unsure = np.array([1.0, -1.0, 2.0, -0.5, 1.0]), np.array([1, 1, 1, 0, 2])
    expected = []
    for keep in (5, 4, 3, 2, 1):
        orders = [o for o in itertools.permutations(range(5)) if list(unsure[list(o)]) == sorted(unsure)]
        expected.append(np.mean([(margins[list(o)][:keep] > 0).mean() for o in orders]))
    found = uncertainty.accuracy_rejection(margins, unsure, shares=(0, 0.2, 0.4, 0.6, 0.8))
    np.testing.assert_allclose(found, expected)


def test_accuracy_rises_only_with_an_uncertainty_that_means_something():
    margin = rng().normal(size=5000)
    right = np.where(rng(1).random(5000) < sigmoid(3 * np.abs(margin)), np.abs(margin), -np.abs(margin))
    shares = np.linspace(0, 0.9, 10)
    told = uncertainty.accuracy_rejection(right, -np.abs(margin), shares=shares)
    untold = uncertainty.accuracy_rejection(right, rng(2).random(5000), shares=shares)
    assert (np.diff(told) > 0).all()
    assert np.abs(untold - untold[0]).max() < 0.05
    assert np.ptp(uncertainty.accuracy_rejection(right, np.zeros(5000), shares=shares)) < 1e-9


def test_shift_auroc_has_the_area_and_covers_it():
    """Normal signals one standard deviation apart: the area is Phi(1 / sqrt 2) = .7602."""
    found = uncertainty.shift_auroc(rng().normal(size=40), rng(1).normal(1, 1, size=60))
    assert found.mean == metrics.auroc(rng(1).normal(1, 1, size=60), rng().normal(size=40))
    assert found.num_items == 100
    generator, covered = rng(2), 0
    for _ in range(500):
        interval = uncertainty.shift_auroc(generator.normal(size=40), generator.normal(1, 1, size=60))
        covered += interval.low <= 0.760250 <= interval.high
    assert 0.91 <= covered / 500 <= 0.98
    perfect = uncertainty.shift_auroc([0.0, 1.0], [2.0, 3.0])
    assert (perfect.mean, perfect.low, perfect.high) == (1, 1, 1)
    assert math.isnan(uncertainty.shift_auroc([], [1.0]).mean)


def quality(mean, variance, seed=0, **options):
    return uncertainty.margin_quality(mean, variance, num_samples=200, generator=rng(seed), **options)


def test_margin_quality_by_hand():
    found = quality([1.0, -0.5], [0.0, 8 / math.pi])
    stated = np.array([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(0.5 / math.sqrt(2)))])
    assert found.accuracy.mean == 0.5
    assert found.brier.mean == pytest.approx(metrics.brier(stated))
    assert found.log_likelihood.mean == pytest.approx(np.log(stated).mean())
    assert found.calibration_error.mean == pytest.approx(metrics.expected_calibration_error(stated))
    assert found.accuracy.num_items == found.calibration_error.num_items == 2
    doubled = quality([2.0, -1.0], [0.0, 32 / math.pi], temperature=2.0)
    assert doubled.brier.mean == pytest.approx(found.brier.mean)
    assert math.isnan(quality([], []).calibration_error.mean)


def test_variance_repairs_the_calibration_of_margins_that_are_noisy():
    """Logits z, margins z + e, labels by z: averaging over what is not known of z is calibrated, the margin is not."""
    generator = rng()
    true_margin = generator.normal(size=20_000)
    noisy = true_margin + generator.normal(0, 1, size=20_000)
    # posterior of z given the noisy margin under the prior N(0, 1): mean half, variance half
    sign = np.where(generator.random(20_000) < sigmoid(true_margin), 1, -1)
    point, posterior = quality(sign * noisy, np.zeros(20_000)), quality(sign * noisy / 2, np.full(20_000, 0.5))
    assert posterior.calibration_error.mean < 0.01 < 0.05 < point.calibration_error.mean
    assert posterior.log_likelihood.low > point.log_likelihood.high
    assert posterior.accuracy == point.accuracy


def test_interval_of_the_calibration_error_covers_a_known_error():
    """Labels at 75 % stated at 95 %: the error is .2 whatever the bins."""
    generator, covered = rng(), 0
    for _ in range(150):
        is_right = generator.random(150) < 0.75
        margins = np.where(is_right, 1, -1) * math.log(19)
        interval = quality(margins, np.zeros(150), seed=int(generator.integers(2**31))).calibration_error
        covered += interval.low <= 0.2 <= interval.high
        assert interval.low <= interval.mean <= interval.high
    assert 0.88 <= covered / 150 <= 0.99


def test_a_calibrated_model_is_within_the_limit_and_its_interval_can_reach_zero():
    """Noise of the bins makes the error .06 here, of which percentiles of resamples would never let go."""
    generator, is_within, reaches_zero = rng(), 0, 0
    for _ in range(100):
        margins = generator.normal(size=300)
        margins = np.where(generator.random(300) < sigmoid(margins), margins, -margins)
        found = quality(margins, np.zeros(300), seed=int(generator.integers(2**31)))
        is_within += found.calibration_error.mean <= found.calibration_limit
        reaches_zero += found.calibration_error.low == 0
    assert 0.89 <= is_within / 100 <= 0.99
    assert reaches_zero / 100 > 0.4
    overconfident = quality(3 * margins, np.zeros(300))
    assert overconfident.calibration_error.mean > overconfident.calibration_limit


def test_extreme_margins_stay_finite():
    found = quality([1e4, -1e4], [0.0, 0.0])
    assert found.log_likelihood.mean == pytest.approx(-5e3)
    assert found.brier.mean == 0.5


def test_bad_input_is_refused():
    with pytest.raises(ShapeError, match=r"\(B, 2, 3\)"):
        interval_ranking(np.zeros((4, 3, 2)))
    with pytest.raises(DataError, match="above its upper"):
        interval_ranking([[[0.0, 1.0, -1.0], [0.0, -1.0, 1.0]]])
    with pytest.raises(ShapeError, match=r"\(B, 2\)"):
        reward_bounds([1.0], [1.0])
    with pytest.raises(ShapeError, match="same pairs"):
        quality([1.0], [1.0, 2.0])
    with pytest.raises(DataError, match="negative"):
        quality([1.0], [-1.0])
    with pytest.raises(DataError, match="in \\[0, 1\\)"):
        uncertainty.accuracy_rejection([1.0], [1.0], shares=[1.0])
    with pytest.raises(ShapeError, match="same pairs"):
        uncertainty.accuracy_rejection([1.0], [1.0, 2.0], shares=[0.0])
    with pytest.raises(DataError, match="in \\[0, 1\\]"):
        uncertainty.reliability_curve([1.5])
