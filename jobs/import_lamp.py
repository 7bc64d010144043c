"""Turn the questions and outputs of a LaMP task into histories and requests.

Reads a questions file and, where there is one, its outputs file, plain or .gz. Writes into a folder:
histories.parquet (the profiles, for embed), requests.parquet (for train, generate and evaluate) and
rejects.parquet (what was left out, and why).

Public LaMP names no users, so that a question's id stands for its user: give each split a folder, and later a
store, of its own, lest equal ids of different questions meet.
"""

import itertools
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal, Self

from jobs.runtime.cli import Summary, run
from jobs.runtime.job_options import FLAT, InputRows
from persona.errors import InputError, StorageError

if TYPE_CHECKING:
    import pyarrow as pa

    from persona.inputs.lamp import Rows, Task

TOO_MANY_REJECTS = 3  # exit code
BEHAVIOR_COLUMNS = ("user_id", "behavior_id", "text", "timestamp")
REQUEST_COLUMNS = ("request_id", "user_id", "input", "query", "target", "as_of")
ROW_GROUP_ROWS = 65_536
ROW_GROUP_CHARACTERS = 16 * 2**20  # long texts fill a row group before its rows do


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to import, and into which folder."""

    task: Literal["LaMP_1", "LaMP_2", "LaMP_3", "LaMP_4", "LaMP_5", "LaMP_7"]
    """The LaMP task (LaMP_6 needs a licensed corpus)."""
    questions: str
    """The questions file (JSON, plain or .gz), local or s3://."""
    outputs: str | None = None
    """The outputs file of the same questions; without it the requests have no target."""
    out: str
    """The folder to write into, local or s3://."""
    labels: bool = False
    """Put the tag (LaMP_2) or the score (LaMP_3) of a past behavior into its text; the paper leaves them out."""
    rows: Annotated[InputRows, FLAT] = field(default_factory=InputRows)
    dry_run: bool = False
    """Read and check everything, write nothing."""


def main(config: Config) -> Summary:
    """Import one questions file; if it cannot be used as a whole, nothing is written."""
    from tqdm import tqdm

    from persona.inputs import histories, requests
    from persona.inputs.lamp import TASKS, read_golds, read_questions
    from persona.inputs.records import REJECTS
    from persona.storage import check_reachable, check_uri, join

    started_s = time.monotonic()
    task = TASKS[config.task].with_labels() if config.labels else TASKS[config.task]
    questions_uri = check_uri(config.questions, flag="--questions")
    outputs_uri = None if config.outputs is None else check_uri(config.outputs, flag="--outputs")
    out_uri = check_uri(config.out, flag="--out")
    check_reachable(questions_uri, flag="--questions")
    check_reachable(out_uri, flag="--out", write=True)
    golds = None
    if outputs_uri is not None:
        check_reachable(outputs_uri, flag="--outputs")
        with _open(outputs_uri) as stream:
            golds = read_golds(stream, task, name=outputs_uri)

    counts = Counts()
    with (
        _open(questions_uri) as stream,
        Draft(join(out_uri, "histories.parquet"), _part(histories.SCHEMA, BEHAVIOR_COLUMNS)) as behaviors,
        Draft(join(out_uri, "requests.parquet"), _part(requests.SCHEMA, REQUEST_COLUMNS)) as request_rows,
        Draft(join(out_uri, "rejects.parquet"), REJECTS) as rejects,
    ):
        questions = tqdm(read_questions(stream, name=questions_uri), unit=" questions", disable=None)
        for row, rows, reasons in convert(task, questions, golds, config.rows.limit):
            counts.add(rows, reasons)
            if config.dry_run:
                continue
            if rows is not None:
                behaviors.write(rows.behaviors)
                request_rows.write([rows.request])
            rejects.write(_rejects(questions_uri, row, reasons))
        counts.check(task, questions_uri)
        if not config.dry_run:
            for draft in (behaviors, request_rows, rejects):
                draft.publish()

    fraction = counts.reject_fraction()
    too_many = fraction > config.rows.max_reject_fraction
    verdict = ", more than allowed" if too_many else ""
    return Summary(
        table=[
            ("task", task.name),
            ("questions", f"{counts.questions:,}"),
            ("requests", f"{counts.requests:,}, {counts.placed:,} of them with as_of"),
            ("behaviors", f"{counts.behaviors:,}"),
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
            "requests_with_as_of": counts.placed,
            "behaviors": counts.behaviors,
            "rejects": counts.rejects,
            "reject_fraction": fraction,
            "seconds": round(time.monotonic() - started_s, 3),
        },
        exit_code=TOO_MANY_REJECTS if too_many else 0,
    )


def convert(
    task: "Task", questions: Iterable[Any], golds: Mapping[str, str] | None, limit: int | None
) -> Iterator[tuple[int, "Rows | None", list[str]]]:
    """Each question's position, its rows (None if it cannot be used) and why it or items of it are left out.

    Raises `InputError` at the end of all questions if there are golds for others.
    """
    from persona.inputs.lamp import question_id, question_to_rows

    seen: set[str] = set()
    n_questions = 0
    for row, question in enumerate(itertools.islice(questions, limit)):
        n_questions += 1
        name = f"question {row}"
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
            yield row, None, [f"{name}: {error}"]
        else:
            yield row, rows, [f"{name}: {reason}" for reason in rows.rejects]
    strangers = sorted((golds or {}).keys() - seen)
    # A question whose id cannot be read leaves its gold behind; more golds than that are for other questions.
    if limit is None and len(strangers) > n_questions - len(seen):
        raise InputError(
            f"the outputs file has {len(strangers)} golds without a question, the first for "
            f"{strangers[0]!r}: give the outputs of the same part of the same split"
        )


@dataclass(kw_only=True)
class Counts:
    """What has been read so far."""

    questions: int = 0
    requests: int = 0
    placed: int = 0
    behaviors: int = 0
    rejects: int = 0
    first_reason: str = ""

    def add(self, rows: "Rows | None", reasons: list[str]) -> None:
        """Count one question."""
        self.questions += 1
        self.rejects += len(reasons)
        if reasons and not self.first_reason:
            self.first_reason = reasons[0]
        if rows is not None:
            self.requests += 1
            self.placed += rows.request["as_of"] is not None
            self.behaviors += len(rows.behaviors)

    def check(self, task: "Task", uri: str) -> None:
        """Raise `InputError` if no question could be used: the file or the task is wrong then, not a row."""
        if not self.questions:
            raise InputError(f"{uri} is an empty list: there are no questions in it")
        if not self.requests:
            raise InputError(
                f"none of the {self.questions} questions in {uri} can be used as {task.name}: {self.first_reason}"
            )

    def reject_fraction(self) -> float:
        """The rejected part of the questions or that of the profile items, whichever is larger."""
        questions = self.questions - self.requests
        items = self.rejects - questions
        return max(questions / self.questions, items / max(1, items + self.behaviors))


class Draft:
    """A Parquet file that grows by row groups under a hidden name; `publish` makes it appear, whole.

    Leaving the context without having published leaves nothing. Raises `StorageError` where it cannot write.
    """

    def __init__(self, uri: str, schema: "pa.Schema") -> None:
        self.uri = uri
        self.schema = schema
        self._rows: list[dict[str, Any]] = []
        self._characters = 0
        self._writer: Any = None

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Add rows; those of a full row group leave memory."""
        self._rows += rows
        self._characters += sum(len(cell) for row in rows for cell in row.values() if isinstance(cell, str))
        if len(self._rows) >= ROW_GROUP_ROWS or self._characters >= ROW_GROUP_CHARACTERS:
            self._flush()

    def publish(self) -> None:
        """Finish the file and give it its name."""
        self._flush()
        try:
            self._writer.close()
            self._filesystem.move(self._hidden, self._path)
        except OSError as error:
            raise StorageError(f"cannot write {self.uri}: {error}") from error
        self._writer = None

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        from persona.storage import is_s3, open_filesystem

        try:
            if self._writer is None:
                self._filesystem, self._path = open_filesystem(self.uri)
                folder, _, name = self._path.rpartition("/")
                self._hidden = f"{folder}/_{name}.{uuid.uuid4().hex}"
                if not is_s3(self.uri):
                    self._filesystem.create_dir(folder)
                self._writer = pq.ParquetWriter(
                    self._hidden, self.schema, filesystem=self._filesystem, compression="zstd"
                )
            self._writer.write_table(pa.Table.from_pylist(self._rows, self.schema))
        except OSError as error:
            raise StorageError(f"cannot write {self.uri}: {error}") from error
        self._rows, self._characters = [], 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            with suppress(OSError):  # what ended the import is worth more words than a hidden file left behind
                self._writer.close()
                self._filesystem.delete_file(self._hidden)


def _rejects(uri: str, row: int, reasons: list[str]) -> list[dict[str, Any]]:
    common = {"job": "import_lamp", "source": uri, "row": row, "seen_at": datetime.now(UTC)}
    return [common | {"reason": reason} for reason in reasons]


def _part(schema: "pa.Schema", names: Iterable[str]) -> "pa.Schema":
    import pyarrow as pa

    return pa.schema([schema.field(name) for name in names])


def _open(uri: str) -> BinaryIO:
    """The bytes of a file, decompressed if its name ends in .gz."""
    from persona.storage import open_filesystem

    filesystem, path = open_filesystem(uri)
    try:
        stream: BinaryIO = filesystem.open_input_stream(path)
    except OSError as error:
        raise InputError(f"cannot read {uri}: {error}") from error
    return stream


if __name__ == "__main__":
    sys.exit(run(Config, main))
