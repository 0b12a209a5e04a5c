from __future__ import annotations

import math

import numpy as np
import pytest

from raylign.errors import ModelError
from raylign.evaluation.cost_quality import check_cost_sign, cost_quality
from raylign.evaluation.metrics import auroc_interval

WORDS = {"cost": "the cost", "answers": "answers", "cure": "look at cost_model.label"}


def test_quality_by_hand():
    quality = cost_quality(np.array([2.0, -1.0, 0.0, -3.0]), [True, True, False, False])
    assert quality.auc.mean == 0.75  # three of four unsafe-safe comparisons are right
    assert quality.accuracy == 0.75  # a cost of 0 is safe
    stated = [1 / (1 + math.exp(-cost)) for cost in (2.0, -1.0, 0.0, -3.0)]
    gaps = [abs(p - y) for p, y in zip(stated, (1, 1, 0, 0), strict=True)]  # four bins with one answer each
    assert quality.calibration_error == pytest.approx(sum(gaps) / 4)
    assert (quality.num_unsafe, quality.num_safe) == (2, 2)


def test_costs_far_from_zero_and_no_answers_have_a_quality():
    assert cost_quality(np.array([1e4, -1e4]), [True, False]).calibration_error == pytest.approx(0.0, abs=1e-12)
    nothing = cost_quality(np.array([]), [])
    assert math.isnan(nothing.auc.mean)
    assert math.isnan(nothing.accuracy)
    check_cost_sign(nothing, **WORDS)


def test_negated_costs_are_stopped_and_the_costs_themselves_are_not():
    generator = np.random.default_rng(0)
    unsafe = generator.random(200) < 0.5
    costs = generator.normal(size=200) + unsafe
    check_cost_sign(cost_quality(costs, unsafe), **WORDS)
    with pytest.raises(ModelError, match=r"sign flipped.*look at cost_model.label"):
        check_cost_sign(cost_quality(-costs, unsafe), **WORDS)
    with pytest.raises(ModelError, match="sign flipped"):
        check_cost_sign(cost_quality(costs, ~unsafe), **WORDS)


def test_a_few_answers_in_the_wrong_order_prove_nothing():
    check_cost_sign(cost_quality(np.array([-1.0, 1.0]), [True, False]), **WORDS)
    check_cost_sign(cost_quality(np.array([1.0, 1.0, 1.0]), [True, True, True]), **WORDS)


def test_chance_stops_a_blind_cost_as_rarely_as_its_interval_says():
    generator = np.random.default_rng(0)
    below = [auroc_interval(generator.normal(size=20), generator.normal(size=30)).high < 0.5 for _ in range(4000)]
    assert np.mean(below) == pytest.approx(0.025, abs=0.008)  # three standard errors of the simulation
