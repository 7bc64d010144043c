"""Convert the questions and outputs of a LaMP task to histories and requests.

Reads a questions file and, if given, its outputs file, plain or with .gz, .bz2 or .zst. Writes into a folder:
histories.parquet (the profiles, for embed), requests.parquet (for train, generate and evaluate) and rejects.parquet
(what was left out, and why).

The public LaMP files do not identify users, so each question becomes a user with the question's id. Import each split
into its own folder, and embed it into its own store, so that equal ids of different questions do not mix.
"""

import itertools
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal

from jobs.runtime import cli, reading
from jobs.runtime.cli import Summary
from jobs.runtime.job_options import FLAT, InputRows
from persona.errors import InputError, StorageError

if TYPE_CHECKING:
    import pyarrow as pa

    from persona.inputs.lamp import Rows, Task

BEHAVIOR_COLUMNS = ("user_id", "behavior_id", "text", "timestamp")
REQUEST_COLUMNS = ("request_id", "user_id", "input", "query", "target", "as_of")
ROW_GROUP_ROWS = 65_536
ROW_GROUP_CHARACTERS = 16 * 2**20  # with long texts, a row group is full long before it has that many rows


@dataclass(frozen=True, kw_only=True)
class Config:
    """Configuration of jobs.import_lamp."""

    task: Literal["LaMP_1", "LaMP_2", "LaMP_3", "LaMP_4", "LaMP_5", "LaMP_7"]
    """The LaMP task. LaMP_6 is missing because it needs a licensed corpus."""
    questions: str
    """The questions file (JSON, also .gz, .bz2 or .zst), local or s3://."""
    outputs: str | None = None
    """The outputs file of the same questions; without it the requests have no target."""
    out: str
    """Folder for the three files, local or s3://."""
    labels: bool = False
    """Append the tag (LaMP_2) or the score (LaMP_3) to the text of each past behavior; PPlug does not use them."""
    rows: Annotated[InputRows, FLAT] = field(default_factory=InputRows)
    dry_run: bool = False
    """Read and check everything, and write nothing."""


def main(config: Config) -> Summary:
    """Runs the job. If the questions file cannot be used as a whole, nothing is written."""
    from tqdm import tqdm

    from persona.inputs.lamp import TASKS
    from persona.inputs.lamp_files import read_questions
    from persona.storage import check_reachable, check_uri

    started = time.monotonic()
    task = TASKS[config.task].with_labels() if config.labels else TASKS[config.task]
    questions_uri = check_uri(config.questions, flag="--questions")
    out_uri = check_uri(config.out, flag="--out")
    check_reachable(questions_uri, flag="--questions")
    check_reachable(out_uri, flag="--out", write=True)
    golds = None if config.outputs is None else _golds(config.outputs, task)

    counts = Counts()
    with _open(questions_uri) as stream, ExitStack() as stack:
        files = None if config.dry_run else stack.enter_context(_files(out_uri, questions_uri))
        questions = tqdm(read_questions(stream, name=questions_uri), unit=" questions", disable=None)
        for converted in convert(task, questions, golds, config.rows.limit):
            counts.add(converted)
            if files is not None:
                files.write(converted)
        counts.check(task, questions_uri)
    return _summary(config, task, counts, out_uri, time.monotonic() - started)


def _golds(outputs: str, task: "Task") -> dict[str, str]:
    from persona.inputs.lamp_files import read_golds
    from persona.storage import check_reachable, check_uri

    uri = check_uri(outputs, flag="--outputs")
    check_reachable(uri, flag="--outputs")
    with _open(uri) as stream:
        return read_golds(stream, task, name=uri)


@dataclass(frozen=True, kw_only=True)
class Converted:
    """One question: its position in the file, its rows, and why it, or an item of its profile, is rejected."""

    position: int
    rows: "Rows | None"
    """None if the question as a whole is rejected."""
    reasons: Sequence[str]


def convert(
    task: "Task", questions: Iterable[Any], golds: Mapping[str, str] | None, limit: int | None
) -> Iterator[Converted]:
    """Convert the questions one by one.

    After the last question, raises `InputError` if there are golds of other questions.
    """
    from persona.inputs.lamp import question_id, question_to_rows

    seen: set[str] = set()
    n_questions = 0
    for position, question in enumerate(itertools.islice(questions, limit)):
        n_questions += 1
        name = f"question {position}"
        try:
            request_id = question_id(question)
            name = f"question {request_id!r}"
            if request_id in seen:
                raise InputError("duplicate id")
            seen.add(request_id)
            if golds is not None and request_id not in golds:
                raise InputError("the outputs file has no gold for it")
            rows = question_to_rows(task, question, None if golds is None else golds[request_id])
        except InputError as error:
            yield Converted(position=position, rows=None, reasons=[f"{name}: {error}"])
        else:
            yield Converted(position=position, rows=rows, reasons=[f"{name}: {reason}" for reason in rows.rejects])
    unknown = sorted((golds or {}).keys() - seen)
    # A question with an unreadable id leaves its gold over. If more golds are left over, they are of other questions.
    if limit is None and len(unknown) > n_questions - len(seen):
        raise InputError(
            f"the outputs file has {len(unknown)} golds without a question, the first for "
            f"{unknown[0]!r}: give the outputs of the same part of the same split"
        )


@dataclass(kw_only=True)
class Counts:
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

    def check(self, task: "Task", uri: str) -> None:
        """Raise `InputError` if all questions were rejected: then the file or the task is wrong, not a row."""
        if not self.questions:
            raise InputError(f"{uri} is an empty list: there are no questions in it")
        if not self.requests:
            raise InputError(
                f"none of the {self.questions} questions in {uri} can be used as {task.name}: {self.first_reason}"
            )

    def reject_fraction(self) -> float:
        """The rejected share of the questions or of the profile items, whichever is larger."""
        n_questions = self.questions - self.requests
        n_items = self.rejects - n_questions
        return max(
            reading.reject_fraction(rejects=n_questions, rows=self.requests),
            reading.reject_fraction(rejects=n_items, rows=self.behaviors),
        )


@dataclass(frozen=True, kw_only=True)
class _Files:
    """The files that are being written."""

    questions_uri: str
    behaviors: "_ParquetFile"
    requests: "_ParquetFile"
    rejects: "_ParquetFile"

    def write(self, converted: Converted) -> None:
        from persona.inputs.records import rejects

        if converted.rows is not None:
            self.behaviors.write(converted.rows.behaviors)
            self.requests.write([converted.rows.request])
        if n := len(converted.reasons):
            places = [self.questions_uri] * n, [converted.position] * n
            self.rejects.write(rejects("import_lamp", *places, converted.reasons).to_pylist())


@contextmanager
def _files(out_uri: str, questions_uri: str) -> Iterator[_Files]:
    """Three files in a folder that appear when the context ends without an error."""
    from persona.inputs import histories, records, requests
    from persona.storage import join

    with (
        _parquet_file(join(out_uri, "histories.parquet"), _part(histories.SCHEMA, BEHAVIOR_COLUMNS)) as behaviors,
        _parquet_file(join(out_uri, "requests.parquet"), _part(requests.SCHEMA, REQUEST_COLUMNS)) as request_rows,
        _parquet_file(join(out_uri, "rejects.parquet"), records.REJECTS) as rejects,
    ):
        yield _Files(questions_uri=questions_uri, behaviors=behaviors, requests=request_rows, rejects=rejects)


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


def _open(uri: str) -> BinaryIO:
    """The bytes of a file, decompressed if its name ends in .gz, .bz2 or .zst."""
    from persona.storage import open_filesystem

    filesystem, path = open_filesystem(uri)
    try:
        stream: BinaryIO = filesystem.open_input_stream(path)
    except OSError as error:
        raise InputError(f"cannot read {uri}: {error}") from error
    return stream


def _summary(config: Config, task: "Task", counts: Counts, out_uri: str, seconds: float) -> Summary:
    fraction = counts.reject_fraction()
    exit_code = reading.exit_code_of(fraction, config.rows.max_reject_fraction)
    verdict = ", more than --max-reject-fraction" if exit_code else ""
    return Summary(
        table=[
            ("task", task.name),
            ("questions", f"{counts.questions:,}"),
            ("requests", f"{counts.requests:,}, {counts.with_as_of:,} of them with as_of"),
            ("behaviors", f"{counts.behaviors:,}"),
            ("unreadable dates", f"{counts.unreadable_dates:,}, which count as absent"),
            ("rejects", f"{counts.rejects:,} ({100 * fraction:.2f} %{verdict})"),
            ("out", f"{out_uri}{' (dry run: nothing written)' if config.dry_run else ''}"),
        ],
        result={
            "job": "import_lamp",
            "task": task.name,
            "dry_run": config.dry_run,
            "out": out_uri,
            "questions": counts.questions,
            "requests": counts.requests,
            "requests_with_as_of": counts.with_as_of,
            "behaviors": counts.behaviors,
            "rejects": counts.rejects,
            "unreadable_dates": counts.unreadable_dates,
            "reject_fraction": fraction,
            "seconds": round(seconds, 3),
        },
        exit_code=exit_code,
    )


if __name__ == "__main__":
    sys.exit(cli.run(Config, main))
