"""Read the lines of a JSONL split; a line that is not a JSON object becomes a reject."""

import bz2
import io
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import orjson
import pyarrow as pa

from persona.errors import StorageError
from persona.inputs.files import Format
from persona.inputs.json_columns import MAX_CELLS, json_array, kind_of
from persona.inputs.records import (
    MAX_BATCH_BYTES,
    WHOLE_FILE,
    BadRows,
    first_line,
    is_store_failure,
    selected,
    with_location,
)
from persona.inputs.splits import Split
from persona.storage import open_filesystem

_CHUNK_BYTES = 2**20
_ZSTD_BYTES = 2**16  # less, because Arrow loses what it has unpacked when the file is cut
_CUT = "the compressed data ends early"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class _Batch:
    """Rows and rejects until there are enough to hand on."""

    def __init__(self) -> None:
        self.objects: list[dict[str, Any]] = []
        self.offsets: list[int] = []
        self.bad: BadRows = []
        self._names: set[str] = set()
        self._n_bytes = 0

    def add(self, offset: int, line: bytes) -> None:
        self._n_bytes += len(line)
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            self.bad.append((offset, f"line is not JSON: {error.msg}"))
            return
        if isinstance(value, dict):
            self.objects.append(value)
            self.offsets.append(offset)
            self._names.update(value)
        else:
            self.bad.append((offset, f"line is {kind_of(value)}, not an object"))

    def is_full(self, max_rows: int) -> bool:
        """Whether it has enough rows, bytes or cells; many cells if every line has different keys."""
        n_rows, n_cells = len(self.objects) + len(self.bad), len(self.objects) * len(self._names)
        return n_rows >= max_rows or self._n_bytes >= MAX_BATCH_BYTES or n_cells >= MAX_CELLS

    def table(self, source: str, columns: Sequence[str] | None) -> pa.Table:
        names = selected(dict.fromkeys(name for record in self.objects for name in record), columns)
        table = pa.table({name: json_array([record.get(name) for record in self.objects]) for name in names})
        return with_location(table, source, self.offsets)


def read_jsonl(split: Split, max_rows: int, columns: Sequence[str] | None) -> Iterator[tuple[pa.Table, BadRows]]:
    """Rows with their location, and rejects. Raises `StorageError` if the store fails."""
    batch = _Batch()
    file_rejects: BadRows = []
    try:
        for offset, line in _lines(split, file_rejects):
            batch.add(offset, line)
            if batch.is_full(max_rows):
                yield batch.table(split.uri, columns), batch.bad
                batch = _Batch()
    except (EOFError, zlib.error) as error:
        file_rejects.append((WHOLE_FILE, f"file cannot be read to its end: {first_line(error)}"))
    except OSError as error:
        raise StorageError(f"cannot read {split.uri}: {error}") from error
    bad = batch.bad + file_rejects
    if batch.objects or bad:
        yield batch.table(split.uri, columns), bad


def _lines(split: Split, file_rejects: BadRows) -> Iterator[tuple[int, bytes]]:
    """The non-blank lines that start within the split, each with its offset in the uncompressed text.

    A problem with the file as a whole is added to `file_rejects`.
    """
    filesystem, path = open_filesystem(split.uri)
    with filesystem.open_input_file(path) as raw:
        file_rejects += split.check_size(raw.size())
        offset = 0
        lines: Iterator[bytes]
        if split.format in _UNPACK:
            lines = _unpacked_lines(raw, split.format)
        else:
            file = io.BufferedReader(raw, _CHUNK_BYTES)
            if split.start:
                offset = file.seek(split.start - 1)
                offset += len(file.readline())
            lines = file
        while offset < split.until and (line := next(lines, b"")):
            if content := (line if offset else line.removeprefix(_BYTE_ORDER_MARK)).strip():
                yield offset, content
            offset += len(line)


def _unpacked_lines(raw: pa.NativeFile, kind: Format) -> Iterator[bytes]:
    """The lines of a compressed file with any number of members; those before a broken part come before the error."""
    partial = b""
    for text in _UNPACK[kind](raw):
        *lines, partial = (partial + text).split(b"\n")
        yield from (line + b"\n" for line in lines)
    yield partial


def _gunzipped(raw: pa.NativeFile) -> Iterator[bytes]:
    """`gzip.GzipFile` would lose the content of its buffers if the file is cut."""
    decoder = zlib.decompressobj(wbits=31)
    while chunk := raw.read(_CHUNK_BYTES):
        while chunk:
            if decoder.eof:
                decoder = zlib.decompressobj(wbits=31)
            yield decoder.decompress(chunk, _CHUNK_BYTES)
            chunk = decoder.unused_data or decoder.unconsumed_tail
    if not decoder.eof:
        raise EOFError(_CUT)


def _bunzipped(raw: pa.NativeFile) -> Iterator[bytes]:
    decoder = bz2.BZ2Decompressor()
    while chunk := raw.read(_CHUNK_BYTES):
        while chunk or not (decoder.eof or decoder.needs_input):
            if decoder.eof:
                decoder = bz2.BZ2Decompressor()
            try:
                yield decoder.decompress(chunk, _CHUNK_BYTES)
            except OSError as error:  # what it raises for bytes that are not bzip2
                raise EOFError(first_line(error)) from error
            chunk = decoder.unused_data
    if not decoder.eof:
        raise EOFError(_CUT)


def _unpacked_zstd(raw: pa.NativeFile) -> Iterator[bytes]:
    stream = pa.CompressedInputStream(raw, "zstd")
    while True:
        try:
            text = stream.read(_ZSTD_BYTES)
        except OSError as error:
            if is_store_failure(error):
                raise
            raise EOFError(first_line(error)) from error
        if not text:
            return
        yield text


_UNPACK: Mapping[Format, Callable[[pa.NativeFile], Iterator[bytes]]] = {
    "jsonl.gz": _gunzipped,
    "jsonl.bz2": _bunzipped,
    "jsonl.zst": _unpacked_zstd,
}
