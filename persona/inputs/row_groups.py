"""Decode a row group of a Parquet file in batches of bounded memory.

Pages are decoded one after the other, so memory depends on the largest page, not on the row group. A repeated value
stands in a row group once, in its dictionary, and a batch of rows may hold it thousands of times; batches are therefore
put together from steps that are small where the dictionary is large.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import types

from persona.inputs.records import MAX_BATCH_BYTES

_STEP_BYTES = 256 * 2**20  # the most that the rows of a step can take, if each has the whole dictionary
_NO_LOOK_BYTES = 4 * 2**20  # of a column in a row group; its dictionary is smaller, so it is not measured
_HEADER_BYTES = 16  # the kind and the size of a page, with room to spare


def row_bytes(file: pq.ParquetFile, group: int, names: Sequence[str]) -> int:
    """The mean size of a row in a row group before compression, in bytes, of the columns `names`; at least 1."""
    metadata = file.metadata.row_group(group)
    size = sum(column.total_uncompressed_size for column in _read_columns(metadata, names))
    return max(1, int(size) // max(1, int(metadata.num_rows)))


def batches(
    file: pq.ParquetFile, raw: pa.NativeFile, group: int, names: Sequence[str], max_rows: int
) -> Iterator[pa.Table]:
    """The rows of a row group with the columns `names`, in tables of at most `max_rows` and about `MAX_BATCH_BYTES`.

    Raises what Arrow raises for a row group that cannot be decoded.
    """
    max_rows = min(max_rows, max(1, MAX_BATCH_BYTES // row_bytes(file, group, names)))
    dense = [name for name in names if not types.is_dictionary(file.schema_arrow.field(name).type)]
    step_rows = min(max_rows, _step_rows(file.metadata.row_group(group), raw, dense))
    steps: list[pa.RecordBatch] = []
    n_rows = n_bytes = 0
    decoded = file.iter_batches(step_rows, row_groups=[group], columns=names, use_threads=False)
    for step in itertools.chain.from_iterable(map(_dense, decoded)):
        if steps and (n_rows + step.num_rows > max_rows or n_bytes + step.nbytes > MAX_BATCH_BYTES):
            yield pa.Table.from_batches(steps)
            steps, n_rows, n_bytes = [], 0, 0
        steps.append(step)
        n_rows += step.num_rows
        n_bytes += step.nbytes
    if steps:
        yield pa.Table.from_batches(steps)


def _step_rows(metadata: pq.RowGroupMetaData, raw: pa.NativeFile, names: Sequence[str]) -> int:
    """How many rows take at most `_STEP_BYTES` for each column if all cells are as long as its dictionary; at least 1.

    A dictionary of numbers is no danger: a number takes as much in a dictionary as in a row.
    """
    longest = 1.0
    for column in _read_columns(metadata, names):
        if column.physical_type == "BYTE_ARRAY" and column.has_dictionary_page:
            cells_per_row = column.num_values / max(1, metadata.num_rows)
            longest = max(longest, _dictionary_bytes(column, raw) * cells_per_row)
    return max(1, int(_STEP_BYTES / longest))


def _read_columns(metadata: pq.RowGroupMetaData, names: Sequence[str]) -> list[pq.ColumnChunkMetaData]:
    """The columns `names`, and the leaves of nested ones."""
    columns = map(metadata.column, range(metadata.num_columns))
    return [column for column in columns if column.path_in_schema.partition(".")[0] in names]


def _dictionary_bytes(column: pq.ColumnChunkMetaData, raw: pa.NativeFile) -> int:
    """The size of a column's dictionary before compression, or more: the size of the column."""
    if column.total_uncompressed_size <= _NO_LOOK_BYTES:
        return int(column.total_uncompressed_size)
    raw.seek(column.dictionary_page_offset)
    kind, size = _page(raw.read(_HEADER_BYTES))
    return size if kind == _DICTIONARY_PAGE else int(column.total_uncompressed_size)


_DICTIONARY_PAGE = 2
_FIELD_OF_INT = 0x15  # in Thrift's compact protocol: the next field, an int32


def _page(header: bytes) -> tuple[int, int]:
    """The first two fields of a page's header, in Thrift's compact protocol: its kind, and its size uncompressed."""
    found: list[int] = []
    rest = iter(header)
    while len(found) < 2 and next(rest, None) == _FIELD_OF_INT:
        value = shift = 0
        for byte in rest:
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        found.append((value >> 1) ^ -(value & 1))
    return (found[0], found[1]) if len(found) == 2 else (-1, 0)


def _dense(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """The batch with plain columns in place of dictionary-encoded ones, in parts of about `_STEP_BYTES` or one row."""
    coded = [column for column in batch.columns if types.is_dictionary(column.type)]
    n_bytes = np.zeros(batch.num_rows, np.int64)
    for column in coded:
        if types.is_string(column.type.value_type) or types.is_binary(column.type.value_type):
            lengths = pc.binary_length(column.dictionary).take(column.indices)
            n_bytes += lengths.fill_null(0).to_numpy(zero_copy_only=False)
    ends = np.flatnonzero(np.diff(np.cumsum(n_bytes) // _STEP_BYTES)) + 1
    for start, end in itertools.pairwise([0, *ends.tolist(), batch.num_rows]):
        part = batch.slice(start, end - start)
        columns = [
            column.cast(column.type.value_type) if types.is_dictionary(column.type) else column for column in part
        ]
        yield pa.RecordBatch.from_arrays(columns, names=batch.schema.names) if coded else part
