"""Work by bucket: the only place where rows change machines; and work on single items, side by side."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

    from persona.inputs.splits import Split

# Of input, packed: some ten thousand rows, which a worker holds in memory all at once.
_PARTITION_BYTES = 2**19
# Ray deals buckets to partitions by hash: in as many partitions as buckets, one would hold four of them.
_PARTITIONS_A_BUCKET = 4


def by_bucket(
    rows: "Dataset", splits: Sequence["Split"], n_buckets: int, work: Callable[..., Any], **settings: Any
) -> "Dataset":
    """`work(rows_of_one_bucket, **settings)` for each bucket; the only place where rows change machines.

    `work` has to give the same whenever it is called: of a task that is tried again, Ray leaves out as many blocks as
    have gone on already, and what came of those may have been committed meanwhile. So the tables that the job writes to
    are read from a snapshot of the store at the job's beginning.
    """
    n_bytes = sum(split.end - split.start for split in splits)
    n_partitions = min(max(n_bytes // _PARTITION_BYTES, 4), _PARTITIONS_A_BUCKET * n_buckets)
    return rows.groupby("bucket", num_partitions=n_partitions).map_groups(
        work, batch_format="pyarrow", fn_kwargs=settings
    )


def each(items: Sequence[Mapping[str, Any]], work: Callable[..., Any], **settings: Any) -> Iterator["pa.Table"]:
    """What `work(table_of_one_item, **settings)`, of which the same holds as in `by_bucket`, yields, side by side."""
    import ray

    if items:
        rows = ray.data.from_items(list(items), override_num_blocks=len(items))
        done = rows.map_batches(work, batch_size=1, batch_format="pyarrow", fn_kwargs=settings)
        yield from done.iter_batches(batch_size=None, batch_format="pyarrow")


def each_row(items: Sequence[Mapping[str, Any]], work: Callable[..., Any], **settings: Any) -> Iterator[dict[str, Any]]:
    """The rows of what `each` yields."""
    for table in each(items, work, **settings):
        yield from table.to_pylist()
