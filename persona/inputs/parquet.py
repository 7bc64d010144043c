"""Read the row groups of a Parquet split; a file or row group that cannot be decoded becomes a reject."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from persona.errors import InputError, StorageError
from persona.inputs.records import (
    WHOLE_FILE,
    Part,
    first_line,
    is_store_failure,
    no_rows,
    selected,
    too_long,
    with_location,
)
from persona.inputs.row_groups import batches, row_bytes
from persona.inputs.splits import Split
from persona.storage import open_filesystem

# Row groups up to this size are fetched in a few large requests; larger ones are streamed, a buffer for each column.
_PRE_BUFFERED_BYTES, _BUFFER_BYTES = 64 * 2**20, 4 * 2**20
_DECODE_ERRORS = (OSError, pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError)


def read_parquet(
    split: Split,
    max_rows: int,
    columns: Sequence[str] | None,
    max_row_bytes: int,
    problem: Callable[[pa.Schema], str],
) -> Iterator[Part]:
    """The rows of a split; the whole file is one reject if `problem` says why its columns cannot be used.

    Raises `StorageError` if the store fails.
    """
    try:
        raw, file = _open(split)
    except _DECODE_ERRORS as error:
        _raise_if_store_failed(split, error)
        if split.start == 0:  # one reject per file
            yield Part(no_rows(), [(WHOLE_FILE, f"file cannot be read: {first_line(error)}")])
        return
    with raw, file:
        size_bytes = raw.size()
        if bad := split.check_size(size_bytes):
            yield Part(no_rows(), bad)
        n_rows = file.metadata.num_rows
        if n_rows and (why := problem(file.schema_arrow)):
            if split.start == 0:
                yield Part(
                    no_rows(), [(WHOLE_FILE, f"file with {n_rows:,} rows cannot be used: {why}")], n_lost=n_rows - 1
                )
            return
        names = selected(file.schema_arrow.names, columns)
        first = 0
        for group, n_rows in enumerate(_group_lengths(file)):
            if split.start <= size_bytes * group // file.num_row_groups < split.until:
                yield from _read_group(split, file, raw, group, first, max_rows, names, max_row_bytes)
            first += n_rows


def read_schema(split: Split) -> pa.Schema:
    """The columns of a file.

    Raises `InputError` with the reason if it cannot be read or has no rows, `StorageError` if the store fails.
    """
    try:
        raw, file = _open(split)
    except _DECODE_ERRORS as error:
        _raise_if_store_failed(split, error)
        raise InputError(f"file cannot be read: {first_line(error)}") from error
    with raw, file:
        if not file.metadata.num_rows:
            raise InputError("it has no rows")
        return file.schema_arrow


def _open(split: Split) -> tuple[pa.NativeFile, pq.ParquetFile]:
    filesystem, path = open_filesystem(split.uri)
    raw = filesystem.open_input_file(path)
    options = {
        "page_checksum_verification": True,
        "coerce_int96_timestamp_unit": "us",  # nanoseconds, the default, wrap outside the years 1678 to 2261
    }
    file = pq.ParquetFile(raw, pre_buffer=True, **options)
    _check_footer(file)
    if max(map(_compressed_bytes, _groups(file)), default=0) > _PRE_BUFFERED_BYTES:
        file = pq.ParquetFile(raw, metadata=file.metadata, pre_buffer=False, buffer_size=_BUFFER_BYTES, **options)
    return raw, file


def _read_group(
    split: Split,
    file: pq.ParquetFile,
    raw: pa.NativeFile,
    group: int,
    first: int,
    max_rows: int,
    names: list[str],
    max_row_bytes: int,
) -> Iterator[Part]:
    """One row group, whose first row has the number `first` in the file."""
    end = first + file.metadata.row_group(group).num_rows
    if row_bytes(file, group, names) > max_row_bytes:  # decoding a single page may take more memory than there is
        reason = f"rows {first} to {end - 1}: {too_long('a row, on average,', max_row_bytes)}"
        yield Part(no_rows(), [(WHOLE_FILE, reason)], n_lost=end - first - 1)
        return
    try:
        for table in batches(file, raw, group, names, max_rows):
            numbers = range(first, first + table.num_rows)
            bad = [(numbers[row], too_long("row", max_row_bytes)) for row in _long_rows(table, max_row_bytes)]
            located = with_location(table, split.uri, numbers)
            yield Part(_without(located, [row - first for row, _ in bad]), bad)
            first += table.num_rows
        if first < end:
            raise pa.ArrowInvalid("the row group ends early")
    except _DECODE_ERRORS as error:
        _raise_if_store_failed(split, error)
        yield Part(no_rows(), [(WHOLE_FILE, f"rows {first} to {end - 1} cannot be read: {first_line(error)}")])


def _long_rows(table: pa.Table, max_row_bytes: int) -> list[int]:
    """The rows of more than `max_row_bytes`."""
    if table.nbytes <= max_row_bytes:
        return []
    return [row for row in range(table.num_rows) if table.slice(row, 1).nbytes > max_row_bytes]


def _without(table: pa.Table, rows: Sequence[int]) -> pa.Table:
    return table.filter(pa.array(~np.isin(np.arange(table.num_rows), rows))) if rows else table


def _check_footer(file: pq.ParquetFile) -> None:
    names = file.schema_arrow.names
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise pa.ArrowInvalid(f"duplicate column {doubled[0]!r}")
    if file.metadata.num_rows != sum(_group_lengths(file)):
        raise pa.ArrowInvalid("the footer gives two different numbers of rows")


def _groups(file: pq.ParquetFile) -> list[pq.RowGroupMetaData]:
    return [file.metadata.row_group(group) for group in range(file.num_row_groups)]


def _group_lengths(file: pq.ParquetFile) -> list[int]:
    return [group.num_rows for group in _groups(file)]


def _compressed_bytes(group: pq.RowGroupMetaData) -> int:
    return sum(group.column(column).total_compressed_size for column in range(group.num_columns))


def _raise_if_store_failed(split: Split, error: Exception) -> None:
    if is_store_failure(error):
        raise StorageError(f"cannot read {split.uri}: {first_line(error)}") from error
