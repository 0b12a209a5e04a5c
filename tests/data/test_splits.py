"""Decisions over a whole data set, against slow rewrites in plain Python and on hand-made cases."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest

from raylign.data.splits import RowHashes, assign_split, decide, outcome, pair_hashes, prompt_key
from raylign.types import Message, PreferencePair

SPLIT_CODES = {None: -1, "train": 0, "valid": 1, "test": 2}
FRACTIONS = {"valid_fraction": 0.1, "test_fraction": 0.2}


def make_pair(prompt="Hi?", chosen="a", rejected="b", row_id="1", split=None, later=()):
    messages = (Message(role="user", content=prompt), *later)
    return PreferencePair(row_id=row_id, source="", prompt=messages, chosen=chosen, rejected=rejected, split=split)


def hashes_of(pairs):
    rows, contents, mirrored = zip(*(pair_hashes(pair) for pair in pairs), strict=True)
    return RowHashes(
        row=np.array(rows, np.uint64),
        content=np.array(contents, np.uint64),
        mirrored=np.array(mirrored, np.uint64),
        prompt=np.array([int(prompt_key(pair), 16) for pair in pairs], np.uint64),
        named=np.array([SPLIT_CODES[pair.split] for pair in pairs], np.int8),
    )


def outcomes(pairs, *, max_pairs=None, seed=0, **fractions):
    verdicts = decide(hashes_of(pairs), max_pairs=max_pairs, seed=seed, **(FRACTIONS | fractions))
    return [outcome(code) for code in verdicts.codes.tolist()], verdicts


def test_prompt_key_ignores_case_blanks_and_later_turns():
    later = (Message(role="assistant", content="x"), Message(role="user", content="y"))
    keys = {prompt_key(make_pair("How  do\nI?")), prompt_key(make_pair(" how do i?", later=later))}
    assert len(keys) == 1
    assert len(keys.pop()) == 16
    assert prompt_key(make_pair("How do you?")) != prompt_key(make_pair("How do I?"))


def test_prompt_key_skips_the_system_turn():
    with_system = PreferencePair(
        row_id="1",
        source="",
        prompt=(Message(role="system", content="s"), Message(role="user", content="Hi?")),
        chosen="a",
        rejected="b",
    )
    assert prompt_key(with_system) == prompt_key(make_pair("Hi?"))


def test_first_of_equal_rows_is_kept():
    pairs = [
        make_pair(row_id="1"),
        make_pair(row_id="2"),
        make_pair(row_id="1", chosen="c"),
        make_pair("x", row_id="3"),
    ]
    reasons = [reason for _, reason in outcomes(pairs)[0]]
    assert reasons == [None, "duplicate_row", "duplicate_id", None]


def test_id_of_a_dropped_duplicate_is_free():
    pairs = [make_pair(row_id="1"), make_pair(row_id="2"), make_pair("x", row_id="2")]
    assert [reason for _, reason in outcomes(pairs)[0]] == [None, "duplicate_row", None]


def test_contradicting_rows_are_kept_and_counted_once():
    pairs = [make_pair(row_id="1"), make_pair(chosen="b", rejected="a", row_id="2"), make_pair("x", row_id="3")]
    found, verdicts = outcomes(pairs)
    assert [reason for _, reason in found] == [None] * 3
    assert verdicts.num_contradictions == 1


def test_split_fractions_seed_and_agreement_with_assign_split():
    pairs = [make_pair(f"prompt {i}", row_id=str(i)) for i in range(4000)]
    splits = [split for split, _ in outcomes(pairs)[0]]
    shares = Counter(splits)
    # Three standard deviations of a binomial share at n = 4000 are below 0.02.
    assert shares["valid"] / 4000 == pytest.approx(0.1, abs=0.02)
    assert shares["test"] / 4000 == pytest.approx(0.2, abs=0.02)
    assert splits == [assign_split(prompt_key(pair), seed=0, **FRACTIONS) for pair in pairs]
    assert splits != [split for split, _ in outcomes(pairs, seed=1)[0]]


def test_growing_test_fraction_only_moves_train_prompts():
    pairs = [make_pair(f"prompt {i}", row_id=str(i)) for i in range(500)]
    before = [split for split, _ in outcomes(pairs)[0]]
    after = [split for split, _ in outcomes(pairs, test_fraction=0.4)[0]]
    assert all(a == b or (b, a) == ("train", "test") for b, a in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("test", "train"), "test"),
        (("test", "valid", None), "test"),
        (("valid", "train"), "valid"),
        ((None, "valid"), "valid"),
    ],
)
def test_rows_of_one_prompt_share_the_strongest_named_split(names, expected):
    pairs = [make_pair(chosen=f"c{i}", row_id=str(i), split=name) for i, name in enumerate(names)]
    assert {split for split, _ in outcomes(pairs)[0]} == {expected}


def test_train_rows_give_no_test_rows_where_the_data_names_some():
    rng = np.random.default_rng(0)
    names = rng.choice(["train", "test"], 1000)
    pairs = [make_pair(f"prompt {i}", row_id=str(i), split=str(name)) for i, name in enumerate(names)]
    table = Counter(zip(names.tolist(), (split for split, _ in outcomes(pairs)[0]), strict=True))
    assert set(table) == {("train", "train"), ("train", "valid"), ("test", "test")}


def test_train_rows_alone_are_split_like_unnamed_ones():
    named = [make_pair(f"prompt {i}", row_id=str(i), split="train") for i in range(300)]
    unnamed = [make_pair(f"prompt {i}", row_id=str(i)) for i in range(300)]
    assert outcomes(named)[0] == outcomes(unnamed)[0]


def test_no_prompt_is_in_two_splits():
    rng = np.random.default_rng(0)
    pairs = [
        make_pair(f"prompt {rng.integers(60)}", chosen=str(i), row_id=str(i), split=rng.choice([None, "train", "test"]))
        for i in range(400)
    ]
    seen = defaultdict(set)
    for pair, (split, _) in zip(pairs, outcomes(pairs)[0], strict=True):
        seen[prompt_key(pair)].add(split)
    assert len(seen) > 40
    assert all(len(splits) == 1 for splits in seen.values())


def test_max_pairs_is_exact_independent_of_order_and_keeps_splits():
    pairs = [make_pair(f"prompt {i}", row_id=str(i)) for i in range(100)]
    every = {pair.row_id: found for pair, found in zip(pairs, outcomes(pairs)[0], strict=True)}
    found, verdicts = outcomes(pairs, max_pairs=30)
    kept = {pair.row_id: out for pair, out in zip(pairs, found, strict=True) if out[0] is not None}
    assert (len(kept), verdicts.num_sampled_out) == (30, 70)
    assert kept.items() <= every.items()
    turned = outcomes(pairs[::-1], max_pairs=30)[0][::-1]
    assert turned == found


def test_duplicates_do_not_use_up_max_pairs():
    pairs = [make_pair(row_id=str(i)) for i in range(5)] + [make_pair("x", row_id="x"), make_pair("y", row_id="y")]
    found, verdicts = outcomes(pairs, max_pairs=3)
    assert sum(split is not None for split, _ in found) == 3
    assert verdicts.num_sampled_out == 0


def test_no_rows():
    empty = np.empty(0, np.uint64)
    hashes = RowHashes(row=empty, content=empty, mirrored=empty, prompt=empty, named=np.empty(0, np.int8))
    assert len(decide(hashes, max_pairs=None, seed=0, **FRACTIONS).codes) == 0
