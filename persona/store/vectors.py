"""The one codec of stored vectors: little-endian float16, 2·d bytes a vector.

Shapes: N vectors, d encoder width.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

_DTYPE = np.dtype("<f2")


def n_bytes(width: int) -> int:
    """Bytes of one stored vector."""
    return _DTYPE.itemsize * width


def to_bytes(vectors: ArrayLike) -> bytes:
    """Vectors (N, d) or one vector (d,), one after the other."""
    return np.ascontiguousarray(vectors, dtype=_DTYPE).tobytes()


def from_bytes(data: bytes | memoryview, width: int) -> NDArray[np.float16]:
    """The vectors (N, d) in `data`, as a read-only view where the machine is little-endian."""
    return np.frombuffer(data, _DTYPE).reshape(-1, width)


def to_column(vectors_Nd: NDArray[np.floating]) -> pa.BinaryArray:
    """A `binary` column with one value a vector."""
    n, width = vectors_Nd.shape
    fixed = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(n_bytes(width)), n, [None, pa.py_buffer(to_bytes(vectors_Nd))]
    )
    return fixed.cast(pa.binary())


def from_column(column: pa.ChunkedArray | pa.Array | Sequence[bytes], width: int) -> NDArray[np.float16]:
    """The vectors (N, d) of a column without nulls."""
    values = column.to_pylist() if isinstance(column, pa.Array | pa.ChunkedArray) else column
    return from_bytes(b"".join(values), width)
