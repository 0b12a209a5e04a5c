from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from raylign.errors import DataError, ShapeError
from raylign.evaluation import drift
from raylign.evaluation.drift import kendall_tau, measure_drift

NUM_PROMPTS, NUM_CANDIDATES = 40, 8


@pytest.fixture
def before() -> np.ndarray:
    """Length-mean log-probabilities of sampled answers: prompts differ, candidates spread around -1.5 nats."""
    rng = np.random.default_rng(0)
    return rng.normal(-1.5, 0.2, (NUM_PROMPTS, 1)) + rng.normal(0, 0.4, (NUM_PROMPTS, NUM_CANDIDATES))


def measured(before: np.ndarray, now: np.ndarray, **fresh):
    return measure_drift(before, now, num_samples=300, generator=np.random.default_rng(1), **fresh)


def test_an_unchanged_policy_has_tau_one_and_no_warning(before):
    report = measured(before, before.copy())
    assert (report.kendall_tau.mean, report.kendall_tau.low, report.rank_drift.mean) == (1.0, 1.0, 0.0)
    assert report.top1_change_rate == 0.0
    assert report.js_divergence == 0.0
    assert report.verdict == "order unchanged"
    assert not report.is_stale


def test_shuffled_log_probabilities_have_tau_zero_and_the_same_distribution():
    rng = np.random.default_rng(2)
    before = rng.normal(-1.5, 0.4, (400, NUM_CANDIDATES))
    report = measured(before, rng.permuted(before, axis=1))
    standard_error = math.sqrt(2 * (2 * NUM_CANDIDATES + 5) / (9 * NUM_CANDIDATES * (NUM_CANDIDATES - 1)) / 400)
    assert abs(report.kendall_tau.mean) < 3 * standard_error
    width = report.kendall_tau.high - report.kendall_tau.low
    assert width == pytest.approx(2 * 1.96 * standard_error, rel=0.2)
    assert report.top1_change_rate == pytest.approx(1 - 1 / NUM_CANDIDATES, abs=0.06)
    assert report.js_divergence == 0.0
    assert report.verdict == "hypothesis holds"


def test_short_training_moves_the_order_before_the_distribution(before):
    rng = np.random.default_rng(3)
    report = measured(before, before + rng.normal(0, 0.1, before.shape))
    assert 0 < report.rank_drift.low < report.rank_drift.high < 0.5
    assert report.js_divergence <= report.js_null_limit
    assert report.verdict == "hypothesis holds"


def test_training_that_leaves_the_candidates_behind_is_stale(before):
    rng = np.random.default_rng(4)
    report = measured(before, before - 1.0 + rng.normal(0, 0.2, before.shape))
    assert report.js_divergence > report.js_null_limit
    assert report.is_stale
    assert "sample anew" in report.advice


def test_a_second_sample_of_the_same_policy_is_inside_the_null():
    """The null is wide enough: independent samples of one distribution are called stale in at most 5 % of runs."""
    rng = np.random.default_rng(5)
    samples = rng.normal(-1.5, 0.4, (60, 2, 20, 8))
    stale = [measure_drift(first, second, num_samples=60, generator=rng).is_stale for first, second in samples]
    assert np.mean(stale) <= 0.05


def test_divergence_is_symmetric_and_bounded():
    first, second = np.array([0.5, 0.5, 0.0]), np.array([0.0, 0.25, 0.75])
    by_hand = 0.5 * (0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.375))
    by_hand += 0.5 * (0.25 * math.log(0.25 / 0.375) + 0.75 * math.log(2))
    assert drift._js_divergence(first, second) == pytest.approx(by_hand)
    assert drift._js_divergence(second, first) == pytest.approx(by_hand)
    assert drift._js_divergence(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == pytest.approx(math.log(2))


def test_tau_against_the_naive_count():
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 4, (30, 6)).astype(float), rng.integers(0, 4, (30, 6)).astype(float)
    for a, b, found in zip(first, second, kendall_tau(first, second), strict=True):
        pairs = [(np.sign(a[i] - a[j]), np.sign(b[i] - b[j])) for i in range(6) for j in range(i)]
        untied = sum(x != 0 for x, _ in pairs) * sum(y != 0 for _, y in pairs)
        assert found == pytest.approx(sum(x * y for x, y in pairs) / math.sqrt(untied))


def test_identical_candidates_do_not_count_as_change():
    before = np.array([[-1.0, -1.0, -2.0, -3.0]])
    now = np.array([[-0.5, -0.5, -2.5, -3.5]])
    assert kendall_tau(before, now).tolist() == [1.0]
    assert measured(before, now).top1_change_rate == 0.0
    tied = np.full((1, 3), -1.0)
    assert kendall_tau(tied, tied).tolist() == [1.0]
    assert kendall_tau(tied, np.array([[-1.0, -2.0, -3.0]])).tolist() == [0.0]


def test_fresh_samples_give_the_divergence_from_the_reference(before):
    """Samples of N(m, 1) against N(0, 1): KL is m^2 / 2."""
    sample = np.random.default_rng(6).normal(2.0, 1.0, (NUM_PROMPTS, 500))
    fresh = {"fresh_policy_logps": -0.5 * (sample - 2) ** 2, "fresh_reference_logps": -0.5 * sample**2}
    report = measured(before, before, **fresh)
    assert report.kl.mean == pytest.approx(2.0, abs=0.05)
    assert report.kl.low < 2.0 < report.kl.high
    assert measured(before, before).kl is None


def test_samples_of_one_prompt_are_not_independent(before):
    """Log-ratios that are 0 on half of the prompts and 1 on the others, for every sample of a prompt.

    The mean over 40 prompts has the standard error 0.5 / sqrt(40); taking all 40 x 8 samples for independent would make
    it smaller by sqrt(8).
    """
    log_ratio = np.repeat(np.arange(NUM_PROMPTS)[:, None] % 2, NUM_CANDIDATES, axis=1).astype(float)
    kl = measured(before, before, fresh_policy_logps=log_ratio, fresh_reference_logps=0 * log_ratio).kl
    assert (kl.mean, kl.num_items) == (0.5, NUM_PROMPTS)
    assert kl.high - kl.low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(NUM_PROMPTS), rel=0.15)


def test_report_is_frozen_and_repeats_under_its_seed(before):
    now = before + np.random.default_rng(3).normal(0, 0.1, before.shape)
    assert measured(before, now) == measured(before, now)
    with pytest.raises(dataclasses.FrozenInstanceError):
        measured(before, now).verdict = "order unchanged"


def test_bad_inputs_are_refused(before):
    with pytest.raises(ShapeError, match=r"\(P, K\)"):
        measured(before, before[:, :4])
    with pytest.raises(ShapeError, match="K at least 2"):
        measured(before[:, :1], before[:, :1])
    with pytest.raises(DataError, match="finite"):
        measured(before, np.where(before < -2, np.nan, before))
    with pytest.raises(DataError, match="finite"):
        measured(before[:0], before[:0])
    with pytest.raises(DataError, match="both the policy and the reference"):
        measured(before, before, fresh_policy_logps=np.zeros(3))
    with pytest.raises(ShapeError, match=r"\(P, S\) with P=40"):
        measured(before, before, fresh_policy_logps=np.zeros(320), fresh_reference_logps=np.zeros(320))
