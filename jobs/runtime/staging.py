"""Workers write rows to files that no reader sees until the driver commits them (`jobs.runtime.commits`)."""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jobs.runtime.tally import note

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

    from persona.store.store import Store


def staged(rows: "Dataset", *, store: "Store", table: str, tally: Any) -> Iterator[Any]:
    """The files that the rows are staged in, for the driver to commit."""
    files = rows.map_batches(
        stage,  # type: ignore[arg-type]  # Ray's types know nothing of fn_kwargs
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"store": store, "table": table, "tally": tally},
    )
    yield from files.iter_batches(batch_size=None, batch_format="pyarrow")


def stage(rows: "pa.Table", *, store: "Store", table: str, tally: Any) -> "pa.Table":
    """Writes a block to files that nobody sees until the driver commits them (`jobs.commits`)."""
    started = time.perf_counter()
    staged = store.stage(table, rows)
    if staged.num_rows:
        note(tally, "write", staged["file"][0].as_py(), {"seconds": time.perf_counter() - started})
    return staged
