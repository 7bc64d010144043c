"""The writer when something comes between: a successor, an answer that is lost, another program."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from persona.errors import LeaseHeld, LeaseLost, StorageError
from persona.inputs.histories import bucket_of
from persona.storage import delta_options, join
from persona.store.store import Store
from persona.store.table import Table
from persona.store.writer import Writer, files_of, staged_files
from tests.stores import IDENTITY, behaviors, encode
from tests.writing import (
    AFTER,
    BEFORE,
    CHANGES,
    Attempts,
    behind,
    commit,
    compact,
    fails_after,
    fails_before,
    fill,
    on_disk,
    rows_of,
    stage,
    staged_changes,
    take_over,
)

pytestmark = pytest.mark.usefixtures("impatient")


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
        Attempts(monkeypatch, behind(take_over, store))
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
    look = Table._refreshed
    for k in range(1, 30):
        store = Store.create(str(tmp_path / str(k)), IDENTITY, 4)
        fill(store)
        commit(store, stage(store, "new", ("a", "3", "xxxx", 3)))  # something to compact
        before = rows_of(store)
        with store.writer("behaviors", job="first") as writer:
            looks, version = [0], [0]

            def counted(table: Table, looks=looks, version=version, k=k, writer=writer, store=store) -> Any:
                found = look(table)
                looks[0] += table is writer.table
                if table is writer.table and looks[0] == k:
                    version[0] = take_over(store).version()
                return found

            with monkeypatch.context() as patched:
                patched.setattr(Table, "_refreshed", counted)
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


def test_a_holder_that_was_replaced_does_not_compact(local: Store) -> None:
    fill(local)
    commit(local, stage(local, "new", ("a", "3", "xxxx", 1)))
    with local.writer("behaviors", job="first") as writer:
        second = take_over(local)
        version = second.version()
        with pytest.raises(LeaseLost):
            compact(writer)
    assert (second.version(), second.lease()) == (version, writer.lease.number + 1)


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
    from persona.store import lease

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
    [[fails_after], [fails_before], [fails_before, fails_after], [fails_after, fails_after], [fails_before] * 3],
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
    assert attempts.n == 1 + [event is fails_after for event in [*events, fails_after]].index(True) or attempts.n > 1


def test_a_commit_whose_answer_is_lost_counts_once_on_a_store(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.create(join(s3, "store"), IDENTITY, 4)
    fill(store)
    with store.writer("behaviors", job="first") as writer:
        Attempts(monkeypatch, fails_after)
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
    Attempts(monkeypatch, fails_before, fails_after)
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
    meanwhile = behind(outsiders_append, store)
    with store.writer("behaviors", job="first") as writer:
        attempts = Attempts(monkeypatch, meanwhile, meanwhile)
        writer.commit(staged_changes(store, name))
    found = rows_of(store)
    assert sum(found.pop(key) for key in list(found) if key[0] == "outsider") == 2
    assert found == AFTER[name] and attempts.n == 3


def test_new_rows_get_in_past_an_outsider_that_merges_files(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(local)
    commit(local, stage(local, "new", ("a", "3", "xxxx", 1)))
    with local.writer("behaviors", job="first") as writer:
        attempts = Attempts(monkeypatch, behind(outsiders_compact, local))
        writer.commit(staged_changes(local, "new"))
    assert rows_of(local) == AFTER["new"] + Counter([("a", "3", 4)]) and attempts.n == 2


@pytest.mark.parametrize("name", ["edited", "gone", "all"])
def test_a_file_that_an_outsider_has_removed_meanwhile_is_an_error_and_changes_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fill(store)
    commit(store, stage(store, "new", ("a", "3", "xxxx", 1)))
    with store.writer("behaviors", job="first") as writer:
        Attempts(monkeypatch, behind(outsiders_compact, store))
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
