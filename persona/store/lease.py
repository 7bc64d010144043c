"""The right to write to a table: a numbered object that only one process could create, and that it renews.

    <store>/_leases/<table>/00000012.json    who holds it, since when, until when

Whoever wants to write creates the next number once the last one is released or has run out. Clocks and expiry only
decide how long others wait. What keeps a holder that was paused from writing after it was replaced is the number: every
commit carries it (`tables.Table.commit`), and the table's log refuses one that is no longer the highest.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Self

from persona import storage
from persona.errors import LeaseHeld, LeaseLost, StorageError

TTL_S = 60.0
_RENEWALS = 4  # within the time a lease lives


@dataclass(frozen=True, kw_only=True)
class _Entry:
    number: int
    job: str
    host: str
    pid: int
    since: str
    expires: str
    token: str  # or two threads that write at the same moment would both find their own bytes
    released: bool = False

    @property
    def holder(self) -> str:
        return f"{self.job} (process {self.pid} on {self.host})"

    def is_over(self) -> bool:
        """Whether nobody can be holding it: given back, run out, or left by a process of this machine that is gone."""
        gone = self.host == socket.gethostname() and not _is_running(self.pid)
        return self.released or gone or datetime.fromisoformat(self.expires) < datetime.now(UTC)


class Lease:
    """Held from `acquire` on; a context that gives it back, and that renews it from a thread of its own until then."""

    def __init__(self, folder: str, entry: _Entry, ttl_s: float) -> None:
        """For `acquire`."""
        self.number = entry.number
        self._folder = folder
        self._entry = entry
        self._ttl_s = ttl_s
        self._ended = threading.Event()
        self._lost_to: _Entry | None = None
        self._thread = threading.Thread(target=self._keep, daemon=True, name=f"lease of {folder}")

    @staticmethod
    def acquire(store_uri: str, table: str, *, job: str, above: int = 0, ttl_s: float = TTL_S) -> "Lease":
        """Become the one writer of a table.

        A lease that nobody can be holding is taken over at once. One that might be held is watched until it is renewed
        or has not been for `ttl_s`: a run that died on another machine delays its successor by no more than that. The
        number is `above` what the log knows of, also where somebody has deleted the leases.

        Raises LeaseHeld, with the holder and since when, for one that is renewed.
        """
        folder = storage.join(store_uri, "_leases", table)
        while True:
            last = _last(folder)
            if last is not None and not last.is_over():
                _watch(folder, last, table, ttl_s)
            now = datetime.now(UTC)
            entry = _Entry(
                number=max(last.number if last else 0, above) + 1,
                job=job,
                host=socket.gethostname(),
                pid=os.getpid(),
                since=now.isoformat(timespec="seconds"),
                expires=(now + timedelta(seconds=ttl_s)).isoformat(),
                token=uuid.uuid4().hex,
            )
            if not storage.create_bytes(_uri(folder, entry.number), _written(entry)):
                continue
            numbers = _numbers(folder)
            if max(numbers) > entry.number:
                # It was free only because it is so old that its entry has been deleted: nobody may have it again.
                storage.delete(_uri(folder, entry.number))
                continue
            for number in numbers:
                if number < entry.number:
                    storage.delete(_uri(folder, number))
            return Lease(folder, entry, ttl_s)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        if self._lost_to is not None:
            return
        with contextlib.suppress(StorageError, OSError):  # what was done is done, and the lease runs out by itself
            storage.write_bytes(_uri(self._folder, self.number), _written(replace(self._entry, released=True)))

    def check(self) -> None:
        """Raises LeaseLost when somebody else has taken over, as far as this process has noticed."""
        if self._lost_to is not None:
            raise LeaseLost(
                f"{self._lost_to.holder} took over the lease {_uri(self._folder, self.number)}, which was not renewed "
                f"for {self._ttl_s:.0f} s; nothing was written since, run the same command again"
            )

    def _keep(self) -> None:
        while not self._ended.wait(self._ttl_s / _RENEWALS):
            try:
                last = _last(self._folder)
                if last is not None and last.number > self.number:
                    self._lost_to = last
                    return
                expires = datetime.now(UTC) + timedelta(seconds=self._ttl_s)
                self._entry = replace(self._entry, expires=expires.isoformat())
                storage.write_bytes(_uri(self._folder, self.number), _written(self._entry))
            except (StorageError, OSError):
                continue  # an object store that is away for a while; whoever takes over meanwhile is seen at a commit


def _watch(folder: str, seen: _Entry, table: str, ttl_s: float) -> None:
    """Returns when the lease is free; raises LeaseHeld as soon as it is renewed."""
    until = time.monotonic() + ttl_s
    while time.monotonic() < until and not seen.is_over():
        time.sleep(min(1.0, ttl_s / (4 * _RENEWALS)))
        now = _last(folder)
        if now is None or now.is_over():
            return
        if now != seen:
            raise LeaseHeld(
                f"the table {table!r} is being written by {now.holder}, since {now.since}; wait until that run has "
                "ended, or end it"
            )


def _last(folder: str) -> _Entry | None:
    """The entry with the highest number; None where there is none yet."""
    while numbers := _numbers(folder):
        uri = _uri(folder, max(numbers))
        try:
            return _Entry(**json.loads(storage.read_bytes(uri)))
        except StorageError:
            if storage.exists(uri):
                raise  # and not just replaced by the next one
        except (ValueError, TypeError) as error:
            raise StorageError(
                f"{uri} cannot be read as a lease ({error}); if no run is writing to this table, delete it"
            ) from error
    return None


def _numbers(folder: str) -> list[int]:
    names = [file.uri.rsplit("/", 1)[1].removesuffix(".json") for file in storage.list_files(folder, (".json",))]
    return [int(name) for name in names if name.isdecimal()]


def _uri(folder: str, number: int) -> str:
    return storage.join(folder, f"{number:08d}.json")


def _written(entry: _Entry) -> bytes:
    return json.dumps(asdict(entry)).encode()


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
