"""Distribute work over the cluster: rows grouped by bucket, or one task per item."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import pyarrow as pa
    from ray import ObjectRef
    from ray.data import Dataset

    from persona.inputs.splits import Split

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

# Of the input as stored, compressed: some ten thousand rows, which a worker holds in memory together.
_PARTITION_BYTES = 2**19
# Ray assigns buckets to partitions by hash. With as many partitions as buckets, some would get four buckets.
_PARTITIONS_PER_BUCKET = 4
_TASKS_PER_CPU = 2  # so that no CPU waits for the driver


def by_bucket(
    rows: "Dataset",
    splits: Sequence["Split"],
    n_buckets: int,
    work: "Callable[..., pa.Table | Iterator[pa.Table]]",
    **settings: object,
) -> "Dataset":
    """`work(rows_of_one_bucket, **settings)` for each bucket; the only place where rows move between machines.

    `work` must return the same rows whenever it is called: when Ray retries a task, it skips as many output blocks as
    it has already passed on, and those may have been committed in the meantime. So `work` must read the tables that
    the job writes to from a snapshot that was taken when the job started.
    """
    n_bytes = sum(split.end - split.start for split in splits)
    n_partitions = min(max(n_bytes // _PARTITION_BYTES, 4), _PARTITIONS_PER_BUCKET * n_buckets)
    return rows.groupby("bucket", num_partitions=n_partitions).map_groups(
        work, batch_format="pyarrow", fn_kwargs=settings
    )


def each(
    items: Sequence[Mapping[str, object]], work: "Callable[..., Iterator[pa.Table]]", **settings: object
) -> "Iterator[pa.Table]":
    """The tables that `work(table_with_one_item, **settings)` yields, as they come; items run in parallel.

    `work` must yield the same tables whenever it is called, as in `by_bucket`.
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
    while waiting or running:
        while waiting and len(running) < max_running:
            running.append(task.remote(waiting.popleft(), **shared))
        done, running = ray.wait(running)
        yield from ray.get(done)
