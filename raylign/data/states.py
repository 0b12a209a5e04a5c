"""Hidden states as arrow columns of fixed-shape tensors, in both directions without a copy.

Not nested fixed-size lists: pyarrow 26 takes the wrong rows of a slice of these (`take` and `filter` forget the slice's
offset at the inner level), so that rows would trade states with their neighbours.

Shape letters: N rows, L layers, D hidden width.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from raylign.errors import ShapeError


def states_to_column(states_NLD: np.ndarray) -> pa.FixedShapeTensorArray:
    """Arrow column of N tensors of shape (L, D).

    Args:
        states_NLD: shape (N, L, D), float16 or float32.

    Raises:
        ShapeError: not three-dimensional.
    """
    if states_NLD.ndim != 3:
        raise ShapeError(f"states have shape {states_NLD.shape}, expected (rows, layers, width)")
    _, num_layers, width = states_NLD.shape
    flat = pa.array(np.ascontiguousarray(states_NLD).reshape(-1))
    storage = pa.FixedSizeListArray.from_arrays(flat, num_layers * width)
    kind = pa.fixed_shape_tensor(flat.type, [num_layers, width])
    return pa.ExtensionArray.from_storage(kind, storage)


def states_from_column(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Array (N, L, D) of a column of tensors; a view for a single chunk, read-only.

    Arrow's own fixed-shape tensors are read, and those that Ray Data makes of them when it goes through numpy.

    Raises:
        ShapeError: the column holds no tensors of two dimensions, or holds nulls.
    """
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    kind = column.type
    shape = tuple(getattr(kind, "shape", ()))
    if not isinstance(kind, pa.BaseExtensionType) or len(shape) != 2:
        raise ShapeError(f"column has type {kind}, expected tensors of shape (layers, width)")
    if column.null_count:
        raise ShapeError(f"column of states holds {column.null_count} nulls")
    # flatten() honours the offset of a slice, .values would not
    parts = [chunk.storage.flatten().to_numpy(zero_copy_only=True).reshape(-1, *shape) for chunk in chunks]
    if not parts:
        return np.empty((0, *shape), kind.storage_type.value_type.to_pandas_dtype())
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
