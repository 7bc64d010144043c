"""Pair requests with stored answers: the answer of a variant becomes the text that the target is preferred to.

Reads `--requests` with targets and `<store>/generations`. Writes `<out>/part-….parquet`, one file per bucket of users:
the requests with a column `rejected`, as `train --rejected` and `evaluate --rejected` read it.
"""

import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

from jobs.runtime import cli, exchange, parts, reading, session
from jobs.runtime.cli import Summary
from jobs.runtime.inputs import Requests, find_requests
from jobs.runtime.job_options import FLAT, RequestFormat, check_reject_fraction
from jobs.runtime.progress import Stage, progress
from jobs.runtime.receipts import Receipts, receipt
from jobs.runtime.tally import Counts, Tally
from persona.errors import InputError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa

    from persona.exchange.windows import Window
    from persona.store.store import Store


@dataclass(frozen=True, kw_only=True)
class Config:
    """Configuration of jobs.pair."""

    requests: str
    """Requests with targets, Parquet or JSONL, local or s3://."""
    store: str
    """Folder of the tables with the answers of jobs.generate."""
    out: str
    """Folder for the requests with rejected texts, local or s3://."""
    variant: str = "bare"
    """Name of the answers to prefer the targets to; bare are those of the LLM without the plug."""
    max_reject_fraction: float = 0.01
    """Exit with code 3 when a larger share of the rows is bad; all good rows are processed first."""
    form: Annotated[RequestFormat, FLAT] = field(default_factory=RequestFormat)
    dry_run: bool = False
    """Show what would be done and change nothing."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        check_reject_fraction(self.max_reject_fraction)


def main(config: Config) -> Summary:
    """Runs the job."""
    from persona import storage
    from persona.store.store import Store

    started = time.perf_counter()
    out = storage.check_uri(config.out, flag="--out")
    storage.check_reachable(out, flag="--out", write=True)
    store_uri = storage.check_uri(config.store, flag="--store")
    storage.check_reachable(store_uri, flag="--store")
    requests = find_requests(config.requests, config.form, flag="--requests", needs_target=True)
    store = Store.open(store_uri).snapshot("generations")
    parts.check_only_parts(out, store.n_buckets)
    if config.variant not in store.variants():
        known = ", ".join(store.variants()) or "none"
        raise UsageError(
            f"--variant {config.variant}: the store has no such answers (it has {known}); make them with jobs.generate"
        )
    if config.dry_run:
        n_files = len({split.uri for split in requests.splits})
        would = f"pair the requests of {n_files} files with the answers {config.variant}"
        return Summary(table=[("would", would), *requests.rows()], result={"dry_run": True, "would": would})
    session.connect()
    tally, receipts = Tally.start(), Receipts()
    with progress(tally, "pair", _stage_of), exchange.run_files(out, "pair") as folder:
        read = _exchanged(requests, store, tally, folder)
        settings = {"out": out, "variant": config.variant, "names": _names(requests)}
        written = exchange.by_partition(read, _write_buckets, store=store, tally=tally, **settings)
        for table in written.iter_batches(batch_size=None, batch_format="pyarrow"):
            receipts.taken_from(table)
    counts, found = receipts.counts, read.found[0]
    result: dict[str, Any] = {"job": "pair", "out": out, **counts, "rejects": found.total.rejects, **requests.facts()}
    result["seconds"] = round(time.perf_counter() - started, 1)
    left_out = f"{counts['blank']:,} with a blank answer, {counts['same']:,} answered with their target"
    table = [
        ("requests", f"{counts['requests']:,} in {out}"),
        ("left out", left_out),
        *reading.request_rows(requests, found),
        ("seconds", f"{result['seconds']:,}"),
    ]
    return Summary(table=table, result=result, exit_code=found.exit_code(config.max_reject_fraction))


def _exchanged(requests: Requests, store: "Store", tally: Tally, folder: str) -> exchange.Exchanged:
    """The valid requests, brought together by the buckets of the store."""
    from persona.inputs.requests import SCHEMA

    read = reading.Requests(
        columns=requests.columns,
        needs_as_of=requests.needs_as_of,
        needs_target=True,
        blank_targets=False,
        rejected=None,
        job="pair",
        store=store,
        tally=tally,
    )
    source = exchange.Source(splits=requests.splits, read=read)
    return exchange.exchange([source], store.n_buckets, SCHEMA, key=None, folder=folder, whole_buckets=True)


def _names(requests: Requests) -> list[str]:
    """The columns of the files: those that the requests have, and `rejected`."""
    from persona.inputs.requests import REJECTED, SCHEMA

    absent = {"bucket", *({"system", "as_of"} & set(requests.absent))}
    return [*(name for name in SCHEMA.names if name not in absent), REJECTED.name]


def _write_buckets(
    windows: "Iterator[Window]", *, store: "Store", out: str, variant: str, names: list[str], tally: Tally
) -> "Iterator[pa.Table]":
    """Write the requests of some buckets of users; yields receipts. A retried task writes the same files again."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from persona import storage
    from persona.inputs.requests import REJECTED, SCHEMA

    schema = pa.schema([field for field in [*SCHEMA, REJECTED] if field.name in names])
    filled = (window for window in windows if window.rows.num_rows)
    for bucket, of_bucket in groupby(filled, key=lambda window: window.bucket):
        found = Counter({"requests": 0, "blank": 0, "same": 0})
        with (
            storage.write_file(parts.part_uri(out, bucket, store.n_buckets)) as path,
            pq.ParquetWriter(path, schema) as file,
        ):
            for window in of_bucket:
                paired = _paired(window.rows, store, bucket, variant, found)
                file.write_table(paired.select(names).cast(schema))
        tally.note("pair", str(bucket), found)
        yield receipt(found, pa.schema([]))


def _paired(requests: "pa.Table", store: "Store", bucket: int, variant: str, found: "Counter[str]") -> "pa.Table":
    """The requests with the answers of the variant as `rejected`, but those that it answers blankly or rightly.

    Raises InputError for a request without an answer.
    """
    import pyarrow.compute as pc

    from persona.inputs import cells
    from persona.inputs.requests import REJECTED

    ids = requests["request_id"].unique().to_pylist()
    answers = store.table("generations").read(
        ["request_id", "output"], partitions=[variant], values={"bucket": [bucket], "request_id": ids}
    )
    index = pc.index_in(requests["request_id"], value_set=answers["request_id"].combine_chunks())
    if index.null_count:
        request = requests["request_id"].filter(index.is_null())[0].as_py()
        raise InputError(
            f"the variant {variant!r} has no answer to {request!r}, and perhaps to others; answer all requests first, "
            f"with jobs.generate --persona {variant} on the same --requests"
        )
    texts = answers["output"].cast(REJECTED.type).take(index)
    blank = cells.is_blank(texts)
    same = pc.and_not(pc.equal(pc.utf8_trim_whitespace(texts), pc.utf8_trim_whitespace(requests["target"])), blank)
    kept = pc.invert(pc.or_(blank, same))
    found.update(blank=pc.sum(blank).as_py() or 0, same=pc.sum(same).as_py() or 0, requests=pc.sum(kept).as_py() or 0)
    return requests.append_column(REJECTED, texts).filter(kept)


def _stage_of(counts: Counts) -> Stage | None:
    n_read = int(counts.get("read", {}).get("rows", 0))
    if paired := counts.get("pair"):
        done = int(sum(paired[name] for name in ("requests", "blank", "same")))
        return Stage(name="pair", done=done, total=n_read, unit="requests")
    return Stage(name="read", done=n_read, total=None, unit="requests") if n_read else None


if __name__ == "__main__":
    sys.exit(cli.run(Config, main))
