"""Input splits become Ray datasets of valid rows; bad rows go to the `rejects` table."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jobs.runtime.tally import Counts, note

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

    from persona.inputs.histories import Columns
    from persona.inputs.splits import Split
    from persona.store.store import Store


def read(splits: Sequence["Split"], reader: Callable[..., Any], *, limit: int | None, **settings: Any) -> "Dataset":
    """The rows of all splits; `reader(split, **settings)` yields tables and runs where there is a CPU."""
    from dataclasses import asdict

    import ray

    sources = ray.data.from_items([asdict(split) for split in splits], override_num_blocks=len(splits))
    if limit is not None:
        # Every job that is given a limit must take the same rows.
        sources.context.execution_options.preserve_order = True
    rows = sources.map_batches(
        _read_one,  # type: ignore[arg-type]  # Ray's types know nothing of fn_kwargs
        batch_size=1,
        batch_format="pyarrow",
        fn_kwargs={"reader": reader, "settings": settings},
    )
    return rows if limit is None else rows.limit(limit)


def _read_one(batch: "pa.Table", *, reader: Callable[..., Any], settings: dict[str, Any]) -> Iterator["pa.Table"]:
    from persona.inputs.splits import Split

    for fields in batch.to_pylist():
        yield from reader(Split(**fields), **settings)


def read_requests(
    split: "Split", *, store: "Store", tally: Any, job: str, needs_target: bool, rejected: str | None
) -> Iterator["pa.Table"]:
    """Valid requests of a split; the others go to the table of rejects."""
    from persona.inputs import requests
    from persona.inputs.reader import read_split

    def validate(records: Any) -> Any:
        return requests.validate(records, store.n_buckets, needs_target, job=job, rejected=rejected)

    yield from keep_good(read_split(split, job=job), validate, split=split, store=store, tally=tally)


def read_histories(split: "Split", *, columns: "Columns", n_buckets: int) -> Iterator["pa.Table"]:
    """The good behaviors of a split; `embed` tells of the others."""
    from persona.inputs import histories
    from persona.inputs.reader import read_split

    for records in read_split(split, job="texts"):
        yield histories.validate(records, columns, n_buckets)[0]


def keep_good(
    batches: Iterator[Any], validate: Callable[..., Any], *, split: "Split", store: "Store", tally: Any
) -> Iterator["pa.Table"]:
    """The good rows of a split as they are read; its rejects in one commit at the end."""
    import pyarrow as pa

    rejects = []
    n_good = n_unreadable = 0
    good = None
    seconds, since = 0.0, time.perf_counter()
    for records in batches:
        good, bad = validate(records)
        n_good += good.num_rows
        n_unreadable += records.rejects.num_rows
        if bad.num_rows:
            rejects.append(bad)
        if good.num_rows:
            seconds += time.perf_counter() - since
            yield good
            since = time.perf_counter()
    if good is not None and not n_good:
        yield good  # no rows, but columns, which the steps to come look for
    # What could not even be read as a row: nobody knows whose it was.
    counts: dict[str, float] = {"rows": n_good, "rejects": 0, "unreadable": n_unreadable}
    if rejects:
        table = pa.concat_tables(rejects)
        store.write_rejects(table)
        counts["rejects"] = table.num_rows
        for reason in table["reason"].to_pylist():
            counts[f"rejected: {reason}"] = counts.get(f"rejected: {reason}", 0) + 1
    counts["seconds"] = seconds + time.perf_counter() - since
    note(tally, "read", f"{split.uri}:{split.start}", counts)


def reject_rows(counts: Counts) -> list[tuple[str, str]]:
    """The lines of a summary that tell of rejects."""
    found = counts.get("read", {})
    rows = [("rejects", f"{int(found.get('rejects', 0)):,}")]
    reasons = {name.removeprefix("rejected: "): n for name, n in found.items() if name.startswith("rejected: ")}
    rows += [(f"  {int(n):,}", reason) for reason, n in sorted(reasons.items(), key=lambda item: -item[1])[:5]]
    return rows


def exit_code(counts: Counts, max_reject_fraction: float) -> int:
    """3 when more of the rows were rejected than allowed, else 0."""
    found = counts.get("read", {})
    rejects, rows = found.get("rejects", 0), found.get("rows", 0)
    return 3 if rejects > max_reject_fraction * (rows + rejects) else 0
