"""The codec of stored vectors: little-endian float16, 2·d bytes per vector.

Shapes: N vectors, d encoder width.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

_DTYPE = np.dtype("<f2")


def n_bytes(width: int) -> int:
    """The size of one stored vector."""
    return _DTYPE.itemsize * width


def to_bytes(vectors: ArrayLike) -> bytes:
    """Encode vectors (N, d), row after row, or one vector (d,)."""
    return np.ascontiguousarray(vectors, dtype=_DTYPE).tobytes()


def from_bytes(data: bytes | memoryview, width: int) -> NDArray[np.float16]:
    """Decode vectors (N, d), as a read-only view. Raises `ValueError` when `data` is not a multiple of the width."""
    return np.frombuffer(data, _DTYPE).reshape(-1, width)


def to_column(vectors_Nd: NDArray[np.floating]) -> pa.BinaryArray:
    """Encode vectors (N, d) as a `binary` column of N values."""
    n, width = vectors_Nd.shape
    fixed = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(n_bytes(width)), n, [None, pa.py_buffer(to_bytes(vectors_Nd))]
    )
    return fixed.cast(pa.binary())


def from_column(column: pa.ChunkedArray | pa.Array | Sequence[bytes], width: int) -> NDArray[np.float16]:
    """Decode a column of N values without nulls to vectors (N, d)."""
    values = column.to_pylist() if isinstance(column, pa.Array | pa.ChunkedArray) else column
    return from_bytes(b"".join(values), width)
