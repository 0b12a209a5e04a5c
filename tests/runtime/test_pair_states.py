"""Which pairs are read when there are more than may be."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pytest

from raylign.runtime.pair_states import _sample_ids

NUM_PAIRS = {"train": 40, "test": 20, "valid": 4}


def index() -> pa.Table:
    """Prompts' keys of the test split come before those of the others."""
    order = {"test": "a", "valid": "b", "train": "c"}
    rows = [
        {"row_id": f"{split}-{i}", "prompt_key": f"{order[split]}{i:03}", "split": split}
        for split, num in NUM_PAIRS.items()
        for i in reversed(range(num))
    ]
    return pa.Table.from_pylist(rows)


@pytest.mark.parametrize("max_pairs", [1, 4, 8, 100])
def test_every_split_has_a_budget_of_its_own(max_pairs):
    kept = Counter(row_id.split("-")[0] for row_id in _sample_ids(index(), max_pairs))
    assert kept == {split: min(num, max_pairs) for split, num in NUM_PAIRS.items()}


def test_those_of_the_smallest_keys_are_kept():
    assert _sample_ids(index(), 2) == {f"{split}-{i}" for split in NUM_PAIRS for i in range(2)}
