"""Pairs given as a Dataset: new ones replace old ones until a checkpoint depends on them, then they are refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tiny_run import tiny_table

from raylign.errors import CheckpointError
from raylign.runtime.stored_pairs import pairs_difference, store_pairs
from raylign.training.table import PairTable, read_split

TABLE = tiny_table(12, num_valid=4)


def changed(name: str, row: int, value: object) -> pa.Table:
    column = TABLE[name].to_pylist()
    column[row] = value
    return TABLE.set_column(TABLE.column_names.index(name), name, pa.array(column, TABLE.schema.field(name).type))


def test_order_cuts_and_rounding_are_no_difference() -> None:
    shuffled = TABLE.take(np.random.default_rng(0).permutation(TABLE.num_rows))
    assert pairs_difference([TABLE], [shuffled.slice(0, 5), shuffled.slice(5, 0), shuffled.slice(5)]) is None
    gamma = TABLE["label_confidence"][3].as_py()
    assert pairs_difference([TABLE], [changed("label_confidence", 3, gamma * (1 + 1e-6))]) is None


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (changed("label_confidence", 3, 0.999), r"label_confidence of pair row-0003: was .*, now 0\.999"),
        (changed("weight", 3, 0.5), "weight of pair row-0003: was 1, now 0.5"),
        (changed("ref_chosen_logps", 13, -1.0), "ref_chosen_logps of pair row-0013"),
        (changed("ref_rejected_logps", 2, None), "ref_rejected_logps of pair row-0002: .* now nan"),
        (changed("rejected_ids", 4, [3, 1]), "tokens, .* of pair row-0004"),
        (changed("split", 4, "valid"), "split, .* of pair row-0004"),
        (changed("fold", 4, -1), "fold .* of pair row-0004"),
        (changed("row_id", 4, "other"), "pair other is only in one"),
        (TABLE.slice(1), "16 pairs stored, 15 given"),
        (TABLE.drop_columns(["weight"]), "columns weight"),
    ],
)
def test_a_difference_is_named(given: pa.Table, told: str) -> None:
    found = pairs_difference([TABLE], [given])
    assert found is not None
    assert re.search(told, found)


@pytest.mark.ray
def test_new_pairs_replace_old_ones_until_a_checkpoint_depends_on_them(ray_cluster: None, tmp_path: Path) -> None:
    import ray.data

    reranked = changed("label_confidence", 3, 0.999)
    old, new = ray.data.from_arrow(TABLE), ray.data.from_arrow(reranked)
    pairs = tmp_path / "pairs"

    def stored() -> str:
        return PairTable(read_split(pairs, "train")).fingerprint

    store_pairs(old, pairs, is_continued=False)
    first = stored()
    store_pairs(new, pairs, is_continued=False)
    second = stored()
    assert first != second
    store_pairs(new.repartition(3), pairs, is_continued=True)
    with pytest.raises(CheckpointError, match=r"label_confidence of pair row-0003: was 0\.999.*new run\.name"):
        store_pairs(old, pairs, is_continued=True)
    assert stored() == second
