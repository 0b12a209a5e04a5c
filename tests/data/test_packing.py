"""Packing is checked against a mask written out by hand and against a slow definition of who may see whom."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raylign.data.packing import MicroBatch, first_fit_decreasing, pack_pairs, pair_tokens, plan_micro_batches
from raylign.errors import DataError, ShapeError
from raylign.types import Layout, TokenizedPair

LAYOUTS: tuple[Layout, ...] = ("shared", "packed", "padded")
PAD = 0


def make_pair(prompt: int, chosen: int, rejected: int, first_id: int = 10) -> TokenizedPair:
    ids = np.arange(first_id, first_id + prompt + chosen + rejected, dtype=np.int32)
    return TokenizedPair(
        prompt_ids=ids[:prompt], chosen_ids=ids[prompt : prompt + chosen], rejected_ids=ids[prompt + chosen :]
    )


def random_pairs(num_pairs: int, seed: int = 0) -> list[TokenizedPair]:
    rng = np.random.default_rng(seed)
    return [make_pair(*rng.integers(1, 30, 3), first_id=10 + 100 * b) for b in range(num_pairs)]


def test_shared_layout_of_one_pair_is_what_one_writes_by_hand() -> None:
    batch = pack_pairs([make_pair(2, 3, 2)], layout="shared", pad_token_id=PAD, pair_index=[7])

    assert batch.input_ids.tolist() == [[10, 11, 12, 13, 14, 15, 16, PAD]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3, 0]]
    p, c, r, pad = [1, 1], [1, 1, 1], [1, 1], [1]
    assert batch.attention_mask[0, 0].int().tolist() == [
        [1, 0, *([0] * 3), *([0] * 2), 0],
        [*p, *([0] * 3), *([0] * 2), 0],
        [*p, 1, 0, 0, *([0] * 2), 0],
        [*p, 1, 1, 0, *([0] * 2), 0],
        [*p, *c, *([0] * 2), 0],
        [*p, *([0] * 3), 1, 0, 0],
        [*p, *([0] * 3), *r, 0],
        [0, 0, *([0] * 3), *([0] * 2), *pad],
    ]
    assert batch.score_from.tolist() == [1, 2, 3, 1, 5]
    assert batch.score_labels.tolist() == [12, 13, 14, 15, 16]
    assert batch.score_sequence.tolist() == [0, 0, 0, 1, 1]
    assert batch.end_positions.tolist() == [4, 6]
    assert batch.pair_index.tolist() == [7]
    assert batch.num_real_tokens == 7


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_sequence_can_be_read_back(layout: Layout) -> None:
    pairs = random_pairs(9)
    batch = pack_pairs(pairs, layout=layout, pad_token_id=PAD)
    flat_ids, flat_positions = batch.input_ids.flatten(), batch.position_ids.flatten()
    answers = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]

    for sequence, answer in enumerate(answers):
        prompt = pairs[sequence % len(pairs)].prompt_ids
        of_sequence = batch.score_sequence == sequence
        predictors = batch.score_from[of_sequence]
        assert batch.score_labels[of_sequence].tolist() == answer.tolist()
        # each predicting position holds the token before the label, at the position before the label
        assert flat_ids[predictors].tolist() == [prompt[-1], *answer[:-1]]
        assert flat_positions[predictors].tolist() == list(range(len(prompt) - 1, len(prompt) + len(answer) - 1))
        end = batch.end_positions[sequence]
        assert flat_ids[end] == answer[-1]
        assert flat_positions[end] == len(prompt) + len(answer) - 1
    assert batch.num_real_tokens == (flat_ids != PAD).sum()


@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_visible_keys_spell_out_exactly_the_sequence_so_far(layout: Layout) -> None:
    pairs = random_pairs(7, seed=1)
    batch = pack_pairs(pairs, layout=layout, pad_token_id=PAD)
    rows, row_length = batch.input_ids.shape
    mask = batch.attention_mask.reshape(rows * row_length, row_length)
    answers = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]

    for sequence, answer in enumerate(answers):
        so_far = pairs[sequence % len(pairs)].prompt_ids.tolist()
        for query, label in zip(batch.score_from[batch.score_sequence == sequence].tolist(), answer, strict=True):
            row = query // row_length
            assert batch.input_ids[row][mask[query]].tolist() == so_far
            assert batch.position_ids[row][mask[query]].tolist() == list(range(len(so_far)))
            so_far.append(int(label))
    unused = (batch.input_ids == PAD).flatten()
    assert (mask[unused].sum(1) == 1).all(), "padding sees itself and nothing else"


def test_padded_layout_has_chosen_rows_before_rejected_rows() -> None:
    batch = pack_pairs([make_pair(2, 3, 1), make_pair(1, 1, 2, 50)], layout="padded", pad_token_id=PAD)

    assert batch.input_ids.tolist() == [[10, 11, 12, 13, 14], [50, 51, 0, 0, 0], [10, 11, 15, 0, 0], [50, 52, 53, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pad_token_that_is_also_the_end_token_changes_nothing(layout: Layout) -> None:
    pairs = random_pairs(4)
    end = int(pairs[0].chosen_ids[-1])
    for_pad, for_end = (pack_pairs(pairs, layout=layout, pad_token_id=pad) for pad in (PAD, end))

    torch.testing.assert_close(for_pad.end_positions, for_end.end_positions, rtol=0, atol=0)
    torch.testing.assert_close(for_pad.score_from, for_end.score_from, rtol=0, atol=0)
    torch.testing.assert_close(for_pad.attention_mask, for_end.attention_mask, rtol=0, atol=0)


def test_sharing_the_prompt_saves_its_second_copy() -> None:
    pair = make_pair(30, 10, 12)

    assert pair_tokens(pair, "shared") == 52
    assert pair_tokens(pair, "packed") == 82
    assert pair_tokens(pair, "padded") == 84
    assert pack_pairs([pair], layout="packed", pad_token_id=PAD).num_real_tokens == 82


def test_rows_hold_little_padding() -> None:
    pairs = random_pairs(64, seed=3)
    batch = pack_pairs(pairs, layout="shared", pad_token_id=PAD)

    longest = max(pair.num_tokens for pair in pairs)
    assert longest <= batch.input_ids.shape[1] <= 1.5 * longest + 8
    assert batch.num_real_tokens / batch.input_ids.numel() > 0.93


def test_first_fit_decreasing_fills_rows_without_overlap() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 200).tolist()
    slots = first_fit_decreasing(lengths, 64)
    taken = {
        (row, column) for (row, start), n in zip(slots, lengths, strict=True) for column in range(start, start + n)
    }

    assert len(taken) == sum(lengths)
    assert max(column for _, column in taken) < 64


def test_pairs_that_cannot_be_packed_are_refused() -> None:
    with pytest.raises(DataError, match="at least one pair"):
        pack_pairs([], layout="shared", pad_token_id=PAD)
    with pytest.raises(DataError, match="pair 1 has 2 prompt, 0 chosen and 3 rejected"):
        pack_pairs([make_pair(1, 1, 1), make_pair(2, 0, 3)], layout="shared", pad_token_id=PAD)
    with pytest.raises(ShapeError, match="2 entries for 1 pairs"):
        pack_pairs([make_pair(1, 1, 1)], layout="shared", pad_token_id=PAD, pair_index=[1, 2])


@pytest.mark.parametrize("num_pairs", [1, 2, 5, 32, 257])
@pytest.mark.parametrize("num_workers", [1, 2, 3, 8])
def test_plan_uses_every_pair_once_with_equal_counts_and_keeps_the_budget(num_pairs: int, num_workers: int) -> None:
    tokens = np.random.default_rng(num_pairs).integers(10, 700, num_pairs).tolist()
    plan = plan_micro_batches(tokens, batch_tokens=512, num_workers=num_workers)

    assert len(plan) == num_workers
    assert len({len(share) for share in plan}) == 1
    batches = [batch for share in plan for batch in share]
    assert sorted(i for batch in batches if batch.weight for i in batch.indices) == list(range(num_pairs))
    assert all(batch.weight in (0.0, 1.0) and batch.indices for batch in batches)
    assert all(len(batch.indices) == 1 or sum(tokens[i] for i in batch.indices) <= 512 for batch in batches)
    assert plan == plan_micro_batches(tokens, batch_tokens=512, num_workers=num_workers)


def test_plan_balances_tokens_over_workers() -> None:
    tokens = np.random.default_rng(0).integers(10, 512, 256).tolist()
    plan = plan_micro_batches(tokens, batch_tokens=4096, num_workers=4)
    loads = [sum(tokens[i] for batch in share for i in batch.indices) for share in plan]

    assert max(loads) - min(loads) <= max(tokens)


def test_plan_splits_before_it_fills() -> None:
    one_long = plan_micro_batches([100, 40, 30, 30], batch_tokens=64, num_workers=2)
    assert one_long == [
        [MicroBatch((0,)), MicroBatch((2,), weight=0.0)],
        [MicroBatch((1,)), MicroBatch((2, 3))],
    ]
    fewer_pairs_than_workers = plan_micro_batches([5], batch_tokens=64, num_workers=2)
    assert fewer_pairs_than_workers == [[MicroBatch((0,))], [MicroBatch((0,), weight=0.0)]]
    assert plan_micro_batches([], batch_tokens=64, num_workers=2) == [[], []]


def test_plan_puts_similar_lengths_together() -> None:
    plan = plan_micro_batches([10, 200, 11, 210, 12, 190], batch_tokens=600, num_workers=1)
    assert plan == [[MicroBatch((3, 1, 5)), MicroBatch((4, 2, 0))]]


def test_plan_refuses_a_budget_of_nothing() -> None:
    with pytest.raises(DataError, match="batch_tokens=0"):
        plan_micro_batches([1], batch_tokens=0, num_workers=1)
