"""Which files of a folder are read: all of them, or each one left out is known, excluded or named."""

import bz2
import gzip
import random
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from persona import storage
from persona.errors import InputError, StorageError
from persona.inputs.files import find_files
from persona.inputs.reader import read_split
from persona.inputs.splits import plan_splits

LINE = b'{"n":1}\n'
LEFTOVERS = [
    "_SUCCESS",
    "_metadata",
    "_common_metadata",
    "_committed_7",
    "_started_7",
    "_temporary/0/part.jsonl",
    ".part-0.parquet.crc",
    ".DS_Store",
    "._a.jsonl",
    ".ipynb_checkpoints/a.jsonl",
    "_spark_metadata/0",
    f".a.jsonl.{uuid.uuid4().hex}",
]


def zstd(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(data, asbytes=True))


def write(root: str, *names: str, data: bytes = LINE) -> None:
    for name in names:
        storage.write_bytes(storage.join(root, name), data)


def names(root: str, **options: Any) -> list[str]:
    files = find_files(root, flag="--histories", **options).formats
    return [file.uri.removeprefix(storage.join(root, "")) for file in files]


def rows(uri: str) -> list[tuple[Any, ...]]:
    tables = [one.table for split in plan_splits(uri, flag="--histories") for one in read_split(split)]
    return [tuple(row.values()) for table in tables for row in table.drop_columns(["_row", "_source"]).to_pylist()]


@pytest.mark.parametrize(
    "name",
    [
        *("a.JSONL", "a.json", "a.NDJSON", "a.jsonlines", "a.jsonl.GZ", "a.jsonl.bz2", "a.jsonl.zst"),
        *("a.parquet", "a.PARQUET", "a.parq", "a.pq", "a.parquet.snappy", "a.snappy.parquet", "a.parquet.gzip"),
    ],
)
def test_a_format_is_known_by_the_end_of_the_name_in_any_case(tmp_path: Path, name: str) -> None:
    pack = {"gz": gzip.compress, "bz2": bz2.compress, "zst": zstd}.get(name.lower().rsplit(".", 1)[1], bytes)
    if name.lower().startswith("a.p") or "snappy" in name:
        pq.write_table(pa.table({"n": [1]}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pack(LINE))
    assert rows(str(tmp_path)) == [(1,)]


def test_what_writers_leave_and_empty_files_are_no_input(root: str) -> None:
    write(root, *LEFTOVERS, "date=1/_SUCCESS", "a.jsonl")
    write(root, "notes", ".keep", "b_$folder$", data=b"")
    assert names(root) == ["a.jsonl"]


@pytest.mark.parametrize(
    "name", ["a.csv", "part-00000", "a.jsonl.xz", "_a.jsonl", ".a.parquet", "_users/a.jsonl", "x/README.md"]
)
def test_any_other_file_is_named_with_a_pattern_that_excludes_it(root: str, name: str) -> None:
    write(root, "a.jsonl", name)
    with pytest.raises(InputError, match=f"--histories: a file .*'{name}'.*--exclude '(.*)'") as caught:
        names(root, exclude=[])
    pattern = str(caught.value).rsplit("'", 2)[1]
    files = find_files(root, flag="--histories", exclude=[pattern])
    assert len(files.formats) == 1 and len(files.excluded) == 1
    with pytest.raises(InputError) as without_a_flag:
        names(root)
    assert "--exclude" not in str(without_a_flag.value)


@pytest.mark.parametrize("pattern", ["old", "old/", "old/*", "*/b.jsonl", "b.*", "old/2024/b.jsonl", "2024"])
def test_a_pattern_is_compared_with_names_and_paths_of_files_and_folders(root: str, pattern: str) -> None:
    write(root, "a.jsonl", "old/2024/b.jsonl")
    assert names(root, exclude=[pattern]) == ["a.jsonl"]
    with pytest.raises(InputError, match=r"has no file to read \(2 are excluded\)"):
        names(root, exclude=["*"])


@pytest.mark.parametrize(
    ("inner", "table"),
    [
        ("t/_delta_log/00000000000000000000.json", "a Delta table"),
        (".hoodie/hoodie.properties", "a Hudi table"),
        ("metadata/v1.metadata.json", "an Iceberg table"),
    ],
)
def test_the_files_of_a_table_are_refused_for_they_hold_old_rows_too(root: str, inner: str, table: str) -> None:
    write(root, "a.jsonl", inner)
    with pytest.raises(InputError, match=f"--histories: .* {table} "):
        names(root, exclude=["a*", "_delta_log"])


def test_partition_folders_are_columns(root: str) -> None:
    folder = "_day=1/user_id=a%2Fb/empty=__HIVE_DEFAULT_PARTITION__"
    write(root, f"{folder}/a.jsonl", data=b'{"n":1}\n{"n":2}\n')
    write(root, f"{folder}/b.jsonl", data=b'{"n":3,"user_id":"own"}\n')
    assert rows(root) == [(1, "1", "a/b", None), (2, "1", "a/b", None), (3, "own", "1", None)]


@pytest.mark.parametrize("name", ["a b", "a%20b", "a%2Fb", "a+b", "a=b", "a#b", "a?b", "a&b", "日本é", "a'b", "[a]*"])
def test_signs_in_names_are_taken_as_they_are(each_root: str, name: str) -> None:
    write(each_root, f"{name}/{name}.jsonl", "other.jsonl")
    found = {file.uri: file for file in storage.list_files(each_root)}
    uri = storage.join(each_root, name, f"{name}.jsonl")
    assert set(found) == {uri, storage.join(each_root, "other.jsonl")}
    assert storage.read_bytes(uri) == LINE
    assert [row[0] for row in rows(each_root)] == [1, 1]
    assert [row[0] for row in rows(storage.join(each_root, name))] == [1] == [row[0] for row in rows(uri)]


def test_a_symbolic_link_is_followed_unless_it_leads_round_in_a_circle_or_nowhere(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    for one in (folder, elsewhere):
        one.mkdir()
        (one / "a.jsonl").write_bytes(LINE)
    (folder / "linked").symlink_to(elsewhere)
    (folder / "b.jsonl").symlink_to(elsewhere / "a.jsonl")
    assert names(str(folder)) == ["a.jsonl", "b.jsonl", "linked/a.jsonl"]
    for target, problem in (
        (folder, "to a folder that contains it"),
        (elsewhere / "gone", "that leads to no file or folder"),
        (elsewhere / "bad", "that leads to no file or folder"),
    ):
        (elsewhere / "bad").symlink_to(target)
        with pytest.raises(StorageError, match=f"linked/bad is a symbolic link {problem}"):
            names(str(folder))
        (elsewhere / "bad").unlink()


@pytest.mark.parametrize(("kind", "pack"), [("bz2", bz2.compress), ("zst", zstd)])
def test_all_members_of_a_compressed_file_are_read_and_a_cut_one_is_a_reject(
    tmp_path: Path, kind: str, pack: Any
) -> None:
    rng = random.Random(0)
    text = b"".join(b'{"n":%d,"x":%d}\n' % (n, rng.getrandbits(64)) for n in range(100_000))
    file = tmp_path / f"a.jsonl.{kind}"
    file.write_bytes(pack(text) + pack(LINE))
    assert [row[0] for row in rows(str(tmp_path))] == [*range(100_000), 1]
    file.write_bytes(pack(text)[:-1000])
    parts = list(read_split(plan_splits(str(tmp_path), flag="--histories")[0]))
    read = [n for part in parts for n in part.table["n"].to_pylist()]
    assert read == list(range(len(read))) and len(read) > 50_000
    assert [(row["row"], row["reason"][:29]) for part in parts for row in part.rejects.to_pylist()] == [
        (-1, "file cannot be read to its en")
    ]
    file.write_bytes(b"something else")
    (part,) = read_split(plan_splits(str(tmp_path), flag="--histories")[0])
    assert (part.table.num_rows, part.rejects["row"].to_pylist()) == (0, [-1])
