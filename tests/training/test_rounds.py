"""Rounds: which prompts they take, and that what is read back is what was written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_rounds import tiny_round, with_token_rewards

from raylign.errors import CheckpointError
from raylign.training.rounds import Round, RoundSchedule, RoundStore


def make_schedule(**changes: int) -> RoundSchedule:
    values = {"num_prompts": 10, "prompts_per_round": 4, "num_rounds": 5, "batch_size": 2, "round_epochs": 1, "seed": 3}
    return RoundSchedule(**(values | changes))


def test_rounds_walk_through_all_prompts_before_any_comes_again() -> None:
    schedule = make_schedule(prompts_per_round=5)
    first, second, third = (schedule.prompts(index).tolist() for index in range(3))
    assert sorted(first + second) == list(range(10))
    assert len(set(third)) == 5


def test_a_round_that_crosses_the_end_holds_no_prompt_twice_and_is_full() -> None:
    schedule = make_schedule()
    for index in range(5):
        assert len(set(schedule.prompts(index).tolist())) == 4
    assert len(set(np.concatenate([schedule.prompts(index) for index in range(3)]).tolist())) == 10


@pytest.mark.parametrize("num_prompts", [7, 10, 13])
def test_no_prompt_is_ahead_of_another_by_more_than_one_visit(num_prompts: int) -> None:
    schedule = make_schedule(num_prompts=num_prompts)
    visits = np.zeros(num_prompts, int)
    for index in range(40):
        visits[schedule.prompts(index)] += 1
        assert visits.max() - visits.min() <= 2  # one visit, and one more while a prompt waits for the next round


def test_facts_added_later_are_read_with_the_round(tmp_path: Path) -> None:
    store, made = RoundStore(tmp_path), tiny_round(num_prompts=2, num_samples=2)
    store.write(0, made.scored, made.facts)
    store.add_facts(0, {"importance/kl": 0.25})
    assert store.read(0).facts == {**made.facts, "importance/kl": 0.25}


def test_a_round_larger_than_the_prompts_takes_all_of_them() -> None:
    schedule = make_schedule(prompts_per_round=64)
    assert sorted(schedule.prompts(2).tolist()) == list(range(10))
    assert schedule.updates_per_round == 5


def test_updates_of_a_round_visit_each_of_its_prompts_once_per_epoch() -> None:
    schedule = make_schedule(prompts_per_round=5, round_epochs=2)
    assert (schedule.updates_per_round, schedule.num_updates) == (6, 30)
    for index in range(2):
        start = index * 6
        for epoch in range(2):
            batches = [schedule.batch(start + epoch * 3 + position) for position in range(3)]
            assert sorted(np.concatenate(batches).tolist()) == list(range(5))


def test_the_schedule_depends_on_the_seed_and_on_nothing_else() -> None:
    assert make_schedule().prompts(1).tolist() == make_schedule().prompts(1).tolist()
    assert any(make_schedule().prompts(i).tolist() != make_schedule(seed=4).prompts(i).tolist() for i in range(2))


def assert_same(first: Round, second: Round) -> None:
    assert first.facts == second.facts
    for one, other in zip(first.scored, second.scored, strict=True):
        assert (one.reward, one.reward_variance) == (other.reward, other.reward_variance)
        np.testing.assert_array_equal(one.reference_token_logps, other.reference_token_logps)
        for name in ("prompt_ids", "response_ids", "sampler_logps"):
            left, right = getattr(one.rollout, name), getattr(other.rollout, name)
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)
        for name in ("prompt_index", "sample_index", "reached_end", "weight_version"):
            assert getattr(one.rollout, name) == getattr(other.rollout, name)


def test_a_round_is_read_as_it_was_written(tmp_path: Path) -> None:
    store, made = RoundStore(tmp_path / "rounds"), tiny_round(num_prompts=3, num_samples=3)
    assert not store.has(0)
    store.write(0, made.scored[::-1], made.facts)
    assert store.has(0)
    assert_same(store.read(0), made)
    assert store.read(0).policy_logps is None


def test_rewards_of_tokens_are_read_as_they_were_written(tmp_path: Path) -> None:
    store, made = RoundStore(tmp_path), with_token_rewards(tiny_round(num_prompts=2, num_samples=2))
    store.write(0, made.scored, made.facts)
    for found, wanted in zip(store.read(0).scored, made.scored, strict=True):
        assert found.token_rewards is not None and found.token_rewards.dtype == np.float32
        np.testing.assert_array_equal(found.token_rewards, wanted.token_rewards)


def test_what_the_trainer_said_is_kept_beside_the_round(tmp_path: Path) -> None:
    store, made = RoundStore(tmp_path), tiny_round(num_prompts=2, num_samples=2)
    store.write(1, made.scored, made.facts)
    logps = np.arange(made.offsets[-1], dtype=np.float32)
    store.write_policy(1, logps, logps[:, None])
    found = store.read(1)
    assert found.policy_logps is not None and found.values is not None
    np.testing.assert_array_equal(found.policy_logps, logps)
    np.testing.assert_array_equal(found.values, logps[:, None])


@pytest.mark.parametrize("damage", ["short", "garbage"])
def test_damaged_files_are_named_with_their_cure(tmp_path: Path, damage: str) -> None:
    store, made = RoundStore(tmp_path), tiny_round(num_prompts=2, num_samples=2)
    store.write(0, made.scored, made.facts)
    if damage == "short":
        store.write_policy(0, np.zeros(2, np.float32), None)
    else:
        next(tmp_path.glob("*.parquet")).write_bytes(b"not parquet")
    with pytest.raises(CheckpointError, match=r"round_00001.* restore it from a backup, or start under a new"):
        store.read(0)
