"""Which pairs are read when there are more than may be."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from raylign.data.states import states_to_column
from raylign.errors import DataError
from raylign.runtime.pair_states import _sample_ids, read_states

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
    assert set(_sample_ids(index(), 2)) == {f"{split}-{i}" for split in NUM_PAIRS for i in range(2)}


@pytest.mark.ray
@pytest.mark.parametrize("max_pairs", [3, 100])
def test_states_come_with_their_pairs_in_the_order_of_their_ids(ray_cluster, max_pairs):
    import ray.data

    table = index().take(np.random.default_rng(0).permutation(len(index())))
    numbers = np.arange(len(table), dtype=np.float32)
    states = {
        "chosen_states": states_to_column(np.broadcast_to(numbers[:, None, None], (len(table), 2, 3)).copy()),
        "rejected_states": states_to_column(np.broadcast_to(-numbers[:, None, None], (len(table), 2, 3)).copy()),
    }
    whole = pa.table({name: table[name] for name in table.column_names} | states)
    found = read_states(ray.data.from_arrow(whole).repartition(3), max_pairs=max_pairs)
    expected = sorted(_sample_ids(table, max_pairs))
    places = {row_id: place for place, row_id in enumerate(table["row_id"].to_pylist())}
    assert found.chosen[:, 1, 2].tolist() == [places[row_id] for row_id in expected]
    assert found.rejected[:, 0, 0].tolist() == [-places[row_id] for row_id in expected]
    assert found.split == [row_id.split("-")[0] for row_id in expected]
    twice = ray.data.from_arrow(
        pa.concat_tables([pa.table({**{n: table[n] for n in table.column_names}, **states})] * 2)
    )
    with pytest.raises(DataError, match="row_id of another"):
        read_states(twice, max_pairs=100)
