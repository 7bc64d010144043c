"""The door to delta-rs: calls that touch the store are retried, and their errors are one-line `StorageError`s.

No other module calls a `DeltaTable`. Which of its calls send requests is not documented and changes between versions,
so all of them go through `with_retries`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Schema as DeltaSchema, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import AddAction, RemoveAction

from persona.errors import StorageError
from persona.storage import delta_options
from persona.storage.retry import in_one_line, is_transient, plain, retry_transient

T = TypeVar("T")


class UncertainCommit(StorageError):
    """A commit whose response was lost: it may or may not be in the log."""


@contextmanager
def storage_errors(what: str, error_class: type[StorageError] = StorageError) -> Iterator[None]:
    """Raise library errors as `error_class`, starting with `what`. A `CommitFailedError` passes unchanged."""
    try:
        yield
    except CommitFailedError:
        raise
    except (DeltaError, OSError, pa.ArrowInvalid) as error:
        raise error_class(f"{what}: {plain(error)[:500]}") from error


def with_retries(work: Callable[[], T], what: str) -> T:
    """The result of `work`, retried on transient errors. Any other error becomes a `StorageError` as above."""
    with storage_errors(what):
        return retry_transient(work, what)


def create_table(uri: str, schema: pa.Schema, *, name: str, partition: str, properties: Mapping[str, str]) -> None:
    """Create an empty table. An existing one is left unchanged."""
    new = partial(
        DeltaTable.create,
        uri,
        schema,
        mode="ignore",
        name=name,
        partition_by=[partition],
        configuration=dict(properties),
        raise_if_key_not_exists=False,
        storage_options=delta_options(uri),
    )

    def attempt() -> None:
        try:
            new()
        except DeltaError as error:
            if "Invalid table version: 0" not in str(error):
                raise
            # delta-rs took a 409 response for an existing first version, which it then failed to read.
            raise ConnectionError(str(error)) from error

    with suppress(CommitFailedError):  # another process created it at the same time
        with_retries(attempt, f"cannot create the table {uri}")


class OpenTable:
    """A Delta table as of the last time its log was read. Every method raises `StorageError` if the store fails."""

    def __init__(self, uri: str, version: int | None = None) -> None:
        """Read the log up to `version`, or all of it. Raises `StorageError` when the table or version is missing."""
        self.uri = uri
        as_of = "" if version is None else f" as of version {version}"
        opened = partial(DeltaTable, uri, version=version, storage_options=delta_options(uri))
        self._delta: DeltaTable = with_retries(opened, f"cannot open the table {uri}{as_of}")

    def update(self) -> None:
        """Read what the log has gained."""
        self._read(self._delta.update_incremental)

    def version(self) -> int:
        """The version last read."""
        return self._read(self._delta.version)

    def id(self) -> str:
        """What tells this table from any other; a copy has the same."""
        return self._read(lambda: str(self._delta.metadata().id))

    def properties(self) -> dict[str, str]:
        """The properties in its metadata."""
        return self._read(lambda: dict(self._delta.metadata().configuration))

    def set_properties(self, properties: Mapping[str, str]) -> None:
        """Set some of the properties in its metadata, in one commit."""
        set_all = partial(self._delta.alter.set_table_properties, dict(properties), raise_if_not_exists=False)
        what = f"cannot set the properties of the table {self.uri}"
        try:
            with_retries(set_all, what)
        except CommitFailedError as error:
            raise StorageError(f"{what}, which another program is changing; run the same command again") from error

    def history(self) -> list[dict[str, Any]]:
        """What each version still in the log says about its commit, newest first."""
        return self._read(self._delta.history)

    def transaction_version(self, application: str) -> int | None:
        """The number last committed for an application; reads the log entries since the last checkpoint again."""
        return self._read(lambda: self._delta.transaction_version(application))

    def add_actions(self) -> pa.Table:
        """A row per data file, with its partition values and statistics in columns of their own."""
        return self._read(lambda: pa.table(self._delta.get_add_actions(flatten=True)))

    def unused_files(self, keep_hours: int) -> list[str]:
        """The paths of files that no version of the last `keep_hours` uses."""
        listed = partial(self._delta.vacuum, keep_hours, dry_run=True, enforce_retention_duration=False, full=True)
        return with_retries(listed, f"cannot list the unused files of the table {self.uri}")

    def create_checkpoint(self) -> None:
        """Write the version last read as one file, so that readers need not read the entries before it."""
        with_retries(self._delta.create_checkpoint, f"cannot write a checkpoint of the table {self.uri}")

    def delete_expired_log(self) -> None:
        """Delete the log entries that are older than the table's retention and that a checkpoint replaces."""
        with_retries(self._delta.cleanup_metadata, f"cannot delete old log entries of the table {self.uri}")

    def commit(
        self,
        actions: Sequence[AddAction | RemoveAction],
        schema: pa.Schema,
        partition: str,
        numbers: Sequence[tuple[str, int]],
        metadata: dict[str, str] | None,
    ) -> None:
        """Commit as the version after the one last read, in one attempt; reads nothing of the new version.

        Raises:
            CommitFailedError: That version exists already, or the table does not allow these actions.
            UncertainCommit: A transient error. Only the caller can tell whether the commit is in the log.
            StorageError: A permanent error, such as a denied request or a full disk.
        """
        what = f"cannot write to the table {self.uri}"
        try:
            with storage_errors(what):
                self._delta.create_write_transaction(
                    list(actions),
                    "append",
                    DeltaSchema.from_arrow(schema),
                    [partition],
                    commit_properties=CommitProperties(
                        custom_metadata=metadata,
                        max_commit_retries=0,
                        app_transactions=[Transaction(name, number) for name, number in numbers],
                    ),
                    # With these hooks every commit would list the whole log.
                    post_commithook_properties=PostCommitHookProperties(
                        create_checkpoint=False, cleanup_expired_logs=False
                    ),
                )
        except StorageError as error:
            if error.__cause__ is not None and is_transient(error.__cause__):
                raise UncertainCommit(in_one_line(error.__cause__)) from error.__cause__
            raise

    def _read(self, work: Callable[[], T]) -> T:
        return with_retries(work, f"cannot read the log of the table {self.uri}")
