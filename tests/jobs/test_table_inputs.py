"""Jobs that read Delta and Iceberg tables, on S3: the version is recorded, and a refresh reads the added files only."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import write_deltalake

from jobs import embed, generate, make_requests
from persona.storage import delta_options, join
from persona.store import sources
from persona.store.store import Store
from tests.iceberg_tables import sqlite_catalog
from tests.jobs.conftest import BUCKETS, Done, Job, Row, behaviors, requests, stored


@pytest.fixture
def flags(models: dict[str, str], s3: str) -> dict[str, Any]:
    return {
        "store": join(s3, "persona/store"),
        "encoder": models["encoder"],
        "max_tokens": 32,
        "buckets": BUCKETS,
        "actors": 1,
    }


def append(uri: str, rows: list[Row]) -> None:
    table = pa.Table.from_pylist(rows)
    write_deltalake(uri, table, mode="append", storage_options=delta_options(uri))


def found(done: Done) -> tuple[int, ...]:
    """What a run of embed has read and done, and the version of the table."""
    assert done.code == 0
    return tuple(done.result[name] for name in ("files", "read", "new", "committed", "input_version"))


def check_everything_is_stored_and_recorded(store: str, versions: list[int]) -> None:
    """`behaviors()` are in the store, and the ledger has their files with the versions that they were read at."""
    assert set(stored(store, "behaviors")) == {(row["user_id"], row["behavior_id"]) for row in behaviors()}
    assert sorted(one.table_version or 0 for one in sources.read(Store.open(store)).sources) == versions


def test_a_delta_table_that_grows_is_embedded_and_its_requests_are_answered(
    do: Job, refuse: Job, flags: dict[str, Any], plug: str, s3: str
) -> None:
    histories, asked = join(s3, "histories"), join(s3, "requests")
    append(histories, behaviors()[:20])
    assert found(do(embed, histories=f"delta+{histories}", **flags)) == (1, 20, 20, 20, 0)
    append(histories, behaviors()[20:])
    # The folder with the log is the same input.
    refreshed = do(embed, histories=histories, **flags)
    assert found(refreshed) == (1, 10, 10, 10, 1)
    assert "Delta table, version 1" in refreshed.table
    check_everything_is_stored_and_recorded(flags["store"], [0, 1])
    again = refuse(embed, histories=histories, sync=True, **flags)
    assert (again.code, again.result["read"], again.result["gone"]) == (0, 0, 0)

    append(asked, requests(2, 2))
    decoding = {"beams": 1, "max_new_tokens": 2, "precision": "fp32", "actors": 1}
    answered = do(generate, requests=f"delta+{asked}", store=flags["store"], plug=plug, **decoding)
    assert (answered.code, answered.result["answered"]) == (0, 4)
    assert {request for request, _ in stored(flags["store"], "generations")} == {"r0-0", "r0-1", "r1-0", "r1-1"}


def test_an_iceberg_table_that_grows_is_embedded_and_asked_about(
    do: Job, flags: dict[str, Any], s3: str, tmp_path: Path
) -> None:
    histories = "iceberg+local://app.histories"
    with sqlite_catalog(tmp_path / "catalog.db", join(s3, "warehouse")) as catalog:
        rows = pa.Table.from_pylist(behaviors())
        table = catalog.create_table("app.histories", rows.schema)
        snapshots = []
        for part, n in ((rows.slice(0, 20), 20), (rows.slice(20), 10)):
            table.append(part)
            snapshot = table.current_snapshot()
            assert snapshot is not None
            snapshots.append(snapshot.snapshot_id)
            done = do(embed, histories=histories, **flags)
            assert found(done) == (1, n, n, n, snapshots[-1])
            assert f"Iceberg table, snapshot {snapshots[-1]}" in done.table
        check_everything_is_stored_and_recorded(flags["store"], sorted(snapshots))
        made = do(make_requests, histories=histories, out=str(tmp_path / "requests"), min_history=1, buckets=4)
        assert made.code == 0 and made.result["requests"] == 6 * 4
