"""Cut a text file, compressed or not, into lines of bounded length.

Time is linear in the length of the text, whatever its lines look like. A line that is too long takes no memory, because
its content is dropped as it is read.
"""

import bz2
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import pyarrow as pa

from persona.inputs.files import Format
from persona.inputs.records import first_line, is_store_failure

_CHUNK_BYTES = 2**20
# Less, because a decompressor copies what it has not unpacked yet after each chunk of output, and because Arrow's loses
# the last chunk when a file is cut.
_PACKED_BYTES = 2**16
_CUT = "the compressed data ends early"


def read_lines(
    raw: pa.NativeFile, kind: Format, *, start: int, until: float, max_bytes: int
) -> Iterator[tuple[int, bytes | None]]:
    """The lines that start in `[start, until)`, without their ends, each with its offset in the uncompressed text.

    A line of more than `max_bytes` is None. `start` is 0 for compressed text. Raises `EOFError` or `zlib.error` where
    compressed text is broken, after the lines before that place.
    """
    if start:
        raw.seek(start - 1)
    lines = _cut(_UNPACK[kind](raw), max(0, start - 1), until, max_bytes)
    if start:
        next(lines, None)  # it starts in an earlier split
    yield from lines


def _cut(chunks: Iterable[bytes], start: int, until: float, max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """The lines of a text that begins at the offset `start`, as `read_lines` yields them."""
    partial = bytearray()  # the line at `start` as far as it was read; empty if it is too long
    n_bytes = 0  # of that line
    for chunk in chunks:
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            n_bytes += len(end)
            line = bytes(partial + end) if partial else end
            yield start, None if n_bytes > max_bytes else line
            partial.clear()
            start += n_bytes + 1
            n_bytes = 0
            if start >= until:
                return
        n_bytes += len(rest)
        if n_bytes <= max_bytes:
            partial += rest
        else:
            partial.clear()
            if start + n_bytes >= until:  # the next line does not start in the range
                break
    if n_bytes:
        yield start, None if n_bytes > max_bytes else bytes(partial)


def _plain(raw: pa.NativeFile) -> Iterator[bytes]:
    while chunk := raw.read(_CHUNK_BYTES):
        yield chunk


def _gunzipped(raw: pa.NativeFile) -> Iterator[bytes]:
    """`gzip.GzipFile` would lose the content of its buffers if the file is cut."""
    decoder = zlib.decompressobj(wbits=31)
    while packed := raw.read(_PACKED_BYTES):
        while packed:
            if decoder.eof:
                decoder = zlib.decompressobj(wbits=31)
            yield decoder.decompress(packed, _CHUNK_BYTES)
            packed = decoder.unused_data or decoder.unconsumed_tail
    if not decoder.eof:
        raise EOFError(_CUT)


def _bunzipped(raw: pa.NativeFile) -> Iterator[bytes]:
    decoder = bz2.BZ2Decompressor()
    while packed := raw.read(_PACKED_BYTES):
        while packed or not (decoder.eof or decoder.needs_input):
            if decoder.eof:
                decoder = bz2.BZ2Decompressor()
            try:
                yield decoder.decompress(packed, _CHUNK_BYTES)
            except OSError as error:  # what it raises for bytes that are not bzip2
                raise EOFError(first_line(error)) from error
            packed = decoder.unused_data
    if not decoder.eof:
        raise EOFError(_CUT)


def _unpacked_zstd(raw: pa.NativeFile) -> Iterator[bytes]:
    stream = pa.CompressedInputStream(raw, "zstd")
    while True:
        try:
            text = stream.read(_PACKED_BYTES)
        except OSError as error:
            if is_store_failure(error):
                raise
            raise EOFError(first_line(error)) from error
        if not text:
            return
        yield text


_UNPACK: Mapping[Format, Callable[[pa.NativeFile], Iterator[bytes]]] = {
    "jsonl": _plain,
    "jsonl.gz": _gunzipped,
    "jsonl.bz2": _bunzipped,
    "jsonl.zst": _unpacked_zstd,
}
