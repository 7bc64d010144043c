"""Merge the sorted segments of a partition into windows of bounded size.

A window is complete: it has all rows of each place that it has a row of, and so all rows of a key, or of a user where
places tell only users apart. Windows follow one another without gaps and cover the whole range of the partition, so a
reader knows which places have no row.
"""

import heapq
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa

from persona.exchange.plan import ExchangePlan
from persona.exchange.runs import PLACE, Run, Segment
from persona.inputs.place import PLACES

_PARALLEL_OPENS = 16


@dataclass(frozen=True, kw_only=True)
class Window:
    """All rows, possibly none, at the places [low, high) of one bucket, sorted by place.

    Rows at equal places are in the order in which they were given to the exchange.
    """

    bucket: int
    low: int
    high: int
    rows: pa.Table


def windows(runs: Sequence[Run], partition: int, plan: ExchangePlan, schema: pa.Schema) -> Iterator[Window]:
    """The windows of a partition; the same ones whenever they are read.

    Holds one batch of each run and two windows of rows. `schema` is that of the rows. Raises `StorageError`.
    """
    low, high = plan.range_of(partition)
    for rows, upto in _merged(_opened(runs, partition, plan), high, plan.window_bytes):
        yield from _by_bucket(rows, low, upto, schema)
        low = upto
    yield from _by_bucket(None, low, high, schema)


def _opened(runs: Sequence[Run], partition: int, plan: ExchangePlan) -> list[Segment]:
    ranges = [(run.uri, int(run.offsets[partition]), int(run.offsets[partition + 1])) for run in runs]
    filled = [(uri, start, end) for uri, start, end in ranges if end > start]
    # Each takes a request to the store.
    with ThreadPoolExecutor(_PARALLEL_OPENS) as pool:
        return list(pool.map(partial(_open, read_bytes=plan.batch_bytes), filled))


def _open(where: tuple[str, int, int], *, read_bytes: int) -> Segment:
    return Segment(*where, read_bytes=read_bytes)


class _Held:
    """The rows of one segment that have been read and not handed on yet."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.batches: list[pa.RecordBatch] = []
        self.places: list[np.ndarray] = []

    def load(self) -> int | None:
        """Read a batch; its last place, or None at the end of the segment."""
        batch = self.segment.next()
        if batch is None:
            return None
        self.batches.append(batch)
        self.places.append(batch.column(PLACE).to_numpy())
        return int(self.places[-1][-1])

    def drop(self, until: int) -> None:
        """Forget the rows at places below `until`."""
        first = next((i for i, places in enumerate(self.places) if int(places[-1]) >= until), len(self.places))
        del self.batches[:first], self.places[:first]
        if self.batches:
            start = int(np.searchsorted(self.places[0], np.uint64(until)))
            self.batches[0], self.places[0] = self.batches[0].slice(start), self.places[0][start:]


def _merged(segments: Sequence[Segment], high: int, window_bytes: int) -> Iterator[tuple[pa.Table, int]]:
    """Sorted rows with the place up to which they are complete; the last one is `high`."""
    held = [_Held(segment) for segment in segments]
    # What a segment has not read yet comes after its last place, so rows below the smallest of these are complete.
    unread = [(last, number) for number, one in enumerate(held) if (last := one.load()) is not None]
    heapq.heapify(unread)
    n_bytes = 0
    while unread:
        _, number = unread[0]
        last = held[number].load()
        if last is None:
            heapq.heappop(unread)
        else:
            heapq.heapreplace(unread, (last, number))
            n_bytes += held[number].batches[-1].nbytes
        until = unread[0][0] if unread else high
        is_due = not unread or n_bytes >= window_bytes
        if is_due and any(one.places and int(one.places[0][0]) < until for one in held):
            yield from _cut(_ready(held, until), until, window_bytes)
            n_bytes = 0


def _ready(held: Sequence[_Held], until: int) -> pa.Table:
    """Take the rows below `until` from what is held, sorted by place and then in the order of the runs."""
    places_N = np.concatenate([places for one in held for places in one.places])
    order = np.argsort(places_N, kind="stable")
    order = order[: np.count_nonzero(places_N < until)]
    rows = pa.Table.from_batches([batch for one in held for batch in one.batches]).take(pa.array(order))
    for one in held:
        one.drop(until)
    return rows


def _cut(rows: pa.Table, until: int, window_bytes: int) -> Iterator[tuple[pa.Table, int]]:
    """Pieces of about `window_bytes`, cut between places, each with the place where the next one begins."""
    places_N = rows[PLACE].to_numpy()
    n_pieces = -(-rows.nbytes // window_bytes)
    start = 0
    for piece in range(1, n_pieces + 1):
        # The first row of the place at the even cut.
        cut = rows.num_rows * piece // n_pieces
        end = int(np.searchsorted(places_N, places_N[cut])) if cut < rows.num_rows else rows.num_rows
        if end > start:
            yield rows.slice(start, end - start), int(places_N[end]) if end < rows.num_rows else until
            start = end


def _by_bucket(rows: pa.Table | None, low: int, high: int, schema: pa.Schema) -> Iterator[Window]:
    """Rows at the places [low, high), a window per bucket."""
    rows = pa.table({PLACE: pa.array([], pa.uint64())}) if rows is None else rows
    places_N = rows[PLACE].to_numpy()
    start = 0
    while low < high:
        bucket = low // PLACES
        end_of_bucket = min((bucket + 1) * PLACES, high)
        is_last = end_of_bucket == high
        end = rows.num_rows if is_last else int(np.searchsorted(places_N, np.uint64(end_of_bucket)))
        mine = rows.slice(start, end - start).select(schema.names) if end > start else schema.empty_table()
        yield Window(bucket=bucket, low=low, high=end_of_bucket, rows=mine)
        low, start = end_of_bucket, end
