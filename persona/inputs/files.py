"""Decide which files of an input are read: each file is read, excluded by a pattern, or named in an error."""

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal
from urllib.parse import unquote

from persona import storage
from persona.errors import InputError
from persona.inputs import delta, iceberg
from persona.inputs.table_files import Partitions, TableFiles, TableVersion
from persona.storage import FileEntry, list_files

Format = Literal["parquet", "jsonl", "jsonl.gz", "jsonl.bz2", "jsonl.zst"]
NAMES = ".parquet, .jsonl, .json, .jsonlines or .ndjson; the text formats also with .gz, .bz2 or .zst"
# pandas users name the codec inside a Parquet file after its ending: such a file is plain Parquet.
_PARQUET = re.compile(r"\.(parquet|parq|pq)(\.(snappy|gzip|gz|brotli|br|zstd|zst|lz4))?$", re.IGNORECASE)
_JSONL = re.compile(r"\.(jsonl|json|jsonlines|ndjson)(\.(gz|bz2|zst))?$", re.IGNORECASE)
# What writers leave next to data: files and folders of Spark, Hive, Dask, Databricks and Impala, of desktops, and the
# drafts of `persona.storage`.
_LEFTOVER = re.compile(
    r"_SUCCESS|_metadata|_common_metadata|_temporary|_(started|committed)_\w+|_spark_metadata|_impala_insert_staging"
    r"|_exchange|\.spark-staging-.+|\.hive-staging.*|\..+\.crc|\.DS_Store|\._.+|\.ipynb_checkpoints|\.git|\.gitignore"
    r"|\..+\.[0-9a-f]{32}"
)
_PARTITION = re.compile(r"[_.]?\w[^=]*=.*")  # a folder of a Hive partition: key=value
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
_DELTA = "delta+"
_TABLES = {
    delta.LOG: ("a Delta table", "give the folder of that table alone"),
    ".hoodie": ("a Hudi table", "write the rows of its current version to a folder of Parquet files, and give that"),
}
_ICEBERG = re.compile(r"(^|/)metadata/[^/]+\.metadata\.json(\.gz)?$")
_GIVE_ICEBERG = f"give it as {iceberg.PREFIX}CATALOG://NAMESPACE.TABLE"
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class InputFiles:
    """The files of an input.

    Attributes:
        uri: the input in normal form; for a Delta table its folder.
        formats: the format of each file that is read.
        excluded: the files that the patterns of `exclude` left out.
        table: the version that is read, if the input is a table.
    """

    uri: str
    formats: dict[FileEntry, Format]
    excluded: frozenset[str]
    table: TableVersion | None
    partitions: Mapping[FileEntry, Partitions]


def check_uri(given: str, *, flag: str) -> str:
    """The URI of an input in normal form, if there is something that can be read.

    It is a path or an `s3://` URI, either with `delta+` before it if there is a Delta table, or
    `iceberg+CATALOG://NAMESPACE.TABLE`. Raises as `storage.check_uri` and `storage.check_reachable` do.
    """
    if given.startswith(iceberg.PREFIX):
        return iceberg.check_uri(given, flag=flag)
    prefix = _DELTA if given.startswith(_DELTA) else ""
    uri = storage.check_uri(given.removeprefix(prefix), flag=flag)
    storage.check_reachable(uri, flag=flag)
    return f"{prefix}{uri}"


def find_files(uri: str, *, flag: str, exclude: Sequence[str] | None = None) -> InputFiles:
    """The files of the input `uri` (`check_uri`): those at or below a path, or the data files of a table.

    A pattern of `exclude` is compared with a file's path below `uri`, its name, and the path and name of each folder
    above it. Empty files of unknown type, and what writers leave next to data, are no part of the input.

    Raises `InputError`, naming `flag`, for a file that cannot be read, a folder that belongs to a table but is not all
    of it, a table with features that are not supported, and an input without a row. `exclude` is None if the job has no
    flag for it.
    """
    if uri.startswith(iceberg.PREFIX):
        found = _of_table(uri, iceberg.find(uri, flag=flag), flag, exclude or ())
    elif (folder := uri.removeprefix(_DELTA)) != uri or delta.is_table(uri):
        found = _of_table(folder, delta.find(folder, flag=flag), flag, exclude or ())
    else:
        found = _of_folder(uri, flag, exclude)
    others = f" ({len(found.excluded):,} are excluded)" if found.excluded else ""
    if not found.formats:
        names = "" if found.table else f"; file names must end in {NAMES}"
        raise InputError(f"{flag}: {uri} has no file to read{others}{names}")
    if not any(file.size_bytes for file in found.formats):
        raise InputError(f"{flag}: every file of the input is empty, the first is {next(iter(found.formats)).uri}")
    return found


def only_gained_rows(files: InputFiles, since: int, *, flag: str) -> bool:
    """Whether a table has only gained rows since a version: files that have gone since have their rows in others."""
    if files.table is None:
        return False
    if files.uri.startswith(iceberg.PREFIX):
        return iceberg.only_gained_rows(files.uri, since, flag=flag)
    return delta.only_gained_rows(files.uri, since, files.table.number)


def _of_table(uri: str, found: TableFiles, flag: str, exclude: Sequence[str]) -> InputFiles:
    for file in found.partitions:
        # A table on S3 must not name files on the disk of the machine that reads it.
        if "://" in file.uri.removeprefix("s3://") or (storage.is_s3(uri) and not storage.is_s3(file.uri)):
            raise InputError(f"{flag}: {uri} has a data file at {file.uri}, which cannot be read from here")
    excluded = {file.uri for file in found.partitions if _matches(_name(file.uri, uri), exclude)}
    files = sorted((file for file in found.partitions if file.uri not in excluded), key=lambda file: file.uri)
    return InputFiles(
        uri=uri,
        formats=dict.fromkeys(files, "parquet"),
        excluded=frozenset(excluded),
        table=found.version,
        partitions=found.partitions,
    )


def _of_folder(uri: str, flag: str, exclude: Sequence[str] | None) -> InputFiles:
    formats: dict[FileEntry, Format] = {}
    unread: list[str] = []
    excluded: set[str] = set()
    for file in list_files(uri, hidden=True):
        name = _name(file.uri, uri)
        if file.uri != uri:
            _refuse_table(name, uri, flag)
            if any(_LEFTOVER.fullmatch(part) for part in name.split("/")):
                continue
        if _matches(name, exclude or ()):
            excluded.add(file.uri)
            continue
        kind = _format_of(name, is_alone=file.uri == uri)
        if kind is not None:
            formats[file] = kind
        elif file.size_bytes:
            unread.append(name)
    if unread:
        raise InputError(_unread(unread, uri, flag, has_exclude=exclude is not None))
    partitions = {file: _folder_partitions(file.uri) for file in formats}
    return InputFiles(uri=uri, formats=formats, excluded=frozenset(excluded), table=None, partitions=partitions)


def _name(file_uri: str, uri: str) -> str:
    """A file's path below the input; its name if the file is the input, and its whole path if it lies elsewhere."""
    return file_uri.removeprefix(uri).lstrip("/") or PurePosixPath(uri).name


def _folder_partitions(uri: str) -> Partitions:
    """The columns that folders `key=value` above a file give."""
    found: dict[str, str | None] = {}
    for folder in uri.split("/")[:-1]:
        key, equals, value = folder.partition("=")
        if key and equals:
            found.setdefault(key, None if value == _NULL_PARTITION else unquote(value))
    return tuple(found.items())


def _format_of(name: str, *, is_alone: bool) -> Format | None:
    """The format by the file's name; None if it is unknown, or hidden other than as a partition."""
    parts = name.split("/")
    hidden = [part for part in parts if part.startswith(("_", "."))]
    if not is_alone and any(not _PARTITION.fullmatch(part) or part is parts[-1] for part in hidden):
        return None
    if _PARQUET.search(name):
        return "parquet"
    found = _JSONL.search(name)
    packed: dict[str, Format] = {"gz": "jsonl.gz", "bz2": "jsonl.bz2", "zst": "jsonl.zst"}
    return packed.get((found[3] or "").lower(), "jsonl") if found else None


def _refuse_table(name: str, uri: str, flag: str) -> None:
    """Refuse a folder with the files of a table among others: they also hold rows that the table no longer has."""
    found = next((table for part, table in _TABLES.items() if part in name.split("/")), None)
    found = ("an Iceberg table", _GIVE_ICEBERG) if _ICEBERG.search(name) else found
    if found is not None:
        raise InputError(
            f"{flag}: {uri} is or contains {found[0]} ({name}), whose files also hold old versions of rows; {found[1]}"
        )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(text, pattern.rstrip("/")) for text in _names(name) for pattern in patterns)


def _names(name: str) -> Iterator[str]:
    """The path and the name of a file, and of each folder above it."""
    for path in (PurePosixPath(name), *PurePosixPath(name).parents):
        yield from (str(path), path.name)


def _unread(names: Sequence[str], uri: str, flag: str, *, has_exclude: bool) -> str:
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    n_files = "a file" if len(names) == 1 else f"{len(names):,} files"
    first = PurePosixPath(names[0])
    hidden = next((part for part in first.parts if part.startswith(("_", "."))), None)
    pattern = hidden or (f"*{first.suffix}" if first.suffix else first.name)
    way_out = f", or leave them out with --exclude '{pattern}'" if has_exclude else ""
    return (
        f"{flag}: {n_files} of unknown type at {uri}: {shown}{more}. Names must end in {NAMES}, and "
        f"not begin with _ or . (folders like _key=value may). Convert or rename these files{way_out}"
    )
