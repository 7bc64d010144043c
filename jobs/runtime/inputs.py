"""The histories and requests of a job: found and checked before Ray starts, with what a summary says about them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.runtime.job_options import InputFormat, RequestFormat

if TYPE_CHECKING:
    from persona.inputs import histories, requests
    from persona.inputs.splits import Split

# What follows if an optional field has no column; a field about which nothing need be said is absent.
_IF_ABSENT = {
    "behavior_id": "the hash of a text identifies it, so an edited text is a new behavior",
    "timestamp": "a request with as_of sees none of these behaviors",
    "query": "the input weighs the history",
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


def find_histories(uri: str, columns: str, form: InputFormat, *, flag: str) -> Histories:
    """The histories at a URI; `columns` is the value of --columns. Raises UsageError or InputError, naming the flag."""
    from persona.inputs import histories

    named = histories.Columns.parse(columns, "--columns", form.timestamp_unit, form.max_row_mb)
    splits, n_excluded = _splits(uri, form, flag)
    found = histories.check_columns(splits, named)
    absent = tuple(field for field in named.OPTIONAL if field not in found)
    return Histories(splits=splits, absent=absent, n_excluded=n_excluded, columns=named)


def find_requests(
    uri: str, form: RequestFormat, *, flag: str, needs_target: bool, rejected: str | None = None
) -> Requests:
    """The requests at a URI; `rejected` is the value of --rejected. Raises UsageError or InputError with the flag."""
    from persona.inputs import requests

    named = requests.Columns.parse(form.request_columns, "--request-columns", form.timestamp_unit, form.max_row_mb)
    splits, n_excluded = _splits(uri, form, flag)
    found = requests.check_columns(splits, named, needs_target=needs_target, rejected=rejected)
    absent = tuple(field for field in named.OPTIONAL if field not in found)
    return Requests(splits=splits, absent=absent, n_excluded=n_excluded, columns=named)


def _splits(uri: str, form: InputFormat, flag: str) -> "tuple[list[Split], int]":
    from persona import storage
    from persona.inputs.files import find_files
    from persona.inputs.splits import cut

    source = storage.check_uri(uri, flag=flag)
    storage.check_reachable(source, flag=flag)
    files = find_files(source, flag=flag, exclude=form.exclude)
    return cut(files, flag=flag), files.n_excluded
