"""What the tests of the writer share: changes of a small table, what a reader then sees, and what may come between."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from persona import storage
from persona.errors import StorageError
from persona.inputs.histories import bucket_of
from persona.storage import join
from persona.store.store import Store
from persona.store.table import Table
from persona.store.writer import Writer, merge
from tests.stores import behaviors, encode

Row = tuple[str, str, str, int | None]
WHOLE = 2**20  # compaction makes files of this size: one of everything
ODD_VARIANT = "none / ü' %20 a=b"


def stage(store: Store, change: str, *rows: Row) -> pa.Table:
    made = encode(behaviors(*rows, n_buckets=store.n_buckets))
    return store.stage("behaviors", made.append_column("change", pa.array([change] * len(rows))))


def commit(store: Store, *staged: pa.Table) -> None:
    with store.writer("behaviors", job="test") as writer:
        writer.commit(pa.concat_tables(staged))


def compact(writer: Writer) -> tuple[int, int]:
    """What `jobs.store compact` does; how many files there were, and are."""
    before = len(writer.table.files())
    writer.exchange_merged([merge(writer.table, group) for group in writer.small_files(WHOLE)])
    return before, len(writer.table.files())


def rows_of(store: Store) -> Counter[tuple[str, str, int]]:
    """Every row that a reader sees: user, behavior, and the length of the text that was encoded."""
    found: Counter[tuple[str, str, int]] = Counter()
    for row in store.table("behaviors").scan(None).to_pylist():
        assert row["bucket"] == bucket_of([row["user_id"]], store.n_buckets)[0]
        found[row["user_id"], row["behavior_id"], int(np.frombuffer(row["vector"], "<f2")[0])] += 1
    return found


def contents(store: Store, name: str = "behaviors") -> dict[str, bytes]:
    """The files of the newest version."""
    uri = join(store.uri, name)
    return {file.path: storage.read_bytes(join(uri, file.path)) for file in Table(uri, name).files()}


def on_disk(store: Store, name: str = "behaviors") -> set[str]:
    return {file.uri for file in storage.list_files(join(store.uri, name), (".parquet",))}


def take_over(store: Store, name: str = "behaviors") -> Table:
    """What another run does that thinks the lease has run out."""
    table = Table(join(store.uri, name), name)
    table.fence(table.lease() + 1, job="the other run")
    return table


class Attempts:
    """What happens around each attempt of `Table._transact`, in turn; attempts after the last are left alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *events: Callable[[Callable[[], None]], None]) -> None:
        self.n = 0
        original = Table._transact

        def transact(table: Table, *args: Any, **more: Any) -> None:
            self.n += 1
            event = events[self.n - 1] if self.n <= len(events) else passes
            event(lambda: original(table, *args, **more))

        monkeypatch.setattr(Table, "_transact", transact)


def passes(work: Callable[[], None]) -> None:
    work()


def behind(other: Callable[[Store], object], store: Store) -> Callable[[Callable[[], None]], None]:
    """The attempt comes right behind what somebody else does to the store."""

    def event(work: Callable[[], None]) -> None:
        other(store)
        work()

    return event


def fails_before(work: Callable[[], None]) -> None:
    raise StorageError("no answer")


def fails_after(work: Callable[[], None]) -> None:
    work()
    raise StorageError("no answer")


CHANGES: dict[str, Sequence[tuple[str, Row]]] = {
    "new": [("new", ("c", "1", "xxx", 1))],
    "edited": [("edited", ("a", "1", "yyyyy", 1))],
    "gone": [("gone", ("a", "1", "", None)), ("gone", ("b", "1", "", None))],
    "all": [("new", ("c", "1", "xxx", 1)), ("edited", ("a", "1", "yyyyy", 1)), ("gone", ("b", "1", "", None))],
}
BEFORE = Counter([("a", "1", 1), ("a", "2", 2), ("b", "1", 1)])
AFTER = {
    "new": BEFORE + Counter([("c", "1", 3)]),
    "edited": Counter([("a", "1", 5), ("a", "2", 2), ("b", "1", 1)]),
    "gone": Counter([("a", "2", 2)]),
    "all": Counter([("a", "1", 5), ("a", "2", 2), ("c", "1", 3)]),
}


def fill(store: Store) -> None:
    commit(store, stage(store, "new", ("a", "1", "x", 1), ("a", "2", "xx", 2), ("b", "1", "x", None)))


def staged_changes(store: Store, name: str) -> pa.Table:
    return pa.concat_tables([stage(store, change, row) for change, row in CHANGES[name]])
