"""The synthetic gold world: labels and recovery against closed forms, then what best-of-n does to each rule.

The last part is a simulation of four seeds: relations with margins of several standard errors, not values.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from raylign.evaluation import gold_bench
from raylign.evaluation.gold_bench import GoldSetup

W_NOMINALS = (0.0, 0.2, 0.8, 1.0)
SIZES = (1, 16, 64, 256, 1024)
SETUP = GoldSetup(pool_size=8192)
SEEDS = range(4)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def bench():
    return gold_bench.build_bench(SETUP, SEEDS)


@pytest.fixture(scope="module")
def rules():
    return gold_bench.bench_rules(W_NOMINALS)


@pytest.fixture(scope="module")
def curves(bench, rules):
    return gold_bench.rule_curves(bench, rules, SIZES)


@pytest.mark.parametrize(("quality", "agreement"), [(0.0, 0.5), (50.0, 0.992)])
def test_agreement_of_labels_with_unit_normal_gold(quality, agreement):
    """E sigma(q |d|), d ~ N(0, 2), by quadrature, is .500 at q = 0 and .992 at q = 50."""
    first, second = torch.randn(2, 200_000, generator=rng())
    labels = gold_bench.label_pairs(first, second, quality=quality, flip_rate=0.0, generator=rng(1))
    d = np.linspace(0, 12, 2_000_001)
    exact = np.trapezoid(np.exp(-(d**2) / 4) / np.sqrt(np.pi) / (1 + np.exp(-quality * d)), d)
    assert exact == pytest.approx(agreement, abs=5e-4)
    assert (labels == (first > second)).double().mean().item() == pytest.approx(exact, abs=4e-3)
    flipped = gold_bench.label_pairs(first, second, quality=quality, flip_rate=0.25, generator=rng(1))
    expected = 0.75 * exact + 0.25 * (1 - exact)
    assert (flipped == (first > second)).double().mean().item() == pytest.approx(expected, abs=4e-3)


def test_linear_gold_is_recovered_by_linear_members():
    """Twelve dimensions, 5,000 pairs labelled by the logistic of their gold difference."""
    direction = torch.randn(2, 12, 1, generator=rng())
    first, second, fresh = torch.randn(3, 2, 5000, 12, generator=rng(1))
    gold = [(part @ direction).squeeze(-1) for part in (first, second, fresh)]
    labels = gold_bench.label_pairs(gold[0], gold[1], quality=1.0, flip_rate=0.0, generator=rng(2))
    setup = GoldSetup(hidden=(), num_members=2, num_steps=150, learning_rate=0.05)
    rewards = gold_bench.train_members(first, second, labels, setup, [rng(3), rng(4)])(fresh)
    for seed in range(2):
        for member in range(2):
            ranks = [values.argsort().argsort() for values in (rewards[seed, :, member], gold[2][seed])]
            assert np.corrcoef(ranks)[0, 1] > 0.99


def test_gold_has_unit_variance_where_pairs_are_and_falls_away_from_them(bench):
    inputs = torch.randn(len(SEEDS), 20_000, SETUP.num_dims, generator=rng(9))
    gold = bench.gold(inputs)
    torch.testing.assert_close(gold.mean(-1), torch.zeros(len(SEEDS)), atol=0.06, rtol=0)
    torch.testing.assert_close(gold.std(-1), torch.ones(len(SEEDS)), atol=0.06, rtol=0)
    # (scale^2 - 1) D c below the rest, to which the saturated tanh network adds little
    expected = -(SETUP.outlier_scale**2 - 1) * SETUP.num_dims * SETUP.decline
    torch.testing.assert_close(
        bench.gold(SETUP.outlier_scale * inputs).mean(), torch.tensor(expected), atol=0.4, rtol=0
    )


def test_all_seeds_and_members_in_one_pass_equal_one_at_a_time():
    setup = dataclasses.replace(SETUP, pool_size=64, num_steps=25, num_members=3)
    together, alone = gold_bench.build_bench(setup, (5, 6)), gold_bench.build_bench(setup, (6,))
    torch.testing.assert_close(together.pool_gold[1:], alone.pool_gold)
    torch.testing.assert_close(together.pool_rewards[1:], alone.pool_rewards, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together.pool_rewards[0], alone.pool_rewards[0], atol=0.1)


def test_members_are_standardised_on_their_pairs_and_differ(bench):
    assert bench.pool_rewards.shape == (len(SEEDS), SETUP.pool_size, SETUP.num_members)
    near = bench.members(torch.randn(len(SEEDS), 5000, SETUP.num_dims, generator=rng(8)))
    # fresh inputs are a little less spread than the ones that were fitted
    assert near.mean(1).abs().max() < 0.25
    assert near.std(1).min() > 0.7
    assert near.std(1).max() < 1.1
    assert (near.std(-1) > 0).all()


def test_single_rises_then_falls_and_pessimism_delays_it(curves):
    single, _ = curves.mean_and_error("single")
    assert -0.12 < single[0] < 0
    assert single[1] > 0.4
    assert max(single[1:3]) > single[3], "the peak lies before 256"
    assert single[4] < -1 < single[2] - 1
    oracle, _ = curves.mean_and_error("oracle")
    assert (np.diff(oracle) > 0).all()
    for name in curves.rules:
        gold, _ = curves.mean_and_error(name)
        assert gold[0] == pytest.approx(single[0])
        assert (gold[1:] <= oracle[1:]).all()
        proxy = curves.proxy[curves.rules.index(name)]
        assert (np.diff(proxy, axis=1) > 0).all(), "what is maximised goes up whatever gold does"


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("min", "single"),
        ("uwo 2", "single"),
        ("min", "mean"),
        ("uwo .5", "mean"),
        ("uwo 2", "uwo .5"),
        ("min", "brme 0.8"),
    ],
)
def test_rules_are_ordered_as_published(curves, better, worse):
    """Pessimism over members helps (Coste et al., 2023); paired by seed, from where optimisation starts to hurt."""
    mean, error = curves.difference(better, worse)
    for index in (2, 3, 4):
        assert mean[index] > 2 * error[index]
    assert (np.diff(mean) > 0).sum() >= 3  # the more so the larger n


def test_mixture_has_both_ends_bitwise_and_falls_with_the_nominal_weight(bench, curves, rules):
    mu = bench.pool_rewards[0]
    assert torch.equal(rules["brme 1"](mu), rules["single"](mu))
    assert torch.equal(rules["brme 0"](mu), rules["min"](mu))
    gold = [curves.mean_and_error(f"brme {w:g}")[0][-1] for w in W_NOMINALS]
    assert gold == sorted(gold, reverse=True)


def test_without_far_candidates_every_curve_rises(rules):
    setup = dataclasses.replace(SETUP, outlier_share=0.0)
    curves = gold_bench.rule_curves(gold_bench.build_bench(setup, SEEDS), rules, SIZES)
    for name in curves.rules:
        gold, _ = curves.mean_and_error(name)
        assert (np.diff(gold[:4]) > 0).all(), name
        assert gold[4] > gold[2], name  # the last step is within what the few best of a pool this size vary by


def test_flips_cost_accuracy_and_members_give_little_back(bench, rules):
    clean = gold_bench.rule_accuracy(
        gold_bench.build_bench(dataclasses.replace(SETUP, flip_rate=0.0, pool_size=64), SEEDS), rules
    )
    noisy = gold_bench.rule_accuracy(bench, rules)
    assert 0.82 < clean["single"].mean() < 0.92
    for name in ("single", "mean", "min"):
        assert clean[name].mean() - noisy[name].mean() > 0.12
        assert 0.6 < noisy[name].mean() < 0.75
    for accuracy in (clean, noisy):
        assert accuracy["mean"].mean() > accuracy["single"].mean()
        assert accuracy["mean"].mean() - accuracy["single"].mean() < 0.06


def test_disagreement_sees_inputs_that_are_far(bench):
    assert (gold_bench.disagreement_auroc(bench) > 0.8).all()
    same_scale = gold_bench.disagreement_auroc(bench, scale=1.0)
    np.testing.assert_allclose(same_scale, 0.5)
