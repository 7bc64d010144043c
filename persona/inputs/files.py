"""Decide which files of an input are read: each file is read, excluded by a pattern, or named in an error."""

import fnmatch
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from persona.errors import InputError
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
_TABLES = {"_delta_log": "a Delta table", ".hoodie": "a Hudi table"}
_ICEBERG = re.compile(r"(^|/)metadata/[^/]+\.metadata\.json(\.gz)?$")
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class InputFiles:
    """The files of an input.

    Attributes:
        formats: the format of each file that is read.
        n_excluded: how many files the patterns of `exclude` left out.
    """

    formats: dict[FileEntry, Format]
    n_excluded: int


def find_files(uri: str, *, flag: str, exclude: Sequence[str] | None = None) -> InputFiles:
    """The files at or below `uri`.

    A pattern of `exclude` is compared with a file's path below `uri`, its name, and the path and name of each folder
    above it. Empty files of unknown type, and what writers leave next to data, are no part of the input.

    Raises `InputError`, naming `flag`, for a file that cannot be read, a folder that belongs to a table format, and an
    input without a file to read. `exclude` is None if the job has no flag for it.
    """
    formats: dict[FileEntry, Format] = {}
    unread: list[str] = []
    n_excluded = 0
    for file in list_files(uri, hidden=True):
        name = file.uri[len(uri) :].lstrip("/") or PurePosixPath(uri).name
        if file.uri != uri:
            _refuse_table(name, uri, flag)
            if any(_LEFTOVER.fullmatch(part) for part in name.split("/")):
                continue
        if _matches(name, exclude or ()):
            n_excluded += 1
            continue
        kind = _format_of(name, is_alone=file.uri == uri)
        if kind is not None:
            formats[file] = kind
        elif file.size_bytes:
            unread.append(name)
    if unread:
        raise InputError(_unread(unread, uri, flag, has_exclude=exclude is not None))
    if not formats:
        others = f" ({n_excluded:,} are excluded)" if n_excluded else ""
        raise InputError(f"{flag}: {uri} has no file to read{others}; file names must end in {NAMES}")
    return InputFiles(formats=formats, n_excluded=n_excluded)


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
    """Refuse the files of a table: they also hold rows that the table no longer has."""
    found = next((table for part, table in _TABLES.items() if part in name.split("/")), None)
    found = "an Iceberg table" if _ICEBERG.search(name) else found
    if found is not None:
        raise InputError(
            f"{flag}: {uri} is or contains {found} ({name}), whose files also hold old versions of rows; write the "
            "rows of its current version to a folder of Parquet files, and give that"
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
    first = PurePosixPath(names[0])
    hidden = next((part for part in first.parts if part.startswith(("_", "."))), None)
    pattern = hidden or (f"*{first.suffix}" if first.suffix else first.name)
    way_out = f", or leave them out with --exclude '{pattern}'" if has_exclude else ""
    return (
        f"{flag}: {len(names):,} files at {uri} are of unknown type: {shown}{more}. Names must end in {NAMES}, and "
        f"not begin with _ or . (folders like _key=value may). Convert or rename these files{way_out}"
    )
