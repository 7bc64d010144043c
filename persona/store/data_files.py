"""The Parquet files of a table: write one, read one, and its entry in the Delta log."""

import io
import json
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.transaction import AddAction, RemoveAction

from persona import storage
from persona.store.delta_calls import with_retries
from persona.store.schema import Layout

_PARQUET: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 1,
    "row_group_size": 16_384,
}
_UNIQUE_VALUES = ("vector", "persona", "output")


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """A Parquet file of one partition. `stats` has the smallest and largest value of each `Layout.stats_columns`."""

    path: str
    """Relative to the table."""
    partition: str
    n_rows: int
    size_bytes: int
    stats: Mapping[str, tuple[Any, Any]]

    def to_json(self) -> str:
        """As text, to send between processes."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "DataFile":
        """The inverse of `to_json`."""
        fields = json.loads(text)
        return cls(**{**fields, "stats": {name: tuple(min_max) for name, min_max in fields["stats"].items()}})

    def may_overlap(self, other: "DataFile") -> bool:
        """Whether both files may hold the same key, judging by partition and statistics."""
        both = self.stats.keys() & other.stats.keys()
        disjoint = any(self.stats[n][1] < other.stats[n][0] or other.stats[n][1] < self.stats[n][0] for n in both)
        return self.partition == other.partition and not disjoint


def write(table_uri: str, layout: Layout, rows: pa.Table) -> DataFile:
    """Write the rows of one partition to a new file. Readers do not see it until it is committed."""
    value = rows[layout.partition][0].as_py()
    rows = rows.select(layout.schema.names).cast(layout.schema)
    rows = rows.sort_by([(name, "ascending") for name in layout.order])
    folder = f"{layout.partition}={re.sub(r'[^A-Za-z0-9_.-]', '_', str(value))}"
    path = f"{folder}/part-{uuid.uuid4().hex}.parquet"
    sink = io.BytesIO()
    rows = rows.drop_columns([layout.partition])
    # A dictionary or statistics of values that never repeat would cost time and memory and save nothing.
    repeating = [name for name in rows.column_names if name not in _UNIQUE_VALUES]
    pq.write_table(rows, sink, use_dictionary=repeating, write_statistics=repeating, **_PARQUET)
    data = sink.getvalue()
    storage.write_bytes(storage.join(table_uri, path), data)
    min_max = {name: pc.min_max(rows[name]).as_py() for name in layout.stats_columns}
    return DataFile(
        path=path,
        partition=str(value),
        n_rows=rows.num_rows,
        size_bytes=len(data),
        stats={name: (found["min"], found["max"]) for name, found in min_max.items()},
    )


def read(table_uri: str, layout: Layout, file: DataFile, columns: Sequence[str] | None = None) -> pa.Table:
    """Some columns of a file, or all, the partition column included. `vector` is read as `large_binary`."""
    names = layout.schema.names if columns is None else list(columns)
    in_file = [name for name in names if name != layout.partition]

    def read_columns() -> pa.Table:
        filesystem, path = storage.open_filesystem(storage.join(table_uri, file.path))
        with pq.ParquetFile(path, filesystem=filesystem, pre_buffer=True) as parquet:
            return parquet.read(in_file, use_threads=False)

    data = with_retries(read_columns, f"cannot read {file.path} of {table_uri}")
    value = pa.scalar(layout.partition_values([file.partition])[0], layout.partition_type)
    data = data.append_column(layout.partition, pa.repeat(value, data.num_rows)).select(names)
    types = {"vector": pa.large_binary()}
    return data.cast(pa.schema([(name, types.get(name, layout.schema.field(name).type)) for name in names]))


def from_log(delta: DeltaTable, layout: Layout, partitions: Sequence[Any] | None = None) -> list[DataFile]:
    """The files of some partitions, or of all, in one version of a table."""
    actions = pa.table(delta.get_add_actions(flatten=True))
    column = f"partition.{layout.partition}"
    if partitions is not None:
        wanted = pa.array(partitions, actions.schema.field(column).type)
        actions = actions.filter(pc.is_in(actions[column], value_set=wanted))
    return [
        DataFile(
            path=unquote(row["path"]),  # percent-encoded in the log
            partition=str(row[column]),
            n_rows=row["num_records"],
            size_bytes=row["size_bytes"],
            stats={
                name: (row[f"min.{name}"], row[f"max.{name}"])
                for name in layout.stats_columns
                if row.get(f"min.{name}") is not None
            },
        )
        for row in actions.to_pylist()
    ]


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
