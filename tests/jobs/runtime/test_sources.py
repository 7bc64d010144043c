"""A refresh by the ledger of files leaves what reading everything would leave; the job's steps, without Ray."""

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from jobs.runtime import sources
from jobs.runtime.job_options import InputFormat
from jobs.runtime.reading import FileFound, Found
from persona.inputs import histories
from persona.inputs.files import find_files
from persona.inputs.histories import Columns
from persona.inputs.reader import read_split
from persona.inputs.splits import cut
from persona.store import maintenance
from persona.store.schema import LAYOUTS
from persona.store.sources import create, read as read_ledger
from persona.store.store import Store
from tests.stores import IDENTITY, commit_staged, encode, places_of_bucket

Row = tuple[str, str, str, int | None]
"""User, behavior, text and time."""


class Killed(Exception):
    pass


@dataclass
class Ran:
    """What a run has read (names of files) and done (counts of `Store.missing`)."""

    planned: sources.Planned
    read: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def encoded(self) -> int:
        return self.counts["new"] + self.counts["edited"]


def embed(
    store: Store,
    folder: Path,
    *,
    exclude: Sequence[str] = (),
    unit: Any = "s",
    kill_after: int | None = None,
    max_reject_fraction: float = 0.9,
    between: Callable[[], None] = lambda: None,
    **options: bool,
) -> Ran:
    """The steps of `jobs.embed`; killed after a number of commits."""
    n_commits = 0

    def committed() -> None:
        nonlocal n_commits
        if n_commits == kill_after:
            raise Killed
        n_commits += 1

    files = find_files(str(folder), flag="--histories", exclude=exclude)
    form = InputFormat(exclude=tuple(exclude), timestamp_unit=unit)
    columns = Columns(timestamp_unit=unit)
    planned = sources.plan(files, columns, form, store, sources.Options(**options))
    ran = Ran(planned=planned)
    between()
    if not planned.refresh.to_read:
        return ran
    with store.writer("behaviors", job="test") as writer, store.writer("sources", job="test") as ledger:
        planned = planned.again(store)
        found: dict[str, FileFound] = {}
        tables = [histories.SCHEMA.empty_table()]
        for split in cut(files, planned.refresh.to_read):
            rows, rejects, unreadable = _read(split, columns)
            tables.append(rows)
            found[split.uri] = FileFound(rows=rows.num_rows, rejects=rejects, unreadable=unreadable)
        ran.read = sorted(os.path.relpath(uri, folder) for uri in found)
        deletes = planned.refresh.deletes and not any(one.unreadable for one in found.values())
        if deletes:
            planned = planned.before_deleting(ledger)
            committed()
        together = pa.concat_tables(tables)
        for bucket in range(store.n_buckets):
            given = together.filter(pa.compute.equal(together["bucket"], bucket))
            absent = places_of_bucket(bucket) if deletes else None
            missing, counts = store.missing(bucket, given, absent=absent, keeps_later=planned.refresh.keeps_later)
            commit_staged(writer, store.stage("behaviors", encode(missing)))
            ran.counts.update(counts)
            committed()
        committed()
        planned.record(
            ledger,
            Found(files=found, reasons={}),
            run="r",
            version=store.version("behaviors"),
            has_deleted=deletes,
            max_reject_fraction=max_reject_fraction,
        )
    return ran


def _read(split: Any, columns: Columns) -> tuple[pa.Table, int, int]:
    good, rejects, unreadable = [histories.SCHEMA.empty_table()], 0, 0
    for records in read_split(split):
        rows, bad = histories.validate(records, columns, 4)
        good.append(rows)
        rejects += bad.num_rows
        unreadable += records.rejects.num_rows
    return pa.concat_tables(good), rejects, unreadable


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(str(tmp_path / "store"), IDENTITY, 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "in"


_ticks = iter(range(1, 10**9))


def write(path: Path, *rows: Row, extra: str = "") -> None:
    """Write a file with a time of its own, as the clock of the disk may be too coarse for a test."""
    path.parent.mkdir(exist_ok=True, parents=True)
    names = ("user_id", "behavior_id", "text", "timestamp")
    path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows) + extra)
    os.utime(path, ns=(next(_ticks), next(_ticks)))


def stored(store: Store) -> set[tuple[Any, ...]]:
    """User, behavior, text hash and time of all behaviors, each once."""
    rows = store.table("behaviors").read(["user_id", "behavior_id", "text_hash", "timestamp"]).to_pylist()
    assert len({(row["user_id"], row["behavior_id"]) for row in rows}) == len(rows)
    return {tuple(row.values()) for row in rows}


def expected(*rows: Row) -> set[tuple[Any, ...]]:
    """What a store has that was built from these rows alone."""
    users, names, texts, times = zip(*rows, strict=True) if rows else ((), (), (), ())
    columns = {
        "user_id": users,
        "behavior_id": names,
        "text": texts,
        "timestamp": pa.array(
            [None if t is None else t * 10**6 for t in times], histories.SCHEMA.field("timestamp").type
        ),
        "bucket": histories.bucket_of(users, 4),
        "text_hash": histories.text_hash(texts),
    }
    latest = histories.latest(pa.table(columns, schema=histories.SCHEMA))
    return {
        tuple(row.values()) for row in latest.select(["user_id", "behavior_id", "text_hash", "timestamp"]).to_pylist()
    }


A, B, C = ("u", "a", "one", 1), ("u", "b", "two", 2), ("v", "c", "three", None)


def test_a_refresh_reads_new_files_only_and_none_a_second_time(store: Store, folder: Path) -> None:
    write(folder / "1.jsonl", A, B)
    assert embed(store, folder).read == ["1.jsonl"]
    write(folder / "2.jsonl", C, ("u", "a", "earlier", 0), ("u", "b", "later", 3))
    ran = embed(store, folder)
    assert (ran.read, ran.encoded, ran.counts["known"]) == (["2.jsonl"], 2, 1)
    assert stored(store) == expected(A, C, ("u", "b", "later", 3))
    assert embed(store, folder).read == embed(store, folder, sync=True).read == []
    (one, two) = read_ledger(store).sources
    assert (one.rows, two.rows, two.uri) == (2, 3, str(folder / "2.jsonl"))


@pytest.mark.parametrize("seed", range(4))
def test_any_days_leave_what_reading_everything_would_leave(store: Store, folder: Path, seed: int) -> None:
    """Files come, grow, change and go, share behaviors, and runs are killed between their commits."""
    rng = random.Random(seed)
    inputs: dict[str, list[Row]] = {}
    is_clean = True  # whether no row can be left from before
    for day in range(12):
        for _ in range(rng.randrange(3)):
            name = f"{rng.choice('xy')}/{rng.randrange(4)}.jsonl"
            rows = [
                (
                    f"u{rng.randrange(3)}",
                    f"b{rng.randrange(3)}",
                    f"text {rng.randrange(4)}",
                    rng.choice([None, 1, 2, 3]),
                )
                for _ in range(rng.randrange(4))
            ]
            if name in inputs and rng.random() < 0.5:
                del inputs[name]
                (folder / name).unlink()
                is_clean = False
            else:
                is_clean &= name not in inputs
                inputs[name] = inputs.get(name, []) + rows if rng.random() < 0.5 else rows
                write(folder / name, *inputs[name])
        if not any(inputs.values()):
            inputs["x/0.jsonl"] = [A]
            write(folder / "x/0.jsonl", A)
        sync = rng.random() < 0.5
        kill_after = rng.choice([None, None, *range(6)])
        try:
            embed(store, folder, sync=sync, kill_after=kill_after)
        except Killed:
            continue
        have, want = stored(store), expected(*(row for rows in inputs.values() for row in rows))
        if sync or is_clean:
            assert have == want, f"day {day}"
            is_clean = True
        else:
            assert {row[:2] for row in have} >= {row[:2] for row in want}, f"day {day}"
        again = embed(store, folder, sync=sync)
        assert (again.read, again.encoded) == ([], 0), f"day {day}"


@pytest.mark.parametrize("replaced_by", ["1.jsonl", "2.jsonl"])
def test_a_behavior_edited_in_place_counts_though_the_stored_one_would_win(
    store: Store, folder: Path, replaced_by: str
) -> None:
    """Under the same file name, or under another one as when Spark overwrites a folder."""
    write(folder / "1.jsonl", ("u", "a", "one", 5), B)
    write(folder / "x" / "known.jsonl", C, ("u", "b", "later", 8))
    embed(store, folder)
    (folder / "1.jsonl").unlink()
    write(folder / replaced_by, ("u", "a", "corrected", 4), B)
    ran = embed(store, folder)
    assert (ran.read, ran.counts["edited"]) == ([replaced_by, "x/known.jsonl"], 1)
    assert stored(store) == expected(("u", "a", "corrected", 4), ("u", "b", "later", 8), C)
    assert embed(store, folder).read == []


def test_sync_deletes_later_what_a_changed_file_lost_in_a_run_without_it(store: Store, folder: Path) -> None:
    write(folder / "1.jsonl", A, B)
    embed(store, folder)
    write(folder / "1.jsonl", A)
    embed(store, folder)
    assert stored(store) == expected(A, B)
    assert embed(store, folder, sync=True).counts["gone"] == 1
    assert stored(store) == expected(A)
    assert embed(store, folder, sync=True).read == []


@pytest.mark.parametrize("kill_after", range(5))
def test_a_run_killed_before_the_ledger_is_written_encodes_nothing_twice(
    store: Store, folder: Path, kill_after: int
) -> None:
    write(folder / "1.jsonl", A, B, C)
    with pytest.raises(Killed):
        embed(store, folder, kill_after=kill_after)
    assert read_ledger(store).sources == []
    n_stored = len(stored(store))
    ran = embed(store, folder)
    assert (ran.read, ran.counts["known"], ran.encoded) == (["1.jsonl"], n_stored, 3 - n_stored)
    assert (n_stored == 3 or kill_after < 4) and stored(store) == expected(A, B, C)


def test_rows_of_a_killed_run_whose_file_has_gone_are_deleted_by_sync(store: Store, folder: Path) -> None:
    write(folder / "1.jsonl", A)
    embed(store, folder)
    write(folder / "2.jsonl", B)
    with pytest.raises(Killed):
        embed(store, folder, kill_after=4)
    (folder / "2.jsonl").unlink()
    assert embed(store, folder).read == [] and stored(store) == expected(A, B)
    assert embed(store, folder, sync=True).counts["gone"] == 1
    assert stored(store) == expected(A)


def test_sync_keeps_a_behavior_that_another_file_still_has(store: Store, folder: Path) -> None:
    write(folder / "1.jsonl", A, B)
    write(folder / "2.jsonl", B, C)
    embed(store, folder)
    (folder / "2.jsonl").unlink()
    assert embed(store, folder).read == []
    ran = embed(store, folder, sync=True)
    assert (ran.read, ran.counts["gone"], ran.counts["known"]) == (["1.jsonl"], 1, 2)
    assert "1 files have gone" in ran.planned.refresh.why_all and stored(store) == expected(A, B)


def test_a_run_killed_while_it_deletes_leaves_no_file_that_counts_as_read(store: Store, folder: Path) -> None:
    other = folder.parent / "other"
    write(folder / "1.jsonl", A)
    write(other / "2.jsonl", B, C)
    embed(store, folder)
    embed(store, other)
    assert stored(store) == expected(A, B, C)
    with pytest.raises(Killed):
        embed(store, folder, sync=True, kill_after=4)
    assert embed(store, other).read == ["2.jsonl"]
    assert stored(store) == expected(A, B, C)
    embed(store, folder, sync=True)
    assert stored(store) == expected(A)
    assert embed(store, other).encoded == 2


def test_two_inputs_share_a_store_and_neither_reads_again(store: Store, folder: Path) -> None:
    other = folder.parent / "other"
    write(folder / "1.jsonl", A, ("u", "b", "older", 1))
    write(other / "2.jsonl", B, C)
    embed(store, other)
    assert embed(store, folder).counts["known"] == 1, "the later row of the other input stays"
    for one in (folder, other):
        assert embed(store, one).read == []
    assert stored(store) == expected(A, B, C)
    (other / "2.jsonl").unlink()
    write(other / "3.jsonl", C)
    ran = embed(store, folder)
    assert (ran.read, ran.planned.refresh.gone) == ([], [])


def test_a_file_with_a_line_that_cannot_be_read_is_read_again_and_one_with_bad_rows_is_not(
    store: Store, folder: Path
) -> None:
    write(folder / "1.jsonl", A, extra='{"user_id": "w"}\n')
    write(folder / "2.jsonl", B, extra='{"user_id": "w", "te')
    embed(store, folder)
    (source,) = read_ledger(store).sources
    assert (Path(source.uri).name, source.rows, source.rejects) == ("1.jsonl", 1, 1)
    assert embed(store, folder).read == ["2.jsonl"]
    # Its rows may be in the store: once it has gone, sync must look.
    (folder / "2.jsonl").unlink()
    assert embed(store, folder, sync=True).counts["gone"] == 1


def test_a_file_with_bad_rows_is_read_again_if_they_were_too_many(store: Store, folder: Path) -> None:
    """Otherwise the second try of a scheduler would succeed."""
    write(folder / "1.jsonl", A)
    write(folder / "2.jsonl", B, extra='{"user_id": "w"}\n')
    embed(store, folder, max_reject_fraction=0.1)
    assert embed(store, folder, max_reject_fraction=0.1).read == ["2.jsonl"]
    assert embed(store, folder).read == ["2.jsonl"] and embed(store, folder).read == []


def test_a_limited_run_is_not_recorded(store: Store, folder: Path) -> None:
    write(folder / "1.jsonl", A)
    embed(store, folder, limited=True)
    assert read_ledger(store).sources == []
    assert embed(store, folder).read == ["1.jsonl"]
    write(folder / "2.jsonl", ("u", "a", "later", 9))
    embed(store, folder)
    embed(store, folder, limited=True)
    assert stored(store) == expected(("u", "a", "later", 9))


def test_other_settings_read_everything_again(store: Store, folder: Path) -> None:
    write(folder / "1.jsonl", ("u", "a", "one", 1000))
    embed(store, folder)
    ran = embed(store, folder, unit="ms")
    assert ran.read == ["1.jsonl"] and stored(store) == expected(("u", "a", "one", 1))
    assert embed(store, folder, unit="ms", exclude=["*.csv"]).read == []


def test_reread_reads_everything(store: Store, folder: Path) -> None:
    write(folder / "1.jsonl", A)
    embed(store, folder)
    ran = embed(store, folder, reread=True)
    assert (ran.read, ran.encoded) == (["1.jsonl"], 0)


def test_a_forgotten_user_does_not_come_back_by_a_refresh(store: Store, folder: Path) -> None:
    write(folder / "1.jsonl", A, B, C)
    embed(store, folder)
    with store.writer("behaviors", job="forget") as writer:
        table = writer.table
        files = maintenance.files_of_users(store, "behaviors", ["u"])
        writer.exchange([maintenance.without_users(table, file, ["u"]) for file in files])
        writer.erase_history()
    write(folder / "2.jsonl", ("v", "d", "four", 4))
    assert embed(store, folder).read == ["2.jsonl"]
    assert stored(store) == expected(C, ("v", "d", "four", 4))


@pytest.mark.parametrize("harm", ["restore", "delete", "erase"])
def test_files_count_as_unread_once_another_program_has_changed_the_table(
    store: Store, folder: Path, harm: str
) -> None:
    write(folder / "1.jsonl", A, B)
    embed(store, folder)
    write(folder / "2.jsonl", C)
    embed(store, folder)
    table = DeltaTable(f"{store.uri}/behaviors")
    if harm == "restore":
        table.restore(0)
    elif harm == "delete":
        table.delete("behavior_id = 'b'")
    else:
        write_deltalake(table, table.to_pyarrow_table().slice(0, 0), mode="overwrite")
    ran = embed(Store.open(store.uri), folder)
    assert ran.read == ["1.jsonl", "2.jsonl"] and "another program" in ran.planned.refresh.why_all
    assert stored(Store.open(store.uri)) == expected(A, B, C)
    assert embed(Store.open(store.uri), folder, sync=True).encoded == 0
    assert embed(Store.open(store.uri), folder, sync=True).read == []


def test_a_run_that_ended_in_between_is_noticed_under_the_lease(store: Store, folder: Path) -> None:
    write(folder / "1.jsonl", A)
    ran = embed(store, folder, between=lambda: embed(store, folder) and None)
    assert (ran.read, ran.encoded) == ([], 0)


def test_after_the_first_run_into_a_new_store_sync_has_nothing_to_compare(store: Store, folder: Path) -> None:
    write(folder / "1.jsonl", A)
    files = find_files(str(folder), flag="--histories")
    planned = sources.plan(files, Columns(), InputFormat(), None, sources.Options())
    assert planned.ledger.is_exact and planned.again(store).ledger.is_exact


def test_a_store_without_the_table_gets_one(store: Store, folder: Path) -> None:
    write(folder / "1.jsonl", A)
    embed(store, folder)
    shutil.rmtree(Path(store.uri) / "sources")
    opened = Store.open(store.uri)
    assert read_ledger(opened).sources == [] and not read_ledger(opened).is_exact
    assert maintenance.tables(opened) == [name for name in LAYOUTS if name != "sources"]
    create(opened)
    assert embed(opened, folder).read == ["1.jsonl"]
    assert embed(opened, folder).read == []


def test_a_refresh_of_a_delta_table_reads_the_files_that_were_added(store: Store, folder: Path) -> None:
    def append(*rows: Row) -> None:
        names = ("user_id", "behavior_id", "text", "timestamp")
        columns = dict(zip(names, zip(*rows, strict=True), strict=True))
        write_deltalake(str(folder), pa.table(columns), mode="append")

    append(A, B)
    assert len(embed(store, folder).read) == 1
    append(("v", "c", "three", 3))
    ran = embed(store, folder)
    assert (len(ran.read), ran.encoded) == (1, 1)
    assert sorted(one.table_version or 0 for one in read_ledger(store).sources) == [0, 1]
    DeltaTable(str(folder)).optimize.compact()
    append(("v", "d", "four", 4))
    ran = embed(store, folder, sync=True)
    assert (len(ran.read), ran.encoded, ran.counts["known"]) == (2, 1, 3), "rows that have moved are known"
    assert (ran.planned.refresh.why_all, len(ran.planned.refresh.moved)) == ("", 2)
    assert str(ran.planned.files.table) == "Delta table, version 3"
    assert embed(store, folder, sync=True).read == []
    assert len(read_ledger(store).sources) == 2
    DeltaTable(str(folder)).update(predicate="behavior_id = 'a'", new_values={"text": "another"})
    DeltaTable(str(folder)).delete("behavior_id = 'b'")
    ran = embed(store, folder, sync=True)
    assert (ran.counts["edited"], ran.counts["gone"]) == (1, 1)
    assert "where new ones have come" in ran.planned.refresh.why_all
    assert stored(store) == expected(("u", "a", "another", 1), ("v", "c", "three", 3), ("v", "d", "four", 4))
    assert embed(store, folder, sync=True).read == []


def test_a_summary_names_files_with_counts_and_bytes(store: Store, folder: Path) -> None:
    for number in range(5):
        write(folder / f"{number}.jsonl", A)
    size = (folder / "0.jsonl").stat().st_size
    planned = embed(store, folder).planned
    assert planned.rows() == [
        ("new files", f"5 files, {5 * size:,} bytes: 0.jsonl, 1.jsonl, 2.jsonl and 2 more"),
        ("known files", "none"),
    ]
    (folder / "0.jsonl").unlink()
    write(folder / "1.jsonl", A, B)
    planned = sources.plan(
        find_files(str(folder), flag="--histories"), Columns(), InputFormat(), store, sources.Options()
    )
    assert dict(planned.rows())["gone files"] == f"1 files, {size:,} bytes: 0.jsonl"
    assert planned.facts() == {
        "input_version": None,
        "input_files": {
            "new": {"files": 0, "bytes": 0},
            "changed": {"files": 1, "bytes": 2 * size},
            "known": {"files": 3, "bytes": 3 * size},
            "gone": {"files": 1, "bytes": size},
        },
        "files": 4,
        "bytes": 5 * size,
        "reads_all": "1 files have changed, and their old rows cannot be told from those of others",
    }
