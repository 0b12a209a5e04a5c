"""Hidden states survive the trip through arrow and parquet bit by bit, without copies where there is one chunk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylign.data.states import states_from_column, states_to_column
from raylign.errors import ShapeError


def make_states(num_rows: int = 7, dtype: str = "float16") -> np.ndarray:
    return np.random.default_rng(0).normal(size=(num_rows, 3, 4)).astype(dtype)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_round_trip_through_parquet(tmp_path: Path, dtype: str) -> None:
    states = make_states(dtype=dtype)
    pq.write_table(pa.table({"states": states_to_column(states)}), tmp_path / "states.parquet")
    back = states_from_column(pq.read_table(tmp_path / "states.parquet")["states"])

    assert back.dtype == states.dtype
    np.testing.assert_array_equal(back, states)


def test_both_directions_share_memory() -> None:
    states = make_states()
    assert np.shares_memory(states_from_column(states_to_column(states)), states)


def test_slices_and_chunks_keep_their_rows() -> None:
    states = make_states()
    column = states_to_column(states)

    np.testing.assert_array_equal(states_from_column(column.slice(2, 3)), states[2:5])
    chunked = pa.chunked_array([column.slice(4), column.slice(0, 4)])
    np.testing.assert_array_equal(states_from_column(chunked), np.concatenate([states[4:], states[:4]]))
    assert states_from_column(pa.chunked_array([], type=column.type)).shape == (0, 3, 4)


def test_other_columns_are_refused() -> None:
    with pytest.raises(ShapeError, match="expected fixed-size lists of fixed-size lists"):
        states_from_column(pa.array([[1.0]]))
    with pytest.raises(ShapeError, match="1 nulls"):
        states_from_column(pa.array([[[1.0]], None], pa.list_(pa.list_(pa.float32(), 1), 1)))
    with pytest.raises(ShapeError, match="expected \\(rows, layers, width\\)"):
        states_to_column(np.zeros((2, 3)))
