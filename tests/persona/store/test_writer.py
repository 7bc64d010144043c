"""The writer: what is staged counts exactly once, replaces what it is to replace, and touches nothing else."""

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from hypothesis import HealthCheck, given, settings, strategies as st

from persona import storage
from persona.errors import LeaseLost, StorageError
from persona.inputs.histories import bucket_of
from persona.inputs.records import rejects
from persona.storage import join
from persona.store.schema import DataFile
from persona.store.store import Store
from persona.store.table import Table
from persona.store.writer import files_of, key_strings, rewrite, staged_files
from tests.stores import IDENTITY, NASTY, answers, behaviors, encode
from tests.writing import (
    AFTER,
    BEFORE,
    ODD_VARIANT,
    Attempts,
    commit,
    compact,
    contents,
    fill,
    on_disk,
    passes,
    rows_of,
    stage,
    staged_changes,
)

pytestmark = pytest.mark.usefixtures("impatient")


# Rows that replace others


def test_only_touched_files_are_written_again_and_all_in_one_version(store: Store) -> None:
    users = [f"u{n:02}" for n in range(12)]
    for third in range(3):  # three files a bucket, apart by user
        commit(store, stage(store, "new", *((u, b, "x", 1) for u in users[4 * third : 4 * third + 4] for b in "12")))
    old, version = contents(store), store.version("behaviors")
    touched = {
        file.path
        for file in store.table("behaviors").files()
        if file.span["user_id"][0] <= "u05" <= file.span["user_id"][1]
        and file.partition == str(bucket_of(["u05"], 4)[0])
    }
    with store.writer("behaviors", job="edit") as writer:
        writer.commit(stage(store, "edited", ("u05", "2", "xxx", 1)))
    new = contents(store)
    assert len(touched) == 1 and set(old) - set(new) == touched
    assert {path: new[path] for path in set(old) & set(new)} == {path: old[path] for path in set(old) - touched}
    assert store.version("behaviors") == version + 2  # the lease, and all the rest
    expected = Counter((u, b, 1) for u in users for b in "12")
    assert rows_of(store.at(behaviors=version)) == rows_of(store.at(behaviors=version + 1)) == expected
    assert rows_of(store) == expected - Counter([("u05", "2", 1)]) + Counter([("u05", "2", 3)])


def test_a_file_in_whose_span_the_key_lies_but_that_has_it_not_stays(local: Store) -> None:
    one = Store.create(local.uri + "1", IDENTITY, 1)
    commit(one, stage(one, "new", ("a", "1", "x", 1), ("z", "1", "x", 1)))
    commit(one, stage(one, "new", ("b", "1", "x", 1), ("y", "1", "x", 1)))
    old = contents(one)
    commit(one, stage(one, "edited", ("b", "1", "xx", 1)))
    assert len(set(old) & set(contents(one))) == 1
    assert rows_of(one) == Counter([("a", "1", 1), ("z", "1", 1), ("b", "1", 2), ("y", "1", 1)])


# Keys that would be one if their parts were simply put together.
TWINS = [
    ("a", "b:c"),
    ("a:b", "c"),
    ("1:a", "1"),
    ("1", "a:1"),
    ("a\0", "b"),
    ("a", "\0b"),
    ("é", "e\u0301"),
    ("e\u0301", "é"),
]


def test_keys_of_any_characters_are_told_apart(store: Store) -> None:
    keys = [*((user, name) for user in NASTY for name in NASTY), *TWINS]
    commit(store, stage(store, "new", *((user, name, "x", 1) for user, name in keys)))
    edited, gone = keys[::3], keys[1::3]
    commit(
        store,
        stage(store, "edited", *((user, name, "xxx", 1) for user, name in edited)),
        stage(store, "gone", *((user, name, "", None) for user, name in gone)),
    )
    expected = Counter((*key, 3) for key in edited) + Counter((*key, 1) for key in keys[2::3])
    assert rows_of(store) == expected


@given(st.lists(st.tuples(st.text(max_size=4), st.text(max_size=4)), unique=True, min_size=1))
def test_different_keys_are_different_strings(keys: list[tuple[str, str]]) -> None:
    users, names = zip(*keys, strict=True)
    strings = key_strings(pa.table({"user_id": users, "behavior_id": names})).to_pylist()
    assert len(set(strings)) == len(keys)


def test_a_file_of_which_nothing_is_left_leaves(store: Store) -> None:
    fill(store)
    commit(store, stage(store, "gone", ("a", "1", "", None), ("a", "2", "", None)))
    assert rows_of(store) == Counter([("b", "1", 1)])
    assert [file.partition for file in store.table("behaviors").files()] == [str(bucket_of(["b"], 4)[0])]
    commit(store, stage(store, "gone", ("b", "1", "", None)))
    assert rows_of(store) == Counter() and store.table("behaviors").files() == []


def test_files_of_gone_rows_are_deleted_once_they_are_gone(store: Store) -> None:
    fill(store)
    files = on_disk(store)
    with store.writer("behaviors", job="sync") as writer:
        staged = stage(store, "gone", ("b", "1", "", None))
        assert len(on_disk(store)) == len(files) + 1
        writer.commit(staged)
    assert on_disk(store) == files  # the old version's as well
    assert rows_of(store) == BEFORE - Counter([("b", "1", 1)])


def test_rows_to_replace_where_there_are_none_are_simply_there(store: Store) -> None:
    commit(store, stage(store, "edited", ("a", "1", "xx", 1)), stage(store, "gone", ("b", "1", "", None)))
    assert rows_of(store) == Counter([("a", "1", 2)])


def test_rows_edited_twice_and_after_their_file_was_rewritten_are_there_once(local: Store) -> None:
    fill(local)
    for n in (3, 4, 5):
        commit(local, stage(local, "edited", ("a", "1", "x" * n, 1)), stage(local, "edited", ("b", "1", "x" * n, n)))
    assert rows_of(local) == Counter([("a", "1", 5), ("a", "2", 2), ("b", "1", 5)])


def test_a_partition_leaves_in_whole(store: Store) -> None:
    fill(store)
    with store.writer("behaviors", job="sync") as writer:
        assert writer.remove_partition(str(bucket_of(["a"], 4)[0])) == 2
        assert writer.remove_partition(str(bucket_of(["a"], 4)[0])) == 0
    assert rows_of(store) == Counter([("b", "1", 1)])


def test_nothing_staged_commits_nothing(local: Store) -> None:
    with local.writer("behaviors", job="first") as writer:
        writer.commit(staged_files([]))
        writer.add(staged_files([]))
    assert local.version("behaviors") == 1


def test_a_file_travels_as_text(local: Store) -> None:
    for table, rows in (("behaviors", None), ("generations", answers("it's", "ü", variant=ODD_VARIANT))):
        staged = stage(local, "new", ("ü'\"\n", "1", "x", 1)) if rows is None else local.stage(table, rows)
        for file in files_of(staged, "new"):
            assert DataFile.from_json(file.to_json()) == file


def test_a_file_that_is_gone_from_under_the_table_is_a_storage_error(local: Store) -> None:
    fill(local)
    table = local.table("behaviors")
    file = table.files()[0]
    storage.delete(join(table.uri, file.path))
    with pytest.raises(StorageError, match=f"cannot read {file.path} of .*behaviors"):
        rewrite(table, file, [file])


# Compaction


LONG = ["b" * 100, "b" * 100 + "c", "ü" * 70, "ü" * 70 + "x", "👍" * 40, "👍" * 41, "𠮷" * 20, "\U0010ffff" * 20]


def test_rows_are_replaced_after_a_compaction(store: Store) -> None:
    """The library's files tell their spans by statistics of its own kind, which cut long strings."""
    users = [*LONG, "a", "z", *NASTY]
    for third in range(3):
        commit(store, stage(store, "new", *((user, "1", "x", 1) for user in users[third::3])))
    with store.writer("behaviors", job="store") as writer:
        before, after = compact(writer)
    assert after <= 4 < before and rows_of(store) == Counter((user, "1", 1) for user in users)
    for user in users[::2]:
        commit(store, stage(store, "edited", (user, "1", "xxx", 1)))
    assert rows_of(store) == Counter((user, "1", 1 if n % 2 else 3) for n, user in enumerate(users))
    with store.writer("behaviors", job="store") as writer:
        writer.erase_history()
    commit(store, stage(store, "gone", *((user, "1", "", None) for user in users)))
    assert rows_of(store) == Counter()


@pytest.mark.parametrize("variant", ["own", ODD_VARIANT])
def test_a_compaction_merges_the_buckets_of_a_variant(store: Store, variant: str) -> None:
    ids = [f"r{n}" for n in range(8)]
    for half in (ids[:4], ids[4:]):
        store.write("generations", answers(*half, variant=variant))
    store.write("generations", answers(*ids[:2], variant="another"))
    with store.writer("generations", job="store") as writer:
        _, after = compact(writer)
    assert after == 2
    changes = ["edited"] * 3 + ["gone"] * 3
    store.write("generations", answers(*ids[1:7], variant=variant, output="new", changes=changes))
    found = store.read_generations([variant]).to_pylist()
    assert Counter((row["request_id"], row["output"]) for row in found) == Counter(
        [("r0", "o"), ("r1", "new"), ("r2", "new"), ("r3", "new"), ("r7", "o")]
    )
    assert store.read_generations(["another"]).num_rows == 2
    with store.writer("generations", job="store") as writer:
        writer.vacuum(keep_hours=0)
    assert on_disk(store, "generations") == {
        join(store.uri, "generations", path) for path in contents(store, "generations")
    }
    assert store.read_generations().num_rows == 7


def test_rejects_are_appended_and_merged_at_any_time(local: Store) -> None:
    for n in range(3):
        local.write_rejects(rejects("embed", ["file"], [n], ["text is empty"]))
    with local.writer("rejects", job="store") as writer:
        local.write_rejects(rejects("embed", ["file"], [3], ["text is empty"]))
        before, after = compact(writer)
        assert (before, after) == (4, 1)
    assert sorted(local.table("rejects").scan(["row"])["row"].to_pylist()) == [0, 1, 2, 3]


def test_what_is_about_to_be_appended_without_a_lease_is_not_deleted(local: Store) -> None:
    """Rejects are noted by whoever finds them: their files may be there before their commit."""
    local.write_rejects(rejects("embed", ["file"], [1], ["text is empty"]))
    table = local.table("rejects")
    file = table.write_file(rejects("embed", ["file"], [2], ["text is empty"]))
    with local.writer("rejects", job="store") as writer:
        assert writer.vacuum(keep_hours=0) == 0
    assert join(table.uri, file.path) in on_disk(local, "rejects")


def test_the_lease_and_the_count_outlive_checkpoints_and_a_log_that_was_forgotten(local: Store) -> None:
    fill(local)
    with local.writer("behaviors", job="forget") as writer:
        writer.erase_history()
        DeltaTable(writer.table.uri).create_checkpoint()
        writer.commit(staged_changes(local, "all"))
        writer.erase_history()
    assert rows_of(local) == AFTER["all"]
    table = Table(join(local.uri, "behaviors"), "behaviors")
    assert table.lease() == 2
    with pytest.raises(LeaseLost):
        table.commit(files_of(stage(local, "new", ("d", "1", "x", 1)), "new"), lease=1)


# All of it together


USERS, NAMES = ["a", "b", "ü'", "z"], ["1", "2", "x:y"]
KEYS = [(user, name) for user in USERS for name in NAMES]
FAULTS = ["none", "before", "after", "outsider", "crash before", "crash after"]
STEP = st.fixed_dictionaries(
    {
        "rows": st.dictionaries(st.sampled_from(KEYS), st.integers(1, 3), max_size=8),
        "sync": st.booleans(),
        "faults": st.lists(st.sampled_from(FAULTS), max_size=2),
        "then": st.sampled_from(["nothing", "nothing", "compact", "vacuum", "erase"]),
    }
)


class Crash(BaseException):
    """The process ends here."""


def refresh_all(store: Store, rows: dict[tuple[str, str], int], *, sync: bool) -> None:
    """What `embed` does: one look at each bucket, under the lease, and one commit."""
    table = behaviors(*((*key, "x" * n, n) for key, n in rows.items()), n_buckets=store.n_buckets) if rows else None
    with store.writer("behaviors", job="embed") as writer:
        staged = []
        for bucket in range(store.n_buckets):
            empty = behaviors(("a", "1", "x", 1)).slice(0, 0)
            mine = empty if table is None else table.filter(pa.compute.equal(table["bucket"], bucket))
            work, _ = store.missing(bucket, mine, sync=sync)
            if work.num_rows:
                staged.append(store.stage("behaviors", encode(work)))
        if staged:
            writer.commit(pa.concat_tables(staged))


def apply(fault: str, store: Store, work: Callable[[], None]) -> None:
    if fault == "outsider":
        uri = join(store.uri, "behaviors")
        DeltaTable(uri).alter.set_table_properties({"note": str(random.random())}, raise_if_not_exists=False)
    if fault == "before":
        raise StorageError("no answer")
    if fault == "crash before":
        raise Crash
    work()
    if fault == "after":
        raise StorageError("no answer")
    if fault == "crash after":
        raise Crash


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(STEP, min_size=2, max_size=5))
def test_after_any_refreshes_and_faults_the_table_is_the_plain_model(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, steps: list[dict[str, Any]]
) -> None:
    store = Store.create(str(tmp_path_factory.mktemp("store") / "store"), IDENTITY, 2)
    model: dict[tuple[str, str], int] = {}
    for step in steps:
        model = {**({} if step["sync"] else model), **step["rows"]}
        with monkeypatch.context() as patched:
            # The second fault meets the first attempt, or a later one, of the run that comes after a crash.
            events = [lambda work, fault=fault: apply(fault, store, work) for fault in step["faults"]]
            Attempts(patched, passes, *events)
            for _ in range(3):
                try:
                    refresh_all(store, step["rows"], sync=step["sync"])
                    break
                except Crash:
                    continue
        with store.writer("behaviors", job="store") as writer:
            if step["then"] == "compact":
                compact(writer)
            elif step["then"] == "vacuum":
                writer.vacuum(keep_hours=0)
            elif step["then"] == "erase":
                writer.erase_history()
        assert rows_of(store) == Counter((*key, n) for key, n in model.items())
