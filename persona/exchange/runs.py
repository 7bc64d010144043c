"""Write and read run files: rows sorted by place, one segment per partition.

A segment is an Arrow IPC stream of small compressed batches, so a reader holds one batch of it at a time. Segments
follow one another in a file; `Run.offsets` says where each begins.
"""

import io
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from pyarrow import ipc

from persona import storage

PLACE = "place"
"""The last column of a run file: `persona.inputs.place.places` of each row."""
_OPTIONS = ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=1))


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run file: the segment of partition i is at the bytes `offsets[i]` to `offsets[i + 1]`; empty if it has no row.

    `offsets` is uint64 (P + 1,).
    """

    uri: str
    offsets: np.ndarray


def write_run(folder: str, rows: pa.Table, places_N: np.ndarray, lows_P: np.ndarray, batch_bytes: int) -> Run:
    """Sort rows by place, at equal places in their order, and write them to a new file in `folder`.

    The name is unique, so that a file of a failed attempt is never taken for one of its retry. Raises `StorageError`.
    """
    uri = storage.join(folder, f"{uuid.uuid4().hex}.run")
    order_N = np.argsort(places_N, kind="stable")
    ends_P = np.append(np.searchsorted(places_N[order_N], lows_P[1:], side="left"), len(places_N))
    rows = rows.combine_chunks()
    offsets = np.zeros(len(lows_P) + 1, dtype=np.uint64)
    with storage.write_file(uri) as path, path.open("wb") as file:
        start = 0
        for partition, end in enumerate(ends_P.tolist()):
            if end > start:
                mine = order_N[start:end]
                segment = rows.take(pa.array(mine)).append_column(PLACE, pa.array(places_N[mine]))
                with ipc.new_stream(file, segment.schema, options=_OPTIONS) as stream:
                    for batch in _batches(segment, batch_bytes):
                        stream.write_table(batch)
            offsets[partition + 1] = file.tell()
            start = end
    return Run(uri=uri, offsets=offsets)


def _batches(rows: pa.Table, batch_bytes: int) -> Iterator[pa.Table]:
    """Slices of at most `batch_bytes`, or of one row."""
    if rows.nbytes <= batch_bytes or rows.num_rows == 1:
        yield rows.combine_chunks()
        return
    step = max(1, rows.num_rows * batch_bytes // rows.nbytes)
    for start in range(0, rows.num_rows, step):
        part = rows.slice(start, step)
        if part.nbytes <= 2 * batch_bytes:
            yield part.combine_chunks()
        else:
            yield from _batches(part.slice(0, (part.num_rows + 1) // 2), batch_bytes)
            yield from _batches(part.slice((part.num_rows + 1) // 2), batch_bytes)


def folded(
    rows: pa.Table, places_N: np.ndarray, fold: Callable[[pa.Table], pa.Table], place: Callable[[pa.Table], np.ndarray]
) -> tuple[pa.Table, np.ndarray]:
    """The rows and their places after `fold` has been applied to those that share a place with others.

    `fold` leaves one row for each key, and `place` gives the places of what it leaves.
    """
    sorted_N = np.sort(places_N)
    repeated = np.unique(sorted_N[1:][sorted_N[1:] == sorted_N[:-1]])
    if not len(repeated):
        return rows, places_N
    is_repeated_N = np.isin(places_N, repeated)
    kept = fold(rows.filter(pa.array(is_repeated_N)))
    others = rows.filter(pa.array(~is_repeated_N))
    return pa.concat_tables([others, kept]), np.concatenate([places_N[~is_repeated_N], place(kept)])


class Segment:
    """The rows of one partition in one run file, read batch by batch."""

    def __init__(self, uri: str, start: int, end: int, read_bytes: int) -> None:
        """`read_bytes` is the size of a request to the store. Raises `StorageError`, as `next` does."""
        ranges = io.BufferedReader(_Range(uri, start, end), buffer_size=min(read_bytes, max(end - start, 1)))
        self._stream = ipc.open_stream(pa.PythonFile(ranges, mode="r"))
        self.schema: pa.Schema = self._stream.schema

    def next(self) -> pa.RecordBatch | None:
        """The next batch; None at the end. `PLACE` is its last column."""
        try:
            return self._stream.read_next_batch()
        except StopIteration:
            return None


class _Range(io.RawIOBase):
    """The bytes from `start` to `end` of a file."""

    def __init__(self, uri: str, start: int, end: int) -> None:
        super().__init__()
        self.uri = uri
        self.at = start
        self.end = end

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        length = min(len(buffer), self.end - self.at)
        if not length:
            return 0
        data = storage.read_range(self.uri, self.at, length)
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)
