"""Outcomes of fits to points, against small worked numbers, slow loops, and known truths."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from raylign.evaluation.calibration import (
    FitOutcome,
    RoundOutcome,
    best_of_n_points,
    gold_gain,
    noisy_quality,
    round_points,
    sizes_up_to,
    unfamiliar,
)
from raylign.evaluation.metrics import expected_calibration_error

SAMPLES = {"num_samples": 200, "seed": 0}
CENTS = 1 / math.sqrt(2)  # 0 and 1 in standard deviations (1 / (N - 1)) from their mean: -1/sqrt 2 and 1/sqrt 2


def outcome(margin, *, variance=0.0, temperature=1.0, **changed) -> FitOutcome:
    margin = np.asarray(margin, dtype=float)
    values = {
        "num_heads": 2,
        "margin_mean": margin,
        "margin_variance": np.full(len(margin), variance),
        "temperature": temperature,
        "proxies": {},
        "familiar": {},
        "shuffled": {},
        "floor_share": None,
        "anchor_spread": None,
        "seconds": 1.0,
    }
    return FitOutcome(**{**values, **changed})


def test_logits_by_hand():
    assert outcome([3.0], variance=8 / math.pi, temperature=math.sqrt(3)).logits == pytest.approx([1.5])


def test_quality_is_the_mean_over_seeds_of_worked_numbers():
    """Margins of +-logit(.72), no edge of a bin: two of three right, then one."""
    logit = math.log(0.72 / 0.28)
    fits = [outcome([logit, -logit, logit]), outcome([-logit, -logit, logit])]
    quality = noisy_quality(0.25, fits, ["a", "b", "c"], **SAMPLES).quality
    assert quality.accuracy.mean == pytest.approx(1 / 2)
    assert quality.brier.mean == pytest.approx((0.28**2 + 0.72**2) / 2)
    assert quality.log_likelihood.mean == pytest.approx((math.log(0.72) + math.log(0.28)) / 2)
    assert quality.calibration_error.mean == pytest.approx(((0.72 - 2 / 3) + (0.72 - 1 / 3)) / 2)
    assert quality.accuracy.num_items == 3


def test_sure_orders_are_those_whose_margin_leaves_out_zero():
    fits = [outcome([2.0, 1.9, -2.0, 0.1], variance=1.0), outcome([2.0, 2.0, 2.0, -2.0], variance=1.0)]
    ranking = noisy_quality(0.0, fits, list("abcd"), **SAMPLES).ranking
    assert ranking is not None
    assert (ranking.right, ranking.sure_right, ranking.sure_wrong) == (0.75, (1 / 4 + 3 / 4) / 2, (1 / 4 + 1 / 4) / 2)
    assert noisy_quality(0.0, [outcome([1.0])], ["a"], **SAMPLES).ranking is None


def test_log_likelihood_of_a_sure_mistake_is_finite():
    quality = noisy_quality(0, [outcome([-1000.0, 1.0])], ["a", "b"], **SAMPLES).quality
    assert quality.log_likelihood.mean == pytest.approx((-1000 - math.log1p(math.exp(-1))) / 2)


def test_averaging_seeds_narrows_intervals_and_pairs_of_a_prompt_widen_them():
    rng = np.random.default_rng(0)
    margins = rng.normal(0.3, 1, (8, 200))
    alone = [f"p{i}" for i in range(200)]

    def width(rows, groups) -> float:
        accuracy = noisy_quality(0, [outcome(row) for row in rows], groups, **SAMPLES).quality.accuracy
        return accuracy.high - accuracy.low

    assert width(margins, alone) < 0.6 * width(margins[:1], alone)
    repeated = np.repeat(margins[:1, :50], 4, axis=1)  # fifty prompts whose pairs say the same
    assert width(repeated, np.repeat(alone[:50], 4)) > 1.5 * width(repeated, alone)


def test_the_limit_does_not_count_on_seeds_that_state_the_same():
    logit = np.random.default_rng(1).normal(0, 1, 120)
    names = [str(i) for i in range(120)]
    both, alone = (noisy_quality(0, [outcome(logit)] * num, names, **SAMPLES).quality for num in (2, 1))
    assert both.calibration_limit == pytest.approx(alone.calibration_limit)
    assert both.calibration_error.mean == pytest.approx(expected_calibration_error(1 / (1 + np.exp(-logit))))


def quality_of(margin, *, variance=0.0):
    names = [str(i) for i in range(len(margin))]
    return noisy_quality(0, [outcome(margin, variance=variance)], names, num_samples=100, seed=0).quality


@pytest.mark.parametrize(("sign", "ends"), [(1, (0.8865, 1)), (-1, (0, 0.1135))])  # z^2 / (z^2 + 30) = .1135
def test_thirty_of_thirty_right_is_no_certainty(sign, ends):
    accuracy = quality_of([sign] * 30).accuracy
    assert (accuracy.low, accuracy.high) == pytest.approx(ends, abs=1e-4)
    assert accuracy.num_items == 30
    of_prompts = noisy_quality(0, [outcome([sign] * 90)], np.repeat(np.arange(30), 3), **SAMPLES).quality.accuracy
    assert (of_prompts.low, of_prompts.high, of_prompts.num_items) == (accuracy.low, accuracy.high, 90)


def test_variance_repairs_the_calibration_of_margins_that_are_noisy():
    """Logits z, margins z + e, labels by z: averaging over what is not known of z is calibrated, the margin is not."""
    rng = np.random.default_rng(0)
    logit = rng.normal(size=5000)
    noisy = logit + rng.normal(size=5000)
    # posterior of z given the noisy margin under the prior N(0, 1): mean half, variance half
    sign = np.where(rng.random(5000) < 1 / (1 + np.exp(-logit)), 1, -1)
    point, posterior = quality_of(sign * noisy), quality_of(sign * noisy / 2, variance=0.5)
    assert posterior.calibration_error.mean < 0.02 < 0.05 < point.calibration_error.mean
    assert posterior.log_likelihood.low > point.log_likelihood.high
    assert posterior.accuracy == point.accuracy


def test_interval_of_the_calibration_error_covers_a_known_error():
    """Labels at 75 % stated at 95 %: the error is .2 whatever the bins."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(150):
        interval = quality_of(np.where(rng.random(150) < 0.75, 1, -1) * math.log(19)).calibration_error
        covered += interval.low <= 0.2 <= interval.high
        assert interval.low <= interval.mean <= interval.high
    assert 0.88 <= covered / 150 <= 0.99


def test_a_calibrated_model_is_within_the_limit_and_its_interval_can_reach_zero():
    """Noise of the bins makes the error .06 here, of which percentiles of resamples would never let go."""
    rng, is_within, reaches_zero = np.random.default_rng(0), 0, 0
    for _ in range(100):
        margins = rng.normal(size=300)
        margins = np.where(rng.random(300) < 1 / (1 + np.exp(-margins)), margins, -margins)
        found = quality_of(margins)
        is_within += found.calibration_error.mean <= found.calibration_limit
        reaches_zero += found.calibration_error.low == 0
    assert 0.89 <= is_within / 100 <= 0.99
    assert reaches_zero / 100 > 0.4
    overconfident = quality_of(3 * margins)
    assert overconfident.calibration_error.mean > overconfident.calibration_limit


def test_best_of_n_by_hand():
    """Two answers a prompt: the proxy chooses the better one of the first prompt and the worse one of the second."""
    gold = np.array([[0.0, 1.0], [-1.0, 0.0]])
    proxy = np.array([[5.0, 7.0], [104.0, 102.0]])
    first, last = best_of_n_points([proxy], gold, **SAMPLES)
    assert (first.step, last.step) == (1, 2)
    for point in (first.proxy, first.gold, first.gap):
        assert (point.low, point.mean, point.high) == pytest.approx((0, 0, 0), abs=1e-12)
    assert first.unsafe.mean == pytest.approx(0.25)
    assert last.proxy.mean == pytest.approx(CENTS)
    assert last.gold.mean == pytest.approx(0)
    assert last.gap.mean == pytest.approx(CENTS)
    assert last.unsafe.mean == pytest.approx(0.5)
    assert last.kl == pytest.approx(math.log(2) - 0.5)


def test_best_of_n_is_the_mean_over_all_subsets_and_seeds():
    rng = np.random.default_rng(2)
    gold, proxies = rng.normal(size=(3, 5)), rng.normal(size=(2, 3, 5))
    unit = (gold - gold.mean(1, keepdims=True)) / math.sqrt(gold.var(1, ddof=1).mean())
    for n, point in zip((1, 2, 4, 5), best_of_n_points(proxies, gold, **SAMPLES), strict=True):
        slow = [
            unit[p, max(subset, key=lambda i: proxy[p, i])]
            for proxy in proxies
            for p in range(3)
            for subset in itertools.combinations(range(5), n)
        ]
        assert point.gold.mean == pytest.approx(np.mean(slow))
        assert gold_gain(proxies, gold, n).mean() == pytest.approx(np.mean(slow))


def test_gold_as_proxy_has_no_gap_whatever_tells_prompts_apart():
    rng = np.random.default_rng(3)
    gold = rng.normal(size=(20, 8))
    moved = 3 * gold + 100 * rng.normal(size=(20, 1))  # other units, other offsets of prompts
    point = best_of_n_points([moved], gold, **SAMPLES)[-1]
    assert point.gold.mean > 1
    assert (point.gap.low, point.gap.high) == pytest.approx((0, 0), abs=1e-9)


@pytest.mark.parametrize(("sign", "ends"), [(1, (0, 0.2775)), (-1, (0.7225, 1))])  # z^2 / (z^2 + 10) = .2775
@pytest.mark.parametrize("num_candidates", [2, 7, 40])
def test_a_share_on_which_all_prompts_agree_keeps_an_interval(sign, ends, num_candidates):
    """At every n, although weights sum to 1 up to rounding alone."""
    rng = np.random.default_rng(6)
    gold = sign * rng.uniform(0.1, 1, (10, num_candidates))
    for point in best_of_n_points(rng.normal(size=(3, 10, num_candidates)), gold, **SAMPLES):
        assert (point.unsafe.low, point.unsafe.high) == pytest.approx(ends, abs=1e-4)
        assert point.unsafe.mean == max(0, -sign)


def test_a_proxy_that_is_constant_gains_nothing():
    point = best_of_n_points([np.zeros((4, 8))], np.random.default_rng(0).normal(size=(4, 8)), **SAMPLES)[-1]
    assert (point.proxy.mean, point.gold.mean) == pytest.approx((0, 0))


@pytest.mark.parametrize(("num", "sizes"), [(2, [1, 2]), (8, [1, 2, 4, 8]), (40, [1, 2, 4, 8, 16, 32, 40])])
def test_sizes(num, sizes):
    assert sizes_up_to(num) == sizes


def test_rounds_by_hand():
    """Units are those of each training's first round; a second training in other units adds nothing new."""
    first = RoundOutcome(kl=0.0, proxy=np.array([[0.0, 2.0], [1.0, 3.0]]), gold=np.array([[-1.0, 1.0], [-1.0, 1.0]]))
    second = RoundOutcome(kl=1.5, proxy=first.proxy + 2, gold=first.gold - 1)
    scaled = [RoundOutcome(kl=one.kl, proxy=10 * one.proxy, gold=10 * one.gold) for one in (first, second)]
    start, end = round_points([[first, second], scaled], **SAMPLES)
    assert (start.step, start.proxy.mean, start.gold.low, start.gold.high) == (1, 0, 0, 0)
    assert end.proxy.mean == pytest.approx(2 / math.sqrt(2))
    assert end.gold.mean == pytest.approx(-1 / math.sqrt(2))
    assert end.gap.mean == pytest.approx(3 / math.sqrt(2))
    assert (start.unsafe.mean, end.unsafe.mean, end.kl) == (0.5, 0.5, 1.5)
    assert round_points([], **SAMPLES) == ()


def test_the_interval_of_a_round_holds_the_noise_of_the_first_one():
    """Without it 95 % intervals would cover a true gain of 0 about four times in five."""
    rng = np.random.default_rng(4)
    covered = []
    for _ in range(200):
        rounds = [RoundOutcome(kl=0.0, proxy=np.zeros((30, 2)), gold=rng.normal(size=(30, 2))) for _ in range(2)]
        gold = round_points([rounds], **SAMPLES)[1].gold
        covered.append(gold.low <= 0 <= gold.high)
    assert 0.89 <= np.mean(covered) <= 0.99


def test_unfamiliar_by_hand_and_by_prompt():
    familiar, shuffled = np.array([[0.0, 1.0], [2.0, 3.0]]), np.array([[1.5, 1.5], [3.5, 3.0]])
    # 1.5 beats 2 of 4, twice; 3.5 beats 4; 3 beats 3 and ties with one
    fits = [
        outcome([1.0], familiar={"disagreement": familiar}, shuffled={"disagreement": shuffled}),
        outcome([1.0], familiar={"disagreement": familiar}, shuffled={"disagreement": familiar}),
    ]
    (signal,) = unfamiliar(fits, **SAMPLES)
    assert signal.auroc.mean == pytest.approx((11.5 / 16 + 1 / 2) / 2)
    assert signal.familiar == (0, 1, 2, 3)
    assert signal.shuffled == (1.5, 1.5, 3.5, 3)
    rng = np.random.default_rng(5)
    answers = np.repeat(rng.normal(size=(10, 1)), 4, axis=1) + 0.01 * rng.normal(size=(10, 4))
    clustered = outcome([1.0], familiar={"s": answers}, shuffled={"s": answers + 0.5})
    spread = outcome([1.0], familiar={"s": answers.reshape(40, 1)}, shuffled={"s": answers.reshape(40, 1) + 0.5})
    wide, narrow = (unfamiliar([fit], **SAMPLES)[0].auroc for fit in (clustered, spread))
    assert wide.mean == narrow.mean
    assert wide.high - wide.low > 1.3 * (narrow.high - narrow.low)


def test_one_member_has_no_signal():
    assert unfamiliar([outcome([1.0])], **SAMPLES) == ()
