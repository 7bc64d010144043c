"""The order of the requests in an epoch, the same on every worker and in a resumed run.

Ray Data's tasks import this module, so it imports no torch and they start fast. Shape: N requests.
"""

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Item = TypeVar("Item")
# Batches that are shuffled among each other; each worker holds this many at once.
_WINDOW_BATCHES = 32
# Rows whose lengths (in characters) differ by less count as equal. Otherwise rows that repeat one question, and so have
# one length, would fill whole batches.
_LENGTH_STEP = 64


def epoch_order(requests: pa.Table, *, epoch: int, seed: int, n_requests: int, global_batch: int) -> pa.Array:
    """Sort keys (N,) int64 that order the requests of one epoch; a key depends only on its row.

    Rows are assigned at random to windows of some batches and sorted by length within a window, in coarse steps, so
    that the rows of a batch have about the same length; `shuffle_windows` then shuffles the batches. About one batch of
    rows comes last, in random order, so that chance and not length decides which rows the incomplete batch at the end
    of an epoch leaves out. No process needs all rows.
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
    """Shuffles the batches of an epoch within windows, in the same way on every worker."""
    draw = np.random.default_rng(hash64("windows", seed, epoch))
    window: list[Item] = []
    for batch in batches:
        window.append(batch)
        if len(window) == _WINDOW_BATCHES:
            yield from (window[i] for i in draw.permutation(len(window)))
            window = []
    yield from (window[i] for i in draw.permutation(len(window)))


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
