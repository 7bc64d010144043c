"""Distribute work over the cluster: rows brought together by bucket or user, or one task per item.

Rows move through run files (`persona.exchange`): the driver holds only the names of the files and where in them each
partition begins.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from jobs.runtime.reading import Found, SplitFound
from persona.errors import StorageError

if TYPE_CHECKING:
    import pyarrow as pa
    from ray import ObjectRef
    from ray.data import Dataset

    from persona.exchange.plan import ExchangePlan
    from persona.exchange.runs import Run
    from persona.exchange.windows import Window
    from persona.inputs.splits import Split

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

Fold = Callable[["pa.Table"], "pa.Table"]
"""Leaves one row for each key."""
_TASKS_PER_CPU = 2  # so that no CPU waits for the driver


class Reader(Protocol):
    """Reads the valid rows of splits; sent to workers."""

    def __call__(self, split: "Split", found: SplitFound, limit: int | None, /) -> "Iterator[pa.Table]":
        """The first `limit` rows of a split, or all. Adds to `found` what it found, before it ends."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """An input of an exchange: of its splits, in order, the first `limit` rows are taken, or all."""

    splits: "Sequence[Split]"
    read: Reader
    limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class Exchanged:
    """Rows in run files, ready to be read by partition.

    Attributes:
        plan: the partitions.
        schema: of the rows.
        runs: the run files, in the order of the input.
        found: what was read, for each source.
        n_folded: rows that `fold` has taken away, among those of the same run file.
    """

    plan: "ExchangePlan"
    schema: "pa.Schema"
    runs: "Sequence[Run]"
    found: Sequence[Found]
    n_folded: int


@contextmanager
def run_files(root: str, writer: str) -> Iterator[str]:
    """A new folder for run files, `<root>/_exchange/<writer>-<run id>`, which is deleted when the context ends.

    Only one run of a writer may be at work at a time: what earlier ones have left is deleted first.
    """
    from persona import storage
    from persona.exchange import leftovers

    leftovers.delete_leftovers(root, writer)
    folder = leftovers.new_folder(root, writer)
    is_new = not storage.is_s3(root) and not storage.exists(root)
    try:
        yield folder
    except BaseException:
        with suppress(StorageError):  # the error of the body counts; the next run deletes what is left
            leftovers.delete_folder(folder)
        if is_new:
            with suppress(OSError):  # it has files of the body
                Path(root).rmdir()
        raise
    leftovers.delete_folder(folder)


def exchange(
    sources: Sequence[Source],
    n_buckets: int,
    schema: "pa.Schema",
    *,
    key: str | None,
    folder: str,
    whole_buckets: bool = False,
    fold: Fold | None = None,
) -> Exchanged:
    """Read all sources and write their rows to run files in `folder`; the only place where rows move between machines.

    With a `key`, the name of a column, rows are brought together by user and key, without it by user. With
    `whole_buckets`, no bucket is in two partitions. `fold` leaves one row of those with the same key; it is applied
    where it saves moving them, so the reader must do the same again.
    """
    from persona.exchange.plan import bytes_in_memory, plan_exchange

    n_bytes = sum(bytes_in_memory(source.splits) for source in sources)
    plan = plan_exchange(n_bytes, n_buckets, whole_buckets=whole_buckets)
    runs: list[Run] = []
    found, n_folded = [], 0
    for source in sources:
        mapped = _mapped(source, plan, key, folder, fold)
        n_folded += sum(one.n_folded for one in mapped)
        runs += [run for one in mapped for run in one.runs]
        found.append(Found.of(split for one in mapped for split in one.found))
    return Exchanged(plan=plan, schema=schema, runs=runs, found=found, n_folded=n_folded)


@dataclass(frozen=True, kw_only=True)
class _Task:
    """Splits that one map task reads; `number` is its position in the input."""

    number: int
    splits: "Sequence[Split]"
    limit: int | None


@dataclass(frozen=True, kw_only=True)
class _Mapped:
    """What a map task has written and found."""

    number: int
    runs: "Sequence[Run]"
    found: Sequence[SplitFound]
    n_folded: int


def _mapped(source: Source, plan: "ExchangePlan", key: str | None, folder: str, fold: Fold | None) -> Sequence[_Mapped]:
    """The results of a source's map tasks, in the order of the input."""
    from persona.exchange.plan import grouped

    settings = {"read": source.read, "plan": plan, "key": key, "folder": folder, "fold": fold}
    if source.limit is None:
        groups = grouped(source.splits, plan.task_bytes)
        tasks = [_Task(number=number, splits=group, limit=None) for number, group in enumerate(groups)]
        return sorted(results(tasks, _map, **settings), key=lambda one: one.number)
    # One split after the other: all jobs must take the same rows when given the same limit.
    mapped: list[_Mapped] = []
    left = source.limit
    for split in source.splits:
        if left <= 0:
            break
        mapped += results([_Task(number=len(mapped), splits=[split], limit=left)], _map, **settings)
        left -= sum(one.rows for one in mapped[-1].found)
    return mapped


def _map(
    task: _Task, *, read: Reader, plan: "ExchangePlan", key: str | None, folder: str, fold: Fold | None
) -> _Mapped:
    """Read splits and write their rows to run files. Holds the rows of one run."""
    import numpy as np
    import pyarrow as pa

    from persona.exchange.runs import folded, write_run
    from persona.inputs.place import places as places_of

    place = partial(places_of, n_buckets=plan.n_buckets, key=key)

    runs: list[Run] = []
    found: list[SplitFound] = []
    held: list[pa.Table] = []
    places: list[np.ndarray] = []
    n_bytes = n_folded = 0

    def write() -> None:
        nonlocal n_folded
        rows, places_N = pa.concat_tables(held).combine_chunks(), np.concatenate(places)
        held.clear()
        places.clear()
        n_folded += rows.num_rows
        if fold is not None:
            rows, places_N = folded(rows, places_N, fold, place)
        n_folded -= rows.num_rows
        runs.append(write_run(folder, rows, places_N, plan.lows(), plan.batch_bytes))

    for split in task.splits:
        found.append(SplitFound(uri=split.uri))
        for rows in read(split, found[-1], task.limit):
            held.append(rows)
            places.append(place(rows))
            n_bytes += rows.nbytes
            if n_bytes >= plan.run_bytes:
                write()
                n_bytes = 0
    if n_bytes:
        write()
    return _Mapped(number=task.number, runs=runs, found=found, n_folded=n_folded)


def by_partition(exchanged: Exchanged, work: "Callable[..., Iterator[pa.Table]]", /, **settings: object) -> "Dataset":
    """The rows of the tables that `work(windows, **settings)` yields for each partition's windows.

    `work` must yield the same tables whenever it is called: when Ray retries a task, it skips as many output blocks as
    it has already passed on, and those may have been committed in the meantime. So `work` must read the tables that
    the job writes to from a snapshot that was taken when the job started.
    """
    import ray

    items = [{"partition": number} for number in range(exchanged.plan.n_partitions)]
    return ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _reduce,  # type: ignore[arg-type]  # Ray's types do not cover fn_kwargs
        batch_size=1,
        batch_format="pyarrow",
        # Once for all tasks, which share a node's copy.
        fn_kwargs={"shared": ray.put(replace(exchanged, found=())), "work": work, "settings": settings},
    )


def by_window(exchanged: Exchanged, work: "Callable[..., Iterator[pa.Table]]", /, **settings: object) -> "Dataset":
    """The rows of the tables that `work(rows, **settings)` yields for each window with rows.

    Without a key, a window has all rows of some users of one bucket. `work` is called as in `by_partition`.
    """
    return by_partition(exchanged, _each_window, work=work, settings=settings)


def _each_window(
    windows: "Iterator[Window]", *, work: "Callable[..., Iterator[pa.Table]]", settings: Mapping[str, object]
) -> "Iterator[pa.Table]":
    for window in windows:
        if window.rows.num_rows:
            yield from work(window.rows, **settings)


def _reduce(
    batch: "pa.Table",
    *,
    shared: "ObjectRef[Exchanged]",
    work: "Callable[..., Iterator[pa.Table]]",
    settings: Mapping[str, object],
) -> "Iterator[pa.Table]":
    import ray

    from persona.exchange.windows import windows

    one = ray.get(shared)
    for partition in batch["partition"].to_pylist():
        yield from work(windows(one.runs, partition, one.plan, one.schema), **settings)


def each(
    items: Sequence[Mapping[str, object]], work: "Callable[..., Iterator[pa.Table]]", **settings: object
) -> "Iterator[pa.Table]":
    """The tables that `work(table_with_one_item, **settings)` yields, as they come; items run in parallel.

    `work` must yield the same tables whenever it is called, as in `by_partition`.
    """
    import ray

    if items:
        rows = ray.data.from_items(list(items), override_num_blocks=len(items))
        done = rows.map_batches(work, batch_size=1, batch_format="pyarrow", fn_kwargs=settings)
        yield from done.iter_batches(batch_size=None, batch_format="pyarrow")


def results(items: Sequence[ItemT], work: Callable[..., ResultT], **settings: object) -> Iterator[ResultT]:
    """The result of `work(item, **settings)` for each item, in the order in which the tasks finish."""
    import ray

    task = ray.remote(num_cpus=1, max_retries=-1)(work)
    shared = {name: ray.put(value) for name, value in settings.items()}
    max_running = max(1, _TASKS_PER_CPU * int(ray.cluster_resources().get("CPU", 1)))
    waiting = deque(items)
    running: list[ObjectRef[ResultT]] = []
    try:
        while waiting or running:
            while waiting and len(running) < max_running:
                running.append(task.remote(waiting.popleft(), **shared))
            done, running = ray.wait(running)
            yield from ray.get(done)
    finally:
        for one in running:
            ray.cancel(one)
