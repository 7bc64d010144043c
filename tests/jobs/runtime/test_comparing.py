"""Comparing the windows of an exchange with a store: what has to be encoded or deleted, and receipts of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.runtime import comparing
from jobs.runtime.receipts import Receipts, joined, without_receipts
from persona.exchange.plan import ExchangePlan, plan_exchange
from persona.exchange.runs import write_run
from persona.exchange.windows import windows
from persona.inputs.histories import SCHEMA
from persona.inputs.place import places
from persona.store.store import Store
from persona.store.writer import staged_files
from tests.stores import IDENTITY, behaviors, encode, everything, write_rows

N_BUCKETS = 4
WINDOW_BYTES = 20_000


class Silent:
    """A tally without an actor."""

    def note(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(str(tmp_path / "store"), IDENTITY, N_BUCKETS)


@pytest.fixture
def plan() -> ExchangePlan:
    plan = plan_exchange(0, N_BUCKETS, window_bytes=WINDOW_BYTES)
    return replace(plan, n_partitions=2 * N_BUCKETS, batch_bytes=2000)


def refresh(store: Store, rows: pa.Table, plan: ExchangePlan, *, deletes: bool = False) -> tuple[Receipts, list[int]]:
    """What `embed` does, without Ray or an encoder; the receipts, and the bytes of the tables to encode."""
    receipts, sizes = Receipts(), []
    parts = [rows.slice(start, 700) for start in range(0, rows.num_rows, 700)]
    runs = [
        write_run(f"{store.uri}/_exchange/r", part, places(part, N_BUCKETS), plan.lows(), plan.batch_bytes)
        for part in parts
    ]
    snapshot = store.snapshot("behaviors")
    for partition in range(plan.n_partitions):
        found = windows(runs, partition, plan, SCHEMA)
        for table in comparing.compare(found, store=snapshot, deletes=deletes, keeps_later=False, tally=Silent()):  # type: ignore[arg-type]
            files = joined(staged_files([]), table)  # as when the rows have been staged
            assert receipts.taken_from(files).num_rows == 0
            work = without_receipts(table)
            sizes.append(work.nbytes)
            write_rows(store, "behaviors", encode(work))
    return receipts, sizes


def rows_of(n_users: int, n_each: int) -> pa.Table:
    return behaviors(*((f"user-{u}", f"b{n}", "x" * (50 + n % 7), n) for u in range(n_users) for n in range(n_each)))


def test_receipts_have_the_counts_of_all_partitions(store: Store, plan: ExchangePlan) -> None:
    rows = rows_of(30, 4)
    first, _ = refresh(store, pa.concat_tables([rows, rows.slice(0, 5)]), plan)
    assert {name: first.counts[name] for name in ("new", "known", "duplicates")} == {
        "new": 120,
        "known": 0,
        "duplicates": 5,
    }
    again, _ = refresh(store, rows, plan)
    assert (again.counts["new"], again.counts["known"]) == (0, 120)
    assert len(everything(store)) == 120


def test_behaviors_are_gone_wherever_the_input_has_no_row(store: Store, plan: ExchangePlan) -> None:
    """Also in partitions and buckets that no row of the input falls into."""
    rows = rows_of(30, 4)
    refresh(store, rows, plan)
    left = rows.filter(pa.compute.equal(rows["user_id"], "user-7")).slice(0, 3)
    kept, _ = refresh(store, left, plan)
    assert (kept.counts["gone"], len(everything(store))) == (0, 120)
    synced, _ = refresh(store, left, plan, deletes=True)
    assert (synced.counts["gone"], synced.counts["known"]) == (117, 3)
    assert [(user, name) for user, name, _ in everything(store)] == [("user-7", f"b{n}") for n in range(3)]


def test_one_user_with_all_rows_is_compared_in_small_windows(store: Store, plan: ExchangePlan) -> None:
    receipts, sizes = refresh(store, rows_of(1, 2000), plan)
    assert receipts.counts["new"] == 2000
    assert sum(sizes) > 10 * WINDOW_BYTES and max(sizes) < 1.5 * WINDOW_BYTES
