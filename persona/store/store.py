"""The store: everything known about every user, in Delta tables written with the vectors of one encoder.

    <store>/behaviors    a row per behavior with its vector, by bucket
    <store>/personas     a row per user and plug, by bucket
    <store>/generations  a row per answer, by variant
    <store>/rejects      a row per bad input row, by job

A user's bucket is `histories.bucket_of`. A worker reads one bucket at a time. A folder may also be a pointer to a store
(`pointer`): whoever opens it gets that store.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import reduce

import pyarrow as pa
import pyarrow.compute as pc

from persona.errors import InputError, StoreMismatch, UsageError
from persona.inputs.cells import TIME
from persona.inputs.histories import KEY, in_order
from persona.storage import join
from persona.store import identity as identities, pointer as pointers, vectors
from persona.store.changes import behavior_changes, persona_changes
from persona.store.identity import Identity
from persona.store.lease import Lease
from persona.store.schema import LAYOUTS
from persona.store.table import Table, sql_in
from persona.store.writer import Writer, staged_files

DEFAULT_BUCKETS = 64
# What delta-rs takes for something else in a local path: it decodes `%20` twice, and a backslash separates folders.
_MISREAD = re.compile(r"%[0-9A-Fa-f]{2}|[\\\x00-\x1f\x7f\udc80-\udcff]")


class Store:
    """An open store. It can be sent to another process, which opens its own tables.

    It reads the newest version of each table, or the one in `versions`; see `snapshot`.
    """

    def __init__(
        self,
        uri: str,
        identity: Identity,
        n_buckets: int,
        versions: Mapping[str, int] | None = None,
        pointer: str | None = None,
    ) -> None:
        """Use `open`, `create`, `open_or_create`, `find` or `at`. `pointer` is the folder that led to this store."""
        self.uri = uri
        self.pointer = pointer
        self.identity = identity
        self.n_buckets = n_buckets
        self.versions = dict(versions or {})
        self._tables: dict[str, Table] = {}

    def __reduce__(self) -> tuple[type["Store"], tuple[str, Identity, int, dict[str, int], str | None]]:
        """Without open tables, which hold connections."""
        return Store, (self.uri, self.identity, self.n_buckets, self.versions, self.pointer)

    def __repr__(self) -> str:
        return f"Store({self.uri!r}, encoder={self.identity.encoder!r}, n_buckets={self.n_buckets})"

    @property
    def label(self) -> str:
        """The store's folder for people, and the pointer that led to it, if one did."""
        return self.uri if self.pointer is None else f"{self.uri} (via {self.pointer})"

    @staticmethod
    def create(uri: str, identity: Identity, n_buckets: int) -> "Store":
        """Create the empty tables, or open the store if another process has just created it.

        Raises `StoreMismatch` when that store has another identity or number of buckets.
        """
        if n_buckets < 1:
            raise ValueError(f"n_buckets must be at least 1, got {n_buckets}")
        _check_path(uri)
        properties = identities.to_properties(identity, n_buckets)
        # `behaviors`, with the identity, comes last: once it exists, the store is complete.
        for name in reversed(LAYOUTS):
            Table.create(join(uri, name), name, properties if name == "behaviors" else {})
        return _matching(Store.open(uri), identity, n_buckets)

    @staticmethod
    def open(uri: str) -> "Store":
        """Open a store, or the one that a pointer names. Raises `InputError` when there is none, and as `find`."""
        store = _find(uri)
        if store is None:
            raise InputError(f"there is no store at {uri}; create one with: python -m jobs.embed --store {uri} ...")
        return store

    @staticmethod
    def open_all(uri: str) -> list["Store"]:
        """Open a store, or all that a pointer names and ever named and that still exist. Raises as `open`."""
        store = Store.open(uri)
        pointer = None if store.pointer is None else pointers.read(store.pointer)
        others = [] if pointer is None else [_at(other) for other in pointer.stores if other != store.uri]
        return [store, *(other for other in others if other is not None)]

    @staticmethod
    def open_or_create(uri: str, identity: Identity, n_buckets: int | None = None) -> "Store":
        """Open the store for an encoder, or create it.

        Without `n_buckets`, an existing store keeps its number and a new one has `DEFAULT_BUCKETS`. Raises as `find`.
        """
        store = Store.find(uri, identity, n_buckets)
        if store is None:
            return Store.create(uri, identity, DEFAULT_BUCKETS if n_buckets is None else n_buckets)
        return store

    @staticmethod
    def find(uri: str, identity: Identity, n_buckets: int | None = None) -> "Store | None":
        """The store for an encoder, or None when there is no store yet.

        Raises:
            StoreMismatch: The store has another identity or number of buckets, or a newer format.
            InputError: The table there is not one of ours, or a pointer there is broken.
        """
        store = _find(uri)
        return None if store is None else _matching(store, identity, n_buckets)

    def version(self, table: str) -> int:
        """The version of a table that is read."""
        return self.table(table).version()

    def at(self, **versions: int) -> "Store":
        """The same store with some tables fixed at these versions."""
        return Store(self.uri, self.identity, self.n_buckets, {**self.versions, **versions}, self.pointer)

    def snapshot(self, *tables: str) -> "Store":
        """The same store with some tables fixed at their current version: any process reads the same rows."""
        return self.at(**{name: self.version(name) for name in tables})

    def table(self, name: str) -> Table:
        """An open table, one of `schema.LAYOUTS`."""
        if name not in self._tables:
            self._tables[name] = Table(join(self.uri, name), name, self.versions.get(name))
        return self._tables[name]

    def missing(self, bucket: int, rows: pa.Table, *, sync: bool = False) -> tuple[pa.Table, dict[str, int]]:
        """Compare valid `rows` (`histories.SCHEMA`) of one bucket with the store; reads no vectors.

        Returns the rows that need work, with a string column `change`, each key once:
        - `new`: not stored;
        - `edited`: stored with another text or timestamp;
        - `gone`, only with `sync`: stored but not among `rows`; text and hash are null.

        Also returns the counts of `known`, `new`, `edited`, `gone`, and `duplicates` within the input. Of duplicates
        the latest counts (at the same time, the one with the greatest text hash). The result, order included, depends
        only on the set of rows and the table's version.
        """
        columns = [*KEY, "text_hash", "timestamp"]
        stored = self.table("behaviors").scan(columns, sql_in("bucket", [bucket]))
        return behavior_changes(rows, stored, bucket, sync=sync)

    def personas_to_make(self, bucket: int, plug: str) -> pa.Table:
        """The users of one bucket whose persona under a plug (its fingerprint) is missing, out of date or `gone`.

        Returns `user_id`, `bucket` and `change`. Reads user ids and times, no vectors: a persona is out of date when
        the user's number of behaviors has changed, or one was encoded later than the persona.
        """
        where = sql_in("bucket", [bucket])
        behaviors = self.table("behaviors").scan(["user_id", "embedded_at"], where)
        columns = ["user_id", "n_behaviors", "updated_at"]
        personas = self.table("personas").scan(columns, f"{where} AND {sql_in('plug', [plug])}")
        return persona_changes(behaviors, personas, bucket)

    def stage(self, table: str, rows: pa.Table) -> pa.Table:
        """Write rows to files that readers do not see until a `Writer` commits them.

        `rows` has `change` and all columns of the table except its write time; `gone` rows need only their key.
        Returns a row per file (`writer.staged_files`). A file holds rows of one bucket and one change.
        Raises `StoreMismatch` for vectors of another width.
        """
        layout = LAYOUTS[table]
        if table == "behaviors":
            rows = self._checked(rows)
        (write_time,) = set(layout.schema.names) - set(rows.column_names)
        rows = rows.append_column(write_time, pa.repeat(pa.scalar(datetime.now(UTC), TIME), rows.num_rows))
        grouping = list(dict.fromkeys((layout.partition, "bucket", "change")))
        staged = []
        for group in rows.group_by(grouping).aggregate([]).to_pylist():
            of_group = rows.filter(reduce(pc.and_, (pc.equal(rows[name], value) for name, value in group.items())))
            staged.append((self.table(table).write_file(of_group), group["change"]))
        return staged_files(staged)

    def _checked(self, rows: pa.Table) -> pa.Table:
        size = vectors.n_bytes(self.identity.width)
        column = rows["vector"].cast(pa.large_binary())
        encoded = column.filter(pc.not_equal(rows["change"], "gone"))
        other = next((n for n in pc.unique(pc.binary_length(encoded).fill_null(0)).to_pylist() if n != size), None)
        if other is not None:
            raise StoreMismatch(
                f"a vector has {other} bytes; the store at {self.uri} holds float16 vectors of width "
                f"{self.identity.width}, {size} bytes each"
            )
        return rows.set_column(rows.column_names.index("vector"), "vector", column)

    @contextmanager
    def writer(self, table: str, *, job: str) -> Iterator[Writer]:
        """The only writer of a table, until the context ends. Raises `LeaseHeld`, naming the current one."""
        opened = Table(join(self.uri, table), table)
        with Lease.acquire(self.uri, table, job=job, above=opened.lease()) as lease:
            opened.fence(lease.number, job=job)
            yield Writer(opened, lease)

    def write_rejects(self, rows: pa.Table) -> None:
        """Commit bad input rows (`inputs.REJECTS`) that are not recorded yet."""
        if not rows.num_rows:
            return
        key = ["job", "source", "row", "reason"]
        where = " AND ".join(sql_in(name, pc.unique(rows[name]).to_pylist()) for name in ("job", "source"))
        known = self.table("rejects").scan(key, where)
        fresh = rows.join(known, key, join_type="left anti", use_threads=False).select(rows.column_names)
        if fresh.num_rows:
            self.table("rejects").append(fresh)

    def read_histories(
        self, bucket: int, user_ids: Sequence[str] | None = None, *, with_vectors: bool = True
    ) -> pa.Table:
        """The behaviors of one bucket, or of some users in it: user_id, behavior_id, timestamp, text_hash (, vector).

        Sorted by user_id, timestamp (nulls last) and behavior_id. `vector` is `large_binary`.
        """
        where = sql_in("bucket", [bucket])
        if user_ids is not None:
            where += f" AND {sql_in('user_id', user_ids)}"
        columns = [*KEY, "timestamp", "text_hash", *(["vector"] if with_vectors else [])]
        table = self.table("behaviors").scan(columns, where)
        return in_order(table, dict.fromkeys(["user_id", "timestamp", "behavior_id"], "ascending"))

    def users(self, bucket: int) -> list[str]:
        """The users with behaviors in one bucket, sorted."""
        found = self.table("behaviors").scan(["user_id"], sql_in("bucket", [bucket]))
        return sorted(pc.unique(found["user_id"]).to_pylist())

    def buckets(self) -> list[int]:
        """The buckets with behaviors, sorted; reads only the log."""
        return self.table("behaviors").partitions()

    def persona_buckets(self) -> list[int]:
        """The buckets with personas, sorted; reads only the log."""
        return self.table("personas").partitions()

    def answers(self, variant: str, bucket: int) -> pa.Table:
        """`request_id`, `fingerprint` and `plug` of the stored answers."""
        where = f"{sql_in('variant', [variant])} AND {sql_in('bucket', [bucket])}"
        return self.table("generations").scan(["request_id", "fingerprint", "plug"], where)

    def variants(self) -> list[str]:
        """The variants with answers, sorted; reads only the log."""
        return self.table("generations").partitions()

    def read_generations(
        self,
        variants: Sequence[str] | None = None,
        columns: Sequence[str] | None = None,
        *,
        buckets: Sequence[int] | None = None,
    ) -> pa.Table:
        """The answers of some variants and buckets; None means all."""
        wanted = {"variant": variants, "bucket": buckets}
        where = [sql_in(name, values) for name, values in wanted.items() if values is not None]
        return self.table("generations").scan(columns, " AND ".join(where) or None)


def _check_path(uri: str) -> None:
    """Raises UsageError for a local path that delta-rs takes for another one."""
    if found := _MISREAD.search(uri):
        raise UsageError(
            f"the store {uri!r} cannot have {found[0]!r} in its path, which means another path to the table library; "
            "rename the folder, or give another --store"
        )


def _find(uri: str) -> Store | None:
    """The store in a folder, or the one that the pointer there names."""
    if (store := _at(uri)) is not None:
        return store
    if (pointer := pointers.read(uri)) is None:
        return None
    target = _at(pointer.store)
    if target is None:
        raise InputError(
            f"{uri} points to {pointer.store}, where there is no store; point it to one with: python -m jobs.store "
            f"switch --store {uri} --to STORE --allow-differences"
        )
    return Store(target.uri, target.identity, target.n_buckets, pointer=uri)


def _at(uri: str) -> Store | None:
    """The store in this very folder."""
    _check_path(uri)
    table = Table.find(join(uri, "behaviors"), "behaviors")
    if table is None:
        return None
    return Store(uri, *identities.from_properties(table.properties(), table.uri))


def _matching(store: Store, identity: Identity, n_buckets: int | None) -> Store:
    """The store itself. Raises `StoreMismatch` when it is not one of this identity and number of buckets."""
    wanted_buckets = store.n_buckets if n_buckets is None else n_buckets
    if difference := identities.describe_difference(store.identity, store.n_buckets, identity, wanted_buckets):
        raise StoreMismatch(
            f"the store at {store.uri} was made by encoder {store.identity.encoder} and cannot be used with "
            f"{identity.encoder}: {difference}. Use the store's own settings, or another --store for these"
        )
    return store
