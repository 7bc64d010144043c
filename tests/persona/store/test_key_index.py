"""Key indexes: they come and go with their data files, no other tool sees them, and without them nothing is wrong."""

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from deltalake import DeltaTable
from hypothesis import given, settings, strategies as st

from persona import storage
from persona.inputs.histories import bucket_of
from persona.inputs.place import PLACES, places
from persona.storage import join
from persona.store import key_index, maintenance, stored_keys
from persona.store.store import Store
from tests.stores import IDENTITY, NASTY, behaviors, places_of_bucket, refresh
from tests.writing import commit, compact, stage

BUCKET = places_of_bucket(0)


@pytest.fixture
def one(tmp_path: Path) -> Store:
    """A store with one bucket in three files."""
    store = Store.create(str(tmp_path / "store"), IDENTITY, 1)
    for n, user in enumerate(NASTY[:3]):
        commit(store, stage(store, "new", *((user, str(i), "x" * i, None if i == 2 else n) for i in range(1, 5))))
    return store


def indexes(store: Store) -> list[Path]:
    return sorted(Path(store.uri).rglob("*.keys"))


def given_rows() -> pa.Table:
    """Of the rows of `one`: some known, one with another text, one with another time, and one that is new."""
    users = NASTY[:3]
    known = [(users[0], str(i), "x" * i, None if i == 2 else 0) for i in range(1, 4)]
    return behaviors(*known, (users[1], "1", "edited", 1), (users[2], "3", "xxx", 9), ("new", "1", "x", 1), n_buckets=1)


def test_indexes_come_and_go_with_their_data_files(local: Store) -> None:
    store = local

    def paths() -> tuple[set[str], set[str], set[str]]:
        table = store.table("behaviors")
        return key_index.indexed_paths(table.uri), table.stored_paths(), table.file_list().paths()

    refresh(store, behaviors(*((user, "1", "x", 1) for user in NASTY)))
    refresh(store, behaviors(*((user, "1", "y", 1) for user in NASTY[::2]), ("z", "1", "x", 1)))
    indexed, stored, used = paths()
    assert indexed == stored > used
    with store.writer("behaviors", job="test") as writer:
        before, after = compact(writer)
        assert after < before
        writer.vacuum(keep_hours=0)
        indexed, stored, used = paths()
        assert indexed == stored == used
        file = writer.table.files()[0]
        replaced = maintenance.without_users(writer.table, file, [file.stats["user_id"][0]])
        assert replaced is not None
        writer.exchange([replaced])
        storage.delete(join(writer.table.uri, file.path))  # as if the run had been killed here
        writer.erase_history()
    indexed, stored, used = paths()
    assert indexed == stored == used


def test_no_other_tool_takes_an_index_for_data(one: Store) -> None:
    folder = join(one.uri, "behaviors")
    before = [path.read_bytes() for path in indexes(one)]
    assert len(before) == 3 and DeltaTable(folder).to_pyarrow_table().num_rows == 12
    assert len(pd.read_parquet(folder)) == 12
    counted = duckdb.sql(f"SELECT count(*) FROM read_parquet('{folder}/**/*.parquet', hive_partitioning = true)")
    assert counted.fetchall() == [(12,)]
    deleted = DeltaTable(folder).vacuum(0, dry_run=False, enforce_retention_duration=False, full=True)
    assert deleted == [] and [path.read_bytes() for path in indexes(one)] == before


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def of_another_file(path: Path) -> None:
    others = [other for other in path.parent.iterdir() if other != path]
    path.write_bytes(others[0].read_bytes())


@pytest.mark.parametrize("damage", [Path.unlink, cut, emptied, of_another_file])
def test_without_a_sound_index_the_file_itself_is_compared(one: Store, damage: Callable[[Path], object]) -> None:
    expected, counts = one.missing(0, given_rows(), absent=BUCKET)
    assert {name: counts[name] for name in ("known", "new", "edited", "gone")} == {
        "known": 3, "new": 1, "edited": 2, "gone": 7,
    }  # fmt: skip
    damage(indexes(one)[1])
    stored_keys.of_bucket.cache_clear()
    found, others = one.missing(0, given_rows(), absent=BUCKET)
    assert found.equals(expected) and others["store_bytes"] > 0
    problems = [problem.split(": ")[1] for problem in maintenance.verify(one, "behaviors", "0")[1]]
    assert ("its key index is damaged" in problems) == (damage is not Path.unlink)


def test_any_wrong_byte_of_an_index_is_noticed(one: Store) -> None:
    file = one.table("behaviors").files()[0]
    path = Path(key_index.uri_of(one.table("behaviors").uri, file.path))
    sound = path.read_bytes()
    for position in random.Random(0).sample(range(len(sound)), 100):
        path.write_bytes(sound[:position] + bytes([sound[position] ^ 4]) + sound[position + 1 :])
        assert key_index.read(one.table("behaviors").uri, file.path, file.n_rows) is None


def test_verify_finds_an_index_of_other_rows(one: Store) -> None:
    table = one.table("behaviors")
    file = table.files()[0]
    rows = table.read_file(file)
    times = pa.array([7] * rows.num_rows).cast(pa.timestamp("us", "UTC"))
    key_index.write(table.uri, file.path, rows.set_column(rows.column_names.index("timestamp"), "timestamp", times))
    problems = maintenance.verify(one, "behaviors", "0")[1]
    assert [problem for problem in problems if "index" in problem] == [
        f"behaviors/{file.path}: its key index is of other rows"
    ]


def test_a_bucket_is_read_once_for_all_its_windows(one: Store) -> None:
    """And only the indexes of its files, so that a refresh reads a small share of the store."""
    store = one.snapshot("behaviors")
    rows = given_rows().slice(0, 3)
    expected = sum(path.stat().st_size for path in indexes(one))
    found = [store.missing(0, rows.slice(i, 1))[1]["store_bytes"] for i in range(3)]
    assert found == [expected, 0, 0]


def test_rows_without_a_key_or_a_hash_of_ours_are_never_known(one: Store) -> None:
    """Other programs may have written them."""
    table = one.table("behaviors")
    rows = table.read_file(table.files()[0])
    users = pa.array([None, *rows["user_id"].to_pylist()[1:]], pa.string())
    hashes = pa.array(["no hash", None, *rows["text_hash"].to_pylist()[2:]], pa.string())
    rows = rows.set_column(rows.column_names.index("user_id"), "user_id", users)
    rows = rows.set_column(rows.column_names.index("text_hash"), "text_hash", hashes)
    file = table.write_file(rows)
    assert not Path(key_index.uri_of(table.uri, file.path)).exists()
    with one.writer("behaviors", job="test") as writer:
        writer.table.commit([file], writer.table.files(), lease=writer.lease.number)
    kept = rows.slice(1).select(["user_id", "behavior_id"]).to_pylist()
    texts = [(row["user_id"], row["behavior_id"], "x" * int(row["behavior_id"])) for row in kept]
    times = rows.slice(1)["timestamp"].cast(pa.int64()).to_pylist()
    given_again = behaviors(*((*text, time) for text, time in zip(texts, times, strict=True)), n_buckets=1)
    counts = one.missing(0, given_again, absent=BUCKET)[1]
    assert (counts["known"], counts["edited"], counts["gone"]) == (2, 1, 0)


# Against a comparison of dicts


ROWS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "ü'"]), st.sampled_from(["1", "2", "3"]), st.sampled_from(["x", "y", "z"]),
        st.one_of(st.none(), st.integers(0, 2)),
    ),
    max_size=12,
)  # fmt: skip


def last_of_each_key(rows: pa.Table) -> dict[tuple[str, str], tuple[int, str]]:
    """The content of each key, as a pair that sorts by what is later."""
    found: dict[tuple[str, str], tuple[int, str]] = {}
    for row in rows.to_pylist():
        key = (row["user_id"], row["behavior_id"])
        time = -1 if row["timestamp"] is None else int(row["timestamp"].timestamp() * 10**6)
        found[key] = max(found.get(key, (-2, "")), (time, row["text_hash"]))
    return found


@settings(max_examples=40)
@given(ROWS, ROWS, st.lists(st.integers(0, PLACES), max_size=2), st.booleans(), st.booleans())
def test_what_is_missing_equals_a_comparison_of_dicts(
    tmp_path_factory: pytest.TempPathFactory,
    stored: list[tuple[str, str, str, int | None]],
    rows: list[tuple[str, str, str, int | None]],
    cuts: list[int],
    sync: bool,
    keeps_later: bool,
) -> None:
    store = Store.create(str(tmp_path_factory.mktemp("store")), IDENTITY, 1)
    empty = behaviors(("a", "1", "x", 1), n_buckets=1).slice(0, 0)
    before = behaviors(*stored, n_buckets=1) if stored else empty
    now = behaviors(*rows, n_buckets=1) if rows else empty
    refresh(store, before)
    old, new = last_of_each_key(before), last_of_each_key(now)
    expected = {
        key: "new" if key not in old else "edited"
        for key, content in new.items()
        if old.get(key) != content and not (keeps_later and old.get(key, (-2, "")) > content)
    } | ({key: "gone" for key in old if key not in new} if sync else {})

    found: dict[tuple[str, str], str] = {}
    bounds = [0, *sorted(cuts), PLACES]
    places_N = places(now, 1) if rows else np.array([], np.uint64)
    for low, high in itertools.pairwise(bounds):  # windows of the bucket
        window = now.filter(pa.array((places_N >= np.uint64(low)) & (places_N < np.uint64(high))))
        work, counts = store.missing(0, window, absent=(low, high) if sync else None, keeps_later=keeps_later)
        assert counts["known"] + counts["new"] + counts["edited"] + counts["duplicates"] == window.num_rows
        assert sorted(work["bucket"].to_pylist()) == [0] * work.num_rows == bucket_of(work["user_id"], 1).tolist()
        for user, name, change in zip(work["user_id"], work["behavior_id"], work["change"], strict=True):
            assert (user.as_py(), name.as_py()) not in found
            found[user.as_py(), name.as_py()] = change.as_py()
        assert pc.sum(pc.equal(work["change"], "gone")).as_py() in (counts["gone"], None)
    assert found == expected
