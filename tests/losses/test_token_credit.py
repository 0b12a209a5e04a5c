"""Credit of tokens against sums worked out by hand, and against the advantages that it must not change."""

from __future__ import annotations

import pytest
import torch

from raylign.errors import ShapeError
from raylign.losses.advantages import group_advantages, rewards_at_end
from raylign.losses.logprobs import segment_sum
from raylign.losses.token_credit import attention_credit, mix_with_end, score_differences


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


# Two responses of 3 and 1 tokens; scores of their prefixes, and of the empty response.
SEQUENCE = torch.tensor([1, 1, 1, 0])
PREFIX, EMPTY = vector(0.5, -0.1, 1.0, 0.7), vector(-0.4, 0.2)


def test_differences_by_hand_add_up_to_the_score_above_that_of_the_empty_response():
    credit = score_differences(PREFIX, EMPTY, SEQUENCE)
    close(credit, vector(0.3, -0.6, 1.1, 1.1))
    close(segment_sum(credit, SEQUENCE, 2), vector(0.7 + 0.4, 1.0 - 0.2))


def test_attention_by_hand_adds_up_to_the_reward():
    attention = vector(0.05, 0.1, 0.35, 0.2)  # what the prompt got is missing: (.1, .2, .7) of the response
    reward = vector(-1.0, 2.0)
    mixed = mix_with_end(attention_credit(attention, reward, SEQUENCE), reward, SEQUENCE, dense_weight=0.5)
    close(mixed, vector(0.1, 0.2, 1.7, -1.0))
    close(segment_sum(mixed, SEQUENCE, 2), reward)


def test_a_response_without_attention_shares_alike():
    credit = attention_credit(vector(0, 0, 0, 0.3), vector(5.0, 3.0), SEQUENCE)
    close(credit, vector(1, 1, 1, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_dense_weight_is_the_reward_at_the_end_to_the_bit(dtype):
    reward = torch.tensor([0.1, 1 / 3], dtype=dtype)
    credit = score_differences(PREFIX.to(dtype), EMPTY.to(dtype), SEQUENCE)
    assert torch.equal(mix_with_end(credit, reward, SEQUENCE, dense_weight=0), rewards_at_end(reward, SEQUENCE))
    assert torch.equal(mix_with_end(credit, reward, SEQUENCE, dense_weight=1), credit)


def test_advantages_of_whole_responses_do_not_see_where_the_reward_lies():
    """Four responses to one prompt: the empty score is theirs in common."""
    generator = torch.Generator().manual_seed(0)
    sequence, group = torch.arange(4).repeat_interleave(5), torch.zeros(4, dtype=torch.int64)
    prefix = torch.randn(20, generator=generator, dtype=torch.float64)
    reward = prefix.view(4, 5)[:, -1]
    sparse = group_advantages(reward, group)
    for dense_weight in (0.0, 0.3, 1.0):
        differences = score_differences(prefix, reward.new_full((4,), 0.8), sequence)
        attention = attention_credit(torch.rand(20, generator=generator, dtype=torch.float64), reward, sequence)
        for credit in (differences, attention):
            dense = mix_with_end(credit, reward, sequence, dense_weight=dense_weight)
            torch.testing.assert_close(
                group_advantages(segment_sum(dense, sequence, 4), group), sparse, atol=1e-6, rtol=0
            )


def test_differences_leave_the_best_policy_of_a_small_process_alone():
    """Two tokens of three, scores of all 13 prefixes at random: from every state the best path stays the best."""
    scores = {(): 0.3} | {
        prefix: float(value)
        for prefix, value in zip(
            [(a,) for a in range(3)] + [(a, b) for a in range(3) for b in range(3)],
            torch.randn(12, generator=torch.Generator().manual_seed(3)),
            strict=True,
        )
    }

    def best(state: tuple[int, ...], rewards: dict[tuple[int, ...], float]) -> tuple[float, list[tuple[int, ...]]]:
        if len(state) == 2:
            return 0.0, []
        options = []
        for action in range(3):
            value, path = best((*state, action), rewards)
            options.append((rewards[*state, action] + value, [(*state, action), *path]))
        return max(options)

    dense = {}
    for a in range(3):
        for b in range(3):
            path = [(a,), (a, b)]
            credit = score_differences(
                vector(*(scores[p] for p in path)), vector(scores[()]), torch.zeros(2, dtype=torch.int64)
            )
            dense |= dict(zip(path, credit.tolist(), strict=True))
    sparse = {prefix: score if len(prefix) == 2 else 0.0 for prefix, score in scores.items()}
    for start in ((), (0,), (1,), (2,)):
        assert best(start, dense)[1] == best(start, sparse)[1]
    assert best((), dense)[0] == pytest.approx(best((), sparse)[0] - scores[()], abs=1e-6)


def test_credit_has_no_gradient():
    prefix, reward = PREFIX.clone().requires_grad_(), EMPTY.clone().requires_grad_()
    credits = (score_differences(prefix, reward, SEQUENCE), attention_credit(prefix.exp(), reward, SEQUENCE))
    assert not any(mix_with_end(credit, reward, SEQUENCE, dense_weight=0.5).requires_grad for credit in credits)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ShapeError, match="prefix_scores"):
        score_differences(PREFIX[:3], EMPTY, SEQUENCE)
    with pytest.raises(ShapeError, match="vector"):
        attention_credit(PREFIX.abs(), PREFIX[:, None], SEQUENCE)
    with pytest.raises(ShapeError, match="one after another"):
        score_differences(PREFIX, EMPTY, torch.tensor([0, 1, 0, 1]))
    with pytest.raises(ShapeError, match="credit"):
        mix_with_end(PREFIX[:2], EMPTY, SEQUENCE, dense_weight=0.5)
