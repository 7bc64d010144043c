"""The store: what is known of every user, in Delta tables that only one encoder writes to.

    <store>/behaviors    a row a behavior with its vector, by bucket
    <store>/personas     a row a user and plug
    <store>/generations  a row an answer, by variant
    <store>/rejects      a row a bad input row, by job

A user's bucket is `histories.bucket_of`; whoever works on one bucket reads that part of the tables and
nothing else.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import reduce

import pyarrow as pa
import pyarrow.compute as pc

from persona.errors import InputError, StoreMismatch
from persona.inputs.cells import TIME
from persona.inputs.histories import KEY, in_order, latest
from persona.storage import join
from persona.store import vectors
from persona.store.lease import Lease
from persona.store.schema import LAYOUTS
from persona.store.table import Table, one_of
from persona.store.writer import CHANGES, Writer, key_strings, staged_files

DEFAULT_BUCKETS = 64
_PREFIX = "persona."  # of our keys among the table properties, most of which are Delta's


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What made the vectors of a store; vectors of two identities cannot be compared, so a store has one."""

    encoder: str
    revision: str
    fingerprint: str
    width: int
    pooling: str
    max_tokens: int
    text_rule: str


class Store:
    """An open store. It may travel to another process, being a URI and an identity, and opens its tables there.

    What it reads of a table is the newest version, or, of those in `versions`, that one: see `snapshot`.
    """

    def __init__(self, uri: str, identity: Identity, n_buckets: int, versions: Mapping[str, int] | None = None) -> None:
        """For `open`, `create` and `at`."""
        self.uri = uri
        self.identity = identity
        self.n_buckets = n_buckets
        self.versions = dict(versions or {})
        self._tables: dict[str, Table] = {}

    def __reduce__(self) -> tuple[type["Store"], tuple[str, Identity, int, dict[str, int]]]:
        """Tables stay behind: they hold connections."""
        return Store, (self.uri, self.identity, self.n_buckets, self.versions)

    def __repr__(self) -> str:
        """Where, and by which encoder."""
        return f"Store({self.uri!r}, encoder={self.identity.encoder!r}, n_buckets={self.n_buckets})"

    @staticmethod
    def create(uri: str, identity: Identity, n_buckets: int) -> "Store":
        """Create the empty tables, or open the store when another process has just done so.

        Raises `StoreMismatch` when that one has another identity or number of buckets.
        """
        if n_buckets < 1:
            raise ValueError(f"n_buckets must be at least 1, not {n_buckets}")
        properties = {f"{_PREFIX}{k}": str(v) for k, v in {**asdict(identity), "buckets": n_buckets}.items()}
        # The table with the identity comes last: where it is, the store is whole.
        for name in reversed(LAYOUTS):
            Table.create(join(uri, name), name, properties if name == "behaviors" else {})
        return _same(Store.open(uri), identity, n_buckets)

    @staticmethod
    def open(uri: str) -> "Store":
        """Open an existing store. Raises `InputError` when there is none."""
        store = _find(uri)
        if store is None:
            raise InputError(f"there is no store at {uri}; make one with: python -m jobs.embed --store {uri} ...")
        return store

    @staticmethod
    def open_or_create(uri: str, identity: Identity, n_buckets: int | None = None) -> "Store":
        """Open the store that `identity` may write to, or create it.

        Without `n_buckets`, an existing store keeps its own and a new one gets `DEFAULT_BUCKETS`. Raises as `find`.
        """
        store = Store.find(uri, identity, n_buckets)
        if store is None:
            return Store.create(uri, identity, DEFAULT_BUCKETS if n_buckets is None else n_buckets)
        return store

    @staticmethod
    def find(uri: str, identity: Identity, n_buckets: int | None = None) -> "Store | None":
        """The store that `identity` may write to; None where there is none yet.

        Raises `StoreMismatch`: where the store and the wish differ, and what to do; `InputError` for a table of others.
        """
        store = _find(uri)
        return None if store is None else _same(store, identity, n_buckets)

    def version(self, table: str) -> int:
        """Which version of a table is read."""
        return self.table(table).version()

    def at(self, **versions: int) -> "Store":
        """The same store, of which these tables are read as of these versions, whoever commits meanwhile."""
        return Store(self.uri, self.identity, self.n_buckets, {**self.versions, **versions})

    def snapshot(self, *tables: str) -> "Store":
        """The same store, of which these tables are read as they are now: the same rows at any time, in any process."""
        return self.at(**{name: self.version(name) for name in tables})

    def missing(self, bucket: int, rows: pa.Table, *, sync: bool = False) -> tuple[pa.Table, dict[str, int]]:
        """What has to be done so that the store has a bucket's valid `rows` (`histories.SCHEMA`), each key once.

        Reads keys, hashes and timestamps, no vectors. Returns the rows to work on with a string `change`: `new` ones,
        `edited` ones (stored with another text or timestamp), and, with `sync`, the `gone` ones that are stored and not
        among `rows`, with neither text nor hash. And how many were `known`, `new`, `edited`, `gone`, and `duplicates`
        within the input, of which the latest counts (of the same time, the one with the greatest text hash). The same
        rows and the same version of the table give the same answer, in the same order.
        """
        wanted = latest(rows)
        columns = [*KEY, "text_hash", "timestamp"]
        stored = self.table("behaviors").scan(columns, one_of("bucket", [bucket]))
        keys, stored_keys = (key_strings(rows.select(KEY)) for rows in (wanted, stored))
        # Where each row is stored; a table of strings takes a fraction of the memory of a join.
        place = pc.index_in(keys, value_set=stored_keys)
        old = stored.select(["text_hash", "timestamp"]).take(place)
        same_time = pc.or_(
            pc.fill_null(pc.equal(old["timestamp"], wanted["timestamp"]), False),
            pc.and_(old["timestamp"].is_null(), wanted["timestamp"].is_null()),
        )
        same = pc.and_(pc.fill_null(pc.equal(old["text_hash"], wanted["text_hash"]), False), same_time)
        work = wanted.append_column("change", pc.if_else(place.is_valid(), "edited", "new")).filter(pc.invert(same))
        n_known = wanted.num_rows - work.num_rows
        if sync:
            gone = stored.select(KEY).filter(pc.invert(pc.is_in(stored_keys, value_set=keys)))
            gone = in_order(gone, dict.fromkeys(KEY, "ascending"))
            work = pa.concat_tables([work, _gone(gone, bucket, work.schema)])
        counts = {name: pc.sum(pc.equal(work["change"], name)).as_py() or 0 for name in CHANGES}
        return work, {"known": n_known, **counts, "duplicates": rows.num_rows - wanted.num_rows}

    def stage(self, table: str, rows: pa.Table) -> pa.Table:
        """Write rows (all columns of the table but its time stamp, and `change`) to files that no reader sees yet.

        Returns a row a file, for `Writer`. Rows `gone` need their key only. A file holds rows of one bucket and one
        change. Raises `StoreMismatch` for vectors of another width.
        """
        layout = LAYOUTS[table]
        if table == "behaviors":
            rows = self._checked(rows)
        (stamp,) = set(layout.schema.names) - set(rows.column_names)
        rows = rows.append_column(stamp, _now(rows.num_rows))
        places = list(dict.fromkeys((layout.partition, "bucket", "change")))
        staged = []
        for place in rows.group_by(places).aggregate([]).to_pylist():
            mine = rows.filter(reduce(pc.and_, (pc.equal(rows[name], value) for name, value in place.items())))
            staged.append((self.table(table).write_file(mine), place["change"]))
        return staged_files(staged)

    def _checked(self, rows: pa.Table) -> pa.Table:
        size = vectors.n_bytes(self.identity.width)
        stored = rows["vector"].cast(pa.large_binary())
        encoded = stored.filter(pc.not_equal(rows["change"], "gone"))
        other = next((n for n in pc.unique(pc.binary_length(encoded).fill_null(0)).to_pylist() if n != size), None)
        if other is not None:
            raise StoreMismatch(
                f"a vector has {other} bytes; the store at {self.uri} holds float16 vectors of width "
                f"{self.identity.width}, {size} bytes each"
            )
        return rows.set_column(rows.column_names.index("vector"), "vector", stored)

    def write(self, table: str, rows: pa.Table) -> None:
        """`stage` and commit, in this process alone: what a job does with many."""
        if rows.num_rows:
            with self.writer(table, job="a single write") as writer:
                writer.commit(self.stage(table, rows))

    @contextmanager
    def writer(self, table: str, *, job: str) -> Iterator["Writer"]:
        """The right to commit to a table, for as long as the context is open. Raises `LeaseHeld`: by whom."""
        opened = Table(join(self.uri, table), table)
        with Lease.acquire(self.uri, table, job=job, above=opened.lease()) as lease:
            opened.fence(lease.number, job=job)
            yield Writer(opened, lease)

    def read_histories(
        self, bucket: int, user_ids: Sequence[str] | None = None, *, with_vectors: bool = True
    ) -> pa.Table:
        """The behaviors of a bucket, or of some of its users: user_id, behavior_id, timestamp, text_hash (, vector).

        Sorted by user_id, timestamp (none last) and behavior_id; `vector` is `large_binary`.
        """
        where = one_of("bucket", [bucket])
        if user_ids is not None:
            where += f" AND {one_of('user_id', user_ids)}"
        columns = [*KEY, "timestamp", "text_hash", *(["vector"] if with_vectors else [])]
        table = self.table("behaviors").scan(columns, where)
        return in_order(table, dict.fromkeys(["user_id", "timestamp", "behavior_id"], "ascending"))

    def users(self, bucket: int) -> list[str]:
        """Who has behaviors in a bucket, sorted."""
        found = self.table("behaviors").scan(["user_id"], one_of("bucket", [bucket]))
        return sorted(pc.unique(found["user_id"]).to_pylist())

    def buckets(self) -> list[int]:
        """The buckets that hold behaviors, sorted; read from the log alone."""
        return self.table("behaviors").partitions()

    def persona_buckets(self) -> list[int]:
        """The buckets that hold personas, sorted."""
        return self.table("personas").partitions()

    def personas_to_make(self, bucket: int, plug: str) -> pa.Table:
        """The users of a bucket whose persona under a plug (its fingerprint) is missing or out of date, or who left.

        Rows with `user_id`, `bucket` and `change`. Reads user ids and times, no vectors: a persona is out of date when
        the user has another number of behaviors now, or one that was encoded later.
        """
        where = one_of("bucket", [bucket])
        behaviors = self.table("behaviors").scan(["user_id", "embedded_at"], where)
        now = behaviors.group_by("user_id").aggregate([("embedded_at", "max"), ("embedded_at", "count")])
        made = self.table("personas").scan(
            ["user_id", "n_behaviors", "updated_at"], f"{where} AND {one_of('plug', [plug])}"
        )
        both = now.join(made, "user_id", join_type="full outer", use_threads=False).sort_by("user_id")
        is_new, is_gone = both["n_behaviors"].is_null(), both["embedded_at_count"].is_null()
        is_old = pc.or_(
            pc.not_equal(both["embedded_at_count"], both["n_behaviors"].cast(pa.int64())),
            pc.greater(both["embedded_at_max"], both["updated_at"]),
        )
        cases = pc.make_struct(is_new, is_gone, pc.fill_null(is_old, False))
        change = pc.case_when(cases, "new", "gone", "edited", pa.scalar(None, pa.string()))
        buckets = pa.repeat(pa.scalar(bucket, pa.int32()), both.num_rows)
        users = pa.table({"user_id": both["user_id"], "bucket": buckets, "change": change})
        return users.filter(users["change"].is_valid())

    def answers(self, variant: str, bucket: int) -> pa.Table:
        """`request_id`, `fingerprint` and `plug` of what has been answered."""
        where = f"{one_of('variant', [variant])} AND {one_of('bucket', [bucket])}"
        return self.table("generations").scan(["request_id", "fingerprint", "plug"], where)

    def variants(self) -> list[str]:
        """The variants that have answers, sorted; read from the log alone."""
        return self.table("generations").partitions()

    def read_generations(
        self,
        variants: Sequence[str] | None = None,
        columns: Sequence[str] | None = None,
        *,
        buckets: Sequence[int] | None = None,
    ) -> pa.Table:
        """Answers of some variants and buckets, or of all."""
        wanted = {"variant": variants, "bucket": buckets}
        where = [one_of(name, values) for name, values in wanted.items() if values is not None]
        return self.table("generations").scan(columns, " AND ".join(where) or None)

    def write_rejects(self, rows: pa.Table) -> None:
        """Commit bad input rows (`inputs.REJECTS`); what an earlier run has already noted stays one row."""
        if not rows.num_rows:
            return
        place = ["job", "source", "row", "reason"]
        where = " AND ".join(one_of(name, pc.unique(rows[name]).to_pylist()) for name in ("job", "source"))
        known = self.table("rejects").scan(place, where)
        fresh = rows.join(known, place, join_type="left anti", use_threads=False).select(rows.column_names)
        if fresh.num_rows:
            self.table("rejects").append(fresh)

    def table(self, name: str) -> Table:
        """One of the tables of `layouts.LAYOUTS`, open."""
        if name not in self._tables:
            self._tables[name] = Table(join(self.uri, name), name, self.versions.get(name))
        return self._tables[name]


def _find(uri: str) -> Store | None:
    table = Table.find(join(uri, "behaviors"), "behaviors")
    if table is None:
        return None
    kept = {k.removeprefix(_PREFIX): v for k, v in table.properties().items() if k.startswith(_PREFIX)}
    try:
        identity = Identity(
            encoder=kept["encoder"],
            revision=kept["revision"],
            fingerprint=kept["fingerprint"],
            width=int(kept["width"]),
            pooling=kept["pooling"],
            max_tokens=int(kept["max_tokens"]),
            text_rule=kept["text_rule"],
        )
        store = Store(uri, identity, int(kept["buckets"]))
    except KeyError as error:
        raise InputError(f"the table {table.uri} does not say {error}: it is no store of this project") from error
    return store


def _same(store: Store, identity: Identity, n_buckets: int | None) -> Store:
    mine = {**asdict(store.identity), "buckets": store.n_buckets}
    asked = {**asdict(identity), "buckets": store.n_buckets if n_buckets is None else n_buckets}
    differing = [
        f"{name} is {mine[name]!r} in the store and {asked[name]!r} here" for name in mine if mine[name] != asked[name]
    ]
    if differing:
        raise StoreMismatch(
            f"the store at {store.uri} was made by encoder {store.identity.encoder} and cannot be used with "
            f"{identity.encoder}: {'; '.join(differing)}. Use the store's own settings, or another --store for these"
        )
    return store


def _gone(keys: pa.Table, bucket: int, schema: pa.Schema) -> pa.Table:
    """Rows of `schema` with nothing but key, bucket and change."""
    known = {"bucket": pa.repeat(pa.scalar(bucket, pa.int32()), keys.num_rows), "change": ["gone"] * keys.num_rows}
    columns = {**{name: keys[name] for name in keys.column_names}, **known}
    return pa.table([columns.get(f.name, pa.nulls(keys.num_rows, f.type)) for f in schema], schema=schema)


def _now(n: int) -> pa.Array:
    return pa.repeat(pa.scalar(datetime.now(UTC), TIME), n)
