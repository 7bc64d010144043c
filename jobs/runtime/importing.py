"""What the imports of public benchmarks share: the three files that they write, what they count, and the summary.

A benchmark's question comes with its user's past. It becomes behaviors and one request, or a reject with a reason.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.runtime import reading
from jobs.runtime.cli import Summary
from persona.errors import InputError, StorageError

if TYPE_CHECKING:
    import pyarrow as pa

    from persona.inputs.lamp import Rows

BEHAVIOR_COLUMNS = ("user_id", "behavior_id", "text", "timestamp")
REQUEST_COLUMNS = ("request_id", "user_id", "input", "query", "target", "as_of")
ROW_GROUP_ROWS = 65_536
ROW_GROUP_CHARACTERS = 16 * 2**20  # with long texts, a row group is full long before it has that many rows


@dataclass(frozen=True, kw_only=True)
class Converted:
    """One question: its file, its position there, its rows, and why it, or an item of its profile, is rejected."""

    source: str
    position: int
    rows: "Rows | None"
    """None if the question as a whole is rejected."""
    reasons: Sequence[str]


def write_converted(
    converted: Iterable[Converted],
    *,
    job: str,
    task: str,
    source: str,
    out: str,
    max_reject_fraction: float,
    dry_run: bool,
) -> Summary:
    """Writes all questions of `source` to the folder `out`, or only counts them in a dry run.

    Raises InputError, and writes nothing, if none of them can be used.
    """
    started = time.monotonic()
    counts = _Counts()
    with ExitStack() as stack:
        files = None if dry_run else stack.enter_context(_imported_files(out, job))
        for one in converted:
            counts.add(one)
            if files is not None:
                files.write(one)
        counts.check(task, source)
    seconds = time.monotonic() - started
    return counts.summary(job, task, out, max_reject_fraction=max_reject_fraction, dry_run=dry_run, seconds=seconds)


@dataclass(kw_only=True)
class _Counts:
    """What has been read so far."""

    questions: int = 0
    requests: int = 0
    with_as_of: int = 0
    behaviors: int = 0
    rejects: int = 0
    unreadable_dates: int = 0
    first_reason: str = ""

    def add(self, converted: Converted) -> None:
        """Count one question."""
        self.questions += 1
        self.rejects += len(converted.reasons)
        if converted.reasons and not self.first_reason:
            self.first_reason = converted.reasons[0]
        if converted.rows is not None:
            self.requests += 1
            self.with_as_of += converted.rows.request["as_of"] is not None
            self.behaviors += len(converted.rows.behaviors)
            self.unreadable_dates += converted.rows.n_unreadable_dates

    def check(self, task: str, uri: str) -> None:
        """Raise `InputError` if all questions were rejected: then the file or the task is wrong, not a row."""
        if not self.questions:
            raise InputError(f"{uri} is empty: there are no questions in it")
        if not self.requests:
            raise InputError(
                f"none of the {self.questions} questions in {uri} can be used as {task}: {self.first_reason}"
            )

    def reject_fraction(self) -> float:
        """The rejected share of the questions or of the profile items, whichever is larger."""
        n_questions = self.questions - self.requests
        n_items = self.rejects - n_questions
        return max(
            reading.reject_fraction(rejects=n_questions, rows=self.requests),
            reading.reject_fraction(rejects=n_items, rows=self.behaviors),
        )

    def summary(
        self, job: str, task: str, out: str, *, max_reject_fraction: float, dry_run: bool, seconds: float
    ) -> Summary:
        """The summary of the job."""
        fraction = self.reject_fraction()
        exit_code = reading.exit_code_of(fraction, max_reject_fraction)
        verdict = ", more than --max-reject-fraction" if exit_code else ""
        return Summary(
            table=[
                ("task", task),
                ("questions", f"{self.questions:,}"),
                ("requests", f"{self.requests:,}, {self.with_as_of:,} of them with as_of"),
                ("behaviors", f"{self.behaviors:,}"),
                ("unreadable dates", f"{self.unreadable_dates:,}, which count as absent"),
                ("rejects", f"{self.rejects:,} ({100 * fraction:.2f} %{verdict})"),
                ("out", f"{out}{' (dry run: nothing written)' if dry_run else ''}"),
            ],
            result={
                "job": job,
                "task": task,
                "dry_run": dry_run,
                "out": out,
                "questions": self.questions,
                "requests": self.requests,
                "requests_with_as_of": self.with_as_of,
                "behaviors": self.behaviors,
                "rejects": self.rejects,
                "unreadable_dates": self.unreadable_dates,
                "reject_fraction": fraction,
                "seconds": round(seconds, 3),
            },
            exit_code=exit_code,
        )


@dataclass(frozen=True, kw_only=True)
class _ImportedFiles:
    """The files that are being written: behaviors, requests and rejects."""

    job: str
    behaviors: "_ParquetFile"
    requests: "_ParquetFile"
    rejects: "_ParquetFile"

    def write(self, converted: Converted) -> None:
        """Add the rows and the rejects of one question."""
        from persona.inputs.records import rejects

        if converted.rows is not None:
            self.behaviors.write(converted.rows.behaviors)
            self.requests.write([converted.rows.request])
        if n := len(converted.reasons):
            places = [converted.source] * n, [converted.position] * n
            self.rejects.write(rejects(self.job, *places, converted.reasons).to_pylist())


@contextmanager
def _imported_files(out_uri: str, job: str) -> Iterator[_ImportedFiles]:
    """Three files in a folder that appear when the context ends without an error."""
    from persona.inputs import histories, records, requests
    from persona.storage import join

    with (
        _parquet_file(join(out_uri, "histories.parquet"), _part(histories.SCHEMA, BEHAVIOR_COLUMNS)) as behaviors,
        _parquet_file(join(out_uri, "requests.parquet"), _part(requests.SCHEMA, REQUEST_COLUMNS)) as request_rows,
        _parquet_file(join(out_uri, "rejects.parquet"), records.REJECTS) as rejects,
    ):
        yield _ImportedFiles(job=job, behaviors=behaviors, requests=request_rows, rejects=rejects)


class _ParquetFile:
    """A Parquet file that is written by row groups; memory holds the rows of one row group.

    Raises `StorageError`, naming `uri`, when the disk is full or fails.
    """

    def __init__(self, path: Path, schema: "pa.Schema", uri: str) -> None:
        import pyarrow.parquet as pq

        self.schema = schema
        self.uri = uri
        self._rows: list[dict[str, Any]] = []
        self._characters = 0
        with self._storage_errors():
            self._writer = pq.ParquetWriter(path, schema, compression="zstd")

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Add rows."""
        self._rows += rows
        self._characters += sum(len(cell) for row in rows for cell in row.values() if isinstance(cell, str))
        if len(self._rows) >= ROW_GROUP_ROWS or self._characters >= ROW_GROUP_CHARACTERS:
            self.flush()

    def flush(self) -> None:
        """Write a row group of the rows in memory."""
        import pyarrow as pa

        with self._storage_errors():
            self._writer.write_table(pa.Table.from_pylist(self._rows, self.schema))
        self._rows, self._characters = [], 0

    def close(self) -> None:
        """Write the footer; nothing happens the second time."""
        with self._storage_errors():
            self._writer.close()

    @contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"cannot write {self.uri}: {error}") from error


@contextmanager
def _parquet_file(uri: str, schema: "pa.Schema") -> Iterator[_ParquetFile]:
    """A file that appears when the context ends without an error."""
    from persona.storage import write_file

    with write_file(uri) as path:
        file = _ParquetFile(path, schema, uri)
        try:
            yield file
            file.flush()
            file.close()
        finally:
            with suppress(StorageError):  # it must not hide the error that ends the import
                file.close()


def _part(schema: "pa.Schema", names: Iterable[str]) -> "pa.Schema":
    import pyarrow as pa

    return pa.schema([schema.field(name) for name in names])
