"""One table of a store, a Delta table that any Delta reader can open.

Any process may write data files, which readers do not see. Only the holder of the table's lease commits them.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypedDict

import pyarrow as pa
from deltalake.exceptions import TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction

from persona import storage
from persona.errors import StorageError
from persona.storage.retry import is_transient
from persona.store import data_files, key_index
from persona.store.data_files import DataFile
from persona.store.delta_calls import create_table
from persona.store.file_list import FileList
from persona.store.log import JOB, Log
from persona.store.schema import LAYOUTS

_PARALLEL_READS, _PARALLEL_DELETES = 8, 16


class Run(TypedDict):
    """A run that took the lease of a table: the first version it could write, and when."""

    table: str
    version: int
    job: str
    at: str


class Table:
    """A table at its newest version, or read-only at a fixed one. Open it in the process that uses it.

    Methods that read the log raise `StorageError` when the table or version does not exist. Reading and writing files
    does not read the log, and with `files`, those of the version, nor does reading rows.
    """

    def __init__(self, uri: str, name: str, version: int | None = None, files: FileList | None = None) -> None:
        self.uri = uri
        self.name = name
        self.layout = LAYOUTS[name]
        self.log = Log(uri, self.layout, version)
        self._is_fixed = files is not None
        self._files = files

    @staticmethod
    def create(uri: str, name: str, properties: Mapping[str, str]) -> None:
        """Create an empty table with `properties` in its metadata. An existing table is left unchanged."""
        layout = LAYOUTS[name]
        # Every reader loads the statistics in the log, so keep only those that let it skip files.
        stats_columns = ",".join(layout.stats_columns or layout.order)
        create_table(
            uri,
            layout.schema,
            name=name,
            partition=layout.partition,
            properties={"delta.dataSkippingStatsColumns": stats_columns, **properties},
        )

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
        return self.log.latest().properties()

    def set_properties(self, properties: Mapping[str, str]) -> None:
        """Set some of the metadata properties, in one commit; without any, nothing is committed."""
        if properties:
            self.log.latest().set_properties(properties)

    def id(self) -> str:
        """What tells this table from any other; a copy has the same."""
        return self.log.latest().id()

    def version(self) -> int:
        """The newest version, or the fixed one."""
        return self._files.version if self._is_fixed and self._files is not None else self.log.latest().version()

    def file_list(self) -> FileList:
        """The data files of the newest version, or of the fixed one."""
        if self._files is not None and self._is_fixed:
            return self._files
        latest = self.log.latest()
        if self._files is None or self._files.version != latest.version():
            self._files = FileList.of(latest, self.layout)
        return self._files

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
            needed = Table(self.uri, self.name, version).file_list().paths()
        except StorageError as error:
            if error.__cause__ is None or is_transient(error.__cause__):
                raise
            return False
        return needed <= self.stored_paths()

    def partitions(self) -> list[Any]:
        """The partition values that have rows, sorted."""
        return sorted(self.layout.partition_values(self.file_list().partitions()))

    def files(self, partitions: Sequence[Any] | None = None) -> list[DataFile]:
        """The data files of some partitions, or of all."""
        return self.file_list().of_partitions(partitions)

    def read(
        self,
        columns: Sequence[str] | None = None,
        *,
        partitions: Sequence[Any] | None = None,
        values: Mapping[str, Sequence[Any]] | None = None,
    ) -> pa.Table:
        """The rows of some partitions, or of all, that have one of the `values` of each column, in no particular order.

        Files and row groups that cannot have such rows are not read. `vector` is read as `large_binary`.
        """
        files = [file for file in self.files(partitions) if file.may_hold(values or {})]
        read = partial(data_files.read, self.uri, self.layout, columns=columns, values=values)
        names = self.layout.schema.names if columns is None else columns
        with ThreadPoolExecutor(_PARALLEL_READS) as pool:
            return pa.concat_tables([self.layout.schema_read(names).empty_table(), *pool.map(read, files)])

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

    def delete(self, paths: Sequence[str]) -> None:
        """Delete data files that no version needs, and their key indexes."""
        uris = [storage.join(self.uri, path) for path in paths]
        if self.layout.has_key_index:
            uris += [key_index.uri_of(self.uri, path) for path in paths]
        with ThreadPoolExecutor(_PARALLEL_DELETES) as pool:
            list(pool.map(storage.delete, uris))

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
