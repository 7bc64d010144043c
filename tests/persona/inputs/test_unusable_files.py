"""Each file of an input is judged by itself: one with missing columns or wrong types is one reject, others are read."""

from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from persona.errors import InputError
from persona.inputs import histories, requests
from persona.inputs.cells import TIMESTAMP
from persona.inputs.reader import read_split
from persona.inputs.splits import plan_splits

TIME = datetime(2024, 2, 29, tzinfo=UTC)


def parquet(path: Path, **columns: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=2)


def read(folder: Path, kind: Any = histories) -> tuple[dict[str, list[str]], dict[str, list[str]], int]:
    """User ids and reasons by file, and the number of rows lost with whole files."""
    splits = plan_splits(str(folder), flag="--in", split_bytes=200)
    needs = {} if kind is histories else {"needs_target": True}
    kind.check_columns(splits, kind.Columns(), **needs)
    problem = partial(kind.problem, columns=kind.Columns(), **needs)
    good: dict[str, list[str]] = {}
    bad: dict[str, list[str]] = {}
    n_lost = 0
    for split in splits:
        name = str(Path(split.uri).relative_to(folder))
        for records in read_split(split, problem=problem):
            rows, rejects = kind.validate(records, n_buckets=4, **({"columns": kind.Columns()} | needs))
            good.setdefault(name, []).extend(rows["user_id"].to_pylist())
            bad.setdefault(name, []).extend(rejects["reason"].to_pylist())
            assert records.rejects.num_rows >= bool(records.n_lost)  # then --sync deletes nothing
            n_lost += records.n_lost
    return good, {name: reasons for name, reasons in bad.items() if reasons}, n_lost


def test_a_wrong_first_file_is_one_reject_and_the_others_are_read(tmp_path: Path) -> None:
    users = [f"u{n}" for n in range(5)]
    parquet(tmp_path / "0-floats.parquet", user_id=users, text=[0.5] * 5)
    parquet(tmp_path / "1-lacks.parquet", user_id=users, body=users)
    parquet(tmp_path / "2-times.parquet", user_id=users, text=users, timestamp=[[1]] * 5)
    parquet(tmp_path / "3-list.parquet", user_id=users, behaviors=[[{"text": 5}]] * 5)
    parquet(tmp_path / "4-none.parquet", user_id=pa.array([], pa.float64()), text=pa.array([], pa.float64()))
    parquet(tmp_path / "5-good.parquet", user_id=users, text=users)
    good, bad, n_lost = read(tmp_path)
    assert {name: rows for name, rows in good.items() if rows} == {"5-good.parquet": users}
    lost = "file with 5 rows cannot be used: "
    no_text = "no column 'text' (nor a list column whose items have it). There are: user_id (string), body (string)"
    assert bad == {
        "0-floats.parquet": [f"{lost}column 'text' is double; it must be a string"],
        "1-lacks.parquet": [f"{lost}{no_text}. To use one of them: --columns text=COLUMN"],
        "2-times.parquet": [f"{lost}column 'timestamp' is list<element: int64>; it must be {TIMESTAMP.description}"],
        "3-list.parquet": [f"{lost}column 'text' is int64; it must be a string"],
    }
    assert n_lost == 4 * 4  # besides the four rejects


def test_types_that_can_be_read_may_differ_between_files(tmp_path: Path) -> None:
    """Also the layouts: a list of behaviors in one file, a row for each in another."""
    items = [[{"text": "a", "timestamp": 1_709_164_800}, {"text": "b", "timestamp": None}]]
    parquet(tmp_path / "a.parquet", user_id=[7], text=["t"], timestamp=[TIME])
    parquet(tmp_path / "b.parquet", user_id=["7"], text=[b"t"], timestamp=["2024-02-29"])
    parquet(tmp_path / "c.parquet", user_id=pa.array(["7"]).dictionary_encode(), behaviors=items)
    parquet(tmp_path / "d.parquet", user_id=pa.array([7], pa.uint8()), text=["t"], timestamp=[TIME.date()])
    parquet(tmp_path / "user_id=7/e.parquet", text=["t"])
    (tmp_path / "f.jsonl").write_bytes(b'{"user_id":7,"text":"t"}\n{"user_id":"7","behaviors":[{"text":"t"}]}\n')
    good, bad, _ = read(tmp_path)
    assert bad == {}
    n_rows = {"a": 1, "b": 1, "c": 2, "d": 1, "user_id=7/e": 1, "f": 2}
    assert {name.rpartition(".")[0]: rows for name, rows in good.items()} == {k: ["7"] * n for k, n in n_rows.items()}


def test_lines_of_json_are_judged_one_by_one(tmp_path: Path) -> None:
    rows = [{"user_id": "u", "text": 5}] * 300 + [{"user_id": "v", "text": "t"}]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)))
    parquet(tmp_path / "b.parquet", user_id=["w"], text=["t"])
    good, bad, _ = read(tmp_path)
    assert good == {"a.jsonl": ["v"], "b.parquet": ["w"]} and len(bad["a.jsonl"]) == 300


def test_requests_are_judged_the_same_way(tmp_path: Path) -> None:
    row = {"request_id": ["r"], "user_id": ["u"], "input": ["i"], "target": ["t"]}
    parquet(tmp_path / "a.parquet", **{**row, "target": [1.5]})
    parquet(tmp_path / "b.parquet", **{name: cells for name, cells in row.items() if name != "target"})
    parquet(tmp_path / "c.parquet", **row)
    good, bad, n_lost = read(tmp_path, requests)
    assert good["c.parquet"] == ["u"] and n_lost == 0
    assert "column 'target' is double" in bad["a.parquet"][0] and "no column 'target'; training" in bad["b.parquet"][0]


def test_a_list_of_objects_in_a_json_file_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"user_id": "u", "text": "t"}]')
    with pytest.raises(InputError) as refused:
        read(tmp_path)
    reason = "line is a list, not an object; write each object of a list as a line of its own"
    assert str(refused.value) == f"no row can be read from {tmp_path}/a.json: {reason}"


def test_without_any_usable_file_nothing_is_read(tmp_path: Path) -> None:
    for n in range(20):
        parquet(tmp_path / f"{n:02}.parquet", user_id=["u"], text=[n])
    (tmp_path / "00.parquet").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"03\.parquet cannot be used: column 'text' is int64.*the 5 other files"):
        read(tmp_path)
    for n in range(20):
        (tmp_path / f"{n:02}.parquet").write_bytes(b"cut" if n != 19 else b"")
    with pytest.raises(InputError, match=r"no row can be read from .*00\.parquet: file cannot be read.*19 other files"):
        read(tmp_path)
    parquet(tmp_path / "19.parquet", user_id=["u"], text=["t"])
    assert read(tmp_path)[0]["19.parquet"] == ["u"]


def test_the_message_about_one_or_two_files_says_everything_once(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"no JSON\n")
    with pytest.raises(InputError) as found:
        read(tmp_path)
    assert str(found.value).count("no row can be read from") == 1
    parquet(tmp_path / "b.parquet", user_id=["u"])
    parquet(tmp_path / "c.parquet", user_id=["u"])
    with pytest.raises(InputError, match=r"b\.parquet cannot be used: .*\(nor can the other file that was looked at\)"):
        read(tmp_path)
