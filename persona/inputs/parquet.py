"""Read the row groups of a Parquet split; a file or row group that cannot be decoded becomes a reject."""

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from persona.errors import StorageError
from persona.inputs.records import (
    MAX_BATCH_BYTES,
    WHOLE_FILE,
    BadRows,
    first_line,
    is_store_failure,
    no_rows,
    selected,
    with_location,
)
from persona.inputs.splits import Split
from persona.storage import open_filesystem

_DECODE_ERRORS = (OSError, pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError)


def read_parquet(split: Split, max_rows: int, columns: Sequence[str] | None) -> Iterator[tuple[pa.Table, BadRows]]:
    """Rows with their location, and rejects. Raises `StorageError` if the store fails."""
    try:
        raw, file = _open(split)
    except _DECODE_ERRORS as error:
        _raise_if_store_failed(split, error)
        if split.start == 0:  # one reject per file
            yield no_rows(), [(WHOLE_FILE, f"file cannot be read: {first_line(error)}")]
        return
    with raw, file:
        size_bytes = raw.size()
        if bad := split.check_size(size_bytes):
            yield no_rows(), bad
        names = selected(file.schema_arrow.names, columns)
        first = 0
        for group, n_rows in enumerate(_group_lengths(file)):
            if split.start <= size_bytes * group // file.num_row_groups < split.until:
                yield from _read_group(split, file, group, first, max_rows, names)
            first += n_rows


def read_schema(split: Split) -> pa.Schema:
    """The columns of a file; no fields if the file cannot be read. Raises `StorageError` if the store fails."""
    try:
        raw, file = _open(split)
    except _DECODE_ERRORS as error:
        _raise_if_store_failed(split, error)
        return pa.schema([])
    with raw, file:
        return file.schema_arrow


def _open(split: Split) -> tuple[pa.NativeFile, pq.ParquetFile]:
    filesystem, path = open_filesystem(split.uri)
    raw = filesystem.open_input_file(path)
    file = pq.ParquetFile(
        raw,
        pre_buffer=True,
        page_checksum_verification=True,
        coerce_int96_timestamp_unit="us",  # nanoseconds, the default, wrap outside the years 1678 to 2261
    )
    _check_footer(file)
    return raw, file


def _read_group(
    split: Split, file: pq.ParquetFile, group: int, first: int, max_rows: int, names: list[str]
) -> Iterator[tuple[pa.Table, BadRows]]:
    """One row group, whose first row has the number `first` in the file."""
    metadata = file.metadata.row_group(group)
    end = first + metadata.num_rows
    row_bytes = max(1, metadata.total_byte_size // max(1, metadata.num_rows))
    batch_rows = min(max_rows, max(1, MAX_BATCH_BYTES // row_bytes))
    try:
        for batch in file.iter_batches(batch_rows, row_groups=[group], columns=names, use_threads=False):
            rows = range(first, first + batch.num_rows)
            yield with_location(pa.Table.from_batches([batch]), split.uri, rows), []
            first += batch.num_rows
        if first < end:
            raise pa.ArrowInvalid("the row group ends early")
    except _DECODE_ERRORS as error:
        _raise_if_store_failed(split, error)
        yield no_rows(), [(WHOLE_FILE, f"rows {first} to {end - 1} cannot be read: {first_line(error)}")]


def _check_footer(file: pq.ParquetFile) -> None:
    names = file.schema_arrow.names
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise pa.ArrowInvalid(f"duplicate column {doubled[0]!r}")
    if file.metadata.num_rows != sum(_group_lengths(file)):
        raise pa.ArrowInvalid("the footer gives two different numbers of rows")


def _group_lengths(file: pq.ParquetFile) -> list[int]:
    return [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]


def _raise_if_store_failed(split: Split, error: Exception) -> None:
    if is_store_failure(error):
        raise StorageError(f"cannot read {split.uri}: {first_line(error)}") from error
