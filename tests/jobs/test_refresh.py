"""Tests for a scheduled refresh on a real Ray: the store becomes equal to one built from the new histories."""

import bz2
import gzip
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from jobs import embed
from jobs.runtime import session
from persona.plug.user_personas import UserPersonas
from persona.storage import write_bytes
from persona.store.lease import Lease
from persona.store.store import Store
from tests.jobs.conftest import START, Job, Row, behaviors, changed, fill_store, stored, write

ALONE = "user-5"  # the only user of a bucket
STAMP = ("embedded_at",)


@pytest.fixture
def source(tmp_path: Path) -> str:
    """URI of the histories, which a test writes."""
    return str(tmp_path / "in" / "histories.jsonl")


@pytest.fixture
def flags(models: dict[str, str], store: Path, source: str) -> dict[str, Any]:
    """One text per batch, as in `fill_store`, so that vectors are equal bit by bit."""
    exact = {"token_budget": 1, "precision": "fp32", "max_tokens": 32, "actors": 1}
    return {"histories": str(Path(source).parent), "store": str(store), "encoder": models["encoder"], **exact}


def next_day() -> tuple[list[Row], set[tuple[str, str]]]:
    """`behaviors()` a day later, and the keys that are new or have another text or timestamp."""
    rows = {(row["user_id"], row["behavior_id"]): row for row in behaviors() if row["user_id"] != ALONE}
    del rows["user-2", "b4"]
    rows["user-0", "b1"] |= {"text": "user 0 has changed their mind"}
    rows["user-1", "b2"] |= {"timestamp": START + timedelta(days=30)}
    rows["user-0", "b5"] = {**rows["user-0", "b4"], "behavior_id": "b5", "text": "one more"}
    rows["user-9", "b0"] = {**rows["user-0", "b4"], "user_id": "user-9", "behavior_id": "b0"}
    return list(rows.values()), {("user-0", "b1"), ("user-1", "b2"), ("user-0", "b5"), ("user-9", "b0")}


def test_a_synced_store_equals_one_built_from_scratch(
    do: Job, flags: dict[str, Any], source: str, store: Path, models: dict[str, str], tmp_path: Path
) -> None:
    before, stamps = stored(store, "behaviors", STAMP), stored(store, "behaviors")
    rows, to_encode = next_day()
    write(source, rows)
    done = do(embed, sync=True, block_rows=3, **flags)
    assert done.code == 0
    found = {name: done.result[name] for name in ("read", "known", "new", "edited", "gone", "encoded", "committed")}
    assert found == {"read": 26, "known": 22, "new": 2, "edited": 2, "gone": 6, "encoded": 4, "committed": 4}
    assert "deleted" in done.table and "6 that are no longer in --histories" in done.table

    fresh = stored(fill_store(tmp_path / "fresh", models["encoder"], rows), "behaviors", STAMP)
    assert {row["bucket"] for row in before.values()} > {row["bucket"] for row in fresh.values()}, "no empty bucket"
    assert stored(store, "behaviors", STAMP) == fresh
    after = stored(store, "behaviors")
    assert changed(stamps, after) == to_encode | (before.keys() - fresh.keys()), "an unchanged row was written again"


def test_sync_deletes_nothing_if_a_file_or_line_is_unreadable(
    do: Job, flags: dict[str, Any], source: str, store: Path
) -> None:
    before = stored(store, "behaviors", STAMP)
    rows, to_encode = next_day()
    write(source, rows)
    cut = gzip.compress(b'{"user_id": "user-5", "text": "whole"}\n' * 2)[:-12]
    write_bytes(source.replace("histories.jsonl", "cut.jsonl.gz"), cut)
    write_bytes(source.replace("histories.jsonl", "bad.jsonl"), b'{"user_id": "user-2", "behav')
    write(source.replace("histories.jsonl", "a-number.parquet"), [{"user_id": "user-2", "text": n} for n in range(3)])
    done = do(embed, sync=True, max_reject_fraction=0.5, **flags)
    assert done.code == 0
    assert (done.result["gone"], done.result["unreadable"], done.result["rejects"]) == (0, 3, 5)
    assert "nothing, because 3 files or lines could not be read and may contain the absent behaviors" in done.table
    after = stored(store, "behaviors", STAMP)
    assert before.keys() <= after.keys()
    assert {key for key in changed(before, after) if key[1].startswith("b")} == to_encode


def test_sync_reads_what_has_been_compressed_since(do: Job, flags: dict[str, Any], source: str, store: Path) -> None:
    """It would otherwise delete the users of such a file."""
    before = stored(store, "behaviors", STAMP)
    rows = behaviors()
    write(source, rows[:10])
    for pack, end, part in ((bz2.compress, "BZ2", rows[10:20]), (_zstd, "zst", rows[20:])):
        plain = Path(write(source.replace("histories", end), part))
        plain.with_suffix(f".jsonl.{end}").write_bytes(pack(plain.read_bytes()))
        plain.unlink()
    done = do(embed, sync=True, **flags)
    assert (done.code, done.result["read"], done.result["known"], done.result["gone"]) == (0, 30, 30, 0)
    assert stored(store, "behaviors", STAMP) == before


def _zstd(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(data, asbytes=True))


def test_sync_deletes_nothing_if_a_file_has_no_valid_row(
    do: Job, flags: dict[str, Any], source: str, store: Path
) -> None:
    """Its columns may have been renamed, and its users are those that are absent."""
    rows = behaviors()
    write(source, rows[:-1])
    write(source.replace("histories.jsonl", "last.jsonl"), [{**rows[-1], "user_id": None}])
    done = do(embed, sync=True, max_reject_fraction=0.5, **flags)
    assert (done.code, done.result["gone"], done.result["rejects"]) == (0, 0, 1)
    assert "nothing, because 1 files or lines could not be read" in done.table


def test_sync_deletes_nothing_if_too_many_rows_are_rejected(
    do: Job, flags: dict[str, Any], source: str, store: Path
) -> None:
    """Otherwise an export with another format of timestamps would empty the store."""
    before = stored(store, "behaviors", STAMP)
    write(source, [{**row, "timestamp": "yesterday"} for row in behaviors()] + behaviors(1, 1))
    done = do(embed, sync=True, **flags)
    assert (done.code, done.result["gone"], done.result["unreadable"], done.result["rejects"]) == (3, 0, 0, 30)
    assert "nothing, because more rows than --max-reject-fraction allows were rejected" in done.table
    assert stored(store, "behaviors", STAMP) == before


def test_sync_with_a_limit_is_refused(refuse: Job, flags: dict[str, Any], source: str, store: Path) -> None:
    write(source, behaviors(1, 1))
    done = refuse(embed, sync=True, limit=1, **flags)
    assert done.code == 2
    assert "--sync with --limit would delete every behavior beyond the limit" in done.said
    assert len(stored(store, "behaviors", STAMP)) == 30


def expected_personas(store: Path, plug: str) -> dict[str, tuple[int, list[float]]]:
    """Each user's number of behaviors, and the persona that the plug's own class computes."""
    opened, model = Store.open(str(store)), UserPersonas.load(Path(plug))
    found = {}
    for bucket in opened.buckets():
        users = opened.personas_to_make(bucket, "of no plug")
        rows = model.make(users, opened.read_histories(bucket)).to_pylist()
        found |= {row["user_id"]: (row["n_behaviors"], row["persona"]) for row in rows}
    return found


def personas(store: Path) -> dict[str, Row]:
    return {user: row for (user, _), row in stored(store, "personas").items()}


def check_personas(store: Path, plug: str) -> None:
    """Asserts that each user has one persona, computed from all their behaviors."""
    found, expected = personas(store), expected_personas(store, plug)
    assert {user: row["n_behaviors"] for user, row in found.items()} == {user: n for user, (n, _) in expected.items()}
    for user, (_, persona) in expected.items():
        # float32 sums whose order depends on the batch
        assert found[user]["persona"] == pytest.approx(persona, rel=1e-5, abs=1e-6), user


def test_personas_of_changed_users_are_updated(
    do: Job, flags: dict[str, Any], source: str, store: Path, plug: str
) -> None:
    write(source, behaviors())
    first = do(embed, plug=plug, **flags)
    assert (first.code, first.result["encoded"], first.result["personas"]) == (0, 0, 6)
    before = personas(store)
    assert len(before) == 6
    check_personas(store, plug)

    # Besides the changes of a day, what interrupted runs may leave: a missing persona and a missing behavior.
    DeltaTable(f"{store}/personas").delete("user_id = 'user-3'")
    DeltaTable(f"{store}/behaviors").delete("user_id = 'user-4' AND behavior_id = 'b2'")
    rows, to_encode = next_day()
    write(source, rows)
    done = do(embed, plug=plug, sync=True, **flags)
    assert done.code == 0
    assert done.result["encoded"] == len(to_encode) + 1
    after = personas(store)
    touched = {user for user, _ in to_encode} | {"user-2", "user-3", "user-4"}
    assert {user for user in after if after[user] != before.get(user)} == touched
    assert {user for user in after if user in before and after[user]["updated_at"] > before[user]["updated_at"]} == (
        touched & before.keys()
    )
    assert before.keys() - after.keys() == {ALONE}
    assert done.result["personas"] == len(touched)
    check_personas(store, plug)

    again = do(embed, plug=plug, sync=True, **flags)
    assert (again.code, again.result["personas"], again.result["files_rewritten"]) == (0, 0, 0)
    assert personas(store) == after


@pytest.mark.parametrize("table", ["behaviors", "personas"])
def test_a_second_refresh_at_the_same_time_names_the_holder_of_the_lease(
    refuse: Job,
    flags: dict[str, Any],
    source: str,
    store: Path,
    plug: str,
    table: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(source, behaviors(7))
    rows = stored(store, "behaviors", STAMP)
    monkeypatch.setattr(session, "connect", lambda: pytest.fail("it connects to Ray first"))
    # The holder renews the lease every half second.
    with Lease.acquire(str(store), table, job="jobs.first", ttl_s=2):
        done = refuse(embed, plug=plug, **flags)
    assert done.code == 1
    assert f"the table {table!r} is being written by jobs.first (process " in done.said
    assert ", since 20" in done.said and "wait until that run has ended, or end it" in done.said
    assert stored(store, "behaviors", STAMP) == rows


def test_a_refresh_after_another_one_deletes_nothing_without_sync(
    do: Job, flags: dict[str, Any], source: str, store: Path
) -> None:
    before = stored(store, "behaviors", STAMP)
    rows, to_encode = next_day()
    write(source, rows)
    with Lease.acquire(str(store), "behaviors", job="jobs.first"):
        pass
    done = do(embed, **flags)
    assert (done.code, done.result["encoded"], done.result["gone"]) == (0, len(to_encode), 0)
    assert "deleted" not in done.table
    after = stored(store, "behaviors", STAMP)
    assert before.keys() <= after.keys()
    assert changed(before, after) == to_encode
