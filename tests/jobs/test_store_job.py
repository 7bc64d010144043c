"""`jobs.store` on a real Ray: it tells what is there, finds what is broken, and tidies up without losing a row."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from jobs import store as job
from jobs.runtime.cli import run
from jobs.store import _action_first
from persona.store.store import Store
from tests.jobs.conftest import Job, behaviors, encoded
from tests.models import tiny_encoder
from tests.stores import answers, write_rows


def rows(store: Path, name: str = "behaviors") -> list[dict[str, Any]]:
    return sorted(DeltaTable(f"{store}/{name}").to_pyarrow_table().to_pylist(), key=repr)


def files(store: Path, name: str = "behaviors") -> list[Path]:
    return [path for path in (store / name).rglob("*.parquet") if "_delta_log" not in path.parts]


def refreshed(store: Path, encoder: str, times: int = 3) -> None:
    """What a few refreshes leave: small files, and old versions of rows."""
    opened = Store.open(str(store))
    for day in range(times):
        more = [{**row, "behavior_id": f"day {day}"} for row in behaviors(6, 1)]
        write_rows(opened, "behaviors", encoded(encoder, more))
    edited = [{**row, "text": f"no, {row['text']}"} for row in behaviors(2, 1)]
    write_rows(opened, "behaviors", encoded(encoder, edited, change="edited"))


def test_show_tells_what_is_there(do: Job, store: Path, models: dict[str, str]) -> None:
    refreshed(store, models["encoder"])
    write_rows(Store.open(str(store)), "generations", answers("a", "b"))
    done = do(job, action="show", store=store)
    assert done.code == 0
    found = done.result
    assert (found["users"], found["buckets"]) == (6, 4)
    now = DeltaTable(f"{store}/behaviors")
    size = sum(pa.table(now.get_add_actions(flatten=True))["size_bytes"].to_pylist())
    told = found["tables"]["behaviors"]
    assert (told["rows"], told["version"]) == (48, now.version())
    assert (told["files"], told["bytes"]) == (len(now.file_uris()), size)
    assert sum(told["rows_by_partition"].values()) == 48
    assert found["tables"]["generations"]["rows"] == 2
    assert {run["table"] for run in found["runs"]} == {"behaviors", "generations"}
    assert found["runs"] == sorted(found["runs"], key=lambda run: run["at"], reverse=True)
    assert "encoder" in done.table and "32 wide, cls pooling" in done.table


def test_a_sound_store_is_verified(do: Job, store: Path, models: dict[str, str]) -> None:
    refreshed(store, models["encoder"])
    write_rows(Store.open(str(store)), "generations", answers("a", "b"))
    done = do(job, action="verify", store=store, encoder=models["encoder"])
    assert (done.code, done.result["n_problems"]) == (0, 0)
    assert done.result["checked"] == {"behaviors": 48, "personas": 0, "generations": 2}


def test_what_is_broken_is_found_and_named(do: Job, store: Path, tmp_path: Path) -> None:
    table = DeltaTable(f"{store}/behaviors")
    row = table.to_pyarrow_table().slice(0, 1)

    def changed(**cells: Any) -> pa.Table:
        return pa.Table.from_pylist([{**row.to_pylist()[0], **cells}], row.schema)

    twice = row
    astray = changed(user_id="user-0", behavior_id="astray", bucket=(row["bucket"][0].as_py() + 1) % 4)
    long = changed(behavior_id="long", vector=bytes(10))
    loud = changed(behavior_id="loud", vector=np.full(32, 3, "<f2").tobytes())
    for bad in (twice, astray, long, loud):
        write_deltalake(table, bad, mode="append")
    lost = sorted(table.file_uris())[0]
    Path(lost.removeprefix("file://")).unlink()
    done = do(job, action="verify", store=store, encoder=str(tiny_encoder(tmp_path / "other", seed=9)))
    assert done.code == 1
    said = "\n".join(done.result["problems"])
    expected = ["have a duplicate key", "not in their user's bucket", "are not 64 bytes long"]
    expected += ["are not unit vectors", "cannot read", "and --encoder has"]
    assert [part for part in expected if part not in said] == []


def test_compacting_and_vacuuming_leave_every_row_and_no_small_file(
    do: Job, store: Path, models: dict[str, str]
) -> None:
    refreshed(store, models["encoder"])
    Store.open(str(store)).stage("behaviors", encoded(models["encoder"], behaviors(3, 1)))  # of a run that died
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


def test_the_action_may_stand_first(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(job.Config, job.main, _action_first(["compact", "--store", str(store), "--dry-run"])) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["would"].startswith("compact the store")


def test_bad_use(refuse: Job, store: Path, tmp_path: Path) -> None:
    assert "there is no store" in refuse(job, action="show", store=tmp_path).said
    assert "--encoder goes with verify" in refuse(job, action="show", store=store, encoder="x").said
    assert "--keep-hours goes with vacuum" in refuse(job, action="compact", store=store, keep_hours=0).said
    assert "--target-mb goes with compact" in refuse(job, action="vacuum", store=store, target_mb=1).said
    assert refuse(job, action="shrink", store=store).code == 2
