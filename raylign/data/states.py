"""Hidden states as arrow columns: nested fixed-size lists over one flat buffer, so both directions copy nothing.

Shape letters: N rows, L layers, D hidden width.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from raylign.errors import ShapeError


def states_to_column(states_NLD: np.ndarray) -> pa.FixedSizeListArray:
    """Arrow column of N values of type list<list<number>[D]>[L].

    Args:
        states_NLD: shape (N, L, D), float16 or float32.

    Raises:
        ShapeError: not three-dimensional.
    """
    if states_NLD.ndim != 3:
        raise ShapeError(f"states have shape {states_NLD.shape}, expected (rows, layers, width)")
    flat = pa.array(np.ascontiguousarray(states_NLD).reshape(-1))
    _, num_layers, width = states_NLD.shape
    return pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(flat, width), num_layers)


def states_from_column(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Array (N, L, D) of a column made by `states_to_column`; a view for a single chunk, read-only.

    Raises:
        ShapeError: the column is no list of lists of fixed sizes, or holds nulls.
    """
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    kind = column.type
    if not (pa.types.is_fixed_size_list(kind) and pa.types.is_fixed_size_list(kind.value_type)):
        raise ShapeError(f"column has type {kind}, expected fixed-size lists of fixed-size lists")
    if column.null_count:
        raise ShapeError(f"column of states holds {column.null_count} nulls")
    shape = (-1, kind.list_size, kind.value_type.list_size)
    # flatten() honours the offset of a slice, .values would not
    parts = [chunk.flatten().flatten().to_numpy(zero_copy_only=True).reshape(shape) for chunk in chunks]
    if not parts:
        return np.empty((0, *shape[1:]), kind.value_type.value_type.to_pandas_dtype())
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
