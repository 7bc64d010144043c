"""The writer and its faults: a successor, a lost response, another program."""

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
from persona.store.log import Log, UncertainCommit
from persona.store.store import Store
from persona.store.table import Table
from persona.store.writer import Writer, files_of, staged_files
from tests.stores import IDENTITY, behaviors, changed, commit_staged, write_rows
from tests.writing import (
    AFTER,
    BEFORE,
    CHANGES,
    Attempts,
    commit,
    compact,
    fails_after,
    fails_before,
    fill,
    on_disk,
    preceded_by,
    rows_of,
    stage,
    staged_changes,
    take_over,
)

pytestmark = pytest.mark.usefixtures("impatient")


# A replaced holder


@pytest.mark.parametrize("name", CHANGES)
def test_a_holder_replaced_during_a_pause_commits_nothing(store: Store, name: str) -> None:
    fill(store)
    with store.writer("behaviors", job="first") as writer:
        staged = staged_changes(store, name)
        second = take_over(store)
        version = second.version()
        with pytest.raises(LeaseLost, match=r"another run has taken over .* \(lease 3; this run held 2"):
            commit_staged(writer, staged)
    assert rows_of(store) == BEFORE and second.version() == version


@pytest.mark.parametrize("name", CHANGES)
def test_a_holder_replaced_between_reading_the_log_and_committing_commits_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fill(store)
    with store.writer("behaviors", job="first") as writer:
        staged = staged_changes(store, name)
        Attempts(monkeypatch, preceded_by(take_over, store))
        with pytest.raises(LeaseLost):
            commit_staged(writer, staged)
    assert rows_of(store) == BEFORE and store.table("behaviors").lease() == 3


ACTS: dict[str, Callable[[Writer, Store], object]] = {
    **{name: lambda writer, store, name=name: commit_staged(writer, staged_changes(store, name)) for name in CHANGES},
    "remove_partition": lambda writer, _: writer.remove_partition(str(bucket_of(["a"], 4)[0])),
    "compact": lambda writer, _: compact(writer),
    "vacuum": lambda writer, _: writer.vacuum(keep_hours=0),
    "erase_history": lambda writer, _: writer.erase_history(),
}


@pytest.mark.parametrize("name", ACTS)
def test_a_successor_rules_whenever_it_takes_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The takeover comes right after the first holder's k-th read of the log, for every k."""
    read = Log.latest
    for k in range(1, 30):
        store = Store.create(str(tmp_path / str(k)), IDENTITY, 4)
        fill(store)
        commit(store, stage(store, "new", ("a", "3", "xxxx", 3)))  # something to compact
        before = rows_of(store)
        with store.writer("behaviors", job="first") as writer:
            reads, version = [0], [0]

            def counted(log: Log, reads=reads, version=version, k=k, writer=writer, store=store) -> Any:
                found = read(log)
                reads[0] += log is writer.table.log
                if log is writer.table.log and reads[0] == k:
                    version[0] = take_over(store).version()
                return found

            with monkeypatch.context() as patched:
                patched.setattr(Log, "latest", counted)
                lost = False
                try:
                    ACTS[name](writer, store)
                except LeaseLost:
                    lost = True
        if reads[0] < k:
            assert k > 1 and not lost
            return
        second = Table(join(store.uri, "behaviors"), "behaviors")
        assert second.lease() == writer.lease.number + 1
        if lost:
            # Nothing was committed after the takeover, and every file that a reader needs exists.
            assert second.version() == version[0]
        assert sum(rows_of(store).values()) in {sum(before.values()), sum(before.values()) + 1} or not lost
        second.commit([], files_of(staged_files([]), "new"), lease=second.lease())
        staged = stage(store, "new", ("z", "9", "x", 1))
        second.commit(files_of(staged, "new"), lease=second.lease())
        assert rows_of(store)["z", "9", 1] == 1
    raise AssertionError("still reading the log")


def test_a_replaced_holder_deletes_no_file_staged_by_its_successor(local: Store) -> None:
    fill(local)
    with local.writer("behaviors", job="first") as writer:
        second = take_over(local)
        staged = stage(local, "new", ("c", "1", "xxx", 1))
        for act in (lambda: writer.vacuum(keep_hours=0), writer.erase_history):
            with pytest.raises(LeaseLost):
                act()
        second.commit(files_of(staged, "new"), lease=second.lease())
    assert rows_of(local) == AFTER["new"]


def test_a_replaced_holder_does_not_compact(local: Store) -> None:
    fill(local)
    commit(local, stage(local, "new", ("a", "3", "xxxx", 1)))
    with local.writer("behaviors", job="first") as writer:
        second = take_over(local)
        version = second.version()
        with pytest.raises(LeaseLost):
            compact(writer)
    assert (second.version(), second.lease()) == (version, writer.lease.number + 1)


def test_a_successor_that_stages_during_a_vacuum_loses_nothing(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first holder lists the files to delete before the takeover, and the second stages after it."""
    fill(local)
    require_lease, staged = Log.require_lease, []

    def paused(log: Log, lease: int) -> Any:
        found = require_lease(log, lease)
        monkeypatch.setattr(Log, "require_lease", require_lease)
        take_over(local)
        staged.append(stage(local, "new", ("c", "1", "xxx", 1)))
        return found

    with local.writer("behaviors", job="first") as writer:
        unused = files_of(stage(local, "new", ("d", "1", "x", 1)), "new")
        monkeypatch.setattr(Log, "require_lease", paused)
        assert writer.vacuum(keep_hours=0) == len(unused)
    second = Table(join(local.uri, "behaviors"), "behaviors")
    second.commit(files_of(staged[0], "new"), lease=second.lease())
    assert rows_of(local) == AFTER["new"]


def test_two_open_tables_under_one_lease_commit_each_file_once(local: Store) -> None:
    """Two open tables in one process see each other's commits like those of another process."""
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
            write_rows(local, "behaviors", changed(behaviors(("c", "1", "x", 1)), "new"))
        assert (local.version("behaviors"), on_disk(local)) == (version, files)


# A lost response


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize(
    "events",
    [[fails_after], [fails_before], [fails_before, fails_after], [fails_after, fails_after], [fails_before] * 3],
    ids=["after", "before", "before, after", "after twice", "before thrice"],
)
def test_a_commit_with_a_lost_response_counts_once(
    local: Store, monkeypatch: pytest.MonkeyPatch, name: str, events: list[Any]
) -> None:
    fill(local)
    with local.writer("behaviors", job="first") as writer:
        version = local.version("behaviors")
        attempts = Attempts(monkeypatch, *events)
        commit_staged(writer, staged_changes(local, name))
    assert rows_of(local) == AFTER[name] and local.version("behaviors") == version + 1
    assert attempts.n == 1 + [event is fails_after for event in [*events, fails_after]].index(True) or attempts.n > 1


def test_a_commit_with_a_lost_response_counts_once_on_s3(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.create(join(s3, "store"), IDENTITY, 4)
    fill(store)
    with store.writer("behaviors", job="first") as writer:
        Attempts(monkeypatch, fails_after)
        commit_staged(writer, staged_changes(store, "all"))
    assert rows_of(store) == AFTER["all"]


@pytest.mark.parametrize("name", CHANGES)
def test_a_commit_with_a_lost_response_counts_once_even_if_its_files_were_merged_since(
    local: Store, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Its files do not show whether it happened: another program has replaced them."""
    fill(local)

    def merged(attempt: Callable[[], None]) -> None:
        attempt()
        assert DeltaTable(join(local.uri, "behaviors")).optimize.compact()["numFilesRemoved"] > 0
        raise UncertainCommit("no response")

    commit(local, stage(local, "new", ("a", "3", "xxxx", 1), ("c", "2", "xxxx", 1)))
    with local.writer("behaviors", job="first") as writer:
        Attempts(monkeypatch, merged)
        commit_staged(writer, staged_changes(local, name))
    assert rows_of(local) == AFTER[name] + Counter([("a", "3", 4), ("c", "2", 4)])


def test_a_fence_with_a_lost_response_holds(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    Attempts(monkeypatch, fails_before, fails_after)
    with local.writer("behaviors", job="first") as writer:
        assert local.version("behaviors") == 1
        commit_staged(writer, staged_changes(local, "new"))
    assert rows_of(local) == Counter([("c", "1", 3)])


def test_a_commit_without_a_response_is_given_up_after_the_limit(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(local)
    with local.writer("behaviors", job="first") as writer:
        monkeypatch.setenv("PERSONA_STORAGE_TIMEOUT_S", "0.05")
        attempts = Attempts(monkeypatch, *[fails_before] * 100_000)
        message = "cannot write to the table .*: retried for 0 s; last error: UncertainCommit: no response"
        with pytest.raises(StorageError, match=message):
            commit_staged(writer, staged_changes(local, "all"))
        assert 1 < attempts.n < 100_000 and rows_of(local) == BEFORE


def test_an_error_in_reading_the_log_ends_a_commit_at_once(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads are retried on their own; only an attempt to write is repeated by the commit."""
    fill(local)
    n_reads = [0]

    def fails(log: Log, lease: int) -> Any:
        n_reads[0] += 1
        raise StorageError("no connection")

    with local.writer("behaviors", job="first") as writer:
        staged = staged_changes(local, "new")
        with monkeypatch.context() as patched:
            patched.setattr(Log, "require_lease", fails)
            attempts = Attempts(patched)
            with pytest.raises(StorageError, match="^no connection$"):
                writer.add(staged)
    assert n_reads == [1] and attempts.n == 0 and rows_of(local) == BEFORE


def test_a_refused_commit_fails_at_once_with_its_reason(local: Store) -> None:
    """delta-rs raises the same error as for a conflict, which is retried."""
    fill(local)
    DeltaTable(join(local.uri, "behaviors")).alter.set_table_properties({"delta.appendOnly": "true"})
    with local.writer("behaviors", job="first") as writer:
        with pytest.raises(StorageError, match=r"cannot write to the table .*behaviors: .*append-only"):
            commit_staged(writer, staged_changes(local, "edited"))
        commit_staged(writer, staged_changes(local, "new"))
    assert rows_of(local) == AFTER["new"]


def test_a_table_that_requires_a_newer_writer_is_refused(local: Store) -> None:
    log = Path(local.uri, "behaviors", "_delta_log")
    needs = '{"protocol":{"minReaderVersion":1,"minWriterVersion":7,"writerFeatures":["rowTracking","domainMetadata"]}}'
    (log / f"{1:020d}.json").write_text(needs + "\n")
    with (
        pytest.raises(StorageError, match=r"cannot write to the table .*RowTracking"),
        local.writer("behaviors", job="j"),
    ):
        pass


# Other programs


def append_directly(store: Store) -> None:
    uri = join(store.uri, "behaviors")
    table = DeltaTable(uri, storage_options=delta_options(uri))
    row = table.to_pyarrow_table().slice(0, 1)
    row = row.set_column(row.column_names.index("user_id"), "user_id", pa.array(["outsider"]))
    row = row.set_column(row.column_names.index("bucket"), "bucket", pa.array(bucket_of(["outsider"], 4)))
    write_deltalake(table, row, mode="append")


def compact_directly(store: Store) -> None:
    uri = join(store.uri, "behaviors")
    DeltaTable(uri, storage_options=delta_options(uri)).optimize.compact()


@pytest.mark.parametrize("name", CHANGES)
def test_rows_that_another_program_adds_meanwhile_stay(
    store: Store, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fill(store)
    meanwhile = preceded_by(append_directly, store)
    with store.writer("behaviors", job="first") as writer:
        attempts = Attempts(monkeypatch, meanwhile, meanwhile)
        commit_staged(writer, staged_changes(store, name))
    found = rows_of(store)
    assert sum(found.pop(key) for key in list(found) if key[0] == "outsider") == 2
    assert found == AFTER[name] and attempts.n == 3


def test_new_rows_are_committed_while_another_program_merges_files(
    local: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(local)
    commit(local, stage(local, "new", ("a", "3", "xxxx", 1)))
    with local.writer("behaviors", job="first") as writer:
        attempts = Attempts(monkeypatch, preceded_by(compact_directly, local))
        commit_staged(writer, staged_changes(local, "new"))
    assert rows_of(local) == AFTER["new"] + Counter([("a", "3", 4)]) and attempts.n == 2


@pytest.mark.parametrize("name", ["edited", "gone", "all"])
def test_replacing_a_file_that_another_program_removed_is_an_error_and_changes_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fill(store)
    commit(store, stage(store, "new", ("a", "3", "xxxx", 1)))
    with store.writer("behaviors", job="first") as writer:
        Attempts(monkeypatch, preceded_by(compact_directly, store))
        with pytest.raises(StorageError, match=r"another program has removed bucket=.* run the same command again"):
            commit_staged(writer, staged_changes(store, name))
        assert rows_of(store) == BEFORE + Counter([("a", "3", 4)])
        commit_staged(writer, staged_changes(store, name))  # the same command again
    assert rows_of(store) == AFTER[name] + Counter([("a", "3", 4)])


def test_a_compaction_that_conflicts_with_another_program_changes_nothing(
    local: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(local)
    commit(local, stage(local, "new", ("a", "3", "xxxx", 1)))
    require_lease = Log.require_lease

    def conflicting(log: Log, lease: int) -> Any:
        found = require_lease(log, lease)
        monkeypatch.setattr(Log, "require_lease", require_lease)
        compact_directly(local)
        return found

    with local.writer("behaviors", job="first") as writer:
        monkeypatch.setattr(Log, "require_lease", conflicting)
        with pytest.raises(StorageError, match=r"another program has removed bucket=.* run the same command again"):
            compact(writer)
    assert rows_of(local) == BEFORE + Counter([("a", "3", 4)])
