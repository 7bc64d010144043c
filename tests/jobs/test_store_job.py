"""`jobs.store` on a real Ray: it shows the contents, finds what is broken, and maintains without losing a row."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from jobs import embed, store as job
from jobs.runtime.cli import run
from persona.store.store import Store
from tests.jobs.conftest import Job, behaviors, encoded, write
from tests.models import tiny_encoder
from tests.stores import answers, write_rows


def rows(store: Path, name: str = "behaviors") -> list[dict[str, Any]]:
    return sorted(DeltaTable(f"{store}/{name}").to_pyarrow_table().to_pylist(), key=repr)


def files(store: Path, name: str = "behaviors") -> list[Path]:
    return [path for path in (store / name).rglob("*.parquet") if "_delta_log" not in path.parts]


def refreshed(store: Path, encoder: str, times: int = 3) -> None:
    """Add what a few refreshes leave: small files, and old versions of rows."""
    opened = Store.open(str(store))
    for day in range(times):
        more = [{**row, "behavior_id": f"day {day}"} for row in behaviors(6, 1)]
        write_rows(opened, "behaviors", encoded(encoder, more))
    edited = [{**row, "text": f"no, {row['text']}"} for row in behaviors(2, 1)]
    write_rows(opened, "behaviors", encoded(encoder, edited, change="edited"))


def test_show_reports_the_contents(do: Job, store: Path, models: dict[str, str]) -> None:
    refreshed(store, models["encoder"])
    write_rows(Store.open(str(store)), "generations", answers("a", "b"))
    done = do(job, action="show", store=store)
    assert done.code == 0
    found = done.result
    assert (found["users"], found["buckets"]) == (6, 4)
    now = DeltaTable(f"{store}/behaviors")
    size = sum(pa.table(now.get_add_actions(flatten=True))["size_bytes"].to_pylist())
    facts = found["tables"]["behaviors"]
    assert (facts["rows"], facts["version"]) == (48, now.version())
    assert (facts["files"], facts["bytes"]) == (len(now.file_uris()), size)
    assert sum(facts["rows_by_partition"].values()) == 48
    assert found["tables"]["generations"]["rows"] == 2
    assert {run["table"] for run in found["runs"]} == {"behaviors", "generations"}
    assert found["runs"] == sorted(found["runs"], key=lambda run: run["at"], reverse=True)
    assert "encoder" in done.table and "width 32, cls pooling" in done.table


def test_verify_passes_for_a_sound_store(do: Job, store: Path, models: dict[str, str]) -> None:
    refreshed(store, models["encoder"])
    write_rows(Store.open(str(store)), "generations", answers("a", "b"))
    done = do(job, action="verify", store=store, encoder=models["encoder"])
    assert (done.code, done.result["n_problems"]) == (0, 0)
    checked = {name: n for name, n in done.result["checked"].items() if n}
    assert checked == {"behaviors": 48, "generations": 2}
    assert {"personas", "completions", "judgements"} <= set(done.result["checked"])


def test_verify_names_every_kind_of_damage(do: Job, store: Path, tmp_path: Path) -> None:
    table = DeltaTable(f"{store}/behaviors")
    row = table.to_pyarrow_table().slice(0, 1)

    def changed(**cells: Any) -> pa.Table:
        return pa.Table.from_pylist([{**row.to_pylist()[0], **cells}], row.schema)

    duplicate = row
    misplaced = changed(user_id="user-0", behavior_id="misplaced", bucket=(row["bucket"][0].as_py() + 1) % 4)
    wrong_size = changed(behavior_id="wrong size", vector=bytes(10))
    wrong_norm = changed(behavior_id="wrong norm", vector=np.full(32, 3, "<f2").tobytes())
    for bad in (duplicate, misplaced, wrong_size, wrong_norm):
        write_deltalake(table, bad, mode="append")
    missing = sorted(table.file_uris())[0]
    Path(missing.removeprefix("file://")).unlink()
    done = do(job, action="verify", store=store, encoder=str(tiny_encoder(tmp_path / "other", seed=9)))
    assert done.code == 1
    problems = "\n".join(done.result["problems"])
    expected = ["have a duplicate key", "not in their user's bucket", "are not 64 bytes long"]
    expected += ["are not unit vectors", "cannot read", "and --encoder has"]
    assert [part for part in expected if part not in problems] == []


def test_compact_and_vacuum_keep_every_row_and_leave_no_small_file(
    do: Job, store: Path, models: dict[str, str]
) -> None:
    refreshed(store, models["encoder"])
    Store.open(str(store)).stage("behaviors", encoded(models["encoder"], behaviors(3, 1)))  # from a killed run
    before, version = rows(store), DeltaTable(f"{store}/behaviors").version()
    n_before = len(DeltaTable(f"{store}/behaviors").file_uris())
    done = do(job, action="compact", store=store)
    assert done.code == 0
    assert done.result["behaviors"] == {"files_before": n_before, "files_after": 4}
    assert rows(store) == before
    assert sorted(DeltaTable(f"{store}/behaviors", version=version).to_pyarrow_table().to_pylist(), key=repr) == before

    kept = do(job, action="vacuum", store=store)
    assert (kept.code, kept.result["behaviors"]["files_deleted"]) == (0, 0), "a week has not passed"
    n_files = len(files(store))
    done = do(job, action="vacuum", store=store, keep_hours=0)
    assert done.result["behaviors"]["files_deleted"] == n_files - 4
    assert len(files(store)) == 4 and rows(store) == before
    assert do(job, action="verify", store=store).code == 0


def test_a_refresh_merges_the_files_of_a_crowded_partition(do: Job, store: Path, tmp_path: Path, models: Any) -> None:
    opened = Store.open(str(store))
    refreshed(store, models["encoder"], times=8)
    crowded = {value for value in range(4) if len(opened.table("behaviors").files([value])) >= 8}
    before = [row["behavior_id"] for row in rows(store)]
    histories = write(str(tmp_path / "histories.jsonl"), [{**row, "behavior_id": "new"} for row in behaviors(6, 1)])
    done = do(embed, histories=histories, store=store, encoder=models["encoder"], max_tokens=32)
    assert (done.code, done.result["new"]) == (0, 6)
    assert crowded and [len(opened.table("behaviors").files([value])) for value in crowded] == [1] * len(crowded)
    assert sorted(row["behavior_id"] for row in rows(store)) == sorted([*before, *["new"] * 6])
    assert do(job, action="verify", store=store).code == 0


def test_the_action_may_be_given_first(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(job.Config, job.main, ["compact", "--store", str(store), "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["would"].startswith("compact the store")


def test_wrong_usage(refuse: Job, store: Path, tmp_path: Path) -> None:
    assert "there is no store" in refuse(job, action="show", store=tmp_path).said
    assert "--encoder goes with verify" in refuse(job, action="show", store=store, encoder="x").said
    assert "--keep-hours goes with vacuum" in refuse(job, action="compact", store=store, keep_hours=0).said
    assert "--target-mb goes with compact" in refuse(job, action="vacuum", store=store, target_mb=1).said
    assert refuse(job, action="shrink", store=store).code == 2
