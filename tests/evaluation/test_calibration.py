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


def test_calibrated_margins_stay_below_the_limit_as_often_as_promised():
    """Two seeds that state the same: no averaging helps, and the limit must not count on it."""
    rng = np.random.default_rng(1)
    below = []
    for _ in range(60):
        logit = np.abs(rng.normal(0, 1, 120))
        margin = np.where(rng.random(120) < 1 / (1 + np.exp(-logit)), logit, -logit)
        quality = noisy_quality(0, [outcome(margin)] * 2, [str(i) for i in range(120)], **SAMPLES).quality
        alone = noisy_quality(0, [outcome(margin)], [str(i) for i in range(120)], **SAMPLES).quality
        assert quality.calibration_limit == pytest.approx(alone.calibration_limit)
        below.append(quality.calibration_error.mean <= quality.calibration_limit)
        assert quality.calibration_error.mean == pytest.approx(expected_calibration_error(1 / (1 + np.exp(-margin))))
    assert np.mean(below) >= 0.85


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


def test_a_share_on_which_all_prompts_agree_keeps_an_interval():
    safe = np.random.default_rng(6).uniform(0.1, 1, (10, 4))
    unsafe = best_of_n_points([safe], safe, **SAMPLES)[-1].unsafe
    assert (unsafe.mean, unsafe.low) == (0, 0)
    assert unsafe.high == pytest.approx(0.2775, abs=1e-4)  # z^2 / (z^2 + 10)


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
