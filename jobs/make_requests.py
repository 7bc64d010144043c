"""Make training requests from histories alone, for data without requests: predict each text from the older ones.

Reads `--histories`, which need timestamps. Writes `<out>/part-….parquet`, one file per bucket of users: the
`--requests` of train, generate and evaluate.
"""

import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

from jobs.runtime import cli, exchange, parts, reading, session
from jobs.runtime.cli import Summary
from jobs.runtime.inputs import Histories, find_histories
from jobs.runtime.job_options import FLAT, InputFormat, check_buckets
from jobs.runtime.progress import Stage, progress
from jobs.runtime.receipts import Receipts, receipt
from jobs.runtime.tally import Counts, Tally
from persona.errors import UsageError
from persona.option_checks import check_at_least

if TYPE_CHECKING:
    import pyarrow as pa

    from persona.exchange.windows import Window
    from persona.inputs.derived_requests import RequestRule


@dataclass(frozen=True, kw_only=True)
class Config:
    """Configuration of jobs.make_requests."""

    histories: str
    """The histories, as jobs.embed reads them: Parquet or JSONL files, a Delta or an Iceberg table."""
    out: str
    """Folder for the requests, local or s3://."""
    columns: str = ""
    """Your column names where they differ from the standard ones: text=body,user_id=author."""
    form: Annotated[InputFormat, FLAT] = field(default_factory=InputFormat)
    ask: str = "Write the next text of this person."
    """The instruction to the LLM; name the kind of text, like 'Write a movie review.'"""
    opening_words: int = 0
    """Put this many first words of the text into the request, where they also weigh the history; the LLM continues."""
    min_history: int = 3
    """Make a request only from texts with at least this many older texts of the user; raise it for long histories."""
    max_a_user: int = 16
    """Make at most this many requests per user, from the latest texts; lower it when a few users dominate."""
    buckets: int = 64
    """Files to write; about one per 100,000 behaviors."""
    dry_run: bool = False
    """Print what would be done, and start nothing."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        check_at_least(self, 1, "max_a_user")
        check_buckets(self.buckets)
        check_at_least(self, 0, "min_history", "opening_words")
        if not self.ask.strip():
            raise UsageError("--ask is empty; give an instruction for the LLM")

    def rule(self) -> "RequestRule":
        """How texts become requests."""
        from persona.inputs.derived_requests import RequestRule

        return RequestRule(
            ask=self.ask,
            opening_words=self.opening_words,
            min_history=self.min_history,
            max_a_user=self.max_a_user,
        )


def main(config: Config) -> Summary:
    """Runs the job."""
    from persona import storage

    started = time.perf_counter()
    out = storage.check_uri(config.out, flag="--out")
    storage.check_reachable(out, flag="--out", write=True)
    histories = find_histories(config.histories, config.columns, config.form, flag="--histories")
    splits = histories.splits
    parts.check_only_parts(out, config.buckets)
    if config.dry_run:
        would = f"make requests from the texts of {len({split.uri for split in splits})} files"
        plan = {"dry_run": True, "would": would, **histories.facts()}
        return Summary(table=[("would", would), *histories.rows()], result=plan)
    session.connect()
    tally, receipts = Tally.start(), Receipts()
    with progress(tally, "make_requests", _stage_of), exchange.run_files(out, "make_requests") as folder:
        for written in _written(config, histories, out, tally, folder):
            receipts.taken_from(written)
    counts = receipts.counts
    result: dict[str, Any] = {"job": "make_requests", "out": out, **counts, **histories.facts()}
    result["seconds"] = round(time.perf_counter() - started, 1)
    table = [
        ("requests", f"{counts.get('requests', 0):,} in {out}"),
        ("left out", _left_out(config, counts)),
        *histories.rows(),
        ("seconds", f"{result['seconds']:,}"),
    ]
    return Summary(table=table, result=result)


def _written(config: Config, histories: Histories, out: str, tally: Tally, folder: str) -> "Iterator[pa.Table]":
    """The job as one chain: read, bring together by user, write the requests. Yields receipts."""
    from persona.inputs.histories import SCHEMA

    read = reading.Behaviors(columns=histories.columns, n_buckets=config.buckets, job="make_requests")
    source = exchange.Source(splits=histories.splits, read=read)
    behaviors = exchange.exchange([source], config.buckets, SCHEMA, key=None, folder=folder, whole_buckets=True)
    written = exchange.by_partition(
        behaviors, _write_buckets, out=out, rule=config.rule(), n_files=config.buckets, tally=tally
    )
    yield from written.iter_batches(batch_size=None, batch_format="pyarrow")


def _write_buckets(
    windows: "Iterator[Window]", *, out: str, rule: "RequestRule", n_files: int, tally: Tally
) -> "Iterator[pa.Table]":
    """Write the requests of some buckets of users; yields receipts. A retried task writes the same files again."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from persona import storage
    from persona.inputs.derived_requests import REQUESTS, requests_of

    filled = (window for window in windows if window.rows.num_rows)
    for bucket, of_bucket in groupby(filled, key=lambda window: window.bucket):
        found: Counter[str] = Counter()
        with (
            storage.write_file(parts.part_uri(out, bucket, n_files)) as path,
            pq.ParquetWriter(path, REQUESTS) as file,
        ):
            for window in of_bucket:
                requests, counts = requests_of(window.rows, rule)
                file.write_table(requests)
                found.update({**counts, "behaviors": window.rows.num_rows})
        tally.note("make", str(bucket), found)
        yield receipt(found, pa.schema([]))


def _left_out(config: Config, counts: Mapping[str, int]) -> str:
    """How many texts did not become requests, by reason."""
    reasons = {
        "early": f"with fewer than {config.min_history:,} older texts",
        "short": f"with no more than {config.opening_words:,} words",
        "older": f"beyond the latest {config.max_a_user:,} of a user",
        "untimed": "without a timestamp",
    }
    return ", ".join(f"{counts.get(name, 0):,} {reason}" for name, reason in reasons.items())


def _stage_of(counts: Counts) -> Stage | None:
    n_read = int(counts.get("read", {}).get("rows", 0))
    if made := counts.get("make"):
        requests = f"{int(made['requests']):,} requests"
        return Stage(name="make", done=int(made["behaviors"]), total=n_read, unit="behaviors", note=requests)
    return Stage(name="read", done=n_read, total=None, unit="behaviors") if n_read else None


if __name__ == "__main__":
    sys.exit(cli.run(Config, main))
