"""Data order: every pair once per epoch, by (seed, epoch) alone."""

from __future__ import annotations

import numpy as np
import pytest

from raylign.errors import DataError
from raylign.training.order import DataOrder


def order(**changes: object) -> DataOrder:
    return DataOrder(**({"num_pairs": 10, "batch_size": 4, "seed": 0, "epochs": 2} | changes))


def test_every_epoch_visits_every_pair_once_with_a_smaller_last_batch() -> None:
    plan = order()
    assert (plan.updates_per_epoch, plan.num_updates) == (3, 6)
    batches = [plan.batch(update) for update in range(6)]
    assert [len(b) for b in batches] == [4, 4, 2, 4, 4, 2]
    for epoch in (0, 1):
        assert sorted(np.concatenate(batches[3 * epoch : 3 * epoch + 3]).tolist()) == list(range(10))
    assert not np.array_equal(np.concatenate(batches[:3]), np.concatenate(batches[3:]))


def test_the_order_is_a_function_of_seed_and_update() -> None:
    assert np.array_equal(order().batch(4), order(epochs=9).batch(4))
    assert not np.array_equal(order().batch(4), order(seed=1).batch(4))


def test_the_order_is_that_of_earlier_versions() -> None:
    """Golden, numpy 1.26 to 2.x: np.random.default_rng([seed, epoch]).permutation. A change here breaks resumes."""
    assert order().batch(0).tolist() == np.random.default_rng([0, 0]).permutation(10)[:4].tolist() == GOLDEN


GOLDEN = [4, 6, 2, 7]


def test_epochs_count_pairs_not_updates() -> None:
    assert [order().epoch_after(update) for update in range(4)] == [0.4, 0.8, 1.0, 1.4]


def test_limits() -> None:
    assert order(max_steps=2).num_updates == 2
    assert order(max_steps=99).num_updates == 6
    assert order(epochs=None, max_steps=99).num_updates == 99
    with pytest.raises(DataError, match="endless"):
        _ = order(epochs=None).num_updates
    with pytest.raises(DataError, match="num_pairs=0"):
        order(num_pairs=0)
