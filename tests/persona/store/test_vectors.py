"""The vector codec, against bytes written out by hand."""

import numpy as np
import pyarrow as pa
import pytest

from persona.store import vectors

# IEEE 754 half precision, low byte first: 1 is 0x3c00, -2 is 0xc000, 0.5 is 0x3800, 65504 (the largest) is 0x7bff.
VECTORS_Nd = np.array([[1, -2, 0.5], [0, 65504, 1]], np.float32)
BYTES = bytes.fromhex("003c 00c0 0038") + bytes.fromhex("0000 ff7b 003c")


def test_bytes_are_little_endian_float16_row_after_row() -> None:
    assert vectors.to_bytes(VECTORS_Nd) == BYTES and vectors.to_bytes(VECTORS_Nd[0]) == BYTES[:6]
    assert vectors.n_bytes(3) == 6


@pytest.mark.parametrize("dtype", [">f2", "<f2", "<f4", ">f8"])
def test_any_dtype_and_memory_order_give_the_same_bytes(dtype: str) -> None:
    given = VECTORS_Nd.astype(dtype)
    assert vectors.to_bytes(given) == vectors.to_bytes(np.asfortranarray(given)) == BYTES
    assert vectors.to_column(given).to_pylist() == [BYTES[:6], BYTES[6:]]


def test_decoding_inverts_encoding() -> None:
    for data in (BYTES, memoryview(BYTES)):
        decoded_Nd = vectors.from_bytes(data, 3)
        assert decoded_Nd.dtype == np.float16 and not decoded_Nd.flags.writeable
        np.testing.assert_array_equal(decoded_Nd, VECTORS_Nd)
    column = vectors.to_column(VECTORS_Nd)
    assert column.type == pa.binary()
    chunked = pa.chunked_array([column[:1].cast(pa.large_binary()), column[1:].cast(pa.large_binary())])
    for stored in (column, chunked, column.to_pylist()):
        np.testing.assert_array_equal(vectors.from_column(stored, 3), VECTORS_Nd)


def test_no_vectors_have_no_bytes() -> None:
    empty_Nd = np.zeros((0, 3), np.float32)
    assert vectors.to_bytes(empty_Nd) == b"" and vectors.to_column(empty_Nd).to_pylist() == []
    assert vectors.from_bytes(b"", 3).shape == vectors.from_column([], 3).shape == (0, 3)


def test_bytes_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="reshape"):
        vectors.from_bytes(BYTES, 4)
    with pytest.raises(ValueError, match="element size"):
        vectors.from_bytes(BYTES[:-1], 3)
