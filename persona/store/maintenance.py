"""Inspect and verify the tables of a store, and find and remove the rows of users.

Every function works on one file or one partition, so that many can run in parallel.
"""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from persona import storage
from persona.errors import StorageError
from persona.inputs.histories import KEY, bucket_of
from persona.store import key_index, vectors
from persona.store.changes import key_strings
from persona.store.data_files import DataFile
from persona.store.schema import LAYOUTS
from persona.store.store import Store
from persona.store.table import Table
from persona.store.writer import Rewritten

_BATCH_ROWS = 65_536
# Rounding to float16 changes each component of a unit vector by at most a factor of 1 ± 2^-11, and so does its norm.
_NORM_TOLERANCE = 2e-3


class TableFacts(TypedDict):
    """The size of a table, as reported by `jobs.store show`."""

    version: int
    rows: int
    bytes: int
    files: int
    rows_by_partition: dict[str, int]


def tables(store: Store) -> list[str]:
    """The tables that a store has; one made by an earlier version has no `sources` before the next `embed`."""
    return [name for name in LAYOUTS if Table.find(storage.join(store.uri, name), name) is not None]


def tables_of_users(store: Store) -> list[str]:
    """Those of them with rows of users."""
    return [name for name in tables(store) if "user_id" in LAYOUTS[name].schema.names]


def facts(store: Store, name: str) -> TableFacts:
    """Version and size of a table; reads only the log."""
    files = store.table(name).file_list()
    by_partition = files.rows_by_partition()
    return {
        "version": files.version,
        "rows": sum(by_partition.values()),
        "bytes": files.size_bytes(),
        "files": len(files),
        "rows_by_partition": by_partition,
    }


def verify(store: Store, name: str, partition: str) -> tuple[int, list[str]]:
    """Check one partition of a table, file by file; returns its number of rows and the problems found."""
    table = store.table(name)
    problems: list[str] = []
    keys_by_file: list[pa.Array] = []
    n_rows = 0
    for file in table.files(table.layout.partition_values([partition])):
        where = f"{name}/{file.path}"
        try:
            rows = table.read_file(file)
        except StorageError as error:
            problems.append(f"{where}: {error}")
            continue
        if rows.num_rows != file.n_rows:
            problems.append(f"{where}: has {rows.num_rows:,} rows, but {file.n_rows:,} according to the log")
        n_rows += rows.num_rows
        problems += [f"{where}: {problem}" for problem in _row_problems(store, table, rows)]
        if table.layout.has_key_index:
            problems += [f"{where}: {problem}" for problem in _index_problems(table, file, rows)]
        keys_by_file.append(key_strings(rows.select(table.layout.row_key)))
    keys = pa.chunked_array(keys_by_file, pa.large_string())
    if n_duplicates := len(keys) - pc.count_distinct(keys, mode="all").as_py():
        problems.append(f"{name}, {table.layout.partition} {partition}: {n_duplicates:,} rows have a duplicate key")
    return n_rows, problems


def _row_problems(store: Store, table: Table, rows: pa.Table) -> list[str]:
    """Problems with the rows of one file, except duplicate keys."""
    nulls = {key: rows[key].null_count for key in table.layout.key}
    found = [f"{n:,} rows have no {key}" for key, n in nulls.items() if n]
    buckets = bucket_of(rows["user_id"].drop_null(), store.n_buckets)
    if not rows["user_id"].null_count and (n_misplaced := int((buckets != rows["bucket"].to_numpy()).sum())):
        found.append(f"{n_misplaced:,} rows are not in their user's bucket")
    if "vector" in rows.column_names:
        found += _vector_problems(rows["vector"], store.identity.width)
    return found


def _index_problems(table: Table, file: DataFile, rows: pa.Table) -> list[str]:
    """Problems with the key index of a file with these rows; that it has none is not one."""
    indexed = key_index.read(table.uri, file.path, rows.num_rows)
    if indexed is None:
        return ["its key index is damaged"] if storage.exists(key_index.uri_of(table.uri, file.path)) else []
    if any(rows[key].null_count for key in KEY):
        return ["it has a key index, but not all of its rows have a key"]
    entries = key_index.entries(rows)
    by_digest = [(key, "ascending") for key in ("digest", "timestamp", "text_hash")]
    is_equal = indexed[0].sort_by(by_digest).equals(entries.sort_by(by_digest))
    return [] if is_equal else ["its key index is of other rows"]


def _vector_problems(column: pa.ChunkedArray, width: int) -> list[str]:
    size = vectors.n_bytes(width)
    fits = pc.fill_null(pc.equal(pc.binary_length(column), size), False)
    found = []
    if not pc.all(fits).as_py():
        found.append(f"{len(column) - pc.sum(fits).as_py():,} vectors are not {size} bytes long")
    for start in range(0, len(column), _BATCH_ROWS):
        batch = column.filter(fits).slice(start, _BATCH_ROWS).to_pylist()
        norms_N = np.linalg.norm(vectors.from_column(batch, width).astype(np.float32), axis=1)
        # The zero vector is valid: the encoder returns it for a text with nothing to encode.
        is_wrong = (np.abs(norms_N - 1) > _NORM_TOLERANCE) & (norms_N != 0) | np.isnan(norms_N)
        if n_wrong := int(is_wrong.sum()):
            found.append(f"{n_wrong:,} vectors are not unit vectors")
    return found


def files_of_users(store: Store, name: str, users: Sequence[str]) -> list[DataFile]:
    """The files of a table that may hold rows of these users, judging by the log."""
    table = store.table(name)
    buckets = bucket_of(users, store.n_buckets)
    by_bucket: dict[int, list[str]] = {}
    for bucket, user in zip(buckets.tolist(), users, strict=True):
        by_bucket.setdefault(bucket, []).append(user)
    files = table.files(sorted(by_bucket) if table.layout.partition == "bucket" else None)
    return [file for file in files if _may_hold(file, table, by_bucket)]


def _may_hold(file: DataFile, table: Table, by_bucket: dict[int, list[str]]) -> bool:
    if table.layout.partition == "bucket":
        first, last = file.stats.get("user_id", (None, None))
        return any(first is None or first <= user <= last for user in by_bucket[int(file.partition)])
    first, last = file.stats.get("bucket", (None, None))
    return first is None or any(first <= bucket <= last for bucket in by_bucket)


def rows_of_users(table: Table, file: DataFile, users: Sequence[str]) -> int:
    """The number of rows of these users in a file."""
    is_theirs = pc.is_in(table.read_file(file, ["user_id"])["user_id"], value_set=pa.array(users, pa.string()))
    return pc.sum(is_theirs).as_py() or 0


def without_users(table: Table, file: DataFile, users: Sequence[str]) -> Rewritten | None:
    """Stage a copy of a file without the rows of these users; None when it has none."""
    if not rows_of_users(table, file, users):
        return None
    rows = table.read_file(file)
    rest = rows.filter(pc.invert(pc.is_in(rows["user_id"], value_set=pa.array(users, pa.string()))))
    return file, table.write_file(rest) if rest.num_rows else None
