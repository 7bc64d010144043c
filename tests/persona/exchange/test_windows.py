"""Rows that are written to runs come back in windows: each once, complete by place, in order, and within the bound."""

import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from persona.exchange.plan import ExchangePlan, plan_exchange
from persona.exchange.runs import Run, folded, write_run
from persona.exchange.windows import Window, windows
from persona.inputs.histories import bucket_of, latest, text_hash
from persona.inputs.place import PLACES, places

SCHEMA = pa.schema(
    [("user_id", pa.string()), ("behavior_id", pa.string()), ("text", pa.large_string()), ("bucket", pa.int32())]
)
BATCH_BYTES, WINDOW_BYTES = 4096, 32_768


def small_plan(n_buckets: int, n_partitions: int) -> ExchangePlan:
    plan = plan_exchange(0, n_buckets, window_bytes=WINDOW_BYTES)
    return replace(plan, n_partitions=n_partitions, batch_bytes=BATCH_BYTES)


def rows_of(keys: list[tuple[str, str]], chance: random.Random, n_buckets: int) -> pa.Table:
    users = [user for user, _ in keys]
    texts = ["x" * chance.randint(0, 200) + str(number) for number in range(len(keys))]
    columns = [users, [behavior for _, behavior in keys], texts, bucket_of(users, n_buckets)]
    return pa.table(columns, schema=SCHEMA)


def write_runs(folder: Path, tables: list[pa.Table], plan: ExchangePlan, key: str | None) -> list[Run]:
    return [
        write_run(str(folder), rows, places(rows, plan.n_buckets, key), plan.lows(), plan.batch_bytes)
        for rows in tables
    ]


def all_windows(runs: list[Run], plan: ExchangePlan) -> Iterator[Window]:
    for partition in range(plan.n_partitions):
        yield from windows(runs, partition, plan, SCHEMA)


@pytest.mark.parametrize("seed", range(12))
def test_windows_have_each_row_once_and_are_complete_and_bounded(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    n_buckets = chance.choice([1, 3, 16])
    # Fewer partitions than buckets, as many, or several a bucket.
    plan = small_plan(n_buckets, chance.choice([1, n_buckets, 4 * n_buckets]))
    key = chance.choice([None, "behavior_id"])
    n_users = chance.choice([1, 5, 300])
    keys = [(f"user-{chance.randrange(n_users)}", f"b{chance.randrange(400)}") for _ in range(3000)]
    cuts = sorted(chance.sample(range(1, 3000), 6))
    parts = [keys[start:end] for start, end in zip([0, *cuts], [*cuts, 3000], strict=True)]
    tables = [rows_of(part, chance, n_buckets) for part in parts]
    runs = write_runs(tmp_path, tables, plan, key)

    found = list(all_windows(runs, plan))
    given = pa.concat_tables(tables)
    order = np.argsort(places(given, n_buckets, key), kind="stable")
    assert pa.concat_tables(one.rows for one in found).equals(given.take(pa.array(order)).combine_chunks())
    assert [one.low for one in found] == [0, *(one.high for one in found[:-1])]
    assert found[-1].high == n_buckets * PLACES
    for one in found:
        places_N = places(one.rows, n_buckets, key)
        assert not len(places_N) or one.low <= int(places_N.min()) <= int(places_N.max()) < one.high
        assert set(one.rows["bucket"].to_pylist()) <= {one.bucket} == {one.low // PLACES}
        largest = max((one.rows.filter(pa.array(places_N == place)).nbytes for place in set(places_N)), default=0)
        assert one.rows.nbytes <= WINDOW_BYTES + 2 * largest


def test_one_user_with_all_rows_does_not_make_a_large_window_of_keys(tmp_path: Path) -> None:
    plan = small_plan(4, 4)
    chance = random.Random(0)
    keys = [("the only one", f"b{number}") for number in range(5000)]
    runs = write_runs(tmp_path, [rows_of(keys[n::4], chance, 4) for n in range(4)], plan, "behavior_id")
    sizes = [one.rows.nbytes for one in all_windows(runs, plan) if one.rows.num_rows]
    assert sum(sizes) > 10 * WINDOW_BYTES and max(sizes) < 1.2 * WINDOW_BYTES


def test_a_window_of_users_is_as_large_as_its_largest_user(tmp_path: Path) -> None:
    plan = small_plan(1, 1)
    chance = random.Random(0)
    keys = [("many", f"b{number}") for number in range(3000)] + [(f"user-{n}", "b") for n in range(300)]
    runs = write_runs(tmp_path, [rows_of(keys[n::4], chance, 1) for n in range(4)], plan, None)
    users = [set(one.rows["user_id"].to_pylist()) for one in all_windows(runs, plan)]
    assert len(users) > 1 and sum("many" in some for some in users) == 1
    assert sum(map(len, users)) == 301, "the rows of a user are in two windows"


def test_a_reduce_task_holds_batches_and_windows_not_its_partition(tmp_path: Path) -> None:
    plan = small_plan(1, 1)
    chance = random.Random(0)
    tables = [rows_of([(f"user-{n}", f"b{m}") for n in range(m, 20_000, 8)], chance, 1) for m in range(8)]
    runs = write_runs(tmp_path, tables, plan, "behavior_id")
    before, peak = pa.total_allocated_bytes(), 0
    for _ in windows(runs, 0, plan, SCHEMA):
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert sum(rows.nbytes for rows in tables) > 40 * WINDOW_BYTES
    assert peak < 8 * 4 * BATCH_BYTES + 4 * WINDOW_BYTES


def test_a_partition_without_rows_is_visited_bucket_by_bucket(tmp_path: Path) -> None:
    plan = small_plan(8, 2)
    found = list(windows([], 1, plan, SCHEMA))
    assert [(one.bucket, one.low, one.high) for one in found] == [
        (bucket, bucket * PLACES, (bucket + 1) * PLACES) for bucket in range(4, 8)
    ]
    assert all(one.rows.schema == SCHEMA for one in found)


def test_of_a_key_that_is_repeated_in_a_run_only_the_latest_row_moves() -> None:
    chance = random.Random(0)
    keys = [(f"user-{n % 50}", f"b{chance.randrange(30)}") for n in range(2000)]
    rows = rows_of(keys, chance, 4).append_column("timestamp", pa.array(range(2000), pa.timestamp("us", "UTC")))
    rows = rows.append_column("text_hash", text_hash(rows["text"]))
    place = partial(places, n_buckets=4)
    found, places_N = folded(rows, place(rows), latest, place)
    order = [("user_id", "ascending"), ("behavior_id", "ascending")]
    assert found.sort_by(order).equals(latest(rows).sort_by(order))
    np.testing.assert_array_equal(places_N, place(found))
    once, places_N = folded(found, places_N, latest, place)
    assert once is found
