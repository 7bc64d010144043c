"""Parquet and JSONL files as a stream of raw records, cut into splits that different workers can read.

Nothing is lost silently: a line that is no JSON object, a row group that cannot be decoded and a file that
ends too early each become a *reject*, and all that can be read around them is read. The content of a field is
judged later (`histories`, `requests`).
"""

import io
import math
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from persona.errors import InputError, StorageError
from persona.inputs.cells import Kind, kind_of
from persona.storage import list_files, open_filesystem

Format = Literal["parquet", "jsonl", "jsonl.gz"]
_TEXT = (".jsonl", ".json", ".jsonlines", ".ndjson")
_FORMATS: dict[str, Format] = {".parquet": "parquet"}
_FORMATS.update(dict.fromkeys(_TEXT, "jsonl"))
_FORMATS.update({f"{name}.gz": "jsonl.gz" for name in _TEXT})

REJECTS = pa.schema(
    [
        ("job", pa.string()),
        ("source", pa.string()),
        ("row", pa.int64()),
        ("reason", pa.string()),
        ("seen_at", pa.timestamp("us", "UTC")),
    ]
)
_PLACE = ("_source", "_row")
_CHUNK_BYTES = 2**20
_HELD_BYTES = 32 * 2**20  # of text before rows are handed on, however few they are
_HELD_CELLS = 2**22  # of a table, most of them null where each line has keys of its own
_MAX_DEPTH = 32  # of lists and objects in each other that become Arrow types; it takes seconds for hundreds
WHOLE_FILE = -1  # the `row` of a reject that concerns all of a file, or all that follows in it


@dataclass(frozen=True, kw_only=True)
class Split:
    """A byte range of a file; the lines that *start* in `[start, end)` belong to it.

    Row groups are taken to start at even distances: where they do is said by a footer that may be broken. `size_bytes`
    is of the whole file.
    """

    uri: str
    start: int
    end: int
    format: Format
    size_bytes: int

    @property
    def until(self) -> float:
        """Its end; a file's last split ends where the file does, which may be longer by the time it is read."""
        return math.inf if self.end >= self.size_bytes else self.end


@dataclass(frozen=True, kw_only=True)
class Records:
    """Raw rows, and what could not become one.

    `table` has the file's own columns and two more: `_source`, the file, and `_row`, where the row is in it:
    its number in a Parquet file, the byte offset of its line in (unpacked) text. A column whose JSON values
    do not share one type has the type `arrow.json`, each value as its own JSON text. `rejects` has the schema
    `REJECTS`.
    """

    table: pa.Table
    rejects: pa.Table


def plan_splits(uri: str, *, flag: str, split_bytes: int = 64 * 2**20) -> list[Split]:
    """Cut the files at or below `uri` into splits of about `split_bytes`; a compressed text is one split.

    Raises `InputError`, naming `flag`, when there is nothing to read.
    """
    files = list_files(uri, tuple(_FORMATS))
    known = ", ".join(sorted(_FORMATS))
    if not files:
        raise InputError(f"{flag}: {uri} holds no file to read; files must end in one of {known}")
    splits = []
    for file in files:
        kind = next((kind for end, kind in _FORMATS.items() if file.uri.endswith(end)), None)
        if kind is None:
            raise InputError(f"{flag}: the kind of {file.uri} is unknown; its name must end in one of {known}")
        step = max(file.size_bytes, 1) if kind == "jsonl.gz" else split_bytes
        for start in range(0, max(file.size_bytes, 1), step):
            end = min(start + step, max(file.size_bytes, 1))
            splits.append(Split(uri=file.uri, start=start, end=end, format=kind, size_bytes=file.size_bytes))
    if all(file.size_bytes == 0 for file in files):
        raise InputError(f"{flag}: every file at {uri} is empty")
    return splits


def read_split(
    split: Split, *, max_rows: int = 4096, columns: Sequence[str] | None = None, job: str = ""
) -> Iterator[Records]:
    """The rows of a split, at most `max_rows` at a time; only the named `columns` (those that exist) are decoded.

    Raises `StorageError` when the store, rather than the file, is at fault.
    """
    read = _read_parquet if split.format == "parquet" else _read_lines
    for table, bad in read(split, max_rows, columns):
        yield Records(table=table, rejects=rejects(job, [split.uri] * len(bad), *_unzip(bad)))


def rejects(job: str, sources: Sequence[str], rows: Sequence[int], reasons: Sequence[str]) -> pa.Table:
    """A table of rejects, one for each row named, seen now."""
    seen_at = pa.array([datetime.now(UTC)] * len(rows), REJECTS.field("seen_at").type)
    return pa.table([[job] * len(rows), sources, rows, reasons, seen_at], schema=REJECTS)


_Bad = list[tuple[int, str]]


def _unzip(bad: _Bad) -> tuple[list[int], list[str]]:
    return [row for row, _ in bad], [reason for _, reason in bad]


def _read_parquet(split: Split, max_rows: int, columns: Sequence[str] | None) -> Iterator[tuple[pa.Table, _Bad]]:
    filesystem, path = open_filesystem(split.uri)
    try:
        raw = filesystem.open_input_file(path)
        file = pq.ParquetFile(raw, pre_buffer=True, page_checksum_verification=True)
        names = file.schema_arrow.names
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise pa.ArrowInvalid(f"it has more than one column {doubled[0]!r}")
        if file.metadata.num_rows != sum(_rows_in_groups(file)):
            raise pa.ArrowInvalid("its footer does not agree with itself on how many rows there are")
    except _BROKEN as error:
        _raise_if_store(split, error)
        if split.start == 0:
            yield _nothing(), [(WHOLE_FILE, f"file cannot be read: {_first_line(error)}")]
        return
    wanted = _wanted(names, columns)
    with raw, file:
        size_bytes = raw.size()
        if bad := _changed(split, size_bytes):
            yield _nothing(), bad
        row = 0
        for group, n_rows in enumerate(_rows_in_groups(file)):
            first, row = row, row + n_rows
            if not split.start <= size_bytes * group // file.num_row_groups < split.until:
                continue
            row_bytes = max(1, file.metadata.row_group(group).total_byte_size // max(1, n_rows))
            batch_rows = min(max_rows, max(1, _HELD_BYTES // row_bytes))
            try:
                for batch in file.iter_batches(batch_rows, row_groups=[group], columns=wanted, use_threads=False):
                    yield _placed(pa.Table.from_batches([batch]), split, range(first, first + batch.num_rows)), []
                    first += batch.num_rows
                if first < row:
                    raise pa.ArrowInvalid("they are not there")
            except _BROKEN as error:
                _raise_if_store(split, error)
                reason = f"rows {first} to {row - 1} cannot be read: {_first_line(error)}"
                yield _nothing(), [(WHOLE_FILE, reason)]


_BROKEN = (OSError, pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError)


def _changed(split: Split, size_bytes: int) -> _Bad:
    """A reject for a file that was replaced, or is still being written: some splits may have read what it was before.

    So nobody knows which rows were missed.
    """
    if size_bytes == split.size_bytes:
        return []
    sizes = f"{split.size_bytes:,} bytes when this run listed it, and {size_bytes:,} when it was read"
    return [(WHOLE_FILE, f"file was changed meanwhile: it had {sizes}; what is there now is read")]


def _rows_in_groups(file: pq.ParquetFile) -> list[int]:
    return [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]


def _read_lines(split: Split, max_rows: int, columns: Sequence[str] | None) -> Iterator[tuple[pa.Table, _Bad]]:
    objects: list[dict[str, Any]] = []
    places: list[int] = []
    bad: _Bad = []
    names: set[str] = set()
    held_bytes = 0
    try:
        for place, line in _lines(split, bad):
            held_bytes += len(line)
            try:
                value = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                bad.append((place, f"line is not JSON: {error.msg}"))
                continue
            if isinstance(value, dict):
                objects.append(value)
                places.append(place)
                names.update(value)
            else:
                bad.append((place, f"line is {kind_of(value)}, not an object"))
            full = held_bytes >= _HELD_BYTES or len(objects) * len(names) >= _HELD_CELLS
            if full or len(objects) + len(bad) >= max_rows:
                yield _placed(_table(objects, columns), split, places), bad
                objects, places, bad, names, held_bytes = [], [], [], set(), 0
    except (EOFError, zlib.error) as error:
        bad.append((WHOLE_FILE, f"file cannot be read to its end: {_first_line(error)}"))
    except OSError as error:
        raise StorageError(f"cannot read {split.uri}: {error}") from error
    if objects or bad:
        yield _placed(_table(objects, columns), split, places), bad


def _lines(split: Split, bad: _Bad) -> Iterator[tuple[int, bytes]]:
    """The lines that start within the split, each with its offset in the (unpacked) text; blank ones are left out.

    What is wrong with the file as a whole is added to `bad`.
    """
    filesystem, path = open_filesystem(split.uri)
    with filesystem.open_input_file(path) as raw:
        bad += _changed(split, raw.size())
        place = 0
        if split.format == "jsonl.gz":
            lines = _unpacked_lines(raw)
        else:
            file = io.BufferedReader(raw, _CHUNK_BYTES)
            if split.start:
                place = file.seek(split.start - 1)
                place += len(file.readline())
            lines = file
        while place < split.until and (line := next(lines, b"")):
            if content := (line if place else line.removeprefix(b"\xef\xbb\xbf")).strip():
                yield place, content
            place += len(line)


def _unpacked_lines(raw: pa.NativeFile) -> Iterator[bytes]:
    """The lines of a gzip file of any number of members; all that was unpacked is given before an error is raised.

    `gzip.GzipFile` loses what its buffers hold when the file turns out to be cut.
    """
    unpacker = zlib.decompressobj(wbits=31)
    begun = b""
    while chunk := raw.read(_CHUNK_BYTES):
        while chunk:
            if unpacker.eof:
                unpacker = zlib.decompressobj(wbits=31)
            *lines, begun = (begun + unpacker.decompress(chunk, _CHUNK_BYTES)).split(b"\n")
            yield from (line + b"\n" for line in lines)
            chunk = unpacker.unused_data or unpacker.unconsumed_tail
    if not unpacker.eof:
        raise EOFError("the file ends within its compressed data")
    yield begun


def _table(objects: list[dict[str, Any]], columns: Sequence[str] | None) -> pa.Table:
    names = dict.fromkeys(name for record in objects for name in record)
    return pa.table({name: json_array([o.get(name) for o in objects]) for name in _wanted(names, columns)})


def _wanted(names: Iterable[str], columns: Sequence[str] | None) -> list[str]:
    return [name for name in names if (columns is None or name in columns) and name not in _PLACE]


def json_array(values: Sequence[Any]) -> pa.Array:
    """JSON values as an Arrow array: of their common type, or of type `arrow.json` where they have none."""
    if _alike(values):
        try:
            return pa.array(values)
        except (pa.ArrowInvalid, OverflowError):  # integers that are too large beside others that are negative
            pass
    return pa.array([None if v is None else _dumped(v) for v in values], pa.json_())


def _alike(values: Sequence[Any]) -> bool:
    """Whether the values share their types down to the last; Arrow itself takes 1 and true for 1.0 beside 0.5.

    Values that are very deep, or objects of which nearly each has keys of its own, are not alike.
    """
    groups = [(0, values)]
    while groups:
        depth, group = groups.pop()
        kinds = {type(v) for v in group} - {type(None)}
        if len(kinds) > 1 or depth > _MAX_DEPTH:
            return False
        if kinds == {list}:
            groups.append((depth + 1, [item for v in group if v is not None for item in v]))
        if kinds == {dict}:
            fields = defaultdict(list)
            for name, value in (pair for v in group if v is not None for pair in v.items()):
                fields[name].append(value)
            if len(fields) * len(group) > max(_HELD_CELLS, 16 * sum(map(len, fields.values()))):
                return False
            groups += [(depth + 1, found) for found in fields.values()]
    return True


def _dumped(value: Any) -> str:
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError:  # it is too deep; what is no JSON becomes a reject where someone asks for it
        return ""


def _placed(table: pa.Table, split: Split, rows: Sequence[int]) -> pa.Table:
    if table.num_columns == 0:  # records without a field still are rows, but Arrow cannot count them
        table = pa.table({"_row": pa.array(rows, pa.int64())})
    else:
        table = table.append_column("_row", pa.array(np.asarray(rows, dtype=np.int64)))
    return table.append_column("_source", pa.repeat(pa.scalar(split.uri), table.num_rows))


def _nothing() -> pa.Table:
    return pa.table({"_row": pa.array([], pa.int64()), "_source": pa.array([], pa.string())})


def _raise_if_store(split: Split, error: Exception) -> None:
    """Tell a store that fails from a file that is broken: Arrow reports both as `OSError`."""
    if isinstance(error, OSError) and (error.errno is not None or "AWS Error" in str(error)):
        raise StorageError(f"cannot read {split.uri}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def first_rows(splits: Sequence[Split]) -> pa.Table:
    """A few rows of the first file that has any. Raises `InputError`, with the first reason, where none has."""
    reason = "it has no rows"
    for split in splits:
        for records in read_split(split, max_rows=256):
            if records.table.num_rows:
                return records.table
            if records.rejects.num_rows:
                reason = records.rejects["reason"][0].as_py()
    where = splits[0].uri if splits else "the input"
    others = f" and {len(splits) - 1} more" if len(splits) > 1 else ""
    raise InputError(f"no row can be read from {where}{others}: {reason}")


def check_types(schema: pa.Schema, wanted: dict[str, Kind], source: str) -> None:
    """Raise `InputError` for the first column that is there and cannot be read as what it is wanted for."""
    for name, kind in wanted.items():
        if name in schema.names and not kind.fits(schema.field(name).type):
            raise InputError(f"column {name!r} of {source} is {schema.field(name).type}; it must be {kind.words}")


def column(table: pa.Table, name: str) -> pa.Array:
    """A column as one array; all nulls where the table does not have it."""
    return table[name].combine_chunks() if name in table.column_names else pa.nulls(table.num_rows)


def describe(schema: pa.Schema) -> str:
    """The columns of an input and their types, for a message."""
    return ", ".join(f"{field.name} ({field.type})" for field in schema if field.name not in _PLACE)
