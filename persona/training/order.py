"""In which order the requests of an epoch come, the same on every worker and whenever the run is resumed.

The data tasks of a training import this file and no model, so that they start without torch. N requests.
"""

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Item = TypeVar("Item")
# Batches whose order is drawn anew within a window; all of them lie on each worker at once.
_WINDOW_BATCHES = 32
# Rows whose lengths differ by less are not told apart: batches of one length alone would be batches of one question.
_LENGTH_STEP = 64


def epoch_order(requests: pa.Table, *, epoch: int, seed: int, n_requests: int, global_batch: int) -> pa.Array:
    """Sort keys (N,) int64 that put one epoch's requests in their order, known from each row's content alone.

    Rows are dealt at random into windows of some batches and sorted by length, in coarse steps, within a window, so
    that a batch holds rows of about one length; `shuffle_windows` then draws the order of the batches. About one batch
    comes last in random order: what does not fill a batch at the end of an epoch is left out by chance, and not because
    it is long. No process needs to know all rows.
    """
    n_windows = max(1, n_requests // (_WINDOW_BATCHES * global_batch))
    ids = requests["request_id"].to_pylist()
    hashes = np.array([hash64("order", seed, epoch, request_id) for request_id in ids], dtype=np.uint64)
    characters = pc.add(pc.utf8_length(requests["input"]), pc.utf8_length(requests["target"]))
    length = np.minimum(np.asarray(characters, dtype=np.int64) // _LENGTH_STEP, 2**14 - 1)
    window = (hashes % n_windows).astype(np.int64)
    ties = (hashes >> 38).astype(np.int64)
    last = ties < 2**26 * global_batch / max(n_requests, 1)
    return pa.array(np.where(last, n_windows, window) << 40 | np.where(last, 0, length) << 26 | ties)


def shuffle_windows(batches: Iterable[Item], *, epoch: int, seed: int) -> Iterator[Item]:
    """The batches of an epoch in random order within windows; every worker draws the same order."""
    draw = np.random.default_rng(hash64("windows", seed, epoch))
    window: list[Item] = []
    for batch in batches:
        window.append(batch)
        if len(window) == _WINDOW_BATCHES:
            yield from (window[i] for i in draw.permutation(len(window)))
            window = []
    yield from (window[i] for i in draw.permutation(len(window)))


def one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The items in their order, the next one made in a thread while the caller works on this one."""
    source = iter(items)
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="one-ahead") as beside:
        coming = beside.submit(next, source, end)
        while (item := coming.result()) is not end:
            coming = beside.submit(next, source, end)
            yield cast(Item, item)


def hash64(*parts: object) -> int:
    """A random but fixed number of 64 bits for these parts, from which a draw that must be repeatable begins."""
    return int.from_bytes(hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest(), "little")
