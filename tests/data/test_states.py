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


def test_rows_taken_and_filtered_from_a_slice_keep_their_states() -> None:
    """What pyarrow 26 gets wrong for nested fixed-size lists."""
    states = make_states(50)
    table = pa.table({"states": states_to_column(states)}).slice(10, 30)
    rows = np.arange(30)[::-2]
    keep = np.arange(30) % 3 == 0

    np.testing.assert_array_equal(states_from_column(table.take(pa.array(rows))["states"]), states[10:40][rows])
    np.testing.assert_array_equal(states_from_column(table.filter(pa.array(keep))["states"]), states[10:40][keep])


@pytest.mark.ray
def test_states_survive_ray_data_going_through_numpy(ray_cluster: None) -> None:
    import ray.data
    from ray.data.expressions import col

    states = make_states(40)
    table = pa.table({"row": np.arange(40), "states": states_to_column(states)})
    dataset = ray.data.from_arrow(table).map_batches(lambda batch: batch, batch_format="numpy", batch_size=7)
    back = pa.concat_tables(dataset.filter(expr=col("row") >= 9).sort("row").iter_batches(batch_format="pyarrow"))
    np.testing.assert_array_equal(states_from_column(back["states"]), states[9:])


def test_other_columns_are_refused() -> None:
    with pytest.raises(ShapeError, match="expected tensors of shape"):
        states_from_column(pa.array([[1.0]]))
    with pytest.raises(ShapeError, match="1 nulls"):
        storage = pa.array([[1.0], None], pa.list_(pa.float32(), 1))
        states_from_column(pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), [1, 1]), storage))
    with pytest.raises(ShapeError, match="expected \\(rows, layers, width\\)"):
        states_to_column(np.zeros((2, 3)))
