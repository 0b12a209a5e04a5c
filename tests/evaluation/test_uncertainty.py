"""Uncertain rewards: numbers by hand, slow oracles, and calibration on simulated pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from raylign.errors import DataError, ShapeError
from raylign.evaluation import metrics, uncertainty


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


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


def bounds(*means: float, width: float) -> np.ndarray:
    return np.array([[mean, mean - width, mean + width] for mean in means])


def test_sure_orders_by_hand():
    """Four pairs: two surely right, one right, one surely wrong."""
    found = uncertainty.confident_ranking(bounds(5, 4, 1.5, 0, width=1), bounds(0, 0, 1, 4, width=1))
    assert (found.right, found.sure_right, found.sure_wrong) == (0.75, 0.5, 0.25)
    expected = {0: -1 / 3, 0.01: -0.306422, 0.2: 0.0, 1: 0.25}
    assert [found.score(b) for b in expected] == pytest.approx(list(expected.values()), abs=1e-6)


def test_without_width_every_order_is_sure_and_ties_are_wrong():
    found = uncertainty.confident_ranking(bounds(3, 2, 1, width=0), bounds(0, 2, 2, width=0))
    assert (found.right, found.sure_right, found.sure_wrong) == (1 / 3, 1 / 3, 1 / 3)
    nothing = uncertainty.ConfidentRanking(right=1.0, sure_right=0.5, sure_wrong=0.0)
    assert nothing.score(0) == 0.5  # no order is wrong, so that none is surely wrong


@pytest.mark.parametrize(
    ("chosen", "rejected", "error"),
    [
        (bounds(1, width=0)[:, :2], bounds(1, width=0)[:, :2], ShapeError),
        (bounds(1, 2, width=0), bounds(1, width=0), ShapeError),
        (bounds(1, width=-1), bounds(1, width=1), DataError),
        (bounds(1, width=1), bounds(math.nan, width=1), DataError),
    ],
)
def test_bounds_that_are_none_are_refused(chosen, rejected, error):
    with pytest.raises(error):
        uncertainty.confident_ranking(chosen, rejected)


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


def test_bad_input_is_refused():
    with pytest.raises(DataError, match="in \\[0, 1\\]"):
        uncertainty.reliability_curve([1.5])
    with pytest.raises(ShapeError, match="one-dimensional"):
        uncertainty.reliability_curve([[0.5]])
