"""Rows that are too long are rejects, in linear time and little memory; the rows after them are read."""

import bz2
import gzip
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from persona.errors import InputError
from persona.inputs import lamp_files, row_groups
from persona.inputs.reader import read_split
from persona.inputs.splits import plan_splits

MB = 2**20
TOO_LONG = "longer than 1 MB; --max-row-mb sets the limit"


def zstd(text: bytes) -> bytes:
    return bytes(pa.compress(text, codec="zstd", asbytes=True))


def same(text: bytes) -> bytes:
    return text


PACK: dict[str, Callable[[bytes], bytes]] = {"": same, ".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstd}


def read(folder: Path, split_bytes: int = 64 * MB, **options: Any) -> tuple[list[Any], list[tuple[int, str]]]:
    """The column `n` of the rows, and the rejects."""
    good: list[Any] = []
    bad: list[tuple[int, str]] = []
    for split in plan_splits(str(folder), flag="--in", split_bytes=split_bytes):
        for records in read_split(split, max_row_mb=1, **options):
            good += records.table["n"].to_pylist() if records.table.num_rows else []
            bad += zip(records.rejects["row"].to_pylist(), records.rejects["reason"].to_pylist(), strict=True)
    return good, bad


@pytest.mark.parametrize("end", PACK)
@pytest.mark.parametrize("split_bytes", [64 * MB, 300_000], ids=["whole", "cut"])
def test_a_line_that_is_too_long_is_a_reject_with_its_offset(tmp_path: Path, end: str, split_bytes: int) -> None:
    at_limit = b'{"n":1,"text":"%s"}' % (b"x" * (MB - 17))
    assert len(at_limit) == MB
    lines = [b'{"n":0}', at_limit, b'{"n":2,"text":"%s"}' % (b"x" * (MB - 16)), b"y" * 3 * MB, b'{"n":3}']
    (tmp_path / f"in.jsonl{end}").write_bytes(PACK[end](b"\n".join(lines)))
    good, bad = read(tmp_path, split_bytes)
    starts = [sum(len(line) + 1 for line in lines[:number]) for number in (2, 3)]
    assert good == [0, 1, 3] and bad == [(start, f"line is {TOO_LONG}") for start in starts]


@pytest.mark.parametrize("end", PACK)
def test_a_last_line_that_is_too_long_is_a_reject(tmp_path: Path, end: str) -> None:
    (tmp_path / f"in.jsonl{end}").write_bytes(PACK[end](b'{"n":0}\n' + b" " * 2 * MB))
    assert read(tmp_path) == ([0], [(8, f"line is {TOO_LONG}")])


_READ = """
import resource, sys
from persona.inputs.reader import read_split
from persona.inputs.splits import plan_splits
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = [r for s in plan_splits(sys.argv[1], flag="--in", split_bytes=2**27) for r in read_split(s)]
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(sum(r.table.num_rows for r in found), sum(r.rejects.num_rows for r in found), grown // 2**10)
"""


def test_lines_of_a_quarter_of_a_gigabyte_take_little_memory(tmp_path: Path) -> None:
    zeros = gzip.compress(bytes(64 * MB), 1)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"n":0}\n') + zeros * 4 + gzip.compress(b'\n{"n":1}\n'))
    with (tmp_path / "b.jsonl").open("wb") as file:
        file.write(b'{"n":0}\n')
        file.seek(256 * MB)
        file.write(b'\n{"n":1}\n')
    done = subprocess.run([sys.executable, "-c", _READ, tmp_path], capture_output=True, text=True, check=True)
    rows, rejects, grown_mb = map(int, done.stdout.split())
    assert (rows, rejects) == (4, 2)
    assert grown_mb < 200  # a few times the limit of 64 MB


def test_an_object_with_too_many_keys_is_a_reject_and_a_nested_one_stays_json(tmp_path: Path) -> None:
    many = ",".join(f'"key {n}":0' for n in range(20_000))
    (tmp_path / "in.jsonl").write_text(f'{{"n":0,"more":{{{many}}}}}\n{{"n":1,{many}}}\n{{"n":2}}\n')
    good, bad = read(tmp_path)
    assert good == [0, 2] and [reason for _, reason in bad] == ["line has more than 16,384 keys"]


def test_a_parquet_row_that_is_too_long_is_a_reject_with_its_number(tmp_path: Path) -> None:
    texts = ["x"] * 500
    texts[7] = "y" * (2 * MB)
    histories = [[{"text": "z" * 1000}] * (2000 if n == 300 else 1) for n in range(500)]  # two megabytes together
    table = pa.table({"n": range(500), "text": texts, "behaviors": histories})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=250)
    good, bad = read(tmp_path)
    assert good == [n for n in range(500) if n not in (7, 300)]
    assert bad == [(row, f"row is {TOO_LONG}") for row in (7, 300)]


def test_a_row_group_of_rows_that_are_too_long_is_not_decoded(tmp_path: Path) -> None:
    table = pa.table({"n": [0, 1, 2], "text": ["x" * 4 * MB, "y" * 4 * MB, "z"]})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=2, compression="zstd")
    before = pa.default_memory_pool().max_memory()
    good, bad = read(tmp_path)
    assert good == [2] and bad == [(-1, f"rows 0 to 1: a row, on average, is {TOO_LONG}")]
    assert pa.default_memory_pool().max_memory() <= max(before, 4 * MB)
    # Of the columns that are not read, rows may be as long as they like.
    assert read(tmp_path, columns=["n"]) == ([0, 1, 2], [])


@pytest.mark.parametrize("store_schema", [True, False], ids=["dictionary", "plain"])
def test_a_long_value_in_the_dictionary_does_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store_schema: bool
) -> None:
    n, value = 200, "x" * MB
    values = [value, *(str(number) * 1000 for number in range(2000))]  # too many for its size to be taken as that
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * n, pa.int32()), values)
    pq.write_table(pa.table({"n": range(n), "text": texts}), tmp_path / "in.parquet", store_schema=store_schema)
    monkeypatch.setattr("persona.inputs.row_groups._STEP_BYTES", 32 * MB)
    before, peak, rows = pa.total_allocated_bytes(), 0, 0
    for records in read_split(plan_splits(str(tmp_path), flag="--in")[0]):
        peak = max(peak, pa.total_allocated_bytes() - before)
        assert records.table["text"].type == pa.string() and records.table["text"][-1].as_py() == value
        rows += records.table.num_rows
    assert rows == n
    assert peak < n * MB / 2


@pytest.mark.parametrize("codec", ["none", "snappy"])
def test_the_size_of_a_dictionary_is_that_in_the_file(tmp_path: Path, codec: str) -> None:
    values = [f"{number:01000}" for number in range(5000)]
    table = pa.table({"text": pa.array(values * 2)})
    pq.write_table(table, tmp_path / "in.parquet", compression=codec, dictionary_pagesize_limit=2**25)
    with pa.OSFile(str(tmp_path / "in.parquet")) as raw, pq.ParquetFile(raw) as file:
        column = file.metadata.row_group(0).column(0)
        assert row_groups._dictionary_bytes(column, raw) == 5000 * 1004  # with four bytes for each length


def test_a_large_row_group_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n = 40_000
    table = pa.table({"n": range(n), "text": pa.array([f"{number:0999}" for number in range(n)])})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=n, compression="none", use_dictionary=False)
    monkeypatch.setattr("persona.inputs.parquet._PRE_BUFFERED_BYTES", 2**20)
    del table
    before, peak, good = pa.total_allocated_bytes(), 0, []
    for records in read_split(plan_splits(str(tmp_path), flag="--in")[0]):
        peak = max(peak, pa.total_allocated_bytes() - before)
        good += records.table["n"].to_pylist()
    assert good == list(range(n))
    assert peak < n * 1000 / 2


def test_a_lamp_question_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lamp_files, "MAX_QUESTION_BYTES", MB)
    text = b'[{"id":"1"},{"id":"%s"},{"id":"3"}]'
    assert len(list(lamp_files.read_questions(io.BytesIO(text % (b"2" * 600_000)), name="q.json"))) == 3
    questions = lamp_files.read_questions(io.BytesIO(text % (b"2" * 5 * MB)), name="q.json")
    assert next(questions) == {"id": "1"}
    with pytest.raises(InputError, match=r"q\.json: the question after the first 1 is longer than 1 MB"):
        next(questions)
