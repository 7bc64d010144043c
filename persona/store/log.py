"""The Delta log of a table: read it, and commit to it as the holder of the table's lease.

The log orders commits without a lock table, on S3 by conditional put. Two numbers in it, kept as Delta application
transactions, make commits exclusive and exactly-once: the number of the ruling lease, and the count of leased commits.
Each commit requires its own lease number and advances the count by one. So a replaced holder cannot commit, and a
commit whose response was lost is recognized instead of repeated.

Reading the numbers costs a request for each log entry since the last checkpoint. So they are remembered with the
version that they belong to, and read again only when that version is not the newest.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

from deltalake.exceptions import CommitFailedError
from deltalake.transaction import AddAction, RemoveAction

from persona.errors import LeaseLost, StorageError
from persona.storage.retry import in_one_line, is_transient, retry_transient
from persona.store.delta_calls import OpenTable, UncertainCommit
from persona.store.file_list import FileList
from persona.store.schema import Layout

JOB = "persona.job"
# Opening a table reads every log entry since the last checkpoint; writing a checkpoint reads them as well.
CHECKPOINT_EVERY = 20
_LEASE, _COMMITS = "persona.lease", "persona.commits"
_PAUSES_S = (0.02, 0.5)


class Log:
    """The log of one table. It follows the newest version, or is fixed at one. Opened on first use."""

    def __init__(self, uri: str, layout: Layout, version: int | None = None) -> None:
        self.uri = uri
        self.layout = layout
        self._version = version
        self._opened: OpenTable | None = None
        self._numbers: dict[str, int] = {}
        self._numbers_version = -1

    def latest(self) -> OpenTable:
        """The newest version, or the fixed one. Raises `StorageError` when the table or version does not exist."""
        if self._opened is not None and self._version is None:
            self._opened.update()
        return self._last_read()

    def _last_read(self) -> OpenTable:
        """The table as of the last time the log was read."""
        if self._opened is None:
            self._opened = OpenTable(self.uri, self._version)
        return self._opened

    def _number(self, name: str) -> int:
        """A number in the version last read; 0 if no commit has set it."""
        opened = self._last_read()
        if self._numbers_version != opened.version():
            self._numbers, self._numbers_version = {}, opened.version()
        if name not in self._numbers:
            self._numbers[name] = opened.transaction_version(name) or 0
        return self._numbers[name]

    def lease(self) -> int:
        """The number of the ruling lease; 0 before the first."""
        self.latest()
        return self._number(_LEASE)

    def foreign_commits(self) -> int:
        """How many commits were made without a lease, by other programs; for a table with a key."""
        return self.latest().version() - self._number(_LEASE) - self._number(_COMMITS)

    def require_lease(self, number: int) -> OpenTable:
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
            count = self._number(_COMMITS)
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
        self._commit_next([action], {}, lambda: action.path in FileList.of(self.latest(), self.layout).paths())

    def _commit_next(
        self,
        actions: Sequence[AddAction | RemoveAction],
        numbers: Mapping[str, int],
        is_committed: Callable[[], bool],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Commit as the next version, unless `is_committed`, which reads the log before each attempt.

        Conflicts and lost responses are retried within the storage timeout; any other error ends the commit at once.
        """
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
            # Of a version that this process has written, it knows the numbers.
            known = self._numbers if self._numbers_version == base else {}
            self._numbers, self._numbers_version = {**known, **numbers}, base + 1

        retry_transient(
            attempt,
            what,
            is_transient=lambda error: isinstance(error, CommitFailedError | UncertainCommit),
            pauses_s=_PAUSES_S,
        )
        self._checkpoint_if_due()

    def _transact(
        self,
        actions: Sequence[AddAction | RemoveAction],
        numbers: Mapping[str, int],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Commit on top of the version last read. Raises as `OpenTable.commit`."""
        self._last_read().commit(
            actions, self.layout.schema, self.layout.partition, list(numbers.items()), dict(metadata or {}) or None
        )

    def _checkpoint_if_due(self) -> None:
        """Keep the number of log entries after the last checkpoint bounded."""
        if (self._last_read().version() + 1) % CHECKPOINT_EVERY == 0:
            latest = self.latest()
            latest.create_checkpoint()
            latest.delete_expired_log()
