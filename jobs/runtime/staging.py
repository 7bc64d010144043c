"""Write rows to files on the workers; readers see none of them until the driver commits (`jobs.runtime.commits`)."""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from jobs.runtime import receipts
from jobs.runtime.tally import Tally

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

    from persona.store.store import Store


def staged(rows: "Dataset", *, store: "Store", table: str, tally: Tally) -> "Iterator[pa.Table]":
    """Run the dataset; yield the files that its blocks were written to (`persona.store.writer.staged_files`).

    Receipts among the rows (`jobs.runtime.receipts`) travel on beside the files.
    """
    files = rows.map_batches(
        _stage,  # type: ignore[arg-type]  # Ray's types do not cover fn_kwargs
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"store": store, "table": table, "tally": tally},
    )
    yield from files.iter_batches(batch_size=None, batch_format="pyarrow")


def _stage(rows: "pa.Table", *, store: "Store", table: str, tally: Tally) -> "pa.Table":
    started = time.perf_counter()
    files = store.stage(table, receipts.without_receipts(rows))
    if files.num_rows:
        tally.note("write", files["file"][0].as_py(), {"seconds": time.perf_counter() - started})
    return receipts.joined(files, rows)
