"""A table of a store as a Delta table: how rows get in and out, one whole commit at a time.

Files are written by whoever has rows, on any machine, and nobody sees them. One process commits them: the holder of the
table's lease. The log itself puts commits in order (on S3 by conditional put, so that no lock table is needed) and
knows which lease rules. Anyone reads the table without this project.
"""

import contextlib
import io
import json
import random
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import (
    ColumnProperties,
    CommitProperties,
    DeltaTable,
    Transaction,
    WriterProperties,
    write_deltalake,
)
from deltalake import Schema as DeltaSchema
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction

from persona import storage
from persona.errors import LeaseLost, StorageError
from persona.layouts import LAYOUTS, DataFile
from persona.retries import persistently
from persona.storage import delta_options

_WRITER = WriterProperties(
    compression="ZSTD",
    compression_level=1,
    max_row_group_size=16_384,
    # Vectors do not repeat: a dictionary of them costs memory and time, and gains nothing.
    column_properties={"vector": ColumnProperties(dictionary_enabled=False, statistics_enabled="NONE")},
)
_PARQUET: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 1,
    "row_group_size": 16_384,
}
_LARGE = ("vector", "persona", "output")
# The name under which a lease's number stands in the log, as one of Delta's application transactions.
_WRITER_NAME = "persona.lease"
_JOB = "persona.job"
_TRY_FOR_S = 300.0


class Table:
    """An open Delta table; it follows the newest version. Not for other processes: open it where it is used."""

    def __init__(self, uri: str, name: str) -> None:
        """Open; raises `StorageError` where there is none or nothing answers."""
        self.uri = uri
        self.name = name
        self.layout = LAYOUTS[name]
        with _storage_errors(f"cannot open the table {uri}"):
            self._latest = DeltaTable(uri, storage_options=delta_options(uri))
        self._pinned: tuple[int, DeltaTable] | None = None

    @staticmethod
    def create(uri: str, name: str, properties: Mapping[str, str]) -> None:
        """Create an empty table with `properties` in its metadata; leaves one that exists as it is."""
        layout = LAYOUTS[name]
        with _storage_errors(f"cannot create the table {uri}"):
            DeltaTable.create(
                uri,
                layout.schema,
                mode="ignore",
                name=name,
                partition_by=[layout.partition],
                # Only these columns are worth statistics in the log, which every reader reads.
                configuration={"delta.dataSkippingStatsColumns": ",".join(layout.spans or layout.order), **properties},
                raise_if_key_not_exists=False,
                storage_options=delta_options(uri),
            )

    @staticmethod
    def find(uri: str, name: str) -> "Table | None":
        """The table, or None where there is none."""
        try:
            return Table(uri, name)
        except StorageError as error:
            if isinstance(error.__cause__, TableNotFoundError):
                return None
            raise

    def properties(self) -> dict[str, str]:
        """What `create` was given, and Delta's own."""
        return dict(self._latest.metadata().configuration)

    def version(self) -> int:
        """The newest version."""
        return self._at(None).version()

    def runs(self) -> list[dict[str, Any]]:
        """Who has taken the lease of this table and when, newest first, as far as the log goes back."""
        return [
            {
                "table": self.name,
                "version": entry["version"],
                "job": entry[_JOB],
                "at": datetime.fromtimestamp(entry["timestamp"] / 1000, UTC).isoformat(timespec="seconds"),
            }
            for entry in self._at(None).history()
            if _JOB in entry
        ]

    def partitions(self, *, version: int | None = None) -> list[Any]:
        """The values of the partition column that have rows, sorted."""
        found = {row[self.layout.partition] for row in self._at(version).partitions()}
        kind = self.layout.schema.field(self.layout.partition).type
        return sorted(int(v) for v in found) if pa.types.is_integer(kind) else sorted(found)

    def scan(self, columns: Sequence[str] | None, where: str | None = None, *, version: int | None = None) -> pa.Table:
        """The rows for which the SQL predicate `where` holds, as of a version (default: the newest), in no order.

        Files, row groups and pages that cannot hold such rows are not read. `vector` comes as `large_binary`:
        a bucket of them may be larger than the 2 GiB that `binary` can address.
        """
        names = self.layout.schema.names if columns is None else list(columns)
        fields = [self.layout.schema.field(name) for name in names]
        schema = pa.schema([f.with_type(pa.large_binary()) if f.name == "vector" else f for f in fields])
        with _storage_errors(f"cannot read the table {self.uri}"):
            reader = pa.RecordBatchReader.from_stream(self._at(version).scan(columns=names, predicate=where))
            return pa.Table.from_batches((batch.select(names).cast(schema) for batch in reader), schema)

    def append(self, rows: pa.Table) -> None:
        """Add rows in one commit that goes past other writers: for a table without a key."""
        ordered = rows.select(self.layout.schema.names).cast(self.layout.schema)
        with _storage_errors(f"cannot write to the table {self.uri}"):
            write_deltalake(
                self._at(None),
                ordered.sort_by([(name, "ascending") for name in self.layout.order]),
                mode="append",
                writer_properties=_WRITER,
                commit_properties=CommitProperties(max_commit_retries=100),
            )

    def files(self, partitions: Sequence[Any] | None = None, *, version: int | None = None) -> list[DataFile]:
        """The files of some partitions, or of all, with what the log says of them."""
        found = pa.table(self._at(version).get_add_actions(flatten=True))
        name = f"partition.{self.layout.partition}"
        if partitions is not None:
            found = found.filter(pc.is_in(found[name], value_set=pa.array(partitions, found.schema.field(name).type)))
        spans = {n: (f"min.{n}", f"max.{n}") for n in self.layout.spans}
        return [
            DataFile(
                path=row["path"],
                partition=str(row[name]),
                n_rows=row["num_records"],
                size_bytes=row["size_bytes"],
                span={n: (row[low], row[high]) for n, (low, high) in spans.items() if row.get(low) is not None},
            )
            for row in found.to_pylist()
        ]

    def partition_values(self, values: Iterable[str]) -> list[Any]:
        """Partitions as `DataFile` names them, as values of the column."""
        kind = self.layout.schema.field(self.layout.partition).type
        return [int(value) if pa.types.is_integer(kind) else value for value in values]

    def write_file(self, rows: pa.Table) -> DataFile:
        """Write rows of one partition as a file that no reader sees until it is committed."""
        layout = self.layout
        value = rows[layout.partition][0].as_py()
        rows = rows.select(layout.schema.names).cast(layout.schema)
        rows = rows.sort_by([(name, "ascending") for name in layout.order])
        folder = f"{layout.partition}={re.sub(r'[^A-Za-z0-9_.-]', '_', str(value))}"
        path = f"{folder}/part-{uuid.uuid4().hex}.parquet"
        sink = io.BytesIO()
        rows = rows.drop_columns([layout.partition])
        # Vectors and texts do not repeat: a dictionary of them costs memory and time, and gains nothing.
        small = [name for name in rows.column_names if name not in _LARGE]
        pq.write_table(rows, sink, use_dictionary=small, write_statistics=small, **_PARQUET)
        data = sink.getvalue()
        storage.write_bytes(storage.join(self.uri, path), data)
        spans = {name: pc.min_max(rows[name]).as_py() for name in layout.spans}
        return DataFile(
            path=path,
            partition=str(value),
            n_rows=rows.num_rows,
            size_bytes=len(data),
            span={name: (ends["min"], ends["max"]) for name, ends in spans.items()},
        )

    def read_file(self, file: DataFile, columns: Sequence[str] | None = None) -> pa.Table:
        """Columns of one file, the partition's among them; `vector` comes as `large_binary`."""
        names = self.layout.schema.names if columns is None else list(columns)
        stored = [name for name in names if name != self.layout.partition]
        data = persistently(lambda: self._read(file, stored), f"cannot read {file.path} of {self.uri}")
        kind = self.layout.schema.field(self.layout.partition).type
        value = pa.scalar(self.partition_values([file.partition])[0], kind)
        data = data.append_column(self.layout.partition, pa.repeat(value, data.num_rows)).select(names)
        kinds = {"vector": pa.large_binary()}
        return data.cast(pa.schema([(name, kinds.get(name, self.layout.schema.field(name).type)) for name in names]))

    def _read(self, file: DataFile, columns: list[str]) -> pa.Table:
        filesystem, path = storage.open_filesystem(storage.join(self.uri, file.path))
        with pq.ParquetFile(path, filesystem=filesystem, pre_buffer=True) as parquet:
            return parquet.read(columns, use_threads=False)

    def discard(self, file: DataFile) -> None:
        """Delete a file that was never committed."""
        storage.delete(storage.join(self.uri, file.path))

    def fence(self, number: int, *, job: str) -> None:
        """Note in the log that the lease of this number rules, for this job; older holders cannot commit any more."""
        while self._fence() < number:
            with contextlib.suppress(CommitFailedError):
                self._transact([], number, {_JOB: job})
        if self._fence() > number:
            raise _lost(self.uri, number, self._fence())

    def commit(self, add: Sequence[DataFile] = (), remove: Sequence[DataFile] = (), *, lease: int) -> None:
        """Files in and out, in one commit that counts once.

        It goes on top of a version in which the lease of this number rules and nothing of it has happened yet; where
        another commit comes first, or the answer is lost, it looks again. So no file is committed twice, and nothing by
        a holder that was replaced.

        Raises:
            LeaseLost: a later lease rules.
            StorageError: a file to remove is gone, because another program changed the table; or no answer.
        """
        if not add and not remove:
            return
        actions: list[Any] = [self._added(file) for file in add]
        now_ms = int(time.time() * 1000)
        actions += [
            RemoveAction(file.path, True, now_ms, file.size_bytes, {self.layout.partition: file.partition})
            for file in remove
        ]
        give_up = time.monotonic() + _TRY_FOR_S
        first = True
        while True:
            if self._fence() != lease:
                raise _lost(self.uri, lease, self._fence())
            if remove or not first:
                there = {file.path for file in self.files()}
                if not first and all(file.path in there for file in add) and not any(f.path in there for f in remove):
                    return
                if gone := [file.path for file in remove if file.path not in there]:
                    raise StorageError(
                        f"another program has removed {gone[0]} from {self.uri} while this run replaced rows of it; "
                        "nothing was lost, run the same command again"
                    )
            first = False
            try:
                self._transact(actions, lease)
                return
            except CommitFailedError as error:
                if time.monotonic() > give_up:
                    raise StorageError(f"other writers of {self.uri} left no gap for {_TRY_FOR_S:.0f} s") from error
            except StorageError:
                if time.monotonic() > give_up:
                    raise
            time.sleep(random.uniform(0.01, 0.5))

    def compact(self, *, lease: int, target_bytes: int) -> dict[str, Any]:
        """Merge small files of each partition, by the library's own means; returns its counts."""
        try:
            with _storage_errors(f"cannot compact the table {self.uri}"):
                found: dict[str, Any] = self._at(None).optimize.compact(
                    target_size=target_bytes,
                    writer_properties=_WRITER,
                    commit_properties=CommitProperties(app_transactions=[Transaction(_WRITER_NAME, lease)]),
                )
        except CommitFailedError:
            raise _lost(self.uri, lease, self._fence()) from None
        return found

    def vacuum(self, *, retention_hours: int) -> list[str]:
        """Delete the files that no version of the last hours holds, also those that were never committed."""
        with _storage_errors(f"cannot vacuum the table {self.uri}"):
            return list(
                self._at(None).vacuum(retention_hours, dry_run=False, enforce_retention_duration=False, full=True)
            )

    def forget_log(self, *, lease: int) -> list[str]:
        """Delete every version but a new last one: old ones name, in statistics, who is gone. Returns the files."""
        self._transact([], lease)
        with _storage_errors(f"cannot write a checkpoint of {self.uri}"):
            self._at(None).create_checkpoint()
        last = self._latest.version()
        old = [
            file.uri
            for file in storage.list_files(storage.join(self.uri, "_delta_log"))
            if (number := file.uri.rsplit("/", 1)[1].split(".")[0]).isdigit() and int(number) < last
        ]
        for uri in old:
            storage.delete(uri)
        self._pinned = None
        return old

    def _added(self, file: DataFile) -> AddAction:
        low = {name: ends[0] for name, ends in file.span.items()}
        high = {name: ends[1] for name, ends in file.span.items()}
        nulls = dict.fromkeys(file.span, 0)
        stats = {"numRecords": file.n_rows, "minValues": low, "maxValues": high, "nullCount": nulls}
        partition = {self.layout.partition: file.partition}
        return AddAction(file.path, file.size_bytes, partition, int(time.time() * 1000), True, json.dumps(stats))

    def _fence(self) -> int:
        return self._at(None).transaction_version(_WRITER_NAME) or 0

    def _transact(self, actions: list[Any], lease: int, facts: dict[str, Any] | None = None) -> None:
        """One attempt to be the next version. Raises CommitFailedError when another one was."""
        with _storage_errors(f"cannot write to the table {self.uri}"):
            self._latest.create_write_transaction(
                actions,
                "append",
                DeltaSchema.from_arrow(self.layout.schema),
                [self.layout.partition],
                commit_properties=CommitProperties(
                    custom_metadata=facts,
                    max_commit_retries=0,
                    app_transactions=[Transaction(_WRITER_NAME, lease)],
                ),
            )

    def _at(self, version: int | None) -> DeltaTable:
        with _storage_errors(f"cannot read the log of the table {self.uri}"):
            if version is None:
                self._latest.update_incremental()
                return self._latest
            if self._pinned is None or self._pinned[0] != version:
                options = delta_options(self.uri)
                self._pinned = version, DeltaTable(self.uri, version=version, storage_options=options)
            return self._pinned[1]


def one_of(column: str, values: Sequence[str] | Sequence[int]) -> str:
    """The SQL predicate that a column has one of some values; its range lets readers skip where the list is long."""
    if not len(values):
        return "false"
    listed = ", ".join(map(_literal, values))
    between = f"{column} BETWEEN {_literal(min(values))} AND {_literal(max(values))}"
    return f"{between} AND {column} IN ({listed})" if len(values) > 1 else f"{column} = {listed}"


def _literal(value: str | int) -> str:
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value)


def _lost(uri: str, mine: int, ruling: int) -> LeaseLost:
    return LeaseLost(
        f"another run has taken over {uri} (lease {ruling}; this run held {mine} and did not renew it in time); "
        "nothing was written since, run the same command again"
    )


@contextmanager
def _storage_errors(what: str) -> Iterator[None]:
    """Give the libraries' errors, which run over many lines, one that a person can read; conflicts pass."""
    try:
        yield
    except CommitFailedError:
        raise
    except (DeltaError, OSError) as error:
        raise StorageError(f"{what}: {' '.join(str(error).split())[:500]}") from error
