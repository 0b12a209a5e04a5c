"""The front: by hand, and against the definition spelled out in loops."""

from __future__ import annotations

import numpy as np
import pytest

from raylign.errors import DataError, ShapeError
from tuning.pareto import front_shares, on_front


def test_a_front_by_hand() -> None:
    reward = np.array([1.0, 2.0, 3.0, 2.0, 0.5])
    cost = np.array([0.0, 1.0, 2.0, 1.5, 0.0])
    assert on_front(reward, cost).tolist() == [True, True, True, False, False]


def test_equal_points_do_not_beat_each_other() -> None:
    assert on_front(np.array([1.0, 1.0]), np.array([2.0, 2.0])).tolist() == [True, True]


def test_the_front_is_its_definition() -> None:
    rng = np.random.default_rng(0)
    reward, cost = rng.integers(0, 5, (2, 12)).astype(float)
    naive = [
        not any(
            reward[q] >= reward[p] and cost[q] <= cost[p] and (reward[q] > reward[p] or cost[q] < cost[p])
            for q in range(12)
        )
        for p in range(12)
    ]
    assert on_front(reward, cost).tolist() == naive
    stacked = on_front(np.stack([reward, -reward]), np.stack([cost, cost]))
    assert stacked[0].tolist() == naive
    assert stacked[1].tolist() == on_front(-reward, cost).tolist()


def shares(reward: list[list[float]], cost: list[list[float]], harmful: list[bool]) -> list[float]:
    return front_shares(
        np.array(reward), np.array(cost), np.array(harmful), num_samples=400, generator=np.random.default_rng(1)
    ).tolist()


def test_a_point_that_is_worse_on_every_prompt_is_never_on_the_front() -> None:
    assert shares([[2, 3, 4], [1, 2, 3]], [[0, 0, 0], [1, 1, 1]], [True, True, True]) == [1.0, 0.0]


def test_costs_of_harmless_prompts_do_not_count() -> None:
    found = shares([[1, 1, 1], [1, 1, 1]], [[0, 0, 9], [0, 0, -9]], [True, True, False])
    assert found == [1.0, 1.0]


def test_a_coin_flip_is_about_one_half() -> None:
    """Equal costs; the reward differs on two prompts of four, in opposite directions: ties put both on the front."""
    found = shares([[1, 0, 0, 0], [0, 1, 0, 0]], [[0] * 4, [0] * 4], [True] * 4)
    assert found[0] == pytest.approx(found[1], abs=0.1)
    assert 0.5 < found[0] < 0.8


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ShapeError, match="same points"):
        on_front(np.zeros(2), np.zeros(3))
    with pytest.raises(DataError, match="none is harmful"):
        shares([[1.0]], [[1.0]], [False])
