"""The store: everything known about every user, in Delta tables written with the vectors of one encoder.

    <store>/behaviors    a row per behavior with its vector, by bucket
    <store>/personas     a row per user and plug, by bucket
    <store>/generations  a row per answer, by variant
    <store>/completions  a row per reply of a chat model, by model
    <store>/judgements   a row per judged answer, by variant
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
from persona.store import identity as identities, pointer as pointers, stored_keys, vectors
from persona.store.changes import behavior_changes, persona_changes
from persona.store.file_list import FileList
from persona.store.identity import Identity
from persona.store.lease import Lease
from persona.store.schema import LAYOUTS
from persona.store.table import Table
from persona.store.writer import Writer, staged_files

DEFAULT_BUCKETS = 64
# What delta-rs takes for something else in a local path: it decodes `%20` twice, and a backslash separates folders.
_MISREAD = re.compile(r"%[0-9A-Fa-f]{2}|[\\\x00-\x1f\x7f\udc80-\udcff]")


class Store:
    """An open store. It can be sent to another process, which opens its own tables.

    It reads the newest version of each table, or the one in `versions`; see `at` and `snapshot`.
    """

    def __init__(
        self,
        uri: str,
        identity: Identity,
        n_buckets: int,
        versions: Mapping[str, int] | None = None,
        pointer: str | None = None,
        files: Mapping[str, FileList] | None = None,
    ) -> None:
        """Use `open`, `create`, `find`, `at` or `snapshot`.

        `pointer` is the folder that led to this store; `files` has the data files of tables at their fixed versions.
        """
        self.uri = uri
        self.pointer = pointer
        self.identity = identity
        self.n_buckets = n_buckets
        self.versions = dict(versions or {})
        self._files = dict(files or {})
        self._tables: dict[str, Table] = {}

    def __reduce__(self) -> tuple[type["Store"], tuple[object, ...]]:
        """Without open tables, which hold connections."""
        return Store, (self.uri, self.identity, self.n_buckets, self.versions, self.pointer, self._files)

    def __repr__(self) -> str:
        return f"Store({self.uri!r}, encoder={self.identity.encoder!r}, n_buckets={self.n_buckets})"

    @property
    def label(self) -> str:
        """The store's folder for people, and the pointer that led to it, if one did."""
        return self.uri if self.pointer is None else f"{self.uri} (via {self.pointer})"

    @staticmethod
    def create(uri: str, identity: Identity, n_buckets: int = DEFAULT_BUCKETS) -> "Store":
        """Create the empty tables where `find` has found no store, or open what another process has just created.

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
        """The same store with some tables fixed at these versions, which each process looks up in the log."""
        files = {name: of_table for name, of_table in self._files.items() if name not in versions}
        return Store(self.uri, self.identity, self.n_buckets, {**self.versions, **versions}, self.pointer, files)

    def snapshot(self, *tables: str) -> "Store":
        """The same store with some tables fixed at the version that is read now, which it knows the files of.

        So any process reads the same rows, and none has to read the log.
        """
        files = {name: self.table(name).file_list() for name in tables}
        versions = {**self.versions, **{name: of_table.version for name, of_table in files.items()}}
        return Store(self.uri, self.identity, self.n_buckets, versions, self.pointer, {**self._files, **files})

    def table(self, name: str) -> Table:
        """An open table, one of `schema.LAYOUTS`."""
        if name not in self._tables:
            uri, files = join(self.uri, name), self._files.get(name)
            self._tables[name] = Table(uri, name, self.versions.get(name), files)
        return self._tables[name]

    def create_missing(self, *tables: str) -> None:
        """Create tables that a store from an earlier version does not have."""
        for name in tables:
            Table.create(join(self.uri, name), name, {})

    def missing(
        self, bucket: int, rows: pa.Table, *, absent: tuple[int, int] | None = None, keeps_later: bool = False
    ) -> tuple[pa.Table, dict[str, int]]:
        """Compare valid `rows` (`histories.SCHEMA`) of one bucket with the store; reads key indexes, no vectors.

        Args:
            bucket: The bucket.
            rows: All of the input that has the same keys; may have no rows.
            absent: The range of places [low, high) in which stored behaviors that are not among `rows` are `gone`.
            keeps_later: Whether a stored behavior that is later than the given one counts as known: it comes from an
                input that is not read now.

        Returns the rows that need work, with a string column `change`, each key once:
        - `new`: not stored;
        - `edited`: stored with another text or timestamp;
        - `gone`: stored but not among `rows`; text and hash are null.

        Also returns the counts of `known`, `new`, `edited`, `gone`, and `duplicates` within the input, and
        `store_bytes`, the bytes of the store that were read for this call. What is read of a bucket is kept until the
        next bucket is compared in the process.

        Of duplicates the latest counts (at the same time, the one with the greatest text hash). The result, order
        included, depends only on the set of rows and the table's version.
        """
        table = self.table("behaviors")
        n_read = stored_keys.of_bucket.cache_info().misses
        stored = stored_keys.of_bucket(table.uri, bucket, self.n_buckets, tuple(table.files([bucket])))
        work, counts = behavior_changes(rows, stored, bucket, self.n_buckets, absent=absent, keeps_later=keeps_later)
        if stored_keys.of_bucket.cache_info().misses > n_read:
            counts["store_bytes"] += stored.n_bytes
        return work, counts

    def personas_to_make(self, bucket: int, plug: str) -> pa.Table:
        """The users of one bucket whose persona under a plug (its fingerprint) is missing, out of date or `gone`.

        Returns `user_id`, `bucket` and `change`. Reads user ids and times, no vectors: a persona is out of date when
        the user's number of behaviors has changed, or one was encoded later than the persona.
        """
        behaviors = self.table("behaviors").read(["user_id", "embedded_at"], partitions=[bucket])
        columns = ["user_id", "n_behaviors", "updated_at"]
        personas = self.table("personas").read(columns, partitions=[bucket], values={"plug": [plug]})
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
        groups = rows.group_by(grouping).aggregate([]).to_pylist()
        staged = []
        for group in groups:
            of_group = rows
            if len(groups) > 1:
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
            if table == "behaviors":
                opened.set_properties(identities.upgrade(opened.properties()))
            yield Writer(opened, lease)

    def write_rejects(self, rows: pa.Table) -> None:
        """Commit bad input rows (`inputs.REJECTS`) that are not recorded yet."""
        if not rows.num_rows:
            return
        key = ["job", "source", "row", "reason"]
        jobs, sources = (pc.unique(rows[name]).to_pylist() for name in ("job", "source"))
        known = self.table("rejects").read(key, partitions=jobs, values={"source": sources})
        fresh = rows.join(known, key, join_type="left anti", use_threads=False).select(rows.column_names)
        if fresh.num_rows:
            self.table("rejects").append(fresh)

    def read_histories(
        self, bucket: int, user_ids: Sequence[str] | None = None, *, with_vectors: bool = True
    ) -> pa.Table:
        """The behaviors of one bucket, or of some users in it: user_id, behavior_id, timestamp, text_hash (, vector).

        Sorted by user_id, timestamp (nulls last) and behavior_id. `vector` is `large_binary`.
        """
        columns = [*KEY, "timestamp", "text_hash", *(["vector"] if with_vectors else [])]
        values = None if user_ids is None else {"user_id": user_ids}
        table = self.table("behaviors").read(columns, partitions=[bucket], values=values)
        return in_order(table, dict.fromkeys(["user_id", "timestamp", "behavior_id"], "ascending"))

    def users(self, bucket: int) -> list[str]:
        """The users with behaviors in one bucket, sorted."""
        found = self.table("behaviors").read(["user_id"], partitions=[bucket])
        return sorted(pc.unique(found["user_id"]).to_pylist())

    def buckets(self) -> list[int]:
        """The buckets with behaviors, sorted; reads no data file."""
        return self.table("behaviors").partitions()

    def persona_buckets(self) -> list[int]:
        """The buckets with personas, sorted; reads no data file."""
        return self.table("personas").partitions()

    def answers(self, variant: str, bucket: int) -> pa.Table:
        """`request_id`, `user_id`, `fingerprint` and `plug` of the stored answers."""
        columns = ["request_id", "user_id", "fingerprint", "plug"]
        return self.table("generations").read(columns, partitions=[variant], values={"bucket": [bucket]})

    def variants(self) -> list[str]:
        """The variants with answers, sorted; reads no data file."""
        return self.table("generations").partitions()

    def read_generations(
        self,
        variants: Sequence[str] | None = None,
        columns: Sequence[str] | None = None,
        *,
        buckets: Sequence[int] | None = None,
    ) -> pa.Table:
        """The answers of some variants and buckets; None means all."""
        values = None if buckets is None else {"bucket": buckets}
        return self.table("generations").read(columns, partitions=variants, values=values)


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
