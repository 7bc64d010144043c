"""Make requests with targets out of histories alone, so that who owns only texts can train a plug.

Reads `--histories` and writes `<out>/part-….parquet`, a file a bucket of users: each behavior is asked for from the
user's strictly older ones. The files are `--requests` for train, generate and evaluate.
"""

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.runtime import cli, exchange, reading, session, texts
from jobs.runtime.cli import Summary
from jobs.runtime.progress import progress
from jobs.runtime.tally import Counts, new_tally, note, totals
from persona.errors import UsageError
from persona.options import check_at_least

if TYPE_CHECKING:
    import pyarrow as pa

    from persona.inputs.derived_requests import RequestRule


@dataclass(frozen=True, kw_only=True)
class Config:
    """What `jobs.make_requests` can be told."""

    histories: str
    """The histories of jobs.embed, Parquet or JSONL, a file or a folder, local or s3://; they need timestamps."""
    out: str
    """Folder for the requests, local or s3://."""
    columns: str = ""
    """Names of your columns where they differ: text=body,user_id=author."""
    ask: str = "Write the next text of this person."
    """What the LLM is asked; the opening of the text follows in a new line."""
    opening_words: int = 0
    """So many first words of the text stand in the request (and weigh the history); the target is the rest."""
    min_history: int = 3
    """A behavior becomes a request only when at least so many of the same user are older."""
    max_a_user: int = 16
    """At most so many requests of a user, the latest ones."""
    buckets: int = 64
    """Files to write; one for each 100,000 behaviors or so."""
    dry_run: bool = False
    """Say what would be done, and start nothing."""

    def __post_init__(self) -> None:
        """Refuses what can be refused without looking at any data."""
        check_at_least(self, 1, "max_a_user", "buckets")
        check_at_least(self, 0, "min_history", "opening_words")
        if not self.ask.strip():
            raise UsageError("--ask: must say what is asked of the LLM")


def main(config: Config) -> Summary:
    """Runs the job."""
    from persona import storage
    from persona.inputs.derived_requests import RequestRule

    started = time.perf_counter()
    out = storage.check_uri(config.out, flag="--out")
    storage.check_reachable(out, flag="--out", write=True)
    splits, columns = texts.plan(config.histories, config.columns, flag="--histories")
    _check_empty(out, config.buckets)
    if config.dry_run:
        would = f"ask for the behaviors of {len({split.uri for split in splits})} files"
        return Summary(table=[("would", would)], result={"dry_run": True, "would": would})
    session.connect()
    rule = RequestRule(
        ask=config.ask,
        opening_words=config.opening_words,
        min_history=config.min_history,
        max_a_user=config.max_a_user,
    )
    rows = reading.read(splits, reading.read_histories, limit=None, columns=columns, n_buckets=config.buckets)
    tally = new_tally()
    work = {"out": out, "rule": rule, "n_files": config.buckets, "tally": tally}
    with progress(tally, _progress_line):
        for _ in exchange.by_bucket(rows, splits, config.buckets, _make_bucket, **work).iter_batches(batch_size=None):
            pass
    counts = {name: int(n) for name, n in totals(tally).get("make", {}).items()}
    result = {"job": "make_requests", "out": out, **counts, "seconds": round(time.perf_counter() - started, 1)}
    table = [
        ("requests", f"{counts.get('requests', 0):,} in {out}"),
        ("left out", ", ".join(f"{counts.get(name, 0):,} {name}" for name in ("early", "short", "older", "untimed"))),
        ("seconds", f"{result['seconds']:,}"),
    ]
    return Summary(table=table, result=result)


def _check_empty(out: str, n_buckets: int) -> None:
    """Files of another number of buckets would stay beside the new ones, and their requests be there twice."""
    from persona import storage

    ours = {storage.join(out, _name(bucket, n_buckets)) for bucket in range(n_buckets)}
    others = [entry.uri for entry in storage.list_files(out) if entry.uri not in ours]
    if others:
        raise UsageError(f"--out {out}: has files that this run would not replace ({others[0]}); give an empty folder")


def _name(bucket: int, n_buckets: int) -> str:
    return f"part-{bucket:05}-of-{n_buckets:05}.parquet"


def _make_bucket(behaviors: "pa.Table", *, out: str, rule: "RequestRule", n_files: int, tally: Any) -> "pa.Table":
    """Writes the requests of one bucket's users; the same file whenever it is done again."""
    import io

    import pyarrow.parquet as pq

    from persona import storage
    from persona.inputs.derived_requests import requests_of

    bucket = behaviors["bucket"][0].as_py()
    requests, counts = requests_of(behaviors, rule)
    sink = io.BytesIO()
    pq.write_table(requests, sink)
    storage.write_bytes(storage.join(out, _name(bucket, n_files)), sink.getvalue())
    note(tally, "make", str(bucket), {**counts, "behaviors": behaviors.num_rows})
    return behaviors.select(["bucket"]).slice(0, 1)


def _progress_line(counts: Counts, seconds: float) -> str:
    done = counts.get("make", {})
    if not done:
        return ""
    return (
        f"make_requests: {int(done['requests']):,} requests of {int(done['behaviors']):,} behaviors, {seconds:,.0f} s"
    )


if __name__ == "__main__":
    sys.exit(cli.run(Config, main))
