"""Ask for styles: cross requests with style instructions, so that each request is asked once in each style.

Reads `--requests` and `--styles`, a small file with the columns `id` and `instruction`. Writes
`<out>/part-….parquet`: the `--requests` of train, generate and evaluate. The id of a request is `request_id/style`, the
instruction is part of its `input`, and its `query` is the plain one. Targets are kept.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

from jobs.runtime import cli, exchange, parts, reading, session
from jobs.runtime.cli import Summary
from jobs.runtime.inputs import Requests, find_requests
from jobs.runtime.job_options import FLAT, RequestFormat, check_reject_fraction
from jobs.runtime.progress import Stage, progress
from jobs.runtime.reading import Found, SplitFound
from jobs.runtime.tally import Counts, Tally

if TYPE_CHECKING:
    import pyarrow as pa

    from persona.inputs.splits import Split
    from persona.inputs.styles import Style

_PART_BYTES, _MAX_PARTS = 64 * 2**20, 1024  # of rows in memory that become one file, unless there would be too many
_BATCH_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class Config:
    """Configuration of jobs.style."""

    requests: str
    """Requests, Parquet or JSONL, local or s3://."""
    styles: str
    """Styles to ask for, Parquet or JSONL: rows with an id, like short, and an instruction for the LLM."""
    out: str
    """Folder for the requests in each style, local or s3://."""
    place: Literal["before", "after"] = "before"
    """Put the instruction before the input, where no cut of long inputs can reach it, or after it."""
    max_reject_fraction: float = 0.01
    """Exit with code 3 when a larger share of the rows is bad; all good rows are processed first."""
    form: Annotated[RequestFormat, FLAT] = field(default_factory=RequestFormat)
    dry_run: bool = False
    """Show what would be done and change nothing."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        check_reject_fraction(self.max_reject_fraction)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """The splits of the requests that one file is made from."""

    number: int
    splits: "Sequence[Split]"


@dataclass(frozen=True, kw_only=True)
class _Written:
    """What was found in the splits of a part, and how many requests were written."""

    found: Sequence[SplitFound]
    n_requests: int


def main(config: Config) -> Summary:
    """Runs the job."""
    from persona import storage
    from persona.inputs import files
    from persona.inputs.styles import read_styles

    started = time.perf_counter()
    out = storage.check_uri(config.out, flag="--out")
    storage.check_reachable(out, flag="--out", write=True)
    requests = find_requests(config.requests, config.form, flag="--requests", needs_target=False)
    styles = read_styles(files.check_uri(config.styles, flag="--styles"), flag="--styles")
    todo = _parts(requests)
    parts.check_only_parts(out, len(todo))
    names = ", ".join(style.id for style in styles)
    if config.dry_run:
        would = f"ask the requests of {len({split.uri for split in requests.splits})} files in the styles {names}"
        plan = {"dry_run": True, "would": would, "styles": len(styles), **requests.facts()}
        return Summary(table=[("would", would), *requests.rows()], result=plan)
    session.connect()
    tally = Tally.start()
    with progress(tally, "style", _stage_of):
        written = list(
            exchange.results(
                todo,
                _write,
                requests=requests,
                styles=styles,
                place=config.place,
                out=out,
                n_parts=len(todo),
                tally=tally,
            )
        )
    found = Found.of(split for one in written for split in one.found)
    result = {
        "job": "style",
        "out": out,
        "styles": len(styles),
        "requests": sum(one.n_requests for one in written),
        "plain_requests": found.total.rows,
        "rejects": found.total.rejects,
        **requests.facts(),
        "seconds": round(time.perf_counter() - started, 1),
    }
    table = [
        ("requests", f"{result['requests']:,} in {out}: {found.total.rows:,} in {len(styles):,} styles ({names})"),
        *reading.request_rows(requests, found),
        ("seconds", f"{result['seconds']:,}"),
    ]
    return Summary(table=table, result=result, exit_code=found.exit_code(config.max_reject_fraction))


def _parts(requests: Requests) -> list[_Part]:
    """The parts of the requests, always the same ones for the same files."""
    from persona.exchange.plan import bytes_in_memory, grouped

    part_bytes = max(_PART_BYTES, bytes_in_memory(requests.splits) // _MAX_PARTS)
    return [_Part(number=i, splits=splits) for i, splits in enumerate(grouped(requests.splits, part_bytes))]


def _write(
    part: _Part,
    *,
    requests: Requests,
    styles: "Sequence[Style]",
    place: Literal["before", "after"],
    out: str,
    n_parts: int,
    tally: Tally,
) -> _Written:
    """Write one file; a retried task writes the same again. Holds a few thousand requests at a time."""
    import pyarrow.parquet as pq

    from persona import storage
    from persona.inputs.styles import STYLED, with_styles

    absent = {"system", "as_of"} & set(requests.absent)
    names = [name for name in STYLED.names if name not in absent]
    found = [SplitFound(uri=split.uri) for split in part.splits]
    n_requests = 0
    with storage.write_file(parts.part_uri(out, part.number, n_parts)) as path:
        file = None
        for split, of_split in zip(part.splits, found, strict=True):
            for batch in _valid(split, of_split, requests, tally):
                for start in range(0, batch.num_rows, size := max(1, _BATCH_ROWS // len(styles))):
                    styled = with_styles(batch.slice(start, size), styles, place=place).select(names)
                    file = file or pq.ParquetWriter(path, styled.schema)
                    file.write_table(styled)
                    n_requests += styled.num_rows
        if file is None:
            pq.write_table(STYLED.empty_table().select(names), path)
        else:
            file.close()
    return _Written(found=found, n_requests=n_requests)


def _valid(split: "Split", found: SplitFound, requests: Requests, tally: Tally) -> "Iterator[pa.Table]":
    """The valid requests of a split; the others are counted in `found`."""
    from persona.inputs import requests as of_requests
    from persona.inputs.reader import read_split

    columns, needs_as_of = requests.columns, requests.needs_as_of
    validate = partial(
        of_requests.validate, n_buckets=1, needs_target=False, columns=columns, needs_as_of=needs_as_of, job="style"
    )
    problem = partial(of_requests.problem, columns=columns, needs_target=False)
    batches = read_split(split, job="style", max_row_mb=columns.max_row_mb, problem=problem)
    good = reading.keep_good(batches, validate, found, None, time_column="as_of", store=None)
    yield from reading.counted(good, split, found, tally)


def _stage_of(counts: Counts) -> Stage | None:
    n_read = int(counts.get("read", {}).get("rows", 0))
    return Stage(name="style", done=n_read, total=None, unit="requests") if n_read else None


if __name__ == "__main__":
    sys.exit(cli.run(Config, main))
