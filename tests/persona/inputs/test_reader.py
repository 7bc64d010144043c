"""Raw records: each line and row group is read once, however files are split, and broken ones become rejects."""

import gzip
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from persona import storage
from persona.errors import InputError, StorageError
from persona.inputs.reader import first_rows, read_split
from persona.inputs.records import REJECTS, Records
from persona.inputs.splits import Split, plan_splits


def read(uri: str | Path, **options: Any) -> list[Records]:
    splits = plan_splits(str(uri), flag="--histories", split_bytes=options.pop("split_bytes", 2**26))
    return [records for split in splits for records in read_split(split, **options)]


def rows(parts: Iterable[Records]) -> list[dict[str, Any]]:
    return [row for part in parts for row in part.table.to_pylist()]


def reasons(parts: Iterable[Records]) -> list[tuple[int, str]]:
    tables = [part.rejects for part in parts]
    assert all(table.schema == REJECTS for table in tables)
    return [(row["row"], row["reason"]) for table in tables for row in table.to_pylist()]


@pytest.mark.parametrize("split_bytes", [1, 7, 64, 1000, 10**6])
def test_each_line_belongs_to_one_split(tmp_path: Path, split_bytes: int) -> None:
    rng = random.Random(split_bytes)
    objects = [{"n": n, "text": "é\n" * rng.randrange(20)} for n in range(60)]
    lines = [json.dumps(o, ensure_ascii=False).encode() for o in objects]
    ends = [rng.choice([b"\n", b"\r\n", b"\n\n"]) for _ in lines[1:]] + [b""]
    (tmp_path / "a.jsonl").write_bytes(b"".join(line + end for line, end in zip(lines, ends, strict=True)))
    parts = read(tmp_path, split_bytes=split_bytes)
    assert [row["n"] for row in rows(parts)] == list(range(60)) and reasons(parts) == []


def test_the_row_is_the_offset_of_its_line(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"n":0}\n\n  {"n":1}\n{"n":2}'
    (tmp_path / "a.ndjson").write_bytes(content)
    found = {row["n"]: content[row["_row"] :].split(b"\n")[0] for row in rows(read(tmp_path))}
    assert [b'"n":%d' % n in line for n, line in found.items()] == [True] * 3


@pytest.mark.parametrize("split_bytes", [500, 20_000, 10**7])
def test_each_row_group_belongs_to_one_split(tmp_path: Path, split_bytes: int) -> None:
    table = pa.table({"n": range(10_000), "text": [f"text {n}" for n in range(10_000)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    parts = read(tmp_path, split_bytes=split_bytes, max_rows=300, columns=["n"])
    assert [(row["n"], row["_row"]) for row in rows(parts)] == [(n, n) for n in range(10_000)]
    assert max(part.table.num_rows for part in parts) <= 300
    assert parts[0].table.column_names == ["n", "_row", "_source"]


def test_all_members_of_a_gzip_file_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"n":0}\n{"n"') + gzip.compress(b":1}\n"))
    assert [row["n"] for row in rows(read(tmp_path))] == [0, 1]


def test_bad_lines_are_rejects_and_the_others_are_rows(tmp_path: Path) -> None:
    lines = [b'{"n":0}', b'{"n":"\xff"}', b"[1]", b"nonsense", b'{"n":1}', b'"text"', b'{"n":2']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    parts = read(tmp_path)
    assert [row["n"] for row in rows(parts)] == [0, 1]
    found = reasons(parts)
    starts = [len(b"\n".join(lines[:n])) + 1 for n in (1, 2, 3, 5, 6)]
    assert [row for row, _ in found] == starts
    for expected, (_, reason) in zip(["UTF-8", "a list", "not JSON", "a string", "not JSON"], found, strict=True):
        assert expected in reason


def test_a_truncated_gzip_file_yields_all_complete_lines(tmp_path: Path) -> None:
    rng = random.Random(0)
    text = b"".join(b'{"n":%d,"x":%d}\n' % (n, rng.getrandbits(64)) for n in range(20_000))
    packed = gzip.compress(text)
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "b.jsonl.gz").write_bytes(b"not gzip at all")
    (tmp_path / "c.jsonl").write_bytes(b'{"n":-1}\n')
    parts = read(tmp_path)
    numbers = [row["n"] for row in rows(parts)]
    assert numbers[:-1] == list(range(len(numbers) - 1)) and 9_000 < len(numbers) < 11_000 and numbers[-1] == -1
    assert [row for row, _ in reasons(parts)] == [-1, -1]


def test_a_broken_parquet_file_and_a_broken_row_group_are_one_reject_each(tmp_path: Path) -> None:
    rng = random.Random(0)
    table = pa.table({"n": range(9_000), "x": [rng.getrandbits(60) for _ in range(9_000)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3_000, write_page_checksum=True)
    whole = (tmp_path / "a.parquet").read_bytes()
    middle = len(whole) // 2
    (tmp_path / "b.parquet").write_bytes(whole[:middle])
    (tmp_path / "c.parquet").write_bytes(whole[: middle - 2000] + bytes(4000) + whole[middle + 2000 :])
    (tmp_path / "d.parquet").write_bytes(b"")
    parts = read(tmp_path, split_bytes=30_000)
    count = {name: sum(row["_source"].endswith(name) for row in rows(parts)) for name in ["a.parquet", "c.parquet"]}
    assert count == {"a.parquet": 9_000, "c.parquet": 6_000}
    found = reasons(parts)
    assert [row for row, _ in found] == [-1] * 3 and sum("rows 3000 to 5999" in reason for _, reason in found) == 1


def test_values_without_a_common_type_are_kept_as_json(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"id":1}\n{"id":"1"}\n{"id":[1]}\n{}\n')
    (part,) = read(tmp_path)
    assert part.table["id"].type == pa.json_()
    assert part.table["id"].to_pylist() == ["1", '"1"', "[1]", None]


def test_large_lines_are_yielded_before_the_row_limit(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"".join(b'{"text":"%s"}\n' % (b"x" * 12 * 2**20) for _ in range(6)))
    assert [part.table.num_rows for part in read(tmp_path)] == [3, 3]


def test_location_columns_in_the_input_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"_row":7,"_source":"me"}\n')
    assert rows(read(tmp_path)) == [{"_row": 0, "_source": str(tmp_path / "a.jsonl")}]


@pytest.mark.parametrize(("name", "expected"), [("a.csv", "has no file"), ("a.jsonl", "is empty")])
def test_nothing_to_read_is_an_input_error(tmp_path: Path, name: str, expected: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=f"--histories: .*{expected}"):
        plan_splits(str(tmp_path), flag="--histories")


def test_a_file_of_unknown_type_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"x")
    with pytest.raises(InputError, match=r"a\.csv.*\.parquet"):
        plan_splits(str(tmp_path / "a.csv"), flag="--histories")


def test_an_input_with_only_bad_rows_reports_a_reason(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"[\n")
    with pytest.raises(InputError, match="not JSON"):
        first_rows(plan_splits(str(tmp_path), flag="--histories"))


@pytest.mark.parametrize("pre_buffered_bytes", [2**26, 0], ids=["pre-buffered", "streamed"])
def test_splits_are_read_from_s3(s3: str, monkeypatch: pytest.MonkeyPatch, pre_buffered_bytes: int) -> None:
    monkeypatch.setattr("persona.inputs.parquet._PRE_BUFFERED_BYTES", pre_buffered_bytes)
    table = pa.table({"n": range(1000)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=100)
    storage.write_bytes(f"{s3}/in/a.parquet", sink.getvalue().to_pybytes())
    storage.write_bytes(f"{s3}/in/b.jsonl", b"".join(b'{"n":%d}\n' % n for n in range(1000, 2000)))
    storage.write_bytes(f"{s3}/in/c.jsonl.gz", gzip.compress(b'{"n":2000}\n'))
    assert [row["n"] for row in rows(read(f"{s3}/in", split_bytes=500))] == list(range(2001))


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("n", [200, 2000])
def test_a_file_replaced_after_listing_is_read_whole_and_reported(tmp_path: Path, name: str, n: int) -> None:
    def write(numbers: range) -> None:
        if name == "a.parquet":
            pq.write_table(pa.table({"n": numbers}), tmp_path / name, row_group_size=50)
        else:
            lines = b"".join(b'{"n":%d}\n' % number for number in numbers)
            (tmp_path / name).write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)

    write(range(1000))
    splits = plan_splits(str(tmp_path), flag="--histories", split_bytes=3000)
    write(range(n))
    found = [records for split in splits for records in read_split(split)]
    assert [row["n"] for row in rows(found)] == list(range(n))
    reasons = {reason for records in found for reason in records.rejects["reason"].to_pylist()}
    assert len(reasons) == 1 and "file changed during the run" in reasons.pop()


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_file_that_disappeared_is_a_storage_error_not_a_reject(root: str, kind: Any) -> None:
    split = Split(uri=storage.join(root, "gone"), start=0, end=9, format=kind, size_bytes=9)
    with pytest.raises(StorageError, match="gone"):
        list(read_split(split))
