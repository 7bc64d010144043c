"""The histories and requests of a job: found and checked before Ray starts, with what a summary says about them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.runtime.job_options import InputFormat, RequestFormat
from persona.errors import InputError, UsageError

if TYPE_CHECKING:
    from persona.inputs import histories, requests
    from persona.inputs.files import InputFiles
    from persona.inputs.splits import Split
    from persona.storage import FileEntry

# What follows if an optional field has no column; a field about which nothing need be said is absent.
_IF_ABSENT = {
    "behavior_id": "the hash of a text identifies it, so an edited text is a new behavior",
    "timestamp": "a request with as_of sees none of these behaviors",
    "query": "the input weights the history",
    "as_of": "every request sees the whole history, later behaviors and its own answer included",
}


@dataclass(frozen=True, kw_only=True)
class _Input:
    """What histories and requests have in common.

    Attributes:
        absent: the optional fields without a column.
        n_excluded: files that --exclude leaves out.
    """

    splits: "Sequence[Split]"
    absent: tuple[str, ...]
    n_excluded: int

    def rows(self) -> list[tuple[str, str]]:
        """The rows of a summary, or of a dry run, about what was not found or not read."""
        excluded = [("excluded", f"{self.n_excluded:,} files (--exclude)")] if self.n_excluded else []
        return [*excluded, *((f"no {field}", _IF_ABSENT[field]) for field in self.absent if field in _IF_ABSENT)]

    def facts(self) -> dict[str, Any]:
        """The same for programs."""
        return {"excluded_files": self.n_excluded, "absent_columns": self.absent}


@dataclass(frozen=True, kw_only=True)
class Histories(_Input):
    """Histories, and how to read their columns."""

    columns: "histories.Columns"

    def check_timed(self, uri: str) -> None:
        """Raises UsageError if no file that was looked at has timestamps, for jobs that make requests of behaviors."""
        if "timestamp" in self.absent:
            raise UsageError(
                f"--histories {uri}: has no timestamps, so a request could not be kept from its own answer; if their "
                "column has another name than timestamp: --columns timestamp=COLUMN"
            )


@dataclass(frozen=True, kw_only=True)
class Requests(_Input):
    """Requests, and how to read their columns."""

    columns: "requests.Columns"

    @property
    def have_system(self) -> bool:
        """Whether requests have system texts of their own."""
        return "system" not in self.absent

    @property
    def needs_as_of(self) -> bool:
        """Whether files must have the column `as_of`, because some do."""
        return "as_of" not in self.absent


def find_files(uri: str, form: InputFormat, *, flag: str) -> "InputFiles":
    """The files of the input at a URI. Raises UsageError or InputError, naming the flag."""
    from persona.inputs import files

    return files.find_files(files.check_uri(uri, flag=flag), flag=flag, exclude=form.exclude)


def history_columns(columns: str, form: InputFormat) -> "histories.Columns":
    """How to read histories; `columns` is the value of --columns. Raises UsageError, naming the flag."""
    from persona.inputs.histories import Columns

    return Columns.parse(columns, "--columns", form.timestamp_unit, form.max_row_mb)


def find_histories(uri: str, columns: str, form: InputFormat, *, flag: str) -> Histories:
    """The histories at a URI; `columns` is the value of --columns. Raises UsageError or InputError, naming the flag."""
    named = history_columns(columns, form)
    files = find_files(uri, form, flag=flag)
    return histories_in(files, files.formats, named)


def histories_in(
    files: "InputFiles", chosen: "Iterable[FileEntry]", columns: "histories.Columns", *, lenient: bool = False
) -> Histories:
    """The histories in some files of an input.

    Raises InputError if no file that is looked at is usable. If `lenient`, their rows only become rejects: a bad file
    that has come to many good ones must not end the job.
    """
    from persona.inputs.histories import check_columns
    from persona.inputs.splits import cut

    splits = cut(files, chosen)
    found = frozenset(columns.OPTIONAL)
    try:
        found = check_columns(splits, columns) if splits else found
    except InputError:
        if not lenient:
            raise
    absent = tuple(field for field in columns.OPTIONAL if field not in found)
    return Histories(splits=splits, absent=absent, n_excluded=len(files.excluded), columns=columns)


def find_requests(
    uri: str, form: RequestFormat, *, flag: str, needs_target: bool, rejected: str | None = None
) -> Requests:
    """The requests at a URI; `rejected` is the value of --rejected. Raises UsageError or InputError with the flag."""
    from persona.inputs import requests
    from persona.inputs.splits import cut

    named = requests.Columns.parse(form.request_columns, "--request-columns", form.timestamp_unit, form.max_row_mb)
    files = find_files(uri, form, flag=flag)
    splits = cut(files, files.formats)
    found = requests.check_columns(splits, named, needs_target=needs_target, rejected=rejected)
    absent = tuple(field for field in named.OPTIONAL if field not in found)
    return Requests(splits=splits, absent=absent, n_excluded=len(files.excluded), columns=named)
