"""The Delta log of a table: read it, and commit to it as the holder of the table's lease.

The log orders commits without a lock table, on S3 by conditional put. Two numbers in it, kept as Delta application
transactions, make commits exclusive and exactly-once: the number of the ruling lease, and the count of leased commits.
Each commit requires its own lease number and advances the count by one. So a replaced holder cannot commit, and a
commit whose response was lost is recognized instead of repeated.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

from deltalake import CommitProperties, DeltaTable, Schema as DeltaSchema, Transaction
from deltalake.exceptions import CommitFailedError
from deltalake.transaction import AddAction, RemoveAction

from persona.errors import LeaseLost, StorageError
from persona.storage import delta_options
from persona.storage.retry import in_one_line, is_transient, retry_transient
from persona.store.delta_calls import storage_errors, with_retries
from persona.store.file_list import FileList
from persona.store.schema import Layout

JOB = "persona.job"
_LEASE, _COMMITS = "persona.lease", "persona.commits"
_GIVE_UP_S = 300.0
_PAUSES_S = (0.02, 0.5)


class UncertainCommit(StorageError):
    """A commit without a confirmation: it may or may not be in the log."""


class Log:
    """The log of one table. It follows the newest version, or is fixed at one. Opened on first use."""

    def __init__(self, uri: str, layout: Layout, version: int | None = None) -> None:
        self.uri = uri
        self.layout = layout
        self._version = version
        self._opened: DeltaTable | None = None

    def latest(self) -> DeltaTable:
        """The newest version, or the fixed one. Raises `StorageError` when the table or version does not exist."""
        if self._opened is not None and self._version is None:
            with_retries(self._opened.update_incremental, f"cannot read the log of the table {self.uri}")
        return self._last_read()

    def _last_read(self) -> DeltaTable:
        """The table as of the last time the log was read."""
        if self._opened is None:
            options = delta_options(self.uri)
            open_table = partial(DeltaTable, self.uri, version=self._version, storage_options=options)
            as_of = "" if self._version is None else f" as of version {self._version}"
            self._opened = with_retries(open_table, f"cannot open the table {self.uri}{as_of}")
        return self._opened

    def lease(self) -> int:
        """The number of the ruling lease; 0 before the first."""
        return self.latest().transaction_version(_LEASE) or 0

    def require_lease(self, number: int) -> DeltaTable:
        """The newest version, in which this lease rules. Raises `LeaseLost` when another one does."""
        ruling = self.lease()
        if ruling != number:
            raise LeaseLost(
                f"another run has taken over {self.uri} (lease {ruling}; this run held {number} and did not renew it "
                "in time); nothing was written since, run the same command again"
            )
        return self._last_read()

    def fence(self, number: int, *, job: str) -> None:
        """Make this lease the ruling one, so that holders of lower numbers can no longer commit."""
        self._commit_next([], {_LEASE: number}, lambda: self.lease() >= number, {JOB: job})
        self.require_lease(number)

    def commit(self, actions: Sequence[AddAction | RemoveAction], *, lease: int, removed: Collection[str] = ()) -> None:
        """Commit `actions` exactly once, under a lease; `removed` has the paths of the files they remove.

        Raises:
            LeaseLost: A later lease rules.
            StorageError: A file to remove is gone because another program changed the table, or the storage failed.
        """
        numbers = {_LEASE: lease}

        def is_committed() -> bool:
            # Everything here must come from one read of the log: between two, another run could take over unnoticed.
            latest = self.require_lease(lease)
            count = latest.transaction_version(_COMMITS) or 0
            if count >= numbers.setdefault(_COMMITS, count + 1):
                return True  # only this holder advances the count, so it was an attempt whose response was lost
            present = FileList.of(latest, self.layout).paths() if removed else set()
            if gone := next((path for path in removed if path not in present), None):
                raise StorageError(
                    f"another program has removed {gone} from {self.uri} while this run replaced rows of it; "
                    "nothing was lost, run the same command again"
                )
            return False

        self._commit_next(actions, numbers, is_committed)

    def append(self, action: AddAction) -> None:
        """Add a file without a lease, past any other writer: for a table without a key."""

        def is_committed() -> bool:
            return action.path in FileList.of(self.latest(), self.layout).paths()

        self._commit_next([action], {}, is_committed)

    def _commit_next(
        self,
        actions: Sequence[AddAction | RemoveAction],
        numbers: Mapping[str, int],
        is_committed: Callable[[], bool],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Commit as the next version, unless `is_committed`, which reads the log before each attempt."""
        what = f"cannot write to the table {self.uri}"

        def attempt() -> None:
            if is_committed():
                return
            base = self._last_read().version()
            try:
                self._transact(actions, numbers, metadata)
            except CommitFailedError as error:
                # delta-rs raises the same error for a conflict and for a refusal; a conflict comes with a new version.
                if not is_transient(error) and self.latest().version() == base:
                    raise StorageError(f"{what}: {in_one_line(error)}") from error
                raise

        retry_transient(
            attempt,
            what,
            is_transient=lambda error: isinstance(error, CommitFailedError | UncertainCommit),
            give_up_s=_GIVE_UP_S,
            pauses_s=_PAUSES_S,
        )

    def _transact(
        self,
        actions: Sequence[AddAction | RemoveAction],
        numbers: Mapping[str, int],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Commit on top of the version last read. Raises `CommitFailedError` when there is a newer one."""
        with storage_errors("commit not confirmed", UncertainCommit):
            self._last_read().create_write_transaction(
                list(actions),
                "append",
                DeltaSchema.from_arrow(self.layout.schema),
                [self.layout.partition],
                commit_properties=CommitProperties(
                    custom_metadata=dict(metadata) if metadata else None,
                    max_commit_retries=0,
                    app_transactions=[Transaction(name, number) for name, number in numbers.items()],
                ),
            )
