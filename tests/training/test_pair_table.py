"""The training table: the same rows in the same order on every worker, or an error that names the column."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_run import tiny_pairs, tiny_table, write_pairs

from raylign.errors import DataError, DataNotFoundError
from raylign.training.table import PairTable, anchor_pairs, count_split, read_split


def test_rows_are_sorted_by_id_whatever_the_files(tmp_path: Path) -> None:
    table = tiny_table(7, num_valid=3)
    pairs = write_pairs(tmp_path / "pairs", table)
    assert read_split(pairs, "train")["row_id"].to_pylist() == [f"row-{i:04d}" for i in range(7)]
    assert (count_split(pairs, "train"), count_split(pairs, "valid"), count_split(pairs, "test")) == (7, 3, 0)
    read, direct = PairTable(read_split(pairs, "train")), PairTable(table.slice(0, 7))
    for mine, original in zip(read.batch(np.array([5, 0])).tokens, (tiny_pairs(10)[5], tiny_pairs(10)[0]), strict=True):
        for field in dataclasses.fields(original):
            assert np.array_equal(getattr(mine, field.name), getattr(original, field.name))
    assert read.batch(np.arange(7)).weight.tolist() == direct.batch(np.arange(7)).weight.tolist()


def test_the_fingerprint_sees_tokens_references_and_gamma_but_not_files(tmp_path: Path) -> None:
    table = tiny_table(6)
    fingerprint = PairTable(table).fingerprint
    reordered = table.select(sorted(table.column_names))
    whole = read_split(write_pairs(tmp_path / "a", table), "train")
    pq.write_table(table, tmp_path / "single.parquet")
    assert PairTable(whole).fingerprint == PairTable(read_split(tmp_path / "single.parquet", "train")).fingerprint
    assert fingerprint == PairTable(reordered).fingerprint
    for changed in (tiny_table(6, seed=1), tiny_table(6, weight=np.full(6, 0.5, np.float32)), table.slice(0, 5)):
        assert PairTable(changed).fingerprint != fingerprint


def test_absent_columns_get_their_neutral_value() -> None:
    bare = PairTable(tiny_table(3).drop_columns(["weight", "fold", "label_confidence", "split"]))
    batch = bare.batch(np.arange(3))
    assert (batch.weight.tolist(), batch.fold.tolist(), batch.label_confidence) == ([1, 1, 1], [-1, -1, -1], None)
    assert not bare.has_label_confidence


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    table = tiny_table(4)
    with pytest.raises(DataError, match=r"lack the columns \['ref_chosen_logps'\].*features phase"):
        PairTable(table.drop_columns(["ref_chosen_logps"]))
    with pytest.raises(DataError, match="no pair to train on"):
        PairTable(table.slice(0, 0))
    with pytest.raises(DataError, match="row_id is not unique"):
        read_split(write_pairs(tmp_path / "twice", pa.concat_tables([table, table])), "train")
    with pytest.raises(DataError, match="no row_id"):
        read_split(write_pairs(tmp_path / "anonymous", table.drop_columns(["row_id"])), "train")
    with pytest.raises(DataNotFoundError, match="no parquet file"):
        read_split(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match="column prompt_ids must be lists"):
        PairTable(table.drop_columns(["prompt_ids"]).append_column("prompt_ids", pa.array([1, 2, 3, 4])))


def test_anchors_put_the_safe_answer_first() -> None:
    labels = {"chosen_safe": [True, False, False, True, None], "rejected_safe": [False, True, False, None, True]}
    table = tiny_table(0, num_valid=5, **labels)
    anchors = anchor_pairs(table)
    assert anchors["row_id"].to_pylist() == ["row-0000", "row-0001"]
    stored = tiny_pairs(5)
    assert anchors["chosen_ids"].to_pylist() == [stored[0].chosen_ids.tolist(), stored[1].rejected_ids.tolist()]
    assert anchors["rejected_ids"].to_pylist() == [stored[0].rejected_ids.tolist(), stored[1].chosen_ids.tolist()]


@pytest.mark.parametrize(
    "labels", [{}, {"chosen_safe": pa.nulls(3, pa.bool_()), "rejected_safe": pa.nulls(3, pa.bool_())}]
)
def test_without_safety_labels_anchors_are_the_stored_order(labels: dict[str, pa.Array]) -> None:
    table = tiny_table(0, num_valid=3, **labels)
    assert anchor_pairs(table).equals(table)
