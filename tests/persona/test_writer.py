"""The writer: what is staged counts exactly once or not at all, whoever comes between and whatever answer is lost."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from persona import storage, tables
from persona.errors import LeaseHeld, LeaseLost, StorageError
from persona.histories import bucket_of
from persona.inputs import rejects
from persona.layouts import DataFile
from persona.storage import delta_options, join
from persona.store import Store
from persona.tables import Table
from persona.writer import Writer, files_of, key_strings, merge, rewrite, staged_files
from tests.stores import IDENTITY, NASTY, answers, behaviors, encode

Row = tuple[str, str, str, int | None]
WHOLE = 2**20  # compaction makes files of this size: one of everything
ODD_VARIANT = "none / ü' %20 a=b"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pause between two attempts to commit."""
    monkeypatch.setattr(tables.random, "uniform", lambda low, high: 0.0)


@pytest.fixture
def store(root: str) -> Store:
    return Store.create(join(root, "store"), IDENTITY, 4)


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return Store.create(str(tmp_path / "store"), IDENTITY, 4)


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


def rows_of(store: Store, version: int | None = None) -> Counter[tuple[str, str, int]]:
    """Every row that a reader sees: user, behavior, and the length of the text that was encoded."""
    found: Counter[tuple[str, str, int]] = Counter()
    for row in store.table("behaviors").scan(None, version=version).to_pylist():
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
            event = events[self.n - 1] if self.n <= len(events) else _pass
            event(lambda: original(table, *args, **more))

        monkeypatch.setattr(Table, "_transact", transact)


def _pass(work: Callable[[], None]) -> None:
    work()


def _fail_before(work: Callable[[], None]) -> None:
    raise StorageError("no answer")


def _fail_after(work: Callable[[], None]) -> None:
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


# Who was replaced


@pytest.mark.parametrize("name", CHANGES)
def test_a_holder_that_was_replaced_while_it_paused_commits_nothing(store: Store, name: str) -> None:
    fill(store)
    with store.writer("behaviors", job="first") as writer:
        staged = staged_changes(store, name)
        second = take_over(store)
        version = second.version()
        with pytest.raises(LeaseLost, match=r"another run has taken over .* \(lease 3; this run held 2"):
            writer.commit(staged)
    assert rows_of(store) == BEFORE and second.version() == version


@pytest.mark.parametrize("name", CHANGES)
def test_a_holder_that_is_replaced_between_its_look_and_its_commit_commits_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fill(store)
    with store.writer("behaviors", job="first") as writer:
        staged = staged_changes(store, name)

        def replaced(work: Callable[[], None]) -> None:
            take_over(store)
            work()

        Attempts(monkeypatch, replaced)
        with pytest.raises(LeaseLost):
            writer.commit(staged)
    assert rows_of(store) == BEFORE and store.table("behaviors").lease() == 3


ACTS: dict[str, Callable[[Writer, Store], object]] = {
    **{name: lambda writer, store, name=name: writer.commit(staged_changes(store, name)) for name in CHANGES},
    "remove_partition": lambda writer, _: writer.remove_partition(str(bucket_of(["a"], 4)[0])),
    "compact": lambda writer, _: compact(writer),
    "vacuum": lambda writer, _: writer.vacuum(keep_hours=0),
    "erase_history": lambda writer, _: writer.erase_history(),
}


@pytest.mark.parametrize("name", ACTS)
def test_at_whatever_look_at_the_log_a_holder_is_replaced_its_successor_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The successor comes right after the k-th time that the first holder reads the log, for every k there is."""
    look = Table._at
    for k in range(1, 30):
        store = Store.create(str(tmp_path / str(k)), IDENTITY, 4)
        fill(store)
        commit(store, stage(store, "new", ("a", "3", "xxxx", 3)))  # something to compact
        before = rows_of(store)
        with store.writer("behaviors", job="first") as writer:
            looks, version = [0], [0]

            def counted(
                table: Table, at: int | None, looks=looks, version=version, k=k, writer=writer, store=store
            ) -> Any:
                found = look(table, at)
                looks[0] += table is writer.table
                if table is writer.table and looks[0] == k:
                    version[0] = take_over(store).version()
                return found

            with monkeypatch.context() as patched:
                patched.setattr(Table, "_at", counted)
                lost = False
                try:
                    ACTS[name](writer, store)
                except LeaseLost:
                    lost = True
        if looks[0] < k:
            assert k > 1 and not lost
            return
        second = Table(join(store.uri, "behaviors"), "behaviors")
        assert second.lease() == writer.lease.number + 1
        if lost:
            # The files that a reader needs are there, and nothing has changed but perhaps before the successor came.
            assert second.version() == version[0]
        assert sum(rows_of(store).values()) in {sum(before.values()), sum(before.values()) + 1} or not lost
        second.commit([], files_of(staged_files([]), "new"), lease=second.lease())
        staged = stage(store, "new", ("z", "9", "x", 1))
        second.commit(files_of(staged, "new"), lease=second.lease())
        assert rows_of(store)["z", "9", 1] == 1
    raise AssertionError("there is no end of it")


def test_a_holder_that_was_replaced_deletes_no_file_that_its_successor_has_staged(local: Store) -> None:
    fill(local)
    with local.writer("behaviors", job="first") as writer:
        second = take_over(local)
        staged = stage(local, "new", ("c", "1", "xxx", 1))
        for act in (lambda: writer.vacuum(keep_hours=0), writer.erase_history):
            with pytest.raises(LeaseLost):
                act()
        second.commit(files_of(staged, "new"), lease=second.lease())
    assert rows_of(local) == AFTER["new"]


def test_a_successor_that_stages_while_the_first_deletes_loses_nothing(
    local: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first has listed what to delete; all that the second stages comes after that."""
    fill(local)
    held, staged = Table._held, []

    def paused(table: Table, lease: int) -> Any:
        found = held(table, lease)
        monkeypatch.setattr(Table, "_held", held)
        take_over(local)
        staged.append(stage(local, "new", ("c", "1", "xxx", 1)))
        return found

    with local.writer("behaviors", job="first") as writer:
        rubbish = files_of(stage(local, "new", ("d", "1", "x", 1)), "new")
        monkeypatch.setattr(Table, "_held", paused)
        assert writer.vacuum(keep_hours=0) == len(rubbish)
    second = Table(join(local.uri, "behaviors"), "behaviors")
    second.commit(files_of(staged[0], "new"), lease=second.lease())
    assert rows_of(local) == AFTER["new"]


def test_of_two_that_commit_at_once_under_one_lease_each_file_counts_once(local: Store) -> None:
    """Two open tables of one process see each other's commits as they see those of others."""
    with local.writer("behaviors", job="first") as writer:
        other = Table(writer.table.uri, "behaviors")
        for n in range(4):
            table = (writer.table, other)[n % 2]
            table.commit(files_of(stage(local, "new", (f"u{n}", "1", "x", 1)), "new"), lease=writer.lease.number)
    assert rows_of(local) == Counter((f"u{n}", "1", 1) for n in range(4))


def test_a_refused_second_run_changes_nothing(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from persona import lease

    monkeypatch.setattr(lease, "_RENEWALS", 3000)
    fill(local)
    with local.writer("behaviors", job="first"):
        version, files = local.version("behaviors"), on_disk(local)
        with pytest.raises(LeaseHeld):
            local.write("behaviors", encode(behaviors(("c", "1", "x", 1))).append_column("change", pa.array(["new"])))
        assert (local.version("behaviors"), on_disk(local)) == (version, files)


# Whose answer was lost


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize(
    "events",
    [[_fail_after], [_fail_before], [_fail_before, _fail_after], [_fail_after, _fail_after], [_fail_before] * 3],
    ids=["done", "not done", "not done, done", "done twice", "not done thrice"],
)
def test_a_commit_whose_answer_is_lost_counts_once(
    local: Store, monkeypatch: pytest.MonkeyPatch, name: str, events: list[Any]
) -> None:
    fill(local)
    with local.writer("behaviors", job="first") as writer:
        version = local.version("behaviors")
        attempts = Attempts(monkeypatch, *events)
        writer.commit(staged_changes(local, name))
    assert rows_of(local) == AFTER[name] and local.version("behaviors") == version + 1
    assert attempts.n == 1 + [event is _fail_after for event in [*events, _fail_after]].index(True) or attempts.n > 1


def test_a_commit_whose_answer_is_lost_counts_once_on_a_store(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.create(join(s3, "store"), IDENTITY, 4)
    fill(store)
    with store.writer("behaviors", job="first") as writer:
        Attempts(monkeypatch, _fail_after)
        writer.commit(staged_changes(store, "all"))
    assert rows_of(store) == AFTER["all"]


@pytest.mark.parametrize("name", CHANGES)
def test_a_commit_whose_answer_is_lost_counts_once_when_others_have_merged_its_files(
    local: Store, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """So it cannot be told by its files whether it has happened."""
    fill(local)

    def merged(work: Callable[[], None]) -> None:
        work()
        assert DeltaTable(join(local.uri, "behaviors")).optimize.compact()["numFilesRemoved"] > 0
        raise StorageError("no answer")

    commit(local, stage(local, "new", ("a", "3", "xxxx", 1), ("c", "2", "xxxx", 1)))
    with local.writer("behaviors", job="first") as writer:
        Attempts(monkeypatch, merged)
        writer.commit(staged_changes(local, name))
    assert rows_of(local) == AFTER[name] + Counter([("a", "3", 4), ("c", "2", 4)])


def test_a_fence_whose_answer_is_lost_stands(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    Attempts(monkeypatch, _fail_before, _fail_after)
    with local.writer("behaviors", job="first") as writer:
        assert local.version("behaviors") == 1
        writer.commit(staged_changes(local, "new"))
    assert rows_of(local) == Counter([("c", "1", 3)])


def test_a_refusal_is_told_at_once_and_with_its_reason(local: Store) -> None:
    """And not taken for another writer that came first, again and again."""
    fill(local)
    DeltaTable(join(local.uri, "behaviors")).alter.set_table_properties({"delta.appendOnly": "true"})
    with local.writer("behaviors", job="first") as writer:
        with pytest.raises(StorageError, match=r"cannot write to the table .*behaviors: .*append-only"):
            writer.commit(staged_changes(local, "edited"))
        writer.commit(staged_changes(local, "new"))
    assert rows_of(local) == AFTER["new"]


def test_a_table_that_needs_newer_writers_is_refused(local: Store) -> None:
    log = Path(local.uri, "behaviors", "_delta_log")
    needs = '{"protocol":{"minReaderVersion":1,"minWriterVersion":7,"writerFeatures":["rowTracking","domainMetadata"]}}'
    (log / f"{1:020d}.json").write_text(needs + "\n")
    with (
        pytest.raises(StorageError, match=r"cannot write to the table .*RowTracking"),
        local.writer("behaviors", job="j"),
    ):
        pass


# What others do meanwhile


def outsiders_append(store: Store) -> None:
    uri = join(store.uri, "behaviors")
    table = DeltaTable(uri, storage_options=delta_options(uri))
    row = table.to_pyarrow_table().slice(0, 1)
    row = row.set_column(row.column_names.index("user_id"), "user_id", pa.array(["outsider"]))
    row = row.set_column(row.column_names.index("bucket"), "bucket", pa.array(bucket_of(["outsider"], 4)))
    write_deltalake(table, row, mode="append")


def outsiders_compact(store: Store) -> None:
    uri = join(store.uri, "behaviors")
    DeltaTable(uri, storage_options=delta_options(uri)).optimize.compact()


@pytest.mark.parametrize("name", CHANGES)
def test_what_an_outsider_adds_meanwhile_stays(store: Store, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    fill(store)

    def meanwhile(work: Callable[[], None]) -> None:
        outsiders_append(store)
        work()

    with store.writer("behaviors", job="first") as writer:
        attempts = Attempts(monkeypatch, meanwhile, meanwhile)
        writer.commit(staged_changes(store, name))
    found = rows_of(store)
    assert sum(found.pop(key) for key in list(found) if key[0] == "outsider") == 2
    assert found == AFTER[name] and attempts.n == 3


def test_new_rows_get_in_past_an_outsider_that_merges_files(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(local)
    commit(local, stage(local, "new", ("a", "3", "xxxx", 1)))

    def meanwhile(work: Callable[[], None]) -> None:
        outsiders_compact(local)
        work()

    with local.writer("behaviors", job="first") as writer:
        attempts = Attempts(monkeypatch, meanwhile)
        writer.commit(staged_changes(local, "new"))
    assert rows_of(local) == AFTER["new"] + Counter([("a", "3", 4)]) and attempts.n == 2


@pytest.mark.parametrize("name", ["edited", "gone", "all"])
def test_a_file_that_an_outsider_has_removed_meanwhile_is_an_error_and_changes_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fill(store)
    commit(store, stage(store, "new", ("a", "3", "xxxx", 1)))

    def meanwhile(work: Callable[[], None]) -> None:
        outsiders_compact(store)
        work()

    with store.writer("behaviors", job="first") as writer:
        Attempts(monkeypatch, meanwhile)
        with pytest.raises(StorageError, match=r"another program has removed bucket=.* run the same command again"):
            writer.commit(staged_changes(store, name))
        assert rows_of(store) == BEFORE + Counter([("a", "3", 4)])
        writer.commit(staged_changes(store, name))  # the same command again
    assert rows_of(store) == AFTER[name] + Counter([("a", "3", 4)])


def test_a_compaction_that_an_outsider_crosses_changes_nothing(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(local)
    commit(local, stage(local, "new", ("a", "3", "xxxx", 1)))
    held = Table._held

    def crossed(table: Table, lease: int) -> Any:
        found = held(table, lease)
        monkeypatch.setattr(Table, "_held", held)
        outsiders_compact(local)
        return found

    with local.writer("behaviors", job="first") as writer:
        monkeypatch.setattr(Table, "_held", crossed)
        with pytest.raises(StorageError, match=r"another program has removed bucket=.* run the same command again"):
            compact(writer)
    assert rows_of(local) == BEFORE + Counter([("a", "3", 4)])


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
    assert rows_of(store, version) == rows_of(store, version + 1) == expected
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


def test_a_holder_that_was_replaced_does_not_compact(local: Store) -> None:
    fill(local)
    commit(local, stage(local, "new", ("a", "3", "xxxx", 1)))
    with local.writer("behaviors", job="first") as writer:
        second = take_over(local)
        version = second.version()
        with pytest.raises(LeaseLost):
            compact(writer)
    assert (second.version(), second.lease()) == (version, writer.lease.number + 1)


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
            Attempts(patched, _pass, *events)
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
