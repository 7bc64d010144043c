"""The windows of a training run: tasks fill them with vectors from the store, and workers take their shares in order.

A share is what one worker needs for a few steps. One actor hands out the shares, so that each window is filled once for
all workers, and starts to fill the next window when the first worker takes its shares of one. A worker that resumes
asks for the window of its step.
"""

import time
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

from jobs.runtime.tally import Tally
from persona.errors import RunLost

if TYPE_CHECKING:
    import pyarrow as pa
    from ray import ObjectRef

    from persona.store.store import Store
    from persona.training.order import Piece, RunOrder, Window

_WINDOWS_KEPT = 3  # the one before, the current one, and the next one
# At most this many of a worker in a window: each costs the worker and the actor a few kilobytes.
_SHARES = 64
Slice = tuple["ObjectRef[pa.Table]", int, int]
"""Rows from start to end of a block."""


@dataclass(frozen=True, kw_only=True)
class RequestBlocks:
    """The requests of a run without vectors, sorted by bucket and user, in Ray's object store.

    Attributes:
        refs: the blocks; starts: the number of requests before each of them, and after the last one.
        pieces: as `order.cut` makes them.
    """

    refs: "Sequence[ObjectRef[pa.Table]]"
    starts: Sequence[int]
    pieces: "Sequence[Piece]"

    @classmethod
    def of(cls, refs: "Sequence[ObjectRef[pa.Table]]", width: int) -> "RequestBlocks":
        """Cuts sorted blocks into pieces; vectors have this width."""
        import ray

        starts, pieces = ray.get(ray.remote(num_cpus=1, max_retries=-1)(_cut).remote(list(refs), width))
        return cls(refs=refs, starts=starts, pieces=pieces)

    def slices(self, ranges: Sequence[tuple[int, int]]) -> list[Slice]:
        """Where the requests of these ranges are."""
        found: list[Slice] = []
        for start, end in ranges:
            for block in range(bisect_right(self.starts, start) - 1, bisect_left(self.starts, end)):
                first, after = self.starts[block : block + 2]
                found.append((self.refs[block], max(start, first) - first, min(end, after) - first))
        return found


def _cut(refs: "Sequence[ObjectRef[pa.Table]]", width: int) -> "tuple[list[int], list[Piece]]":
    """The first row of each block and the number of rows; the pieces. One block is in memory at a time."""
    import ray

    from persona.training.order import cut

    starts = [0]

    def blocks() -> "Iterator[pa.Table]":
        for ref in refs:
            block = ray.get(ref)
            starts.append(starts[-1] + block.num_rows)
            yield block

    pieces = cut(blocks(), width)
    return starts, pieces


@dataclass(frozen=True, kw_only=True)
class FillSettings:
    """How a window is filled. `store` is a snapshot of the behaviors, so that every task reads the same ones."""

    store: "Store"
    max_behaviors: int
    seed: int
    global_batch: int
    n_workers: int
    tally: Tally


def fill(slices: Sequence[Slice], window: "Window", settings: FillSettings) -> "Iterator[pa.Table | None]":
    """The workers' shares of the first steps of a window, then those of the next ones, and a None at the end."""
    import pyarrow as pa
    import ray

    since = time.perf_counter()
    blocks = ray.get([ref for ref, _, _ in slices])
    requests = pa.concat_tables(
        [block.slice(start, end - start) for block, (_, start, end) in zip(blocks, slices, strict=True)]
    )
    yield from shares(requests, window, settings)
    counts = {"requests": window.n_steps * settings.global_batch, "seconds": time.perf_counter() - since}
    settings.tally.note("windows", str(window.first_step), counts)
    # With a single result, Ray would take the generator itself for it.
    yield None


def shares(requests: "pa.Table", window: "Window", settings: FillSettings) -> "Iterator[pa.Table]":
    """The shares of a window: requests with `history`; first those of all workers for the first steps.

    Reads the histories of the users of the window, bucket by bucket, each once.
    """
    import numpy as np

    from persona.store.join import Histories, with_vectors
    from persona.training.order import order_in_window

    seed, global_batch = settings.seed, settings.global_batch
    ordered = requests.take(order_in_window(requests, window, seed=seed, global_batch=global_batch))
    sources = list(zip(ordered["bucket"].to_pylist(), ordered["user_id"].to_pylist(), strict=True))
    histories = Histories.read(settings.store, sources, with_vectors=True)
    n = global_batch // settings.n_workers
    for steps in _steps_of_shares(window):
        for rank in range(settings.n_workers):
            starts = [step * global_batch + rank * n for step in steps]
            rows = np.concatenate([np.arange(start, start + n) for start in starts])
            mine = [sources[row] for row in rows.tolist()]
            yield with_vectors(ordered.take(rows), mine, histories, max_behaviors=settings.max_behaviors)


def _steps_of_shares(window: "Window") -> list[range]:
    """The steps of each share of a worker, counted from the first step of the window."""
    n_each = -(-window.n_steps // _SHARES)
    return [range(first, min(first + n_each, window.n_steps)) for first in range(0, window.n_steps, n_each)]


class WindowFeed:
    """The actor that has windows filled."""

    def __init__(self, blocks: RequestBlocks, settings: FillSettings) -> None:
        import ray

        self._blocks = blocks
        self._n_workers = settings.n_workers
        self._settings = ray.put(settings)
        self._task = ray.remote(num_cpus=1, max_retries=-1)(fill)
        # By first step: the shares that no worker has taken yet, by worker.
        self._shares: dict[int, dict[int, list[ObjectRef[pa.Table]]]] = {}

    def take(self, rank: int, window: "Window", following: "Window | None") -> "list[ObjectRef[pa.Table]]":
        """A worker's shares of a window; the window after it is filled meanwhile."""
        # After a crash, workers ask again for a window that they have taken before.
        if rank not in self._shares.get(window.first_step, {}):
            self._shares.pop(window.first_step, None)
            self._fill(window)
        if following is not None and following.first_step not in self._shares:
            self._fill(following)
        mine = self._shares[window.first_step].pop(rank)
        while len(self._shares) > _WINDOWS_KEPT:
            del self._shares[next(iter(self._shares))]
        return mine

    def _fill(self, window: "Window") -> None:
        n_shares = len(_steps_of_shares(window)) * self._n_workers
        task = self._task.options(num_returns=n_shares + 1)
        refs: Any = task.remote(self._blocks.slices(window.ranges), window, self._settings)
        shares = refs[:n_shares]
        self._shares[window.first_step] = {rank: shares[rank :: self._n_workers] for rank in range(self._n_workers)}


@dataclass(frozen=True, kw_only=True)
class Windows:
    """The steps of a run for its workers, to which it may be sent."""

    order: "RunOrder"
    feed: Any
    """Ray's handle to a `WindowFeed`."""

    @classmethod
    def start(cls, order: "RunOrder", blocks: RequestBlocks, settings: FillSettings) -> "Windows":
        """Starts the actor, on the driver's node, so that the loss of another node does not end the run."""
        import ray

        driver_node = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        feed = ray.remote(num_cpus=0, label_selector=driver_node)(WindowFeed).remote(blocks, settings)
        return cls(order=order, feed=feed)

    def steps(self, rank: int, begun: int) -> "Iterator[tuple[int, int, pa.Table]]":
        """Steps from `begun` on: number in the run, epoch, and a worker's share of the batch.

        Raises RunLost when the actor has died.
        """
        import ray

        for window, following in pairwise(chain(self.order.from_step(begun), [None])):
            assert window is not None
            try:
                shares = deque(ray.get(self.feed.take.remote(rank, window, following)))
            except ray.exceptions.RayActorError as error:
                raise RunLost(
                    "the process that hands out training batches has died (killed, or out of memory on the driver's "
                    "machine); run the same command again, which resumes at the last checkpoint"
                ) from error
            for steps in _steps_of_shares(window):
                share = shares.popleft()  # drops the share before, which Ray can then free
                if window.first_step + steps[-1] >= begun:
                    yield from _each_step(ray.get(share), window, steps, begun)


def _each_step(share: "pa.Table", window: "Window", steps: range, begun: int) -> "Iterator[tuple[int, int, pa.Table]]":
    """What a share has for its steps from `begun` on."""
    n = share.num_rows // len(steps)
    for i, step in enumerate(steps):
        if window.first_step + step >= begun:
            yield window.first_step + step, window.epoch, share.slice(i * n, n)
