"""The Parquet files of a table: write one with its key index, read one, and its entry in the Delta log."""

import io
import json
import re
import time
import uuid
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake.transaction import AddAction, RemoveAction

from persona import storage
from persona.store import key_index
from persona.store.delta_calls import with_retries
from persona.store.schema import Layout

_PARQUET: dict[str, Any] = {"compression": "zstd", "compression_level": 1}
_ROW_GROUP = 16_384
_UNIQUE_VALUES = ("vector", "persona", "output", "text", "reason")


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """A Parquet file of one partition. `stats` has the smallest and largest value of each `Layout.stats_columns`."""

    path: str
    """Relative to the table."""
    partition: str
    n_rows: int
    size_bytes: int
    stats: Mapping[str, tuple[Any, Any]] = field(hash=False)

    def to_json(self) -> str:
        """As text, to send between processes."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "DataFile":
        """The inverse of `to_json`."""
        fields = json.loads(text)
        return cls(**{**fields, "stats": {name: tuple(min_max) for name, min_max in fields["stats"].items()}})

    def may_hold(self, values: Mapping[str, Iterable[Any]]) -> bool:
        """Whether the file may have a row with one of the values of each column, judging by its statistics."""
        ranges = {name: self.stats[name] for name in values.keys() & self.stats.keys()}
        return all(_any_within(sorted(values[name]), *low_high) for name, low_high in ranges.items())


def write(table_uri: str, layout: Layout, rows: pa.Table) -> DataFile:
    """Write the rows of one partition to a new file. Readers do not see it until it is committed.

    Besides the rows, the file and one row group are in memory.
    """
    value = rows[layout.partition][0].as_py()
    rows = rows.select(layout.schema.names).cast(layout.schema).combine_chunks()
    in_order = pc.sort_indices(rows.select(layout.order), sort_keys=[(name, "ascending") for name in layout.order])
    folder = f"{layout.partition}={re.sub(r'[^A-Za-z0-9_.-]', '_', str(value))}"
    path = f"{folder}/part-{uuid.uuid4().hex}.parquet"
    rows = rows.drop_columns([layout.partition])
    data = _parquet(rows, in_order)
    if layout.has_key_index:
        key_index.write(table_uri, path, rows)
    storage.write_bytes(storage.join(table_uri, path), data)
    min_max = {name: pc.min_max(rows[name]).as_py() for name in layout.stats_columns}
    return DataFile(
        path=path,
        partition=str(value),
        n_rows=rows.num_rows,
        size_bytes=len(data),
        stats={name: (found["min"], found["max"]) for name, found in min_max.items()},
    )


def _parquet(rows: pa.Table, in_order: pa.Array) -> bytes:
    """A Parquet file with the rows in this order."""
    # A dictionary or statistics of values that never repeat would cost time and memory and save nothing.
    repeating = [name for name in rows.column_names if name not in _UNIQUE_VALUES]
    sink = io.BytesIO()
    with pq.ParquetWriter(
        sink, rows.schema, use_dictionary=repeating, write_statistics=repeating, **_PARQUET
    ) as parquet:
        for start in range(0, len(in_order), _ROW_GROUP):
            parquet.write_table(rows.take(in_order.slice(start, _ROW_GROUP)), row_group_size=_ROW_GROUP)
    return sink.getvalue()


def read(
    table_uri: str,
    layout: Layout,
    file: DataFile,
    columns: Sequence[str] | None = None,
    values: Mapping[str, Sequence[Any]] | None = None,
) -> pa.Table:
    """Some columns of a file, or all, the partition column included. `vector` is read as `large_binary`.

    With `values`, only the rows that have one of the values of each column; row groups without any are not read.
    """
    return read_counted(table_uri, layout, file, columns, values)[0]


def read_counted(
    table_uri: str,
    layout: Layout,
    file: DataFile,
    columns: Sequence[str] | None = None,
    values: Mapping[str, Sequence[Any]] | None = None,
) -> tuple[pa.Table, int]:
    """What `read` gives, and the number of bytes of the file that were read for it, besides its footer."""
    names = layout.schema.names if columns is None else list(columns)
    wanted = {name: sorted(of_column) for name, of_column in (values or {}).items()}
    in_file = [name for name in dict.fromkeys([*names, *wanted]) if name != layout.partition]

    def read_columns() -> tuple[pa.Table, int]:
        filesystem, path = storage.open_filesystem(storage.join(table_uri, file.path))
        with pq.ParquetFile(path, filesystem=filesystem, pre_buffer=True) as parquet:
            groups = _row_groups(parquet.metadata, wanted)
            data = parquet.read_row_groups(groups, in_file, use_threads=False)
            return data, _n_bytes(parquet.metadata, groups, in_file)

    data, n_bytes = with_retries(read_columns, f"cannot read {file.path} of {table_uri}")
    for name in set(in_file) - set(data.column_names):  # other programs may leave out a column of nulls
        data = data.append_column(name, pa.nulls(data.num_rows, layout.schema.field(name).type))
    # Other programs may have another order of columns, and string views, which cannot be filtered.
    data = data.select(in_file).cast(layout.schema_read(in_file))
    for name, of_column in wanted.items():
        data = data.filter(pc.is_in(data[name], value_set=pa.array(of_column, data.schema.field(name).type)))
    value = pa.scalar(layout.partition_values([file.partition])[0], layout.partition_type)
    return data.append_column(layout.partition, pa.repeat(value, data.num_rows)).select(names), n_bytes


def _row_groups(metadata: pq.FileMetaData, wanted: Mapping[str, list[Any]]) -> list[int]:
    """The row groups that may have a row with one of the sorted values of each column."""
    numbers = {metadata.schema.column(i).path: i for i in range(metadata.num_columns)} if wanted else {}

    def may_hold(group: pq.RowGroupMetaData) -> bool:
        stats = ((group.column(numbers[name]).statistics, wanted[name]) for name in wanted.keys() & numbers.keys())
        return all(
            found is None or not found.has_min_max or _any_within(values, found.min, found.max)
            for found, values in stats
        )

    return [i for i in range(metadata.num_row_groups) if may_hold(metadata.row_group(i))]


def _n_bytes(metadata: pq.FileMetaData, groups: Sequence[int], names: Sequence[str]) -> int:
    columns = [i for i in range(metadata.num_columns) if metadata.schema.column(i).path.split(".")[0] in names]
    return sum(metadata.row_group(group).column(i).total_compressed_size for group in groups for i in columns)


def _any_within(values: Sequence[Any], low: Any, high: Any) -> bool:
    """Whether one of the sorted values is in [low, high]."""
    first = bisect_left(values, low)
    return first < len(values) and bool(values[first] <= high)


def add_action(layout: Layout, file: DataFile, *, same_rows: bool = False) -> AddAction:
    """The log entry that adds a file; with `same_rows`, it only rearranges rows, and change readers skip it."""
    stats = {
        "numRecords": file.n_rows,
        "minValues": {name: low for name, (low, _) in file.stats.items()},
        "maxValues": {name: high for name, (_, high) in file.stats.items()},
        "nullCount": dict.fromkeys(file.stats, 0),
    }
    # No ASCII escapes: delta-rs decodes those of characters beyond U+1FFFF wrongly.
    text = json.dumps(stats, ensure_ascii=False)
    partition = {layout.partition: file.partition}
    return AddAction(file.path, file.size_bytes, partition, int(time.time() * 1000), not same_rows, text)


def remove_action(layout: Layout, file: DataFile, *, same_rows: bool = False) -> RemoveAction:
    """The log entry that removes a file, which stays readable in older versions."""
    partition: dict[str, str | None] = {layout.partition: file.partition}
    return RemoveAction(file.path, not same_rows, int(time.time() * 1000), file.size_bytes, partition)
