"""A table of a store as a Delta table: how rows get in and out, one whole commit at a time.

Files are written by whoever has rows, on any machine, and nobody sees them. One process commits them: the holder of the
table's lease. The log itself puts commits in order (on S3 by conditional put, so that no lock table is needed) and
knows which lease rules. Anyone reads the table without this project.
"""

import io
import json
import random
import re
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import (
    CommitProperties,
    DeltaTable,
    Schema as DeltaSchema,
    Transaction,
)
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction

from persona import storage
from persona.errors import LeaseLost, StorageError
from persona.storage import delta_options
from persona.storage.retry import in_one_line, is_transient, retry_transient
from persona.store.schema import LAYOUTS, DataFile

T = TypeVar("T")

_PARQUET: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 1,
    "row_group_size": 16_384,
}
_LARGE = ("vector", "persona", "output")
# The names under which the number of the lease that rules, and that of the commits so far, stand in the log: Delta's
# application transactions, which every later version keeps.
_LEASE, _COMMITS = "persona.lease", "persona.commits"
_JOB = "persona.job"
_TRY_FOR_S = 300.0
_DELETIONS_AT_ONCE = 16


class Table:
    """A Delta table; it follows the newest version, or shows one. Not for other processes: make it where it is used.

    The log is read when it is needed first: who only reads or writes files, does without.
    """

    def __init__(self, uri: str, name: str, version: int | None = None) -> None:
        """For a table that exists, as of a version if one is given, and then only to be read.

        Whatever reads the log raises `StorageError` where there is no such table or version.
        """
        self.uri = uri
        self.name = name
        self.layout = LAYOUTS[name]
        self._shown = version
        self._opened: DeltaTable | None = None

    @staticmethod
    def create(uri: str, name: str, properties: Mapping[str, str]) -> None:
        """Create an empty table with `properties` in its metadata; leaves one that exists as it is."""
        layout = LAYOUTS[name]
        # Only these columns are worth statistics in the log, which every reader reads.
        spans = {"delta.dataSkippingStatsColumns": ",".join(layout.spans or layout.order)}
        new = partial(
            DeltaTable.create,
            uri,
            layout.schema,
            mode="ignore",
            name=name,
            partition_by=[layout.partition],
            configuration={**spans, **properties},
            raise_if_key_not_exists=False,
            storage_options=delta_options(uri),
        )

        def create() -> None:
            try:
                new()
            except DeltaError as error:
                if "Invalid table version: 0" not in str(error):
                    raise
                # The answer was a 409, which delta-rs takes for a first version that is there, and then misses it.
                raise ConnectionError(str(error)) from error

        with suppress(CommitFailedError):  # another process has created it meanwhile
            _asked(create, f"cannot create the table {uri}")

    @staticmethod
    def find(uri: str, name: str) -> "Table | None":
        """The table, or None where there is none."""
        table = Table(uri, name)
        try:
            table.version()
        except StorageError as error:
            if isinstance(error.__cause__, TableNotFoundError):
                return None
            raise
        return table

    def properties(self) -> dict[str, str]:
        """What `create` was given, and Delta's own."""
        return dict(self._refreshed().metadata().configuration)

    def version(self) -> int:
        """The newest version, or the one that is shown."""
        return self._refreshed().version()

    def runs(self) -> list[dict[str, Any]]:
        """Who has taken the lease of this table and when, newest first, as far as the log goes back."""
        return [
            {
                "table": self.name,
                "version": entry["version"],
                "job": entry[_JOB],
                "at": datetime.fromtimestamp(entry["timestamp"] / 1000, UTC).isoformat(timespec="seconds"),
            }
            for entry in self._refreshed().history()
            if _JOB in entry
        ]

    def has(self, version: int) -> bool:
        """Whether a version can still be read: neither its log nor one of its files has been taken away."""
        try:
            wanted = {file.path for file in Table(self.uri, self.name, version).files()}
        except StorageError as error:
            if error.__cause__ is None or is_transient(error.__cause__):
                raise
            return False
        return wanted <= self._paths_there()

    def partitions(self) -> list[Any]:
        """The values of the partition column that have rows, sorted."""
        found = {row[self.layout.partition] for row in self._refreshed().partitions()}
        kind = self.layout.schema.field(self.layout.partition).type
        return sorted(int(v) for v in found) if pa.types.is_integer(kind) else sorted(found)

    def scan(self, columns: Sequence[str] | None, where: str | None = None) -> pa.Table:
        """The rows for which the SQL predicate `where` holds, in no order.

        Files, row groups and pages that cannot hold such rows are not read. `vector` comes as `large_binary`:
        a bucket of them may be larger than the 2 GiB that `binary` can address.
        """
        names = self.layout.schema.names if columns is None else list(columns)
        fields = [self.layout.schema.field(name) for name in names]
        schema = pa.schema([f.with_type(pa.large_binary()) if f.name == "vector" else f for f in fields])
        table = self._refreshed()

        def read() -> pa.Table:
            reader = pa.RecordBatchReader.from_stream(table.scan(columns=names, predicate=where))
            return pa.Table.from_batches((batch.select(names).cast(schema) for batch in reader), schema)

        return _asked(read, f"cannot read the table {self.uri}")

    def append(self, rows: pa.Table) -> None:
        """Add rows of one partition in one commit that goes past other writers: for a table without a key."""
        file = self.write_file(rows)
        self._put([self._added(file, same_rows=False)], {}, lambda: file.path in {one.path for one in self.files()})

    def files(self, partitions: Sequence[Any] | None = None) -> list[DataFile]:
        """The files of some partitions, or of all, with what the log says of them."""
        return self._files(self._refreshed(), partitions)

    def _files(self, table: DeltaTable, partitions: Sequence[Any] | None = None) -> list[DataFile]:
        found = pa.table(table.get_add_actions(flatten=True))
        name = f"partition.{self.layout.partition}"
        if partitions is not None:
            found = found.filter(pc.is_in(found[name], value_set=pa.array(partitions, found.schema.field(name).type)))
        spans = {n: (f"min.{n}", f"max.{n}") for n in self.layout.spans}
        return [
            DataFile(
                path=unquote(row["path"]),  # the log holds it in the form of a URL
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
        data = _asked(lambda: self._read(file, stored), f"cannot read {file.path} of {self.uri}")
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

    def lease(self) -> int:
        """The number of the lease that rules; 0 before the first."""
        return self._refreshed().transaction_version(_LEASE) or 0

    def fence(self, number: int, *, job: str) -> None:
        """Note in the log that the lease of this number rules, for this job; older holders cannot commit any more."""
        self._put([], {_LEASE: number}, lambda: self.lease() >= number, {_JOB: job})
        self._held(number)

    def commit(
        self,
        add: Sequence[DataFile] = (),
        remove: Sequence[DataFile] = (),
        *,
        lease: int,
        same_rows: bool = False,
    ) -> None:
        """Files in and out, in one commit that counts once; with `same_rows`, readers of changes pass it over.

        It goes on top of a version in which the lease of this number rules and nothing of it has happened yet; where
        another commit comes first, or the answer is lost, it looks again. So no file is committed twice, and nothing by
        a holder that was replaced.

        Raises:
            LeaseLost: a later lease rules.
            StorageError: a file to remove is gone, because another program changed the table; or no answer.
        """
        now_ms = int(time.time() * 1000)
        actions: list[Any] = [self._added(file, same_rows) for file in add]
        actions += [
            RemoveAction(file.path, not same_rows, now_ms, file.size_bytes, {self.layout.partition: file.partition})
            for file in remove
        ]
        if actions:
            self._put_once(actions, lease, {file.path for file in remove})

    def _put_once(self, actions: list[Any], lease: int, leaving: Collection[str] = ()) -> None:
        numbers = {_LEASE: lease}

        def is_in() -> bool:
            # One look at the log answers all that follows: between two of them, another run could take over unseen.
            latest = self._held(lease)
            count = latest.transaction_version(_COMMITS) or 0
            if count >= numbers.setdefault(_COMMITS, count + 1):
                return True  # only this lease's holder counts, so it was an attempt of which no answer came
            there = {file.path for file in self._files(latest)} if leaving else set()
            if gone := next((path for path in leaving if path not in there), None):
                raise StorageError(
                    f"another program has removed {gone} from {self.uri} while this run replaced rows of it; "
                    "nothing was lost, run the same command again"
                )
            return False

        self._put(actions, numbers, is_in)

    def _put(
        self,
        actions: list[Any],
        numbers: Mapping[str, int],
        is_in: Callable[[], bool],
        facts: dict[str, Any] | None = None,
    ) -> None:
        """Attempts to be the next version until one succeeds, or `is_in`, which looks at the log before each, says so.

        Raises StorageError where there is no use in another attempt on top of a later version.
        """
        give_up = time.monotonic() + _TRY_FOR_S
        while not is_in():
            seen = self._log.version()
            try:
                self._transact(actions, numbers, facts)
                return
            except (CommitFailedError, StorageError) as error:
                refused = isinstance(error, CommitFailedError) and not is_transient(error) and self.version() == seen
                if refused or time.monotonic() > give_up:
                    raise StorageError(f"cannot write to the table {self.uri}: {in_one_line(error)}") from error
            time.sleep(random.uniform(0.01, 0.5))

    def _held(self, lease: int) -> DeltaTable:
        """The newest version, in which this lease rules. Raises LeaseLost."""
        ruling = self.lease()
        if ruling != lease:
            raise LeaseLost(
                f"another run has taken over {self.uri} (lease {ruling}; this run held {lease} and did not renew it in "
                "time); nothing was written since, run the same command again"
            )
        return self._log

    def vacuum(self, *, lease: int, keep_hours: int) -> list[str]:
        """Delete the files that no version of the last hours holds, also those that were never committed.

        With 0 hours, everything but the newest version goes. Files are listed first, and deleted if this lease rules
        after that: whoever rules later has staged nothing before, so nothing of theirs is on the list.
        """
        if not self.layout.key:
            keep_hours = max(keep_hours, 1)  # `append` needs no lease: what it is about to commit is younger than that
        listed = self._paths_there() if not keep_hours else set()
        latest = self._refreshed()
        look = partial(latest.vacuum, keep_hours, dry_run=True, enforce_retention_duration=False, full=True)
        unused = set(_asked(look, f"cannot list what is unused of the table {self.uri}"))
        used = {file.path for file in self._files(self._held(lease))}
        # The library believes clocks, and those of two machines differ.
        found = sorted(storage.join(self.uri, path) for path in (unused | listed) - used)
        with ThreadPoolExecutor(_DELETIONS_AT_ONCE) as pool:
            list(pool.map(storage.delete, found))
        return found

    def _paths_there(self) -> set[str]:
        """All files of rows, committed or not."""
        return {
            file.uri.removeprefix(storage.join(self.uri, "")) for file in storage.list_files(self.uri, (".parquet",))
        }

    def forget_log(self, *, lease: int) -> list[str]:
        """Delete every version but a new last one: old ones name, in statistics, who is gone. Returns the files."""
        self._put_once([], lease)
        latest = self._held(lease)
        _asked(latest.create_checkpoint, f"cannot write a checkpoint of {self.uri}")
        last = latest.version()
        old = [
            file.uri
            for file in storage.list_files(storage.join(self.uri, "_delta_log"))
            if (number := file.uri.rsplit("/", 1)[1].split(".")[0]).isdigit() and int(number) < last
        ]
        for uri in old:
            storage.delete(uri)
        return old

    def _added(self, file: DataFile, same_rows: bool) -> AddAction:
        low = {name: ends[0] for name, ends in file.span.items()}
        high = {name: ends[1] for name, ends in file.span.items()}
        nulls = dict.fromkeys(file.span, 0)
        stats = {"numRecords": file.n_rows, "minValues": low, "maxValues": high, "nullCount": nulls}
        partition = {self.layout.partition: file.partition}
        # The library reads an escaped character beyond U+1FFFF as another one.
        text = json.dumps(stats, ensure_ascii=False)
        return AddAction(file.path, file.size_bytes, partition, int(time.time() * 1000), not same_rows, text)

    def _transact(self, actions: list[Any], numbers: Mapping[str, int], facts: dict[str, Any] | None = None) -> None:
        """One attempt to be the next version. Raises CommitFailedError when another one was."""
        with _storage_errors(f"cannot write to the table {self.uri}"):
            self._log.create_write_transaction(
                actions,
                "append",
                DeltaSchema.from_arrow(self.layout.schema),
                [self.layout.partition],
                commit_properties=CommitProperties(
                    custom_metadata=facts,
                    max_commit_retries=0,
                    app_transactions=[Transaction(name, number) for name, number in numbers.items()],
                ),
            )

    @property
    def _log(self) -> DeltaTable:
        """The log as it was when it was last read."""
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def _open(self) -> DeltaTable:
        options = delta_options(self.uri)
        table = partial(DeltaTable, self.uri, version=self._shown, storage_options=options)
        of_version = "" if self._shown is None else f" as of version {self._shown}"
        return _asked(table, f"cannot open the table {self.uri}{of_version}")

    def _refreshed(self) -> DeltaTable:
        """The log, read again; that of a version which is shown does not change."""
        if self._opened is not None and self._shown is None:
            _asked(self._opened.update_incremental, f"cannot read the log of the table {self.uri}")
        return self._log


def one_of(column: str, values: Sequence[str] | Sequence[int]) -> str:
    """The SQL predicate that a column has one of some values; its range lets readers skip where the list is long."""
    if not len(values):
        return "false"
    listed = ", ".join(map(_literal, values))
    between = f"{column} BETWEEN {_literal(min(values))} AND {_literal(max(values))}"
    return f"{between} AND {column} IN ({listed})" if len(values) > 1 else f"{column} = {listed}"


def _literal(value: str | int) -> str:
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value)


@contextmanager
def _storage_errors(what: str) -> Iterator[None]:
    """Give the libraries' errors, which run over many lines, one that a person can read; conflicts pass."""
    try:
        yield
    except CommitFailedError:
        raise
    except (DeltaError, OSError, pa.ArrowInvalid) as error:
        raise StorageError(f"{what}: {' '.join(str(error).split())[:500]}") from error


def _asked(work: Callable[[], T], what: str) -> T:
    """What `work` gives in the end, or a StorageError that begins with `what`."""
    with _storage_errors(what):
        return retry_transient(work, what)
