"""The key index of a data file: what it takes to compare keys and contents with the file, in some 33 bytes a row.

    <table>/_keys/bucket=3/part-0a1b….keys    of the data file bucket=3/part-0a1b….parquet

Delta, Spark, DuckDB and pandas do not take files below a folder with an underscore for data. An index consists of a
checksum, which covers the path of the data file too, and an Arrow stream of `ENTRIES`, sorted by hash. Data files of
older versions and of other programs have no index; they are read themselves.
"""

import hashlib
import posixpath
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from persona import storage
from persona.errors import StorageError
from persona.inputs.cells import TIME
from persona.inputs.histories import KEY
from persona.inputs.place import digests, key_hashes

_FOLDER, _SUFFIX = "_keys", ".keys"
_CHECKSUM_BYTES = 16
_TEXT_BYTES = 8
ENTRIES = pa.schema(
    [
        ("hash", pa.uint64()),
        ("digest", pa.binary(16)),
        ("timestamp", TIME),
        ("text_hash", pa.binary(_TEXT_BYTES)),
    ]
)
"""The key of a row (`place.key_hashes`, `place.digests`) and its content: time and the first bytes of the text hash."""
COLUMNS = [*KEY, "timestamp", "text_hash"]
"""The columns of a data file that its entries are made of."""


def entries(rows: pa.Table) -> pa.Table:
    """The entry (`ENTRIES`) of each row with `COLUMNS`. A text hash that is not one of ours becomes null."""
    columns = [pa.array(key_hashes(rows)), digests(rows), rows["timestamp"], _first_bytes(rows["text_hash"])]
    return pa.table(columns, schema=ENTRIES)


def write(table_uri: str, path: str, rows: pa.Table) -> None:
    """Write the index of a data file with these rows, unless a row has no key."""
    if any(rows[name].null_count for name in KEY):
        return
    table = entries(rows).sort_by("hash").combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, ENTRIES, options=pa.ipc.IpcWriteOptions(compression="zstd")) as stream:
        stream.write_table(table)
    content = sink.getvalue().to_pybytes()
    storage.write_bytes(uri_of(table_uri, path), _checksum(path, content) + content)


def read(table_uri: str, path: str, n_rows: int) -> tuple[pa.Table, int] | None:
    """The entries of a data file, sorted by hash, and the bytes read; None if its index is missing or damaged."""
    try:
        data = storage.read_bytes(uri_of(table_uri, path))
    except StorageError:
        return None
    checksum, content = data[:_CHECKSUM_BYTES], memoryview(data)[_CHECKSUM_BYTES:]
    if checksum != _checksum(path, content):
        return None
    with pa.ipc.open_stream(content) as stream:
        table = stream.read_all()
    return (table, len(data)) if table.schema == ENTRIES and table.num_rows == n_rows else None


def delete(table_uri: str, paths: Iterable[str]) -> None:
    """Delete the indexes of these data files, where they exist."""
    for path in paths:
        storage.delete(uri_of(table_uri, path))


def indexed_paths(table_uri: str) -> set[str]:
    """The paths of the data files that have an index, whether or not they exist."""
    folder = storage.join(table_uri, _FOLDER)
    names = (file.uri.removeprefix(f"{folder}/") for file in storage.list_files(folder, (_SUFFIX,)))
    return {f"{name.removesuffix(_SUFFIX)}.parquet" for name in names}


def uri_of(table_uri: str, path: str) -> str:
    """Where the index of a data file is."""
    return storage.join(table_uri, _FOLDER, posixpath.splitext(path)[0] + _SUFFIX)


def _checksum(path: str, content: bytes | memoryview) -> bytes:
    checksum = hashlib.blake2b(path.encode(), digest_size=_CHECKSUM_BYTES)
    checksum.update(content)
    return checksum.digest()


def _first_bytes(text_hashes: pa.ChunkedArray) -> pa.Array:
    """The first bytes of text hashes in hex; null for one that is not in hex."""
    n_digits = 2 * _TEXT_BYTES
    is_ours = pc.fill_null(pc.match_substring_regex(text_hashes, f"^[0-9a-f]{{{n_digits}}}"), False)
    first = pc.utf8_slice_codeunits(pc.if_else(is_ours, text_hashes, "0" * n_digits), 0, n_digits)
    data = pa.py_buffer(bytes.fromhex("".join(first.to_pylist())))
    mask = pa.array(np.packbits(is_ours.to_numpy(), bitorder="little")).buffers()[1]
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(_TEXT_BYTES), len(text_hashes), [mask, data])
