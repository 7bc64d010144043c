"""The join equals a plain loop over rows, for every kind of persona."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from persona.inputs import requests
from persona.inputs.histories import bucket_of, text_hash
from persona.options import PersonaKind
from persona.store.identity import Identity
from persona.store.join import join_histories
from persona.store.store import Store
from tests.stores import write_rows

WIDTH, N_BUCKETS = 4, 3
START = datetime(2024, 1, 1, tzinfo=UTC)
Row = dict[str, Any]


def make_rows(seed: int) -> list[Row]:
    """Behaviors of 30 users, some without a timestamp, some with equal ones; each vector holds its row number."""
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    for user in range(30):
        for item in range(rng.integers(1, 9)):
            day = None if rng.random() < 0.2 else int(rng.integers(0, 6))
            timestamp = None if day is None else START + timedelta(days=day)
            rows.append({"user_id": f"user-{user}", "behavior_id": f"b{item}", "timestamp": timestamp, "n": len(rows)})
    return rows


def write(store: Store, rows: list[Row]) -> None:
    users = [row["user_id"] for row in rows]
    table = pa.table(
        {
            "user_id": users,
            "behavior_id": [row["behavior_id"] for row in rows],
            "timestamp": pa.array([row["timestamp"] for row in rows], pa.timestamp("us", "UTC")),
            "text_hash": text_hash([str(row["n"]) for row in rows]),
            "bucket": bucket_of(users, store.n_buckets),
            "vector": [np.full(WIDTH, row["n"], "<f2").tobytes() for row in rows],
            "change": ["new"] * len(rows),
        }
    )
    write_rows(store, "behaviors", table)


def make_store(folder: Path, rows: list[Row], n_buckets: int = N_BUCKETS) -> Store:
    identity = Identity(
        encoder="e", revision="r", fingerprint="f", width=WIDTH, pooling="mean", max_tokens=8, text_rule="text"
    )
    store = Store.create(str(folder / "store"), identity, n_buckets)
    write(store, rows)
    return store


def make_requests(*pairs: tuple[str, datetime | None], n_buckets: int = N_BUCKETS) -> pa.Table:
    users = [user for user, _ in pairs]
    n = len(users)
    columns = {
        "request_id": [f"r{i}" for i in range(n)],
        "user_id": users,
        "input": ["in"] * n,
        "query": ["q"] * n,
        "target": [None] * n,
        "system": [None] * n,
        "as_of": pa.array([as_of for _, as_of in pairs], pa.timestamp("us", "UTC")),
        "bucket": bucket_of(users, n_buckets),
    }
    return pa.table(columns, schema=requests.SCHEMA)


def seen(joined: pa.Table) -> list[list[int]]:
    """The row numbers in the vectors."""
    return [
        np.frombuffer(h, "<f2").reshape(-1, WIDTH)[:, 0].astype(int).tolist() for h in joined["history"].to_pylist()
    ]


def expected_rows(rows: list[Row], user: str, as_of: datetime | None, max_behaviors: int | None = None) -> list[int]:
    visible = [row for row in rows if row["user_id"] == user]
    if as_of is not None:
        visible = [row for row in visible if row["timestamp"] is not None and row["timestamp"] < as_of]
    last = datetime.max.replace(tzinfo=UTC)
    visible.sort(key=lambda row: (row["timestamp"] or last, row["behavior_id"]))
    return [row["n"] for row in visible][-max_behaviors if max_behaviors else 0 :]


def expected_other(rows: list[Row], bucket: int, user: str, as_of: datetime | None) -> str | None:
    for offset in range(N_BUCKETS):
        searched = (bucket + offset) % N_BUCKETS
        users = sorted({row["user_id"] for row in rows if bucket_of([row["user_id"]], N_BUCKETS)[0] == searched})
        for name in [name for name in users if name > user] + [name for name in users if name < user]:
            if expected_rows(rows, name, as_of):
                return name
    return None


@pytest.mark.parametrize("persona", PersonaKind)
@pytest.mark.parametrize("max_behaviors", [3, 100])
def test_the_join_equals_a_plain_loop(tmp_path: Path, persona: PersonaKind, max_behaviors: int) -> None:
    rows = make_rows(max_behaviors)
    store = make_store(tmp_path, rows)
    times = [None, *(START + timedelta(days=day) for day in range(-1, 8))]
    pairs = [(user, time) for user in ["user-1", "user-12", "user-7", "stranger", "zed", "aa"] for time in times]
    n_seen = 0
    for bucket in range(N_BUCKETS):
        in_bucket = [pair for pair in pairs if bucket_of([pair[0]], N_BUCKETS)[0] == bucket]
        requested = make_requests(*in_bucket)
        joined = join_histories(requested, store, bucket, persona=persona, max_behaviors=max_behaviors)
        assert joined.select(requested.column_names).equals(requested)
        expected = []
        for user, time in in_bucket:
            other = expected_other(rows, bucket, user, time)
            source = {PersonaKind.NONE: None, PersonaKind.BARE: None, PersonaKind.OTHER: other}.get(persona, user)
            expected.append([] if source is None else expected_rows(rows, source, time, max_behaviors))
        assert seen(joined) == expected
        assert joined["n_behaviors"].to_pylist() == [len(e) for e in expected]
        n_seen += sum(map(len, expected))
    assert (n_seen == 0) == persona.sees_no_history


def test_a_behavior_at_the_time_of_as_of_is_not_seen(tmp_path: Path) -> None:
    rows = [
        {"user_id": "a", "behavior_id": str(n), "timestamp": START + timedelta(microseconds=n), "n": n}
        for n in range(3)
    ]
    store = make_store(tmp_path, rows, 1)
    joined = join_histories(
        make_requests(("a", START + timedelta(microseconds=1)), n_buckets=1),
        store,
        0,
        persona=PersonaKind.OWN,
        max_behaviors=9,
    )
    assert seen(joined) == [[0]]


def test_behaviors_without_a_timestamp_are_counted_if_as_of_is_given(tmp_path: Path) -> None:
    rows = [
        {"user_id": "a", "behavior_id": "1", "timestamp": None, "n": 1},
        {"user_id": "a", "behavior_id": "2", "timestamp": START, "n": 2},
    ]
    store = make_store(tmp_path, rows, 1)
    requested = make_requests(("a", START + timedelta(days=1)), ("a", None), ("stranger", START), n_buckets=1)
    joined = join_histories(requested, store, 0, persona=PersonaKind.OWN, max_behaviors=9)
    assert joined["n_untimed"].to_pylist() == [1, 0, 0] and seen(joined) == [[2], [2, 1], []]


def test_the_hash_changes_only_with_the_visible_behaviors(tmp_path: Path) -> None:
    rows = [{"user_id": u, "behavior_id": "1", "timestamp": START, "n": n} for n, u in enumerate(["a", "b", "c"])]
    store = make_store(tmp_path, rows, 1)
    requested = make_requests(("a", None), ("b", None), ("b", START), ("zz", None), n_buckets=1)
    before = join_histories(requested, store, 0, persona=PersonaKind.OWN, max_behaviors=9)["history_hash"].to_pylist()
    write(store, [{"user_id": "b", "behavior_id": "2", "timestamp": START + timedelta(days=1), "n": 7}])
    after = join_histories(requested, store, 0, persona=PersonaKind.OWN, max_behaviors=9)["history_hash"].to_pylist()
    assert [x == y for x, y in zip(before, after, strict=True)] == [True, False, True, True]
    assert before[2] == before[3] and len(set(before)) == 3


def test_a_snapshot_joins_the_behaviors_of_its_version(tmp_path: Path) -> None:
    store = make_store(tmp_path, [{"user_id": "a", "behavior_id": "1", "timestamp": START, "n": 1}], 1)
    snapshot = store.snapshot("behaviors")
    write(store, [{"user_id": "a", "behavior_id": "2", "timestamp": START, "n": 2}])
    requested = make_requests(("a", None), n_buckets=1)
    for opened, expected in ((snapshot, [[1]]), (store, [[1, 2]])):
        assert seen(join_histories(requested, opened, 0, persona=PersonaKind.OWN, max_behaviors=9)) == expected


def test_the_only_user_of_a_store_gets_no_other_history(tmp_path: Path) -> None:
    store = make_store(tmp_path, [{"user_id": "a", "behavior_id": "1", "timestamp": START, "n": 1}])
    (bucket,) = store.buckets()
    assert seen(
        join_histories(make_requests(("a", None)), store, bucket, persona=PersonaKind.OTHER, max_behaviors=9)
    ) == [[]]


@pytest.mark.parametrize("persona", [PersonaKind.OWN, PersonaKind.OTHER, PersonaKind.NONE])
def test_an_empty_join_has_the_same_columns(tmp_path: Path, persona: PersonaKind) -> None:
    store = make_store(tmp_path, make_rows(0))
    joined = join_histories(make_requests(("a", None)), store, 0, persona=persona, max_behaviors=9)
    empty = join_histories(make_requests(("a", None)).slice(0, 0), store, 0, persona=persona, max_behaviors=9)
    assert empty.num_rows == 0 and empty.schema == joined.schema
