"""One table of a store, a Delta table that any Delta reader can open.

Any process may write data files, which readers do not see. Only the holder of the table's lease commits them.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypedDict

import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction

from persona import storage
from persona.errors import StorageError
from persona.storage import delta_options
from persona.storage.retry import is_transient
from persona.store import data_files
from persona.store.data_files import DataFile
from persona.store.delta_calls import with_retries
from persona.store.log import JOB, Log
from persona.store.schema import LAYOUTS


class Run(TypedDict):
    """A run that took the lease of a table: the first version it could write, and when."""

    table: str
    version: int
    job: str
    at: str


class Table:
    """A table at its newest version, or read-only at a fixed one. Open it in the process that uses it.

    Methods that read the log raise `StorageError` when the table or version does not exist. Reading and writing files
    does not read the log.
    """

    def __init__(self, uri: str, name: str, version: int | None = None) -> None:
        self.uri = uri
        self.name = name
        self.layout = LAYOUTS[name]
        self.log = Log(uri, self.layout, version)

    @staticmethod
    def create(uri: str, name: str, properties: Mapping[str, str]) -> None:
        """Create an empty table with `properties` in its metadata. An existing table is left unchanged."""
        layout = LAYOUTS[name]
        # Every reader loads the statistics in the log, so keep only those that let it skip files.
        stats_columns = ",".join(layout.stats_columns or layout.order)
        new = partial(
            DeltaTable.create,
            uri,
            layout.schema,
            mode="ignore",
            name=name,
            partition_by=[layout.partition],
            configuration={"delta.dataSkippingStatsColumns": stats_columns, **properties},
            raise_if_key_not_exists=False,
            storage_options=delta_options(uri),
        )

        def create() -> None:
            try:
                new()
            except DeltaError as error:
                if "Invalid table version: 0" not in str(error):
                    raise
                # delta-rs took a 409 response for an existing first version, which it then failed to read.
                raise ConnectionError(str(error)) from error

        with suppress(CommitFailedError):  # another process created it at the same time
            with_retries(create, f"cannot create the table {uri}")

    @staticmethod
    def find(uri: str, name: str) -> "Table | None":
        """The table, or None when there is none."""
        table = Table(uri, name)
        try:
            table.version()
        except StorageError as error:
            if isinstance(error.__cause__, TableNotFoundError):
                return None
            raise
        return table

    def properties(self) -> dict[str, str]:
        """The metadata properties: those given to `create`, and Delta's."""
        return dict(self.log.latest().metadata().configuration)

    def id(self) -> str:
        """What tells this table from any other; a copy has the same."""
        return str(self.log.latest().metadata().id)

    def version(self) -> int:
        """The newest version, or the fixed one."""
        return self.log.latest().version()

    def runs(self) -> list[Run]:
        """The runs that took the table's lease, newest first, as far back as the log reaches."""
        return [
            {
                "table": self.name,
                "version": entry["version"],
                "job": entry[JOB],
                "at": datetime.fromtimestamp(entry["timestamp"] / 1000, UTC).isoformat(timespec="seconds"),
            }
            for entry in self.log.latest().history()
            if JOB in entry
        ]

    def has(self, version: int) -> bool:
        """Whether a version is still readable: its log entries and all its data files exist."""
        try:
            needed = {file.path for file in Table(self.uri, self.name, version).files()}
        except StorageError as error:
            if error.__cause__ is None or is_transient(error.__cause__):
                raise
            return False
        return needed <= self.stored_paths()

    def partitions(self) -> list[Any]:
        """The partition values that have rows, sorted."""
        found = {row[self.layout.partition] for row in self.log.latest().partitions()}
        return sorted(self.layout.partition_values(found))

    def scan(self, columns: Sequence[str] | None, where: str | None = None) -> pa.Table:
        """The rows that match the SQL predicate `where`, in no particular order.

        Files, row groups and pages that cannot match are not read. `vector` is read as `large_binary`, because a
        bucket of vectors may exceed the 2 GiB that `binary` can address.
        """
        names = self.layout.schema.names if columns is None else list(columns)
        fields = [self.layout.schema.field(name) for name in names]
        schema = pa.schema([f.with_type(pa.large_binary()) if f.name == "vector" else f for f in fields])
        table = self.log.latest()

        def read() -> pa.Table:
            reader = pa.RecordBatchReader.from_stream(table.scan(columns=names, predicate=where))
            return pa.Table.from_batches((batch.select(names).cast(schema) for batch in reader), schema)

        return with_retries(read, f"cannot read the table {self.uri}")

    def files(self, partitions: Sequence[Any] | None = None) -> list[DataFile]:
        """The data files of some partitions, or of all."""
        return data_files.from_log(self.log.latest(), self.layout, partitions)

    def stored_paths(self) -> set[str]:
        """The paths of all stored data files, committed or not."""
        return {
            file.uri.removeprefix(storage.join(self.uri, "")) for file in storage.list_files(self.uri, (".parquet",))
        }

    def write_file(self, rows: pa.Table) -> DataFile:
        """Write the rows of one partition to a new file. Readers do not see it until it is committed."""
        return data_files.write(self.uri, self.layout, rows)

    def read_file(self, file: DataFile, columns: Sequence[str] | None = None) -> pa.Table:
        """Some columns of a file, or all, the partition column included. `vector` is read as `large_binary`."""
        return data_files.read(self.uri, self.layout, file, columns)

    def discard(self, file: DataFile) -> None:
        """Delete a file that was never committed."""
        storage.delete(storage.join(self.uri, file.path))

    def append(self, rows: pa.Table) -> None:
        """Add rows of one partition in one commit, without a lease: for a table without a key."""
        self.log.append(data_files.add_action(self.layout, self.write_file(rows)))

    def lease(self) -> int:
        """The number of the ruling lease; 0 before the first."""
        return self.log.lease()

    def fence(self, number: int, *, job: str) -> None:
        """Make this lease the ruling one and record its job; holders of lower numbers can no longer commit."""
        self.log.fence(number, job=job)

    def commit(
        self,
        add: Sequence[DataFile] = (),
        remove: Sequence[DataFile] = (),
        *,
        lease: int,
        same_rows: bool = False,
    ) -> None:
        """Add and remove files in one commit, exactly once; with `same_rows`, change readers skip it.

        Raises:
            LeaseLost: A later lease rules.
            StorageError: A file to remove is gone because another program changed the table, or the storage failed.
        """
        actions: list[AddAction | RemoveAction] = [
            *(data_files.add_action(self.layout, file, same_rows=same_rows) for file in add),
            *(data_files.remove_action(self.layout, file, same_rows=same_rows) for file in remove),
        ]
        if actions:
            self.log.commit(actions, lease=lease, removed={file.path for file in remove})


def sql_in(column: str, values: Sequence[str] | Sequence[int]) -> str:
    """The SQL predicate that a column has one of `values`, with their range, which lets readers skip files."""
    if not len(values):
        return "false"
    listed = ", ".join(map(_literal, values))
    between = f"{column} BETWEEN {_literal(min(values))} AND {_literal(max(values))}"
    return f"{between} AND {column} IN ({listed})" if len(values) > 1 else f"{column} = {listed}"


def _literal(value: str | int) -> str:
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value)
