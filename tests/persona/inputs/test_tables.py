"""Delta and Iceberg tables as input: the rows of the newest version, and a name for what cannot be read."""

import base64
import json
import re
import string
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from pyiceberg.catalog import Catalog
from pyiceberg.table import DataScan, FileScanTask

from persona import storage
from persona.errors import InputError, UsageError
from persona.inputs.files import InputFiles, check_uri, find_files, only_gained_rows
from persona.inputs.reader import read_split, schema_of
from persona.inputs.splits import cut
from tests.iceberg_tables import sqlite_catalog

# A field of a table with column mapping: its column in the files has another name.
MAPPED = {
    "name": "user_id",
    "type": "string",
    "nullable": True,
    "metadata": {"delta.columnMapping.id": 1, "delta.columnMapping.physicalName": "col-1"},
}
_SIGNS = string.digits + string.ascii_uppercase + string.ascii_lowercase
B85 = (_SIGNS + "!#$%&()*+-;<=>?@^_`{|}~").encode()
Z85 = (string.digits + string.ascii_lowercase + string.ascii_uppercase + ".-:+=^!/*?&<>()[]{}@%$#").encode()
COLUMNS = ("user_id", "text", "day")


def rows_of(*names: str, day: str | None = "2024-01-01") -> pa.Table:
    texts = [f"text of {name}" for name in names]
    return pa.table({"user_id": list(names), "text": texts, "day": pa.array([day] * len(names), pa.string())})


def write_delta(uri: str, rows: pa.Table, **options: Any) -> None:
    write_deltalake(uri, rows, mode="append", storage_options=storage.delta_options(uri), **options)


def found(uri: str, **options: Any) -> InputFiles:
    return find_files(check_uri(uri, flag="--histories"), flag="--histories", **options)


def read(uri: str, **options: Any) -> list[tuple[Any, ...]]:
    files = found(uri, **options)
    tables = [records.table for split in cut(files, files.formats) for records in read_split(split)]
    return sorted((tuple(row[name] for name in COLUMNS) for table in tables for row in table.to_pylist()), key=str)


def expected(*names: str, day: str | None = "2024-01-01") -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in rows_of(*names, day=day).to_pylist()]


def test_a_delta_table_is_read_as_of_its_newest_version(root: str) -> None:
    uri = storage.join(root, "table")
    write_delta(uri, rows_of("a", "b"))
    write_delta(uri, rows_of("c"))
    DeltaTable(uri, storage_options=storage.delta_options(uri)).delete("user_id = 'a'")
    assert read(uri) == read(f"delta+{uri}") == expected("b", "c")
    files = found(uri)
    assert (files.uri, str(files.table)) == (uri, "Delta table, version 2")
    assert found(f"delta+{uri}").uri == uri
    stored = {file.uri: file.size_bytes for file in storage.list_files(uri, (".parquet",))}
    assert {file.uri: file.size_bytes for file in files.formats}.items() < stored.items(), "old files are not read"


@pytest.mark.parametrize("day", ["a b/é%20", "2024-01-01", None])
def test_partition_columns_come_from_the_log(tmp_path: Path, day: str | None) -> None:
    write_delta(str(tmp_path), rows_of("a", day=day), partition_by=["day"])
    write_delta(str(tmp_path), rows_of("b", day="other"))
    assert read(str(tmp_path)) == [*expected("a", day=day), *expected("b", day="other")]
    files = found(str(tmp_path), exclude=["day=other"])
    assert len(files.formats) == 1 and len(files.excluded) == 1
    assert "day" in schema_of(cut(files, files.formats)).names


def test_a_typed_partition_column_is_a_string_that_reads_as_its_value(tmp_path: Path) -> None:
    columns = {"d": pa.array([19_000], pa.date32()), "t": pa.array([1], pa.timestamp("us", "UTC")), "n": pa.array([7])}
    write_delta(str(tmp_path), pa.table({"user_id": ["a"], **columns}), partition_by=["d", "t", "n"])
    files = found(str(tmp_path))
    ((file, partitions),) = files.partitions.items()
    assert dict(partitions) == {"d": "2022-01-08", "t": "1970-01-01 00:00:00.000001Z", "n": "7"}
    assert file.uri.startswith(str(tmp_path))


def test_a_prefix_without_a_table_and_a_table_among_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no Delta table at .*_delta_log"):
        found(f"delta+{tmp_path}")
    write_delta(str(tmp_path / "inner"), rows_of("a"))
    with pytest.raises(InputError, match="contains a Delta table .*give the folder of that table alone"):
        found(str(tmp_path))
    with pytest.raises(UsageError, match="--histories: .* does not exist"):
        found(f"delta+{tmp_path}/nowhere")


def rewrite_log(folder: Path, **changes: Any) -> None:
    """Change the protocol or the metadata in the first commit of a table."""
    log = folder / "_delta_log" / f"{0:020}.json"
    actions = [json.loads(line) for line in log.read_text().splitlines()]
    for action in actions:
        for name in action.keys() & changes.keys():
            action[name] |= changes[name]
    log.write_text("".join(json.dumps(action) + "\n" for action in actions))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {
                "protocol": {"minReaderVersion": 2, "minWriterVersion": 5},
                "metaData": {
                    "configuration": {"delta.columnMapping.mode": "name", "delta.columnMapping.maxColumnId": "1"},
                    "schemaString": json.dumps({"type": "struct", "fields": [MAPPED]}),
                },
            },
            r"uses column mapping \(name\).*; copy it",
        ),
        (
            {
                "protocol": {
                    "minReaderVersion": 3,
                    "minWriterVersion": 7,
                    "readerFeatures": ["variantType"],
                    "writerFeatures": ["variantType"],
                }
            },
            "variantType",
        ),
        (
            {
                "protocol": {
                    "minReaderVersion": 3,
                    "minWriterVersion": 7,
                    "readerFeatures": ["notYetInvented"],
                    "writerFeatures": ["notYetInvented"],
                }
            },
            "[nN]otYetInvented",
        ),
    ],
)
def test_an_unsupported_delta_feature_is_named(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    write_delta(str(tmp_path), rows_of("a"))
    rewrite_log(tmp_path, **changes)
    with pytest.raises(InputError, match=f"--histories: the Delta table {re.escape(str(tmp_path))} .*{problem}"):
        found(str(tmp_path))


def test_deletion_vectors_are_refused_only_where_a_file_has_one(tmp_path: Path) -> None:
    write_delta(str(tmp_path), rows_of("a", "b"))
    feature = {"readerFeatures": ["deletionVectors"], "writerFeatures": ["deletionVectors"]}
    rewrite_log(tmp_path, protocol={"minReaderVersion": 3, "minWriterVersion": 7, **feature})
    assert read(str(tmp_path)) == expected("a", "b")
    # The first row, as a 64-bit Roaring bitmap behind Delta's magic number, in Z85.
    bitmap = struct.pack("<IQIIIHHIH", 1681511377, 1, 0, 12346, 1, 0, 0, 16, 0) + b"\0\0"
    text = base64.b85encode(bitmap).translate(bytes.maketrans(B85, Z85)).decode()
    vector = {"storageType": "i", "pathOrInlineDv": text, "sizeInBytes": len(bitmap) - 2, "cardinality": 1}
    log = tmp_path / "_delta_log" / f"{1:020}.json"
    add = next(line for line in (tmp_path / "_delta_log" / f"{0:020}.json").read_text().splitlines() if '"add"' in line)
    log.write_text(json.dumps({"add": {**json.loads(add)["add"], "deletionVector": vector}}))
    with pytest.raises(InputError, match="uses deletion vectors.* REORG TABLE"):
        found(str(tmp_path))


@pytest.fixture
def catalog(root: str, tmp_path: Path) -> Iterator[Catalog]:
    """A catalog with its tables on disk or on S3."""
    with sqlite_catalog(tmp_path / "catalog.db", root) as found:
        yield found


def test_an_iceberg_table_is_read_as_of_its_current_snapshot(catalog: Catalog) -> None:
    table = catalog.create_table("app.histories", rows_of("a").schema)
    with pytest.raises(InputError, match="has no snapshot"):
        found("iceberg+local://app.histories")
    table.append(rows_of("a", "b"))
    table.append(rows_of("c"))
    table.delete("user_id = 'a'")
    assert read("iceberg+local://app.histories") == expected("b", "c")
    files = found("iceberg+local://app.histories")
    snapshot = table.current_snapshot()
    assert snapshot is not None
    assert str(files.table) == f"Iceberg table, snapshot {snapshot.snapshot_id}"
    assert [storage.list_files(file.uri)[0].size_bytes for file in files.formats] == [
        file.size_bytes for file in files.formats
    ]


@pytest.mark.parametrize("root", ["local"], indirect=True)
def test_an_iceberg_table_that_was_only_appended_to_is_told_from_one_that_was_not(catalog: Catalog) -> None:
    table = catalog.create_table("app.histories", rows_of("a").schema)
    numbers = []
    for change in (
        lambda: table.append(rows_of("a", "b")),
        lambda: table.append(rows_of("c")),
        lambda: table.delete("user_id = 'a'"),
    ):
        change()
        files = found("iceberg+local://app.histories")
        assert files.table is not None
        numbers.append(files.table.number)
        gained = [only_gained_rows(files, number, flag="--histories") for number in numbers]
        assert gained == ([True] * len(numbers) if len(numbers) < 3 else [False, False, True])
    assert not only_gained_rows(files, 1, flag="--histories"), "that snapshot has expired"


@pytest.mark.parametrize("root", ["local"], indirect=True)
def test_what_an_iceberg_table_cannot_be_read_for_is_named(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    table = catalog.create_table("app.renamed", rows_of("a").schema)
    table.append(rows_of("a"))
    with table.update_schema() as update:
        update.rename_column("text", "body")
    with pytest.raises(InputError, match="the column 'body' was renamed or replaced"):
        found("iceberg+local://app.renamed")
    for uri, problem in {
        "iceberg+local://app.nothing": "has no table 'app.nothing'",
        "iceberg+local://nowhere.nothing": "has no table 'nowhere.nothing'",
        "iceberg+other://app.renamed": "pyiceberg knows no catalog 'other'",
    }.items():
        with pytest.raises(InputError, match=problem):
            found(uri)
    for uri in ("iceberg+local://renamed", "iceberg+://app.renamed", "iceberg+local:app.renamed"):
        with pytest.raises(UsageError, match=re.escape("must be iceberg+CATALOG://NAMESPACE.TABLE")):
            found(uri)

    # pyiceberg writes no delete files, so that one is added to its plan.
    catalog.create_table("app.deleted", rows_of("a").schema).append(rows_of("a"))
    plan = DataScan.plan_files
    with monkeypatch.context() as patch:
        patch.setattr(
            DataScan,
            "plan_files",
            lambda scan: [FileScanTask(task.file, delete_files={task.file}) for task in plan(scan)],
        )
        with pytest.raises(InputError, match=r"has delete files \(merge-on-read\)"):
            found("iceberg+local://app.deleted")
    monkeypatch.setitem(sys.modules, "pyiceberg.catalog", None)
    with pytest.raises(InputError, match=re.escape("pip install 'persona-plug[iceberg]'")):
        found("iceberg+local://app.deleted")
