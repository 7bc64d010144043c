"""Which files of an input a refresh reads, and why: the comparison of a listing with the ledger, without a store."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from persona.inputs.files import InputFiles
from persona.inputs.table_files import TableVersion
from persona.storage import FileEntry
from persona.store.refresh import FileRead, Refresh, after_reading, before_deleting, compare
from persona.store.sources import Ledger, Source

NOW = datetime(2024, 1, 1, tzinfo=UTC)
READ_AS = "settings"


def entry(name: str, tag: str = "1", size_bytes: int = 10) -> FileEntry:
    return FileEntry(uri=f"/in/{name}", size_bytes=size_bytes, tag=tag)


def listed(*files: FileEntry, uri: str = "/in", excluded: tuple[str, ...] = (), table: bool = False) -> InputFiles:
    return InputFiles(
        uri=uri,
        formats=dict.fromkeys(files, "jsonl"),
        excluded=frozenset(f"/in/{name}" for name in excluded),
        table=TableVersion(kind="Delta", number=7) if table else None,
        partitions=dict.fromkeys(files, ()),
    )


def source(name: str, tag: str = "1", **fields: Any) -> Source:
    return Source(
        **{
            "input": "/in",
            "uri": f"/in/{name}",
            "size_bytes": 10,
            "tag": tag,
            "table_version": None,
            "read_as": READ_AS,
            "rows": 1,
            "rejects": 0,
            "run": "before",
            "read_at": NOW,
            "epoch": "e",
            "exact_version": 3,
            **fields,
        }
    )


def ledger(*sources: Source, is_exact: bool = True) -> Ledger:
    return Ledger(sources=sources, epoch="e", is_exact=is_exact)


def names(files: Any) -> list[str]:
    return [file.uri.removeprefix("/in/") for file in files]


def read_of(files: InputFiles, known: Ledger, **options: Any) -> tuple[list[str], bool, bool]:
    """The files to read, whether later stored rows stay, and whether what is absent is deleted."""
    refresh = compare(files, known, READ_AS, **options)
    return names(refresh.to_read), refresh.keeps_later, refresh.deletes


def test_only_new_files_are_read_and_later_rows_of_the_others_stay() -> None:
    assert read_of(listed(entry("a"), entry("b")), ledger()) == (["a", "b"], False, False)
    assert read_of(listed(entry("a"), entry("b")), ledger(source("a"))) == (["b"], True, False)
    assert read_of(listed(entry("a")), ledger(source("a"))) == ([], True, False)


@pytest.mark.parametrize("file", [entry("a", tag="2"), entry("a", size_bytes=11)])
def test_a_file_that_grew_or_was_replaced_has_everything_read(file: FileEntry) -> None:
    refresh = compare(listed(file, entry("b"), entry("c")), ledger(source("a"), source("b")), READ_AS)
    assert (names(refresh.new), names(refresh.changed), names(refresh.known)) == (["c"], ["a"], ["b"])
    assert sorted(names(refresh.to_read)) == ["a", "b", "c"] and not refresh.keeps_later
    assert "1 files have changed" in refresh.why_all


def test_a_file_that_has_gone_is_noted_and_with_sync_everything_is_compared() -> None:
    known = ledger(source("x/a"), source("y/b"))
    refresh = compare(listed(entry("y/b")), known, READ_AS)
    assert (names(refresh.gone), refresh.to_read) == (["x/a"], [])
    assert read_of(listed(entry("y/b")), known, sync=True) == (["y/b"], False, True)
    assert read_of(listed(entry("y/b"), entry("z/c")), known) == (["z/c"], True, False)


def test_files_that_come_where_others_have_gone_may_replace_them() -> None:
    """As when Spark overwrites a partition: the names of its files are new."""
    known = ledger(source("x/a"), source("y/b"))
    assert read_of(listed(entry("x/c"), entry("y/b")), known) == (["x/c", "y/b"], False, False)
    assert "1 files have gone where new ones" in compare(listed(entry("x/c"), entry("y/b")), known, READ_AS).why_all
    # The rows of a table may move to any of its files.
    assert read_of(listed(entry("z/c"), entry("y/b"), table=True), known) == (["z/c", "y/b"], False, False)


def test_sync_reads_nothing_if_the_store_has_rows_of_these_files_only() -> None:
    known = [source("a"), source("b")]
    files = listed(entry("a"), entry("b"))
    assert read_of(files, ledger(*known), sync=True) == ([], True, False)
    assert read_of(listed(entry("a"), entry("b"), entry("c")), ledger(*known), sync=True) == (["c"], True, False)
    assert read_of(files, ledger(*known, is_exact=False), sync=True) == (["a", "b"], False, True)
    other = source("a", input="/other", uri="/other/a")
    assert read_of(files, ledger(*known, other), sync=True) == (["a", "b"], False, True)
    assert read_of(listed(entry("a"), excluded=("b",)), ledger(*known), sync=True) == (["a"], False, True)


def test_files_of_another_input_and_excluded_ones_have_not_gone() -> None:
    other = source("a", input="/other", uri="/other/a")
    refresh = compare(listed(entry("a"), excluded=("b",)), ledger(source("a"), source("b"), other), READ_AS)
    assert (refresh.gone, names(refresh.others), refresh.to_read) == ([], ["b", "/other/a"], [])
    # Of another input may come later rows of the same behaviors.
    assert compare(listed(entry("a")), ledger(other), READ_AS).keeps_later


@pytest.mark.parametrize(
    ("fields", "why"),
    [({"epoch": "of before"}, "another program has written"), ({"read_as": "others"}, "1 files were read with other")],
)
def test_a_source_counts_for_one_state_of_the_table_and_one_way_to_read(fields: dict[str, Any], why: str) -> None:
    refresh = compare(listed(entry("a"), entry("b")), ledger(source("a", **fields), source("b")), READ_AS)
    assert sorted(names(refresh.to_read)) == ["a", "b"] and not refresh.keeps_later
    assert why in refresh.why_all


def test_reread_ignores_the_ledger_and_a_limited_run_reads_everything_without_a_say() -> None:
    files, known = listed(entry("a"), entry("b")), ledger(source("a"))
    assert read_of(files, known, reread=True) == (["b", "a"], False, False)
    refresh = compare(files, known, READ_AS, limited=True)
    assert sorted(names(refresh.to_read)) == ["a", "b"]
    assert (refresh.keeps_later, refresh.reads_all) == (True, False)
    assert (
        list(sources_after(refresh, files, known)) == ["a"]
        and sources_after(refresh, files, known)["a"].run == "before"
    )


def sources_after(
    refresh: Refresh, files: InputFiles, known: Ledger, *, has_deleted: bool = False, broken: str = ""
) -> dict[str, Source]:
    found = {file.uri: FileRead(rows=2, rejects=1, is_whole=file.uri != f"/in/{broken}") for file in refresh.to_read}
    after = after_reading(
        refresh, files, known, found, read_as=READ_AS, run="now", now=NOW, version=9, has_deleted=has_deleted
    )
    return {one.uri.removeprefix("/in/"): one for one in after}


def test_files_that_were_read_whole_are_recorded_and_others_are_not() -> None:
    files = listed(entry("a"), entry("b", tag="2"), entry("c"), table=True)
    known = ledger(source("a"), source("b"))
    after = sources_after(compare(files, known, READ_AS), files, known, broken="b")
    assert after.keys() == {"a", "c"}, "the former content of b counts no more"
    assert replace(after["c"], uri="", exact_version=0) == source(
        "c", uri="", table_version=7, rows=2, rejects=1, run="now", exact_version=0
    )
    assert after["a"].run == "now" and after["c"].exact_version is None


def test_a_gone_file_is_kept_until_everything_was_read() -> None:
    known = ledger(source("x/a"), source("y/b"))
    files = listed(entry("y/b"), entry("z/c"))
    after = sources_after(compare(files, known, READ_AS), files, known)
    assert after.keys() == {"x/a", "y/b", "z/c"} and after["z/c"].exact_version == 9
    for sync, exact_version in ((True, 9), (False, None)):
        refresh = compare(files, known, READ_AS, sync=sync, reread=True)
        after = sources_after(refresh, files, known, has_deleted=sync)
        assert {name: one.exact_version for name, one in after.items()} == dict.fromkeys(("y/b", "z/c"), exact_version)


@pytest.mark.parametrize(
    ("files", "known", "broken"),
    [
        (listed(entry("a", tag="2")), ledger(source("a")), ""),
        (listed(entry("b")), ledger(source("a")), ""),
        (listed(entry("y/b")), ledger(source("x/a")), ""),
        (listed(entry("a"), entry("b")), ledger(source("a")), "b"),
        (listed(entry("a"), entry("b")), ledger(source("a"), is_exact=False), ""),
        (listed(entry("a"), entry("b")), ledger(is_exact=False), ""),
    ],
)
def test_what_may_leave_rows_behind_lets_the_next_sync_compare(files: InputFiles, known: Ledger, broken: str) -> None:
    after = sources_after(compare(files, known, READ_AS), files, known, broken=broken)
    assert all(one.exact_version != 9 for one in after.values())


def test_before_rows_are_deleted_the_files_that_may_have_had_them_are_struck_out() -> None:
    other = source("a", input="/other", uri="/other/a")
    known = ledger(source("a"), source("b"), source("c"), other)
    refresh = compare(listed(entry("a"), excluded=("c",)), known, READ_AS, sync=True)
    assert names(before_deleting(refresh, known)) == ["a"]
