"""Convert the questions and outputs of a LaMP task to histories and requests.

Reads a questions file and, if given, its outputs file, plain or with .gz, .bz2 or .zst. Writes into a folder:
histories.parquet (the profiles, for embed), requests.parquet (for train, generate and evaluate) and rejects.parquet
(what was left out, and why).

The public LaMP files do not identify users, so each question becomes a user with the question's id. Import each split
into its own folder, and embed it into its own store, so that equal ids of different questions do not mix.
"""

import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal

from jobs.runtime import cli
from jobs.runtime.cli import Summary
from jobs.runtime.importing import Converted, write_converted
from jobs.runtime.job_options import FLAT, InputRows
from persona.errors import InputError

if TYPE_CHECKING:
    from persona.inputs.lamp import Task


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

    task = TASKS[config.task].with_labels() if config.labels else TASKS[config.task]
    questions_uri = check_uri(config.questions, flag="--questions")
    out_uri = check_uri(config.out, flag="--out")
    check_reachable(questions_uri, flag="--questions")
    check_reachable(out_uri, flag="--out", write=True)
    golds = None if config.outputs is None else _golds(config.outputs, task)

    with _open(questions_uri) as stream:
        questions = tqdm(read_questions(stream, name=questions_uri), unit=" questions", disable=None)
        return write_converted(
            convert(task, questions, golds, config.rows.limit, source=questions_uri),
            job="import_lamp",
            task=task.name,
            source=questions_uri,
            out=out_uri,
            max_reject_fraction=config.rows.max_reject_fraction,
            dry_run=config.dry_run,
        )


def _golds(outputs: str, task: "Task") -> dict[str, str]:
    from persona.inputs.lamp_files import read_golds
    from persona.storage import check_reachable, check_uri

    uri = check_uri(outputs, flag="--outputs")
    check_reachable(uri, flag="--outputs")
    with _open(uri) as stream:
        return read_golds(stream, task, name=uri)


def convert(
    task: "Task", questions: Iterable[Any], golds: Mapping[str, str] | None, limit: int | None, *, source: str
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
            yield Converted(source=source, position=position, rows=None, reasons=[f"{name}: {error}"])
        else:
            reasons = [f"{name}: {reason}" for reason in rows.rejects]
            yield Converted(source=source, position=position, rows=rows, reasons=reasons)
    unknown = sorted((golds or {}).keys() - seen)
    # A question with an unreadable id leaves its gold over. If more golds are left over, they are of other questions.
    if limit is None and len(unknown) > n_questions - len(seen):
        raise InputError(
            f"the outputs file has {len(unknown)} golds without a question, the first for "
            f"{unknown[0]!r}: give the outputs of the same part of the same split"
        )


def _open(uri: str) -> BinaryIO:
    """The bytes of a file, decompressed if its name ends in .gz, .bz2 or .zst."""
    from persona.storage import open_filesystem

    filesystem, path = open_filesystem(uri)
    try:
        stream: BinaryIO = filesystem.open_input_stream(path)
    except OSError as error:
        raise InputError(f"cannot read {uri}: {error}") from error
    return stream


if __name__ == "__main__":
    sys.exit(cli.run(Config, main))
