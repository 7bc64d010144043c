"""The order of the requests in a run: the same with any number of workers, and in a resumed run.

Histories are too large to be moved for a shuffle. So requests are shuffled as in a streaming data set: pieces of
buckets, in an order drawn for each epoch, fill windows of a bounded size, and the requests of a window are shuffled.
Data that fits one window is fully shuffled.

How good the shuffle is: buckets are random samples of the users, so it does not matter which buckets share a batch. But
all requests of a user are in the same window. With n requests a user and N in a window, two requests of a batch are of
one user with probability (n - 1) / (N - 1).

Tasks of Ray import this module, so it imports no torch and they start fast. Shape: N requests.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from persona.store import vectors

Item = TypeVar("Item")
# The task that fills a window holds its vectors in memory; Ray's object store holds two or three windows. Small pieces
# mix the users of many buckets in a window.
_WINDOW_BYTES = 2**30
_PIECE_BYTES = _WINDOW_BYTES // 32
# Rows are sorted by length within this many batches, which are then shuffled.
_GROUP_BATCHES = 32
# Rows whose lengths (in characters) differ by less count as equal. Otherwise rows that repeat one question, and so have
# one length, would fill whole batches.
_LENGTH_STEP = 64


@dataclass(frozen=True)
class Piece:
    """Requests `start` to `end` of a run's requests, sorted by bucket and user; all are of one bucket."""

    start: int
    end: int
    n_bytes: int
    """Size of these requests' texts and of the vectors that they see."""


def cut(requests: Iterable[pa.Table], width: int, piece_bytes: int = _PIECE_BYTES) -> list[Piece]:
    """Cuts the requests of a run into pieces of about `piece_bytes` of texts and vectors.

    A piece ends with a user, unless it would have more than twice as many bytes.

    Args:
        requests: tables with `bucket`, `user_id`, `n_behaviors` and texts, all together sorted by bucket and user.
        width: number of components of a vector.
        piece_bytes: bytes at which a piece is full.
    """
    pieces: list[Piece] = []
    start = row = n_bytes = 0
    last: tuple[int, str] | None = None
    for table in requests:
        columns = (table[name].to_pylist() for name in ("bucket", "user_id"))
        sizes = _text_bytes(table) + table["n_behaviors"].to_numpy() * vectors.n_bytes(width)
        for bucket, user, size in zip(*columns, sizes.tolist(), strict=True):
            is_full = n_bytes >= (piece_bytes if last != (bucket, user) else 2 * piece_bytes)
            if last is not None and (last[0] != bucket or is_full):
                pieces.append(Piece(start, row, n_bytes))
                start, n_bytes = row, 0
            last, row, n_bytes = (bucket, user), row + 1, n_bytes + size
    return [*pieces, Piece(start, row, n_bytes)] if row else []


def _text_bytes(requests: pa.Table) -> np.ndarray:
    """The size of each request's texts (N,)."""
    sizes = np.zeros(requests.num_rows, np.int64)
    for field in requests.schema:
        if pa.types.is_large_string(field.type):  # other strings are short: ids, hashes and kinds
            sizes += pc.binary_length(requests[field.name]).fill_null(0).to_numpy()
    return sizes


@dataclass(frozen=True)
class Window:
    """Consecutive steps of an epoch; their requests are shuffled, and their vectors read together."""

    epoch: int
    number: int
    """Counts the windows of the epoch from 0."""
    first_step: int
    """Counts from the start of the run."""
    n_steps: int
    ranges: tuple[tuple[int, int], ...]
    """Start and end of the requests, as in `Piece`. The last window of an epoch may have more than its steps need."""


@dataclass(frozen=True, kw_only=True)
class RunOrder:
    """The windows of a run, which depend on nothing but these values; `pieces` are from `cut`."""

    pieces: Sequence[Piece]
    n_epochs: int
    seed: int
    global_batch: int
    window_bytes: int = _WINDOW_BYTES
    """Bytes of a window; it has more by at most the rest of the window before it, less than a batch."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch; requests that do not fill a batch are left out of it."""
        return sum(piece.end - piece.start for piece in self.pieces) // self.global_batch

    def epoch(self, epoch: int) -> list[Window]:
        """The windows of one epoch: the pieces in a drawn order, cut into windows of whole batches."""
        draw = np.random.default_rng(hash64("pieces", self.seed, epoch))
        windows: list[Window] = []
        ranges: list[tuple[int, int]] = []
        n_rows = n_bytes = 0
        step = epoch * self.steps_per_epoch
        for i in draw.permutation(len(self.pieces)):
            piece = self.pieces[i]
            if n_bytes + piece.n_bytes > self.window_bytes and n_rows >= self.global_batch:
                n_steps, n_left = divmod(n_rows, self.global_batch)
                ranges, left = _divided(ranges, n_rows - n_left)
                windows.append(Window(epoch, len(windows), step, n_steps, tuple(ranges)))
                ranges, n_rows, n_bytes, step = left, n_left, 0, step + n_steps
            ranges.append((piece.start, piece.end))
            n_rows += piece.end - piece.start
            n_bytes += piece.n_bytes
        if n_rows >= self.global_batch:
            windows.append(Window(epoch, len(windows), step, n_rows // self.global_batch, tuple(ranges)))
        return windows

    def from_step(self, step: int) -> Iterator[Window]:
        """The windows of the run from the one that has `step` on; `step` counts from the start of the run."""
        for epoch in range(step // self.steps_per_epoch, self.n_epochs):
            yield from (window for window in self.epoch(epoch) if window.first_step + window.n_steps > step)


def _divided(ranges: Sequence[tuple[int, int]], n_rows: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The first `n_rows` of the rows in `ranges`, and the others."""
    first: list[tuple[int, int]] = []
    others: list[tuple[int, int]] = []
    for start, end in ranges:
        middle = min(end, start + n_rows)
        n_rows -= middle - start
        first += [(start, middle)] if middle > start else []
        others += [(middle, end)] if end > middle else []
    return first, others


def order_in_window(requests: pa.Table, window: Window, *, seed: int, global_batch: int) -> np.ndarray:
    """The rows (N,) of a window in the order in which they are trained on, whole batches only.

    Rows are assigned at random to groups of some batches and sorted by length within a group, in coarse steps, so that
    the rows of a batch have about the same length; then the batches of a group are shuffled. About one batch of rows
    comes last, in random order, so that chance and not length decides which rows the incomplete batch at the end of an
    epoch leaves out.
    """
    n_requests = requests.num_rows
    n_groups = max(1, n_requests // (_GROUP_BATCHES * global_batch))
    ids = requests["request_id"].to_pylist()
    hashes = np.array([hash64("order", seed, window.epoch, request_id) for request_id in ids], dtype=np.uint64)
    characters = pc.add(pc.utf8_length(requests["input"]), pc.utf8_length(requests["target"]))
    length = np.minimum(np.asarray(characters, dtype=np.int64) // _LENGTH_STEP, 2**14 - 1)
    group = (hashes % n_groups).astype(np.int64)
    ties = (hashes >> 38).astype(np.int64)
    last = ties < 2**26 * global_batch / max(n_requests, 1)
    keys = np.where(last, n_groups, group) << 40 | np.where(last, 0, length) << 26 | ties
    in_order = pc.sort_indices(
        pa.table({"key": keys, "request_id": requests["request_id"], "user_id": requests["user_id"]}),
        sort_keys=[("key", "ascending"), ("request_id", "ascending"), ("user_id", "ascending")],
    ).to_numpy()
    batches = in_order[: window.n_steps * global_batch].reshape(window.n_steps, global_batch)
    draw = np.random.default_rng(hash64("windows", seed, window.epoch) + window.number)
    groups = (
        range(first, min(first + _GROUP_BATCHES, len(batches))) for first in range(0, len(batches), _GROUP_BATCHES)
    )
    shuffled: np.ndarray = np.concatenate([batches[of.start + draw.permutation(len(of))].ravel() for of in groups])
    return shuffled


def one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The items in their order; a thread makes the next one while the caller works on the current one."""
    source = iter(items)
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="one-ahead") as thread:
        following = thread.submit(next, source, end)
        while (item := following.result()) is not end:
            following = thread.submit(next, source, end)
            yield cast(Item, item)


def hash64(*parts: object) -> int:
    """A 64-bit hash of the parts, to seed repeatable random draws."""
    return int.from_bytes(hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest(), "little")
