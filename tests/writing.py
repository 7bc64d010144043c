"""Shared by the tests of the writer: changes to a small table, what a reader then sees, and faults in between."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from persona import storage
from persona.inputs.histories import bucket_of
from persona.storage import join
from persona.store.log import Log, UncertainCommit
from persona.store.store import Store
from persona.store.table import Table
from persona.store.writer import Writer, merge
from tests.stores import behaviors, changed, commit_staged

Row = tuple[str, str, str, int | None]
Event = Callable[[Callable[[], None]], None]
"""Called instead of an attempt to commit, with a function that makes the attempt."""
TARGET_BYTES = 2**20  # larger than any partition here, so compaction makes one file of each
ODD_VARIANT = "none / ü' %20 a=b"


def stage(store: Store, change: str, *rows: Row) -> pa.Table:
    return store.stage("behaviors", changed(behaviors(*rows, n_buckets=store.n_buckets), change))


def commit(store: Store, *staged: pa.Table) -> None:
    with store.writer("behaviors", job="test") as writer:
        commit_staged(writer, pa.concat_tables(staged))


def compact(writer: Writer) -> tuple[int, int]:
    """What `jobs.store compact` does; returns the numbers of files before and after."""
    before = len(writer.table.files())
    writer.exchange_merged([merge(writer.table, group) for group in writer.small_files(TARGET_BYTES)])
    return before, len(writer.table.files())


def rows_of(store: Store) -> Counter[tuple[str, str, int]]:
    """Every row that a reader sees: user, behavior, and the length of the encoded text."""
    found: Counter[tuple[str, str, int]] = Counter()
    for row in store.table("behaviors").read().to_pylist():
        assert row["bucket"] == bucket_of([row["user_id"]], store.n_buckets)[0]
        found[row["user_id"], row["behavior_id"], int(np.frombuffer(row["vector"], "<f2")[0])] += 1
    return found


def contents(store: Store, name: str = "behaviors") -> dict[str, bytes]:
    """The bytes of each file of the newest version."""
    uri = join(store.uri, name)
    return {file.path: storage.read_bytes(join(uri, file.path)) for file in Table(uri, name).files()}


def on_disk(store: Store, name: str = "behaviors") -> set[str]:
    return {file.uri for file in storage.list_files(join(store.uri, name), (".parquet",))}


def take_over(store: Store, name: str = "behaviors") -> Table:
    """What another run does once it considers the lease expired."""
    table = Table(join(store.uri, name), name)
    table.fence(table.lease() + 1, job="the other run")
    return table


class Attempts:
    """Replaces the first attempts of `Log._transact` by events, one each; later attempts are normal."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *events: Event) -> None:
        self.n = 0
        original = Log._transact

        def transact(log: Log, *args: Any, **more: Any) -> None:
            self.n += 1
            event = events[self.n - 1] if self.n <= len(events) else succeeds
            event(lambda: original(log, *args, **more))

        monkeypatch.setattr(Log, "_transact", transact)


def succeeds(attempt: Callable[[], None]) -> None:
    attempt()


def preceded_by(other: Callable[[Store], object], store: Store) -> Event:
    """Something happens to the store right before the attempt."""

    def event(attempt: Callable[[], None]) -> None:
        other(store)
        attempt()

    return event


def fails_before(attempt: Callable[[], None]) -> None:
    """The request is lost, and nothing is committed."""
    raise UncertainCommit("no response")


def fails_after(attempt: Callable[[], None]) -> None:
    """The response is lost after the commit."""
    attempt()
    raise UncertainCommit("no response")


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
    """Write the rows of `BEFORE`."""
    commit(store, stage(store, "new", ("a", "1", "x", 1), ("a", "2", "xx", 2), ("b", "1", "x", None)))


def staged_changes(store: Store, name: str) -> pa.Table:
    return pa.concat_tables([stage(store, change, row) for change, row in CHANGES[name]])
