"""Best-of-n: closed forms of its KL, and expectations against all subsets and all draws."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from raylign.errors import DataError, ShapeError
from raylign.evaluation import best_of_n

KL_BOUNDS = {
    1: 0,
    2: 0.193147,
    4: 0.636294,
    16: 1.835089,
    64: 3.174508,
    256: 4.549084,
    4096: 7.318010,
    12500: 8.433564,
}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(("n", "expected"), KL_BOUNDS.items())
def test_kl_bound(n, expected):
    assert best_of_n.kl_bound(n) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("num_candidates", "expected"), [(8, 0.624646), (64, 0.636111)])
def test_kl_of_distinct_scores_under_a_uniform_reference(num_candidates, expected):
    uniform = np.full(num_candidates, 1 / num_candidates)
    assert best_of_n.best_of_n_kl(uniform, rng().permutation(num_candidates), 4) == pytest.approx(expected, abs=1e-6)
    assert expected < best_of_n.kl_bound(4)


def naive_policy(reference, score, n) -> np.ndarray:
    """All K^n draws; the best score wins, ties are drawn with the reference's odds by taking the first."""
    policy = np.zeros(len(reference))
    for draws in itertools.product(range(len(reference)), repeat=n):
        best = max(draws, key=lambda draw: score[draw])  # the first of the best, so ties go by order of drawing
        policy[best] += np.prod([reference[draw] for draw in draws])
    return policy


def test_policy_and_kl_against_all_draws_with_ties_and_a_skewed_reference():
    reference, score = np.array([0.1, 0.35, 0.05, 0.3, 0.2]), np.array([2.0, 1.0, 3.0, 2.0, 1.0])
    for n in (1, 2, 5):
        policy = naive_policy(reference, score, n)
        np.testing.assert_allclose(best_of_n.best_of_n_policy(reference, score, n), policy, atol=1e-12)
        kl = float((policy * np.log(policy / reference)).sum())
        assert best_of_n.best_of_n_kl(reference, score, n) == pytest.approx(kl, abs=1e-12)
        assert kl <= best_of_n.kl_bound(n) + 1e-12


def test_kl_at_extremes():
    uniform = np.full(1000, 1e-3)
    assert best_of_n.best_of_n_kl(uniform, np.arange(1000), 10**6) == pytest.approx(math.log(1000), abs=1e-9)
    assert best_of_n.best_of_n_kl(uniform, np.zeros(1000), 64) == pytest.approx(0, abs=1e-12)
    fine = np.full(200_000, 5e-6)
    assert best_of_n.best_of_n_kl(fine, np.arange(200_000), 64) == pytest.approx(best_of_n.kl_bound(64), abs=1e-4)


@pytest.mark.parametrize(("num_samples", "n"), [(1, 1), (7, 1), (7, 3), (7, 7), (20_000, 12_500)])
def test_order_statistic_weights_sum_to_one_and_are_binomial(num_samples, n):
    weights = best_of_n.order_statistic_weights(num_samples, n)
    assert weights.sum() == pytest.approx(1, abs=1e-8)
    assert not weights[: n - 1].any()
    for i in {n, num_samples}:  # integers of any length, then one quotient
        assert weights[i - 1] == pytest.approx(
            math.comb(i - 1, n - 1) / math.comb(num_samples, n), rel=1e-7, abs=1e-300
        )


@pytest.mark.parametrize("n", [1, 2, 4, 7])
def test_selection_weights_against_all_subsets_with_ties(n):
    score = np.array([3.0, 1.0, 3.0, 2.0, 1.0, 3.0, 0.0])
    expected = np.zeros(len(score))
    subsets = list(itertools.combinations(range(len(score)), n))
    for subset in subsets:
        best = [row for row in subset if score[row] == max(score[row] for row in subset)]
        expected[best] += 1 / len(best) / len(subsets)
    np.testing.assert_allclose(best_of_n.selection_weights(score, n), expected, atol=1e-12)
    np.testing.assert_allclose(
        best_of_n.selection_weights(np.stack([score, -score]), n)[1], best_of_n.selection_weights(-score, n)
    )


def test_expectation_over_samples_is_unbiased_for_the_population():
    """The maximum of n uniforms has mean n / (n + 1), the bound of the win rate; so has the estimate from N samples."""
    uniforms = rng().random((4000, 20))
    curve = best_of_n.best_of_n_curve(uniforms, uniforms, sizes=(1, 2, 5, 16), num_samples=100, generator=rng(1))
    for point in curve:
        assert point.proxy.mean == pytest.approx(best_of_n.win_rate_bound(point.n), abs=5e-3)


def test_curve_orders_gold_by_the_proxy():
    proxy, gold = rng().normal(size=(30, 64)), rng(1).normal(size=(30, 64))
    same, opposite = (
        best_of_n.best_of_n_curve(proxy, sign * proxy, sizes=(1, 8, 64), num_samples=50, generator=rng(2))
        for sign in (1, -1)
    )
    assert [point.gold.mean for point in same] == [point.proxy.mean for point in same]
    assert [point.gold.mean for point in opposite] == pytest.approx([-point.proxy.mean for point in same])
    assert same[2].proxy.mean == pytest.approx(proxy.max(axis=1).mean())
    assert same[0].proxy.mean == pytest.approx(proxy.mean())
    unrelated = best_of_n.best_of_n_curve(proxy, gold, sizes=(64,), num_samples=50, generator=rng(2))[0]
    expected = gold[np.arange(30), proxy.argmax(axis=1)]
    assert unrelated.gold.mean == pytest.approx(expected.mean())
    assert unrelated.gold.low < expected.mean() < unrelated.gold.high
    assert unrelated.kl_bound == pytest.approx(3.174508, abs=1e-6)


def test_what_cannot_be_chosen_from_is_refused():
    with pytest.raises(DataError, match="sample more or lower n"):
        best_of_n.selection_weights([1.0, 2.0], 3)
    with pytest.raises(DataError, match="n=0"):
        best_of_n.kl_bound(0)
    with pytest.raises(DataError, match="n=0"):
        best_of_n.win_rate_bound(0)
    with pytest.raises(DataError, match="n=0"):
        best_of_n.best_of_n_kl([0.5, 0.5], [0, 1], 0)
    with pytest.raises(DataError, match="not finite"):
        best_of_n.selection_weights([1.0, math.nan], 1)
    with pytest.raises(DataError, match="sum to 1"):
        best_of_n.best_of_n_kl([0.5, 0.4], [0, 1], 2)
    with pytest.raises(ShapeError, match="same candidates"):
        best_of_n.best_of_n_kl([0.5, 0.5], [0], 2)
    with pytest.raises(ShapeError, match=r"\(P, N\)"):
        best_of_n.best_of_n_curve([1.0], [1.0], sizes=(1,), num_samples=1, generator=rng())
