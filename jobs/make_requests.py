"""Make training requests from histories alone, for data without requests: ask for each text from the older ones.

Reads `--histories`, which need timestamps. Writes `<out>/part-….parquet`, one file per bucket of users: the
`--requests` of train, generate and evaluate; with `--held-out` two folders of them, `<out>/train` and `<out>/held_out`.
"""

import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any, Literal

from jobs.runtime import cli, exchange, parts, reading, session
from jobs.runtime.cli import Summary
from jobs.runtime.inputs import Histories, find_histories
from jobs.runtime.job_options import FLAT, InputFormat, check_buckets, check_reject_fraction
from jobs.runtime.progress import Stage, progress
from jobs.runtime.receipts import Receipts, receipt
from jobs.runtime.tally import Counts, Tally
from persona.errors import InputError, UsageError
from persona.option_checks import check_at_least

if TYPE_CHECKING:
    import pyarrow as pa

    from persona.exchange.windows import Window
    from persona.inputs.derived_requests import RequestRule
    from persona.inputs.splits import Split

_PARTS = ("train", "held_out")
_ASK = {
    "next_text": "Write the next text of this person.",
    "titled": "Write the text of this person that has this title.",
    "which": "Which of these texts did this person write? Answer with its number in brackets.",
}


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
    task: Literal["next_text", "opening", "titled", "which"] = "next_text"
    """Ask for the whole text, its opening, the text of a given title, or which of several texts is the user's."""
    ask: str | None = None
    """The instruction to the LLM; name the kind of text, like 'Write a movie review.'; the default fits the task."""
    opening_words: int = 0
    """First words of a text: next_text gives them, opening asks for them (0: one sentence), `which` shows only them."""
    title: str | None = None
    """Column with the title of a text, for --task titled; without it, the first line of a text is its title."""
    candidates: int = 2
    """Texts to choose from in --task which: the user's own, and those of other users nearest in time."""
    min_history: int = 3
    """Make a request only from texts with at least this many older texts of the user; raise it for long histories."""
    max_a_user: int = 16
    """Make at most this many requests per user, from the latest texts; lower it when a few users dominate."""
    held_out: float = 0.0
    """Share of the users, by a hash of their ids, whose requests go to <out>/held_out; the rest go to <out>/train."""
    buckets: int = 64
    """Files to write; about one per 100,000 behaviors."""
    max_reject_fraction: float = 0.01
    """Exit with code 3 when a larger share of the rows is bad; all good rows are processed first."""
    dry_run: bool = False
    """Print what would be done, and start nothing."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        check_at_least(self, 1, "max_a_user")
        check_buckets(self.buckets)
        check_at_least(self, 0, "min_history", "opening_words")
        check_at_least(self, 2, "candidates")
        check_reject_fraction(self.max_reject_fraction)
        if self.ask is not None and not self.ask.strip():
            raise UsageError("--ask is empty; give an instruction for the LLM")
        if not 0 <= self.held_out < 1:
            raise UsageError(f"--held-out {self.held_out}: must be at least 0 and below 1")
        if self.title is not None and self.task != "titled":
            raise UsageError(f"--title {self.title} has no effect without --task titled; remove it, or add the task")
        if self.candidates != 2 and self.task != "which":
            raise UsageError(f"--candidates {self.candidates} has no effect without --task which; remove it")

    @property
    def instruction(self) -> str:
        """`ask`, or what fits the task."""
        opening = f"first {self.opening_words} words" if self.opening_words else "first sentence"
        return self.ask or {**_ASK, "opening": f"Write the {opening} of this person's next text."}[self.task]

    @property
    def parts(self) -> tuple[str, ...]:
        """The folders in --out: none but itself, or one for each part."""
        return _PARTS if self.held_out else ("",)

    def rule(self) -> "RequestRule":
        """How texts become requests."""
        from persona.inputs.derived_requests import RequestRule

        return RequestRule(
            ask=self.instruction,
            task=self.task,
            opening_words=self.opening_words,
            min_history=self.min_history,
            max_a_user=self.max_a_user,
            candidates=self.candidates,
        )


def main(config: Config) -> Summary:
    """Runs the job."""
    from persona import storage

    started = time.perf_counter()
    out = storage.check_uri(config.out, flag="--out")
    storage.check_reachable(out, flag="--out", write=True)
    histories = find_histories(config.histories, config.columns, config.form, flag="--histories")
    splits = histories.splits
    histories.check_timed(config.histories)
    _check_title(config.title, splits)
    parts.check_only_parts(out, config.buckets, config.parts)
    if config.dry_run:
        would = f"make requests from the texts of {len({split.uri for split in splits})} files"
        plan = {"dry_run": True, "would": would, **histories.facts()}
        return Summary(table=[("would", would), *histories.rows()], result=plan)
    session.connect()
    tally, receipts = Tally.start(), Receipts()
    with progress(tally, "make_requests", _stage_of), exchange.run_files(out, "make_requests") as folder:
        read = _exchanged(config, histories, tally, folder)
        written = exchange.by_partition(read, _write_buckets, out=out, rule=config.rule(), config=config, tally=tally)
        for table in written.iter_batches(batch_size=None, batch_format="pyarrow"):
            receipts.taken_from(table)
    counts, found = receipts.counts, read.found[0]
    result: dict[str, Any] = {"job": "make_requests", "out": out, "requests": 0, **counts}
    result |= {"rejects": found.total.rejects, **histories.facts()}
    result["seconds"] = round(time.perf_counter() - started, 1)
    table = [
        ("requests", f"{counts.get('requests', 0):,} in {out}"),
        *([(part, f"{counts.get(f'{part}_requests', 0):,} requests") for part in config.parts if part]),
        ("left out", _left_out(config, counts)),
        *histories.rows(),
        *found.reject_rows(),
        ("seconds", f"{result['seconds']:,}"),
    ]
    return Summary(table=table, result=result, exit_code=found.exit_code(config.max_reject_fraction))


def _exchanged(config: Config, histories: Histories, tally: Tally, folder: str) -> exchange.Exchanged:
    """The valid behaviors, brought together by bucket."""
    from persona.inputs.histories import SCHEMA

    read = _Titled(
        columns=histories.columns, n_buckets=config.buckets, job="make_requests", tally=tally, title=config.title
    )
    source = exchange.Source(splits=histories.splits, read=read)
    return exchange.exchange([source], config.buckets, SCHEMA, key=None, folder=folder, whole_buckets=True)


@dataclass(frozen=True, kw_only=True)
class _Titled(reading.Behaviors):
    """Reads valid behaviors; a title that has a column of its own becomes the first line of the text."""

    title: str | None

    def __call__(self, split: "Split", found: reading.SplitFound, limit: int | None) -> "Iterator[pa.Table]":
        """The first `limit` of them, or all."""
        from persona.inputs import histories
        from persona.inputs.reader import read_split

        if self.title is None:
            yield from super().__call__(split, found, limit)
            return
        problem = partial(histories.problem, columns=self.columns)
        batches = (
            replace(records, table=_titled(records.table, self.columns.text, self.title))
            for records in read_split(split, job=self.job, max_row_mb=self.columns.max_row_mb, problem=problem)
        )
        validate = partial(histories.validate, columns=self.columns, n_buckets=self.n_buckets, job=self.job)
        good = reading.keep_good(batches, validate, found, limit, time_column="timestamp", store=None)
        yield from reading.counted(good, split, found, self.tally)


def _titled(table: "pa.Table", text: str, title: str) -> "pa.Table":
    import pyarrow as pa
    import pyarrow.compute as pc

    from persona.inputs.records import column

    if not {text, title} <= set(table.column_names) or not _is_text(table.schema.field(text).type):
        return table
    titles = column(table, title)
    titles = titles.cast(pa.large_string()) if _is_text(titles.type) else pa.nulls(len(titles), pa.large_string())
    one_line = pc.replace_substring(pc.fill_null(titles, ""), "\n", " ")
    line_end = pa.scalar("\n", pa.large_string())
    texts = pc.binary_join_element_wise(one_line, column(table, text).cast(pa.large_string()), line_end)
    return table.set_column(table.column_names.index(text), text, texts)


def _is_text(kind: "pa.DataType") -> bool:
    from pyarrow import types

    return bool(types.is_string(kind) or types.is_large_string(kind))


def _check_title(title: str | None, splits: "Sequence[Split]") -> None:
    """Raise `InputError` if the first file has no column of that name: then no text would have a title."""
    from persona.inputs.reader import schema_of
    from persona.inputs.records import describe

    if title is None:
        return
    schema = schema_of([split for split in splits if split.uri == splits[0].uri])
    if title not in schema.names:
        raise InputError(f"--title {title}: {splits[0].uri} has no such column. There are: {describe(schema)}")


def _write_buckets(
    windows: "Iterator[Window]", *, out: str, rule: "RequestRule", config: Config, tally: Tally
) -> "Iterator[pa.Table]":
    """Write the requests of some buckets of users; yields receipts. A retried task writes the same files again."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from persona import storage
    from persona.inputs.derived_requests import REQUESTS, requests_of

    filled = (window for window in windows if window.rows.num_rows)
    for bucket, of_bucket in groupby(filled, key=lambda window: window.bucket):
        found: Counter[str] = Counter()
        with ExitStack() as stack:
            uris = {part: parts.part_uri(out, bucket, config.buckets, folder=part) for part in config.parts}
            paths = {part: stack.enter_context(storage.write_file(uri)) for part, uri in uris.items()}
            files = {part: stack.enter_context(pq.ParquetWriter(path, REQUESTS)) for part, path in paths.items()}
            for window in of_bucket:
                for part, rows in _in_parts(window.rows, config):
                    requests, counts = requests_of(rows, rule)
                    files[part].write_table(requests)
                    found.update({**counts, "behaviors": rows.num_rows})
                    if part:
                        found[f"{part}_requests"] += counts["requests"]
                        found[f"{part}_unpaired"] += requests["rejected"].null_count
        tally.note("make", str(bucket), found)
        yield receipt(found, pa.schema([]))


def _in_parts(rows: "pa.Table", config: Config) -> "Iterator[tuple[str, pa.Table]]":
    """The behaviors of the users of each part: a request of one part never shows a text of the other."""
    import pyarrow.compute as pc

    from persona.inputs.derived_requests import are_held_out

    if not config.held_out:
        yield "", rows
        return
    held_out = are_held_out(rows["user_id"], config.held_out)
    yield "train", rows.filter(pc.invert(held_out))
    yield "held_out", rows.filter(held_out)


def _left_out(config: Config, counts: Mapping[str, int]) -> str:
    """How many texts did not become requests, by reason."""
    reasons = {
        "early": f"with fewer than {config.min_history:,} older texts",
        "short": f"with no more than {config.opening_words:,} words" if config.task != "titled" else "without a title",
        "older": f"beyond the latest {config.max_a_user:,} of a user",
        **({"alone": "without texts of other users in their bucket"} if config.task == "which" else {}),
        "untimed": "without a timestamp",
    }
    return ", ".join(f"{counts[name]:,} {reason}" for name, reason in reasons.items() if counts.get(name)) or "none"


def _stage_of(counts: Counts) -> Stage | None:
    n_read = int(counts.get("read", {}).get("rows", 0))
    if made := counts.get("make"):
        requests = f"{int(made['requests']):,} requests"
        return Stage(name="make", done=int(made["behaviors"]), total=n_read, unit="behaviors", note=requests)
    return Stage(name="read", done=n_read, total=None, unit="behaviors") if n_read else None


if __name__ == "__main__":
    sys.exit(cli.run(Config, main))
