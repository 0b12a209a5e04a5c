"""From scored responses to pairs and couples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_rounds import tiny_round

from raylign.training.online_pairs import choose_pairs, couple_responses, preference_batch
from raylign.training.rounds import Round


def with_rewards(round_: Round, rewards: list[float]) -> Round:
    return replace(
        round_, scored=tuple(replace(item, reward=value) for item, value in zip(round_.scored, rewards, strict=True))
    )


def test_best_against_worst_of_each_prompt() -> None:
    round_ = with_rewards(tiny_round(2, 3), [0.1, 0.9, -0.5, 3.0, 1.0, 2.0])
    assert choose_pairs(round_, rule="best_worst", seed=0) == [(1, 2), (3, 4)]


def test_drawn_pairs_are_ordered_by_bradley_terry_and_not_always_by_reward() -> None:
    round_ = with_rewards(tiny_round(1, 2), [1.0, 0.0])
    chosen = [choose_pairs(round_, rule="bradley_terry", seed=seed)[0][0] for seed in range(4000)]
    share = np.mean(np.array(chosen) == 0)
    assert abs(share - 1 / (1 + np.exp(-1))) < 3 * np.sqrt(0.2 / 4000)


def test_drawn_pairs_never_hold_a_response_twice() -> None:
    round_ = tiny_round(20, 3)
    for (chosen, rejected), members in zip(
        choose_pairs(round_, rule="bradley_terry", seed=1), round_.by_prompt, strict=True
    ):
        assert chosen != rejected and {chosen, rejected} <= set(members)


def test_a_batch_holds_the_pairs_of_its_prompts_in_their_order() -> None:
    round_ = tiny_round(3, 2)
    pairs = choose_pairs(round_, rule="best_worst", seed=0)
    batch = preference_batch(round_, pairs, np.array([2, 0]), reference="initial")
    for row, prompt in enumerate((2, 0)):
        chosen, rejected = pairs[prompt]
        assert batch.tokens[row].chosen_ids is round_.scored[chosen].rollout.response_ids
        assert batch.tokens[row].rejected_ids is round_.scored[rejected].rollout.response_ids
        expected = round_.scored[chosen].reference_token_logps.sum(dtype=np.float64)
        assert batch.ref_chosen_logps[row].item() == pytest.approx(expected, rel=1e-6)
    assert batch.weight.tolist() == [1, 1]


def test_the_moving_reference_is_the_policy_of_the_rounds_start() -> None:
    round_ = tiny_round(2, 2)
    round_ = round_.with_policy(-np.arange(round_.offsets[-1], dtype=np.float32), None)
    batch = preference_batch(round_, [(1, 0), (2, 3)], np.array([0]), reference="previous_round")
    start, stop = round_.offsets[1], round_.offsets[2]
    assert batch.ref_chosen_logps.tolist() == [-float(sum(range(start, stop)))]


def test_equal_rewards_weigh_nothing() -> None:
    round_ = with_rewards(tiny_round(2, 2), [0.5, 0.5, 1.0, 0.0])
    pairs = choose_pairs(round_, rule="best_worst", seed=0)
    assert preference_batch(round_, pairs, np.array([0, 1]), reference="initial").weight.tolist() == [0, 1]


@pytest.mark.parametrize("num_samples", [2, 3, 4, 5])
def test_couples_count_every_token_of_every_response_once(num_samples: int) -> None:
    round_ = tiny_round(3, num_samples)
    couples = couple_responses(round_)
    counted = torch.zeros(int(round_.offsets[-1]))
    indices = list(range(len(couples.tokens)))
    counted.index_add_(
        0,
        torch.from_numpy(couples.token_index(round_, indices)),
        torch.from_numpy(couples.token_weight(round_, indices)),
    )
    assert counted.tolist() == [1.0] * int(round_.offsets[-1])
