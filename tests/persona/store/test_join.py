"""The join against a plain loop over rows, for every kind of persona."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from persona.inputs import requests
from persona.inputs.histories import bucket_of, text_hash
from persona.options import PersonaKind
from persona.store.join import join_histories
from persona.store.store import Identity, Store

WIDTH, N_BUCKETS = 4, 3
START = datetime(2024, 1, 1, tzinfo=UTC)
Row = dict[str, Any]


def make_rows(seed: int) -> list[Row]:
    """Behaviors of 30 users, some without a timestamp, some of the same time; each vector tells its row."""
    chance = np.random.default_rng(seed)
    rows: list[Row] = []
    for user in range(30):
        for item in range(chance.integers(1, 9)):
            day = None if chance.random() < 0.2 else int(chance.integers(0, 6))
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
    store.write("behaviors", table)


def make_store(folder: Path, rows: list[Row], n_buckets: int = N_BUCKETS) -> Store:
    identity = Identity(
        encoder="e", revision="r", fingerprint="f", width=WIDTH, pooling="mean", max_tokens=8, text_rule="text"
    )
    store = Store.create(str(folder / "store"), identity, n_buckets)
    write(store, rows)
    return store


def ask(*pairs: tuple[str, datetime | None], n_buckets: int = N_BUCKETS) -> pa.Table:
    users = [user for user, _ in pairs]
    n = len(users)
    columns = {
        "request_id": [f"r{i}" for i in range(n)],
        "user_id": users,
        "input": ["in"] * n,
        "query": ["q"] * n,
        "target": [None] * n,
        "as_of": pa.array([as_of for _, as_of in pairs], pa.timestamp("us", "UTC")),
        "bucket": bucket_of(users, n_buckets),
    }
    return pa.table(columns, schema=requests.SCHEMA)


def seen(joined: pa.Table) -> list[list[int]]:
    """Which rows the vectors tell."""
    return [
        np.frombuffer(h, "<f2").reshape(-1, WIDTH)[:, 0].astype(int).tolist() for h in joined["history"].to_pylist()
    ]


def plainly_visible(rows: list[Row], user: str, as_of: datetime | None, most: int | None = None) -> list[int]:
    mine = [row for row in rows if row["user_id"] == user]
    if as_of is not None:
        mine = [row for row in mine if row["timestamp"] is not None and row["timestamp"] < as_of]
    late = datetime.max.replace(tzinfo=UTC)
    mine.sort(key=lambda row: (row["timestamp"] or late, row["behavior_id"]))
    return [row["n"] for row in mine][-most if most else 0 :]


def plain_other(rows: list[Row], bucket: int, user: str, as_of: datetime | None) -> str | None:
    for turn in range(N_BUCKETS):
        here = sorted(
            {row["user_id"] for row in rows if bucket_of([row["user_id"]], N_BUCKETS)[0] == (bucket + turn) % N_BUCKETS}
        )
        around = [name for name in here if name > user] + [name for name in here if name < user]
        for name in around:
            if plainly_visible(rows, name, as_of):
                return name
    return None


@pytest.mark.parametrize("persona", [kind for kind in PersonaKind if kind is not PersonaKind.BARE])
@pytest.mark.parametrize("most", [3, 100])
def test_what_is_seen_is_what_a_plain_loop_sees(tmp_path: Path, persona: PersonaKind, most: int) -> None:
    rows = make_rows(most)
    store = make_store(tmp_path, rows)
    times = [None, *(START + timedelta(days=day) for day in range(-1, 8))]
    pairs = [(user, time) for user in ["user-1", "user-12", "user-7", "stranger", "zed", "aa"] for time in times]
    n_seen = 0
    for bucket in range(N_BUCKETS):
        mine = [pair for pair in pairs if bucket_of([pair[0]], N_BUCKETS)[0] == bucket]
        asked = ask(*mine)
        joined = join_histories(asked, store, bucket, persona=persona, max_behaviors=most)
        assert joined.select(asked.column_names).equals(asked)
        expected = []
        for user, time in mine:
            whose = {"none": None, "other": plain_other(rows, bucket, user, time)}.get(persona, user)
            expected.append([] if whose is None else plainly_visible(rows, whose, time, most))
        assert seen(joined) == expected
        assert joined["n_behaviors"].to_pylist() == [len(e) for e in expected]
        n_seen += sum(map(len, expected))
    assert (n_seen == 0) == (persona == "none")


def test_a_behavior_of_the_very_moment_is_not_seen(tmp_path: Path) -> None:
    rows = [
        {"user_id": "a", "behavior_id": str(n), "timestamp": START + timedelta(microseconds=n), "n": n}
        for n in range(3)
    ]
    store = make_store(tmp_path, rows, 1)
    joined = join_histories(
        ask(("a", START + timedelta(microseconds=1)), n_buckets=1), store, 0, persona=PersonaKind.OWN, max_behaviors=9
    )
    assert seen(joined) == [[0]]


def test_untimed_behaviors_are_counted_where_a_moment_is_asked_for(tmp_path: Path) -> None:
    rows = [
        {"user_id": "a", "behavior_id": "1", "timestamp": None, "n": 1},
        {"user_id": "a", "behavior_id": "2", "timestamp": START, "n": 2},
    ]
    store = make_store(tmp_path, rows, 1)
    asked = ask(("a", START + timedelta(days=1)), ("a", None), ("nobody", START), n_buckets=1)
    joined = join_histories(asked, store, 0, persona=PersonaKind.OWN, max_behaviors=9)
    assert joined["n_untimed"].to_pylist() == [1, 0, 0] and seen(joined) == [[2], [2, 1], []]


def test_the_hash_changes_with_what_is_seen_and_with_nothing_else(tmp_path: Path) -> None:
    rows = [{"user_id": u, "behavior_id": "1", "timestamp": START, "n": n} for n, u in enumerate(["a", "b", "c"])]
    store = make_store(tmp_path, rows, 1)
    asked = ask(("a", None), ("b", None), ("b", START), ("zz", None), n_buckets=1)
    before = join_histories(asked, store, 0, persona=PersonaKind.OWN, max_behaviors=9)["history_hash"].to_pylist()
    write(store, [{"user_id": "b", "behavior_id": "2", "timestamp": START + timedelta(days=1), "n": 7}])
    after = join_histories(asked, store, 0, persona=PersonaKind.OWN, max_behaviors=9)["history_hash"].to_pylist()
    assert [x == y for x, y in zip(before, after, strict=True)] == [True, False, True, True]
    assert before[2] == before[3] and len(set(before)) == 3


def test_a_snapshot_is_joined_as_it_was(tmp_path: Path) -> None:
    store = make_store(tmp_path, [{"user_id": "a", "behavior_id": "1", "timestamp": START, "n": 1}], 1)
    then = store.snapshot("behaviors")
    write(store, [{"user_id": "a", "behavior_id": "2", "timestamp": START, "n": 2}])
    asked = ask(("a", None), n_buckets=1)
    for one, expected in ((then, [[1]]), (store, [[1, 2]])):
        assert seen(join_histories(asked, one, 0, persona=PersonaKind.OWN, max_behaviors=9)) == expected


def test_the_only_user_of_a_store_has_no_other(tmp_path: Path) -> None:
    store = make_store(tmp_path, [{"user_id": "a", "behavior_id": "1", "timestamp": START, "n": 1}])
    (bucket,) = store.buckets()
    assert seen(join_histories(ask(("a", None)), store, bucket, persona=PersonaKind.OTHER, max_behaviors=9)) == [[]]


@pytest.mark.parametrize("persona", [PersonaKind.OWN, PersonaKind.OTHER, PersonaKind.NONE])
def test_no_requests_join_to_no_rows_of_the_same_columns(tmp_path: Path, persona: PersonaKind) -> None:
    store = make_store(tmp_path, make_rows(0))
    joined = join_histories(ask(("a", None)), store, 0, persona=persona, max_behaviors=9)
    empty = join_histories(ask(("a", None)).slice(0, 0), store, 0, persona=persona, max_behaviors=9)
    assert empty.num_rows == 0 and empty.schema == joined.schema
