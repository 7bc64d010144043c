"""Convert the rows of a LongLaMP task to histories and requests.

Reads the Parquet files of one split, as they are in the Hugging Face dataset LongLaMP/LongLaMP, or JSONL with the same
columns. Writes into a folder: histories.parquet (the profiles, for embed), requests.parquet (for train,
generate and evaluate) and rejects.parquet (what was left out, and why).

A row has no date, so each row becomes a user, `SPLIT:NAME`, who sees exactly the row's profile. Import each split into
its own folder; one store may hold them all.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from jobs.runtime import cli, inputs
from jobs.runtime.cli import Summary
from jobs.runtime.importing import Converted, write_converted
from jobs.runtime.job_options import FLAT, InputFormat, InputRows
from persona.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

    from persona.inputs.longlamp import Task
    from persona.inputs.records import Records
    from persona.inputs.splits import Split

SPLITS = ("train", "val", "test")
_BATCH_ROWS = 64  # a profile has hundreds of texts


@dataclass(frozen=True, kw_only=True)
class Config:
    """Configuration of jobs.import_longlamp."""

    task: Literal["abstract_generation", "product_review", "topic_writing"]
    """The LongLaMP task. Email completion is missing because it needs a licensed corpus."""
    questions: str
    """A file of the task, or the folder of a setting such as topic_writing_user, local or s3://."""
    split: Literal["train", "val", "test"]
    """The split; of a folder, the files of the others (train-*, val-*, test-*) are not read."""
    out: str
    """Folder for the three files, local or s3://."""
    labels: bool = False
    """Append the rating (product_review) to the text of each past behavior."""
    rows: Annotated[InputRows, FLAT] = field(default_factory=InputRows)
    form: Annotated[InputFormat, FLAT] = field(default_factory=InputFormat)
    dry_run: bool = False
    """Read and check everything, and write nothing."""


def main(config: Config) -> Summary:
    """Runs the job. If none of the rows can be used, nothing is written."""
    from tqdm import tqdm

    from persona.inputs.longlamp import TASKS
    from persona.inputs.splits import cut
    from persona.storage import check_reachable, check_uri

    task = TASKS[config.task].with_labels() if config.labels else TASKS[config.task]
    out_uri = check_uri(config.out, flag="--out")
    check_reachable(out_uri, flag="--out", write=True)
    others = [f"{name}-*" for name in SPLITS if name != config.split]
    form = replace(config.form, exclude=(*config.form.exclude, *others))
    files = inputs.find_files(config.questions, form, flag="--questions")
    rows = convert(task, config.split, cut(files, files.formats), limit=config.rows.limit, max_row_mb=form.max_row_mb)

    return write_converted(
        tqdm(rows, unit=" rows", disable=None),
        job="import_longlamp",
        task=task.name,
        source=config.questions,
        out=out_uri,
        max_reject_fraction=config.rows.max_reject_fraction,
        dry_run=config.dry_run,
    )


def convert(
    task: "Task", split: str, parts: "Iterable[Split]", *, limit: int | None, max_row_mb: int
) -> Iterator[Converted]:
    """Convert the first `limit` rows of a split's files, or all, one by one in the order of the files."""
    from persona.inputs.reader import read_split

    n_read = 0
    rows_of: Counter[str] = Counter()
    for part in parts:
        for records in read_split(part, max_rows=_BATCH_ROWS, max_row_mb=max_row_mb, problem=partial(_problem, task)):
            yield from _unreadable(records)
            for row in _rows(records):
                if limit is not None and n_read >= limit:
                    return
                n_read += 1
                yield _converted(task, split, row, rows_of)


def _converted(task: "Task", split: str, row: dict[str, Any], rows_of: Counter[str]) -> Converted:
    """One row; `rows_of` counts those of each user."""
    from persona.inputs.longlamp import row_to_rows, user_of

    place = {"source": row["_source"], "position": row["_row"]}
    name = f"row {row['_row']}"
    try:
        user = user_of(task, row)
        rows_of[user] += 1
        name = f"row {row['_row']} of {user!r}"
        rows = row_to_rows(task, row, split=split, nth=rows_of[user])
    except InputError as error:
        return Converted(**place, rows=None, reasons=[f"{name}: {error}"])
    return Converted(**place, rows=rows, reasons=[f"{name}: {reason}" for reason in rows.rejects])


def _unreadable(records: "Records") -> Iterator[Converted]:
    """What the reader could not read: each a rejected question."""
    for reject in records.rejects.to_pylist():
        yield Converted(source=reject["source"], position=reject["row"], rows=None, reasons=[reject["reason"]])


def _rows(records: "Records") -> Iterator[dict[str, Any]]:
    """The rows as Python values; a JSON column without a common type is decoded cell by cell."""
    from persona.inputs.json_columns import decoded, is_json

    table = records.table
    columns = {
        name: list(decoded(table[name].combine_chunks())) if is_json(table[name].type) else table[name].to_pylist()
        for name in table.column_names
    }
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


def _problem(task: "Task", schema: "pa.Schema") -> str:
    """Why a file is not of this task; empty if it may be."""
    from persona.inputs.longlamp import COLUMNS
    from persona.inputs.records import describe

    missing = [name for name in (task.user_column, *COLUMNS) if name not in schema.names]
    return f"no column {missing[0]!r}, as files of {task.name} have. There are: {describe(schema)}" if missing else ""


if __name__ == "__main__":
    sys.exit(cli.run(Config, main))
