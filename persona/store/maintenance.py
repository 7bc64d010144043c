"""Looking after a store: what is in it, whether it keeps its promises, and who is to be forgotten.

Everything works on one file or one partition at a time, so that many can do it side by side.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from persona.errors import StorageError
from persona.inputs.histories import bucket_of
from persona.store import vectors
from persona.store.schema import LAYOUTS, DataFile
from persona.store.store import Store
from persona.store.table import Table
from persona.store.writer import Rewritten, key_strings

TABLES = tuple(LAYOUTS)
OF_USERS = ("behaviors", "personas", "generations")  # tables that hold rows of users
_ROWS_AT_ONCE = 65_536
# Unit vectors in float16: each of d numbers is off by at most 2^-11 of itself, so the norm by no more than that.
_NORM_TOLERANCE = 2e-3


def facts(store: Store, name: str) -> dict[str, Any]:
    """Rows, bytes, files and version of a table, and its rows by partition; read from the log alone."""
    table = store.table(name)
    files = table.files()
    by_partition: Counter[str] = Counter()
    for file in files:
        by_partition[file.partition] += file.n_rows
    return {
        "version": table.version(),
        "rows": sum(by_partition.values()),
        "bytes": sum(file.size_bytes for file in files),
        "files": len(files),
        "rows_by_partition": dict(by_partition),
    }


def verify(store: Store, name: str, partition: str) -> tuple[int, list[str]]:
    """Checks one partition of a table, file by file; how many rows, and what is wrong, in words."""
    table = store.table(name)
    problems: list[str] = []
    seen: list[pa.Array] = []
    rows = 0
    for file in table.files(table.partition_values([partition])):
        where = f"{name}/{file.path}"
        try:
            read = table.read_file(file)
        except StorageError as error:
            problems.append(f"{where}: {error}")
            continue
        if read.num_rows != file.n_rows:
            problems.append(f"{where}: has {read.num_rows:,} rows, and {file.n_rows:,} by the log")
        rows += read.num_rows
        problems += [f"{where}: {problem}" for problem in _wrong(store, table, read)]
        seen.append(key_strings(read.select([key for key in table.layout.key if key != table.layout.partition])))
    keys = pa.chunked_array(seen, pa.large_string())
    if twice := len(keys) - pc.count_distinct(keys, mode="all").as_py():
        problems.append(
            f"{name}, {table.layout.partition} {partition}: {twice:,} rows have a key that is there already"
        )
    return rows, problems


def _wrong(store: Store, table: Table, rows: pa.Table) -> list[str]:
    """What is wrong with the rows of one file, keys aside."""
    nulls = {key: rows[key].null_count for key in table.layout.key}
    found = [f"{n:,} rows have no {key}" for key, n in nulls.items() if n]
    buckets = bucket_of(rows["user_id"].drop_null(), store.n_buckets)
    if not rows["user_id"].null_count and (astray := int((buckets != rows["bucket"].to_numpy()).sum())):
        found.append(f"{astray:,} rows are not in their user's bucket")
    if "vector" in rows.column_names:
        size = vectors.n_bytes(store.identity.width)
        fits = pc.fill_null(pc.equal(pc.binary_length(rows["vector"]), size), False)
        if not pc.all(fits).as_py():
            found.append(f"{rows.num_rows - pc.sum(fits).as_py():,} vectors are not {size} bytes long")
        for start in range(0, rows.num_rows, _ROWS_AT_ONCE):
            good = rows["vector"].filter(fits).slice(start, _ROWS_AT_ONCE).to_pylist()
            vectors_Nd = vectors.from_column(good, store.identity.width).astype(np.float32)
            norms_N = np.linalg.norm(vectors_Nd, axis=1)
            # A text of which the encoder makes nothing has the vector 0.
            if off := int(((np.abs(norms_N - 1) > _NORM_TOLERANCE) & (norms_N != 0) | np.isnan(norms_N)).sum()):
                found.append(f"{off:,} vectors are no unit vectors")
    return found


def files_of_users(store: Store, name: str, users: Sequence[str]) -> list[DataFile]:
    """The files of a table that may hold rows of these users, as far as the log tells."""
    table = store.table(name)
    buckets = bucket_of(users, store.n_buckets)
    by_bucket: dict[int, list[str]] = {}
    for bucket, user in zip(buckets.tolist(), users, strict=True):
        by_bucket.setdefault(bucket, []).append(user)
    wanted = sorted(by_bucket)
    files = table.files(wanted if table.layout.partition == "bucket" else None)
    return [file for file in files if _may_hold(file, table, by_bucket)]


def _may_hold(file: DataFile, table: Table, by_bucket: dict[int, list[str]]) -> bool:
    if table.layout.partition == "bucket":
        first, last = file.span.get("user_id", (None, None))
        return any(first is None or first <= user <= last for user in by_bucket[int(file.partition)])
    first, last = file.span.get("bucket", (None, None))
    return first is None or any(first <= bucket <= last for bucket in by_bucket)


def rows_of_users(table: Table, file: DataFile, users: Sequence[str]) -> int:
    """How many rows of a file are theirs."""
    theirs = pc.is_in(table.read_file(file, ["user_id"])["user_id"], value_set=pa.array(users, pa.string()))
    return pc.sum(theirs).as_py() or 0


def without_users(table: Table, file: DataFile, users: Sequence[str]) -> Rewritten | None:
    """The file without the rows of these users, as a new one that nobody sees yet; None where it has none."""
    if not rows_of_users(table, file, users):
        return None
    rows = table.read_file(file)
    left = rows.filter(pc.invert(pc.is_in(rows["user_id"], value_set=pa.array(users, pa.string()))))
    return file, table.write_file(left) if left.num_rows else None
