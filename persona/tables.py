"""The tables of a store as Delta tables: their schemas, and how rows get in and out, one whole commit at a time.

Anyone reads them without this project; `deltalake` writes them, on S3 by conditional put, so that no lock
table is needed.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import ColumnProperties, CommitProperties, DeltaTable, WriterProperties, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError

from persona.cells import TIME
from persona.errors import StorageError
from persona.inputs import REJECTS
from persona.storage import delta_options


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a table is laid out: its key, and the order of rows in a file, by which readers skip what they can."""

    schema: pa.Schema
    partition: str
    key: tuple[str, ...]
    order: tuple[str, ...]


LAYOUTS = {
    "behaviors": Layout(
        schema=pa.schema(
            [
                ("bucket", pa.int32()),
                ("user_id", pa.string()),
                ("behavior_id", pa.string()),
                ("timestamp", TIME),
                ("text_hash", pa.string()),
                ("vector", pa.binary()),
                ("embedded_at", TIME),
            ]
        ),
        partition="bucket",
        key=("bucket", "user_id", "behavior_id"),
        order=("bucket", "user_id", "timestamp"),
    ),
    "personas": Layout(
        schema=pa.schema(
            [
                ("bucket", pa.int32()),
                ("user_id", pa.string()),
                ("plug", pa.string()),
                ("n_behaviors", pa.int32()),
                ("persona", pa.list_(pa.float32())),
                ("updated_at", TIME),
            ]
        ),
        partition="bucket",
        key=("bucket", "user_id", "plug"),
        order=("bucket", "user_id"),
    ),
    "generations": Layout(
        schema=pa.schema(
            [
                ("request_id", pa.string()),
                ("user_id", pa.string()),
                ("output", pa.string()),
                ("variant", pa.string()),
                ("plug", pa.string()),
                ("llm", pa.string()),
                ("n_behaviors", pa.int32()),
                ("n_tokens", pa.int32()),
                ("finish_reason", pa.string()),
                ("fingerprint", pa.string()),
                ("created_at", TIME),
                ("bucket", pa.int32()),
            ]
        ),
        partition="variant",
        key=("variant", "bucket", "request_id"),
        order=("variant", "bucket", "request_id"),
    ),
    "rejects": Layout(schema=REJECTS, partition="job", key=(), order=("job", "source", "row")),
}

_WRITER = WriterProperties(
    compression="ZSTD",
    compression_level=1,
    max_row_group_size=16_384,
    # Vectors do not repeat: a dictionary of them costs memory and time, and gains nothing.
    column_properties={"vector": ColumnProperties(dictionary_enabled=False, statistics_enabled="NONE")},
)
_COMMIT = CommitProperties(max_commit_retries=100)
_TRY_FOR_S = 300.0
_LONGEST_PAUSE_S = 2.0


class Table:
    """An open Delta table; it follows the newest version. Not for other processes: open it where it is used."""

    def __init__(self, uri: str, name: str) -> None:
        """Open; raises `StorageError` where there is none or nothing answers."""
        self.uri = uri
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
                configuration={"delta.dataSkippingStatsColumns": ",".join(layout.order), **properties},
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
        """Add rows in one commit."""
        ordered = self._prepared(rows)
        self._commit(
            lambda delta: write_deltalake(
                delta, ordered, mode="append", writer_properties=_WRITER, commit_properties=_COMMIT
            )
        )

    def replace(self, rows: pa.Table) -> None:
        """Add rows in one commit, each in the place of the row with the same key if there is one."""
        ordered = self._prepared(rows)
        partition = self.layout.partition
        touched = ", ".join(_literal(value) for value in pc.unique(rows[partition]).to_pylist())
        same = " AND ".join(f"old.{name} = new.{name}" for name in self.layout.key)
        self._commit(
            lambda delta: (
                delta.merge(
                    ordered,
                    predicate=f"old.{partition} IN ({touched}) AND {same}",
                    source_alias="new",
                    target_alias="old",
                    writer_properties=_WRITER,
                    commit_properties=_COMMIT,
                )
                .when_matched_update_all()
                .when_not_matched_insert_all()
                .execute()
            )
        )

    def _prepared(self, rows: pa.Table) -> pa.Table:
        return (
            rows.select(self.layout.schema.names)
            .cast(self.layout.schema)
            .sort_by([(c, "ascending") for c in self.layout.order])
        )

    def _commit(self, write: Callable[[DeltaTable], object]) -> None:
        """Write against the newest version, again when another writer came first, until it succeeds or time is up."""
        give_up = time.monotonic() + _TRY_FOR_S
        pause_s = 0.05
        while True:
            delta = self._at(None)
            try:
                with _storage_errors(f"cannot write to the table {self.uri}"):
                    write(delta)
                return
            except CommitFailedError as error:
                if time.monotonic() > give_up:
                    raise StorageError(f"other writers of {self.uri} left no gap for {_TRY_FOR_S:.0f} s") from error
            time.sleep(random.uniform(0, pause_s))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

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


@contextmanager
def _storage_errors(what: str) -> Iterator[None]:
    """Give the libraries' errors, which run over many lines, one that a person can read; conflicts pass."""
    try:
        yield
    except CommitFailedError:
        raise
    except (DeltaError, OSError) as error:
        raise StorageError(f"{what}: {' '.join(str(error).split())[:500]}") from error
