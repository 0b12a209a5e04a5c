"""Best-of-n: the bound of its KL, and expectations against all subsets."""

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


@pytest.mark.parametrize(("n", "expected"), KL_BOUNDS.items())
def test_kl_bound(n, expected):
    assert best_of_n.kl_bound(n) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("num_scores", "expected"), [(8, 0.624646), (64, 0.636111), (100_000, 0.636294)])
def test_kl_of_discrete_scores_stays_below_the_bound_and_tends_to_it(num_scores, expected):
    """The best of 4 among uniform responses with distinct scores: P(the i-th) = (i/N)^4 - ((i - 1)/N)^4."""
    share = np.diff((np.arange(num_scores + 1) / num_scores) ** 4)
    exact = float((share * np.log(share * num_scores)).sum())
    assert exact == pytest.approx(expected, abs=1e-6)
    assert exact <= best_of_n.kl_bound(4)


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
    """The maximum of n uniforms has mean n / (n + 1); so has the estimate from N samples."""
    uniforms = np.random.default_rng(0).random((4000, 20))
    for n in (1, 2, 5, 16):
        best = (best_of_n.selection_weights(uniforms, n) * uniforms).sum(1).mean()
        assert best == pytest.approx(n / (n + 1), abs=5e-3)


def test_weights_sum_to_one_for_many_samples_too():
    """Without normalisation 4096 samples are off by 1e-12 and more."""
    score = np.random.default_rng(0).integers(50, size=(3, 4096)).astype(float)
    np.testing.assert_allclose(best_of_n.selection_weights(score, 512).sum(1), 1, rtol=0, atol=1e-15)


def test_what_cannot_be_chosen_from_is_refused():
    with pytest.raises(DataError, match="sample more or lower n"):
        best_of_n.selection_weights([1.0, 2.0], 3)
    with pytest.raises(DataError, match="n=0"):
        best_of_n.kl_bound(0)
    with pytest.raises(DataError, match="not finite"):
        best_of_n.selection_weights([1.0, math.nan], 1)
    with pytest.raises(ShapeError, match=r"\(P, N\)"):
        best_of_n.selection_weights(np.zeros((1, 1, 1)), 1)
