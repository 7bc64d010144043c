"""`forget` on a real Ray: no byte below the store still holds the users' data, and other rows are not touched."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from jobs import forget
from persona.inputs.records import rejects
from persona.plug.user_personas import UserPersonas
from persona.storage import write_bytes
from persona.store import key_index
from persona.store.schema import LAYOUTS
from persona.store.store import Store
from tests.jobs.conftest import Job, Row, behaviors, encoded, fill_store, write
from tests.jobs.runtime.test_reports import STAYING, contents, write_evaluation
from tests.stores import answers, write_rows

TABLES = ("behaviors", "personas", "generations")
NO_ROWS = {name: 0 for name, layout in LAYOUTS.items() if "user_id" in layout.schema.names}
# Alone in a bucket; among other users; and with an id that must be escaped in SQL, in JSON and in paths.
ALONE, JOHN, OBRIEN = "user-5", "john.doe+7@example.org", 'O\'Brien "x"/ü\\%20'
LEAVING = (ALONE, JOHN, OBRIEN)


def rows_of(user: str) -> list[Row]:
    """Four behaviors with ids and texts of this user only."""
    return [
        {**row, "user_id": user, **{name: f"{row[name]} of {user}" for name in ("behavior_id", "text")}}
        for row in behaviors(1, 4)
    ]


def answers_of(users: list[str], variant: str, output: str, change: str = "new") -> pa.Table:
    rows = answers(*users, variant=variant, changes=[change] * len(users))
    columns = {
        "request_id": [f"request of {user}" for user in users],
        "output": [f"{output}, {user}" for user in users],
    }
    for name, values in columns.items():
        rows = rows.set_column(rows.column_names.index(name), name, pa.array(values))
    return rows


@pytest.fixture
def store(models: dict[str, str], plug: str, tmp_path: Path) -> Path:
    """A store with a history: replaced rows, data files that only old versions have, and one never committed."""
    rows = [*behaviors(5), *(row for user in LEAVING for row in rows_of(user))]
    uri = fill_store(tmp_path / "store", models["encoder"], rows)
    opened = Store.open(str(uri))
    edited = [{**row, "text": f"after all, {row['text']}"} for row in rows if row["behavior_id"].startswith("b0")]
    write_rows(opened, "behaviors", encoded(models["encoder"], edited, change="edited"))
    model = UserPersonas.load(Path(plug))
    for bucket in opened.buckets():
        users = opened.personas_to_make(bucket, model.fingerprint)
        write_rows(opened, "personas", model.make(users, opened.read_histories(bucket)))
    names = sorted({row["user_id"] for row in rows})
    for variant in ("own", "a/b c"):
        write_rows(opened, "generations", answers_of(names, variant, "first"))
        write_rows(opened, "generations", answers_of([*LEAVING, "user-1"], variant, "second", "edited"))
    opened.stage("generations", answers_of(names, "never committed", "third"))
    opened.write_rejects(rejects("embed", ["in.jsonl"], [3], ["text is empty"]))
    return uri


def stored(store: Path, version: int | None = None) -> dict[str, list[Row]]:
    tables = {name: DeltaTable(f"{store}/{name}", version=version) for name in TABLES}
    return {name: sorted(table.to_pyarrow_table().to_pylist(), key=repr) for name, table in tables.items()}


def without(tables: dict[str, list[Row]], *users: str) -> dict[str, list[Row]]:
    return {name: [row for row in rows if row["user_id"] not in users] for name, rows in tables.items()}


def versions(store: Path) -> dict[str, int]:
    return {name: DeltaTable(f"{store}/{name}").version() for name in (*TABLES, "rejects")}


def traces(store: Path, user: str) -> set[bytes]:
    """What only this user's rows and their key indexes contain, in any version: ids, hashes, outputs, vectors."""
    found = {user.encode()}
    for name, latest in versions(store).items():
        for version in range(latest + 1):
            for row in DeltaTable(f"{store}/{name}", version=version).to_pyarrow_table().to_pylist():
                if row.get("user_id") == user:
                    found |= {row[key].encode() for key in ("text_hash", "output") if key in row}
                    found |= set(leaves([row.get("vector"), row.get("persona")]))
                    if name == "behaviors":
                        entry = key_index.entries(pa.Table.from_pylist([row])).to_pylist()[0]
                        found |= {entry["digest"], entry["text_hash"]}
    return found


def leaves(value: Any) -> Iterator[bytes]:
    """The bytes of all values in a nested value, including JSON within strings."""
    if isinstance(value, bytes):
        yield value
    elif isinstance(value, str):
        yield value.encode()
        if value.startswith("{"):
            yield from leaves(json.loads(value))
    elif isinstance(value, dict):
        yield from (leaf for pair in value.items() for one in pair for leaf in leaves(one))
    elif isinstance(value, list) and value and isinstance(value[0], float):
        yield np.asarray(value, "<f4").tobytes()
    elif isinstance(value, list | tuple):
        yield from (leaf for one in value for leaf in leaves(one))


def everything(folder: Path) -> bytes:
    """All bytes of all files below the folder, raw and decoded."""
    parts = []
    for path in folder.rglob("*"):
        if path.is_dir():
            continue
        parts += [str(path).encode(), path.read_bytes()]
        if path.suffix == ".parquet":
            parts += leaves(pq.read_table(path, partitioning=None).to_pylist())
        elif path.suffix == ".keys":
            with pa.ipc.open_stream(path.read_bytes()[key_index._CHECKSUM_BYTES :]) as stream:
                parts += leaves(stream.read_all().to_pylist())
        elif path.suffix == ".json":
            parts += [leaf for line in path.read_text().splitlines() for leaf in leaves(json.loads(line))]
        else:
            assert path.name == "_last_checkpoint", f"the test cannot decode {path}"
    return b"\n".join(parts)


def ray_log_lines() -> list[str]:
    """Everything Ray has logged on this machine since it started, except debug lines."""
    import ray

    logs = Path(ray._private.worker.global_worker.node.get_logs_dir_path())
    lines = [
        line for path in logs.rglob("*") if path.is_file() for line in path.read_text(errors="replace").splitlines()
    ]
    assert lines
    return [line for line in lines if "DEBUG" not in line]


def test_rows_bytes_and_versions_are_deleted_and_nothing_else(
    do: Job, store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before, rejected = stored(store), DeltaTable(f"{store}/rejects").to_pyarrow_table()
    marks = {user: traces(store, user) for user in LEAVING}
    # The id, 5 versions of vectors, text hashes and their first bytes, 4 digests of keys, a persona, and two outputs
    assert {user: len(found) for user, found in marks.items()} == dict.fromkeys(LEAVING, 23)
    whole = everything(store)
    assert all(mark in whole for found in marks.values() for mark in found), "the search finds what is there"
    old = versions(store)
    listed = write(str(tmp_path / "users.parquet"), [{"user_id": JOHN, "why": 1}, {"user_id": "unknown to the store"}])
    caplog.set_level(logging.INFO)

    dry = do(forget, store=store, user=ALONE, users=listed, dry_run=True)
    counts = {"behaviors": 8, "personas": 2, "generations": 4}
    assert (dry.code, dry.result["users"], dry.result["rows"]) == (0, 3, NO_ROWS | counts)
    assert versions(store) == old

    done = do(forget, store=store, user=ALONE, users=listed)
    assert done.code == 0
    assert (done.result["rows_before"], done.result["rows_after"]) == (NO_ROWS | counts, NO_ROWS)
    assert "8 behaviors, 2 personas, 4 generations" in done.table
    left = everything(store)
    assert not [mark for user in (ALONE, JOHN) for mark in marks[user] if mark in left]
    assert OBRIEN.encode() in left
    assert stored(store) == without(before, ALONE, JOHN)
    assert DeltaTable(f"{store}/rejects").to_pyarrow_table() == rejected
    for name in TABLES:
        for version in range(old[name] + 1):
            with pytest.raises(Exception, match="(?i)version|not found|no such|no files in log"):
                DeltaTable(f"{store}/{name}", version=version).to_pyarrow_table()

    outputs = "\n".join([*(str(one) for one in (dry, done)), caplog.text, *ray_log_lines()])
    assert JOHN not in outputs


def test_an_id_with_special_characters_and_a_second_run(do: Job, store: Path, tmp_path: Path) -> None:
    before, marks = stored(store), traces(store, OBRIEN)
    listed = write(str(tmp_path / "users.jsonl"), [{"user_id": OBRIEN}])
    write_evaluation(str(tmp_path / "report"), [OBRIEN, *STAYING])
    write_bytes(f"{store}/_exchange/behaviors-f00d/run.arrow", OBRIEN.encode())
    done = do(forget, store=store, users=listed, reports=tmp_path / "report")
    assert done.code == 0
    assert done.result["report_parts_deleted"] == 7 and done.result["files_deleted"]["run files"] == 1
    assert [
        text for text in done.result["not_searched"] if "not a pointer" in text or "than those of --reports" in text
    ]
    assert any("jobs.make_requests put into other users' requests" in text for text in done.result["not_searched"])
    assert not [name for name, data in contents(str(tmp_path / "report")).items() if b"Brien" in data]
    assert done.result["rows_before"] == NO_ROWS | {"behaviors": 4, "personas": 1, "generations": 2}
    left = everything(store)
    assert not [mark for mark in marks if mark in left]
    assert stored(store) == without(before, OBRIEN)
    assert "Brien" not in "\n".join([str(done), *ray_log_lines()])

    again = do(forget, store=store, users=listed)
    assert (again.code, again.result["rows_before"]) == (0, NO_ROWS)
    assert stored(store) == without(before, OBRIEN)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            b'{"user_id": "user-1"}\n{"user_id": null}\n',
            "rows without a readable user_id: 1; no user has been forgotten",
        ),
        (b'{"user_id": "user-1"}\n{"user_i', "rows without a readable user_id: 1; no user has been forgotten"),
        (b'{"user": "user-1"}\n', "no column 'user_id'"),
        (b"[]\n", "no row can be read"),
    ],
)
def test_with_a_bad_file_of_users_nothing_is_deleted(
    refuse: Job, store: Path, tmp_path: Path, lines: bytes, message: str
) -> None:
    before = versions(store)
    write_bytes(str(tmp_path / "users.jsonl"), lines)
    done = refuse(forget, store=store, user=ALONE, users=tmp_path / "users.jsonl")
    assert done.code == 2
    assert message in done.said
    assert versions(store) == before


def test_no_users_are_wrong_usage(refuse: Job, store: Path, tmp_path: Path) -> None:
    assert "name those to forget with --user or --users" in refuse(forget, store=store).said
    assert "there is no store at" in refuse(forget, store=tmp_path, user="a").said
    assert "--user: an id is empty" in refuse(forget, store=store, user="").said
