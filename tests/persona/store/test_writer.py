"""The writer: staged rows count exactly once, replace the right rows, and change nothing else."""

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
from persona.store import key_index
from persona.store.changes import key_strings
from persona.store.data_files import DataFile
from persona.store.log import UncertainCommit
from persona.store.store import Store
from persona.store.table import Table
from persona.store.writer import files_of, rewrite, staged_files
from tests.stores import IDENTITY, NASTY, answers, behaviors, commit_staged, encode, places_of_bucket, write_rows
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
    rows_of,
    stage,
    staged_changes,
    succeeds,
)

pytestmark = pytest.mark.usefixtures("impatient")


# Replacing rows


def test_only_touched_files_are_rewritten_in_one_commit(store: Store) -> None:
    users = [f"u{n:02}" for n in range(12)]
    for third in range(3):  # three files per bucket, with disjoint ranges of users
        commit(store, stage(store, "new", *((u, b, "x", 1) for u in users[4 * third : 4 * third + 4] for b in "12")))
    old, version = contents(store), store.version("behaviors")
    touched = {
        file.path
        for file in store.table("behaviors").files()
        if file.stats["user_id"][0] <= "u05" <= file.stats["user_id"][1]
        and file.partition == str(bucket_of(["u05"], 4)[0])
    }
    with store.writer("behaviors", job="edit") as writer:
        commit_staged(writer, stage(store, "edited", ("u05", "2", "xxx", 1)))
    new = contents(store)
    assert len(touched) == 1 and set(old) - set(new) == touched
    assert {path: new[path] for path in set(old) & set(new)} == {path: old[path] for path in set(old) - touched}
    assert store.version("behaviors") == version + 2  # one for the lease, one for everything else
    expected = Counter((u, b, 1) for u in users for b in "12")
    assert rows_of(store.at(behaviors=version)) == rows_of(store.at(behaviors=version + 1)) == expected
    assert rows_of(store) == expected - Counter([("u05", "2", 1)]) + Counter([("u05", "2", 3)])


def test_a_file_without_the_key_stays_even_if_its_statistics_include_it(local: Store) -> None:
    one = Store.create(local.uri + "1", IDENTITY, 1)
    commit(one, stage(one, "new", ("a", "1", "x", 1), ("z", "1", "x", 1)))
    commit(one, stage(one, "new", ("b", "1", "x", 1), ("y", "1", "x", 1)))
    old = contents(one)
    commit(one, stage(one, "edited", ("b", "1", "xx", 1)))
    assert len(set(old) & set(contents(one))) == 1
    assert rows_of(one) == Counter([("a", "1", 1), ("z", "1", 1), ("b", "1", 2), ("y", "1", 1)])


# Pairs of keys that would be equal if their parts were simply concatenated.
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


def test_keys_of_any_characters_are_distinguished(store: Store) -> None:
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
def test_different_keys_have_different_strings(keys: list[tuple[str, str]]) -> None:
    users, names = zip(*keys, strict=True)
    strings = key_strings(pa.table({"user_id": users, "behavior_id": names})).to_pylist()
    assert len(set(strings)) == len(keys)


def test_a_file_without_remaining_rows_is_removed(store: Store) -> None:
    fill(store)
    commit(store, stage(store, "gone", ("a", "1", "", None), ("a", "2", "", None)))
    assert rows_of(store) == Counter([("b", "1", 1)])
    assert [file.partition for file in store.table("behaviors").files()] == [str(bucket_of(["b"], 4)[0])]
    commit(store, stage(store, "gone", ("b", "1", "", None)))
    assert rows_of(store) == Counter() and store.table("behaviors").files() == []


def test_staged_files_of_deleted_keys_are_discarded_after_the_commit(store: Store) -> None:
    fill(store)
    files = on_disk(store)
    with store.writer("behaviors", job="sync") as writer:
        staged = stage(store, "gone", ("b", "1", "", None))
        assert len(on_disk(store)) == len(files) + 1
        commit_staged(writer, staged)
    assert on_disk(store) == files  # also those of the old version
    assert rows_of(store) == BEFORE - Counter([("b", "1", 1)])


def test_edited_rows_without_an_older_one_are_added(store: Store) -> None:
    commit(store, stage(store, "edited", ("a", "1", "xx", 1)), stage(store, "gone", ("b", "1", "", None)))
    assert rows_of(store) == Counter([("a", "1", 2)])


def test_repeatedly_edited_rows_are_not_duplicated(local: Store) -> None:
    fill(local)
    for n in (3, 4, 5):
        commit(local, stage(local, "edited", ("a", "1", "x" * n, 1)), stage(local, "edited", ("b", "1", "x" * n, n)))
    assert rows_of(local) == Counter([("a", "1", 5), ("a", "2", 2), ("b", "1", 5)])


def test_a_partition_is_removed(store: Store) -> None:
    fill(store)
    with store.writer("behaviors", job="sync") as writer:
        assert writer.remove_partition(str(bucket_of(["a"], 4)[0])) == 2
        assert writer.remove_partition(str(bucket_of(["a"], 4)[0])) == 0
    assert rows_of(store) == Counter([("b", "1", 1)])


def test_nothing_staged_commits_nothing(local: Store) -> None:
    with local.writer("behaviors", job="first") as writer:
        commit_staged(writer, staged_files([]))
        writer.add(staged_files([]))
    assert local.version("behaviors") == 1


def test_a_data_file_survives_conversion_to_json(local: Store) -> None:
    for table, rows in (("behaviors", None), ("generations", answers("it's", "ü", variant=ODD_VARIANT))):
        staged = stage(local, "new", ("ü'\"\n", "1", "x", 1)) if rows is None else local.stage(table, rows)
        for file in files_of(staged, "new"):
            assert DataFile.from_json(file.to_json()) == file


def test_a_missing_data_file_is_a_storage_error(local: Store) -> None:
    fill(local)
    table = local.table("behaviors")
    file = table.files()[0]
    storage.delete(join(table.uri, file.path))
    with pytest.raises(StorageError, match=f"cannot read {file.path} of .*behaviors"):
        rewrite(table, [file], [file])


# Compaction


LONG = ["b" * 100, "b" * 100 + "c", "ü" * 70, "ü" * 70 + "x", "👍" * 40, "👍" * 41, "𠮷" * 20, "\U0010ffff" * 20]


def test_rows_are_replaced_after_a_compaction(store: Store) -> None:
    """Statistics must hold for any characters, and for long strings, which delta-rs truncates in its own files."""
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
        write_rows(store, "generations", answers(*half, variant=variant))
    write_rows(store, "generations", answers(*ids[:2], variant="another"))
    with store.writer("generations", job="store") as writer:
        _, after = compact(writer)
    assert after == 2
    changes = ["edited"] * 3 + ["gone"] * 3
    write_rows(store, "generations", answers(*ids[1:7], variant=variant, output="new", changes=changes))
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


def test_rejects_can_be_appended_and_merged_while_another_run_has_the_lease(local: Store) -> None:
    for n in range(3):
        local.write_rejects(rejects("embed", ["file"], [n], ["text is empty"]))
    with local.writer("rejects", job="store") as writer:
        local.write_rejects(rejects("embed", ["file"], [3], ["text is empty"]))
        before, after = compact(writer)
        assert (before, after) == (4, 1)
    assert sorted(local.table("rejects").read(["row"])["row"].to_pylist()) == [0, 1, 2, 3]


def test_vacuum_spares_a_file_that_is_about_to_be_appended_without_a_lease(local: Store) -> None:
    """Any worker appends the rejects it finds, so their files may exist before their commit."""
    local.write_rejects(rejects("embed", ["file"], [1], ["text is empty"]))
    table = local.table("rejects")
    file = table.write_file(rejects("embed", ["file"], [2], ["text is empty"]))
    with local.writer("rejects", job="store") as writer:
        assert writer.vacuum(keep_hours=0) == 0
    assert join(table.uri, file.path) in on_disk(local, "rejects")


def test_the_lease_and_the_commit_count_survive_checkpoints_and_an_erased_log(local: Store) -> None:
    fill(local)
    with local.writer("behaviors", job="forget") as writer:
        writer.erase_history()
        DeltaTable(writer.table.uri).create_checkpoint()
        commit_staged(writer, staged_changes(local, "all"))
        writer.erase_history()
    assert rows_of(local) == AFTER["all"]
    table = Table(join(local.uri, "behaviors"), "behaviors")
    assert table.lease() == 2
    with pytest.raises(LeaseLost):
        table.commit(files_of(stage(local, "new", ("d", "1", "x", 1)), "new"), lease=1)


# Random sequences


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
    """Stands for the end of the process."""


def refresh_all(store: Store, rows: dict[tuple[str, str], int], *, sync: bool) -> None:
    """What `embed` does: compare each bucket under the lease, and commit once."""
    table = behaviors(*((*key, "x" * n, n) for key, n in rows.items()), n_buckets=store.n_buckets) if rows else None
    with store.writer("behaviors", job="embed") as writer:
        staged = []
        for bucket in range(store.n_buckets):
            empty = behaviors(("a", "1", "x", 1)).slice(0, 0)
            in_bucket = empty if table is None else table.filter(pa.compute.equal(table["bucket"], bucket))
            work, _ = store.missing(bucket, in_bucket, absent=places_of_bucket(bucket) if sync else None)
            if work.num_rows:
                staged.append(store.stage("behaviors", encode(work)))
        if staged:
            commit_staged(writer, pa.concat_tables(staged))


def apply(fault: str, store: Store, attempt: Callable[[], None]) -> None:
    if fault == "outsider":
        uri = join(store.uri, "behaviors")
        DeltaTable(uri).alter.set_table_properties({"note": str(random.random())}, raise_if_not_exists=False)
    if fault == "before":
        raise UncertainCommit("no response")
    if fault == "crash before":
        raise Crash
    attempt()
    if fault == "after":
        raise UncertainCommit("no response")
    if fault == "crash after":
        raise Crash


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(STEP, min_size=2, max_size=5))
def test_after_any_refreshes_and_faults_the_table_equals_a_dict(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, steps: list[dict[str, Any]]
) -> None:
    store = Store.create(str(tmp_path_factory.mktemp("store") / "store"), IDENTITY, 2)
    model: dict[tuple[str, str], int] = {}
    for step in steps:
        model = {**({} if step["sync"] else model), **step["rows"]}
        with monkeypatch.context() as patched:
            # After a crash, the next fault hits an attempt of the next run.
            events = [lambda attempt, fault=fault: apply(fault, store, attempt) for fault in step["faults"]]
            Attempts(patched, succeeds, *events)
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
        if step["then"] in ("vacuum", "erase"):
            table = store.table("behaviors")
            assert key_index.indexed_paths(table.uri) == table.stored_paths() == table.file_list().paths()
