"""The lease of a table: a numbered object that makes its creator the only writer, and that it renews.

    <store>/_leases/<table>/00000012.json    holder, start, how often it is renewed

A writer creates the next number once the last lease is released or has not been renewed for its time to live (TTL).
Only the store's own clock tells how long ago that was, so machines whose clocks differ agree. Safety does not depend on
any clock: a commit goes through only while the committer's number is the ruling one in the table's log
(`log.Log.commit`), so a holder that was paused and replaced cannot write.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

from persona import storage
from persona.errors import LeaseHeld, LeaseLost, StorageError
from persona.field_types import check_field_types

TTL_S = 60.0
_RENEWALS = 4  # per TTL
_CLOCK_STEP_S = 1.0  # object stores give times in whole seconds


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """The content of a lease object.

    `expires` is by the holder's clock, so no other run relies on it; it only shows that a lease was renewed. `machine`
    is that of `_machine`; older versions write neither it nor `ttl_s`.
    """

    number: int
    job: str
    host: str
    pid: int
    since: str
    expires: str
    token: str  # unique, or two threads that write in the same instant would both read back their own bytes
    released: bool = False
    ttl_s: float = TTL_S
    machine: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError or TypeError for values that no holder writes."""
        check_field_types(self)
        if not 0 < self.pid < 2**31:
            raise ValueError(f"there is no process {self.pid}")
        if self.ttl_s <= 0:
            raise ValueError(f"ttl_s, {self.ttl_s}, is not a number of seconds above 0")

    @property
    def holder(self) -> str:
        return f"{self.job} (process {self.pid} on {self.host})"

    def is_free(self, folder: str) -> bool:
        """Whether it can have no holder: it was released, its process on this machine has ended, or its TTL is over."""
        if self.released or (self.machine and self.machine == _machine() and not _is_running(self.pid)):
            return True
        age_s = storage.age_s(_uri(folder, self.number))
        return age_s is not None and age_s > self.ttl_s + _CLOCK_STEP_S


class Lease:
    """A lease that `acquire` took. Its context renews it from a thread, and releases it at the end."""

    def __init__(self, folder: str, entry: _Entry, ttl_s: float) -> None:
        """Use `acquire`."""
        self.number = entry.number
        self._folder = folder
        self._entry = entry
        self._ttl_s = ttl_s
        self._stop = threading.Event()
        self._successor: _Entry | None = None
        self._thread = threading.Thread(target=self._keep_renewing, daemon=True, name=f"lease of {folder}")

    @staticmethod
    def acquire(store_uri: str, table: str, *, job: str, above: int = 0, ttl_s: float = TTL_S) -> "Lease":
        """Become the only writer of a table.

        A free lease is taken at once. One that may be held is watched until it is renewed or its TTL has passed, so a
        run that died on another machine delays its successor by at most that. `ttl_s` is the TTL of the new lease. Its
        number is greater than `above`, the one in the log, even if the lease objects have been deleted.

        Raises `LeaseHeld`, with the holder and its start, when the lease is renewed.
        """
        folder = storage.join(store_uri, "_leases", table)
        while True:
            last = _latest(folder)
            if last is not None and not last.is_free(folder):
                _wait_until_free(folder, last, table)
            now = datetime.now(UTC)
            entry = _Entry(
                number=max(last.number if last else 0, above) + 1,
                job=job,
                host=socket.gethostname(),
                pid=os.getpid(),
                since=now.isoformat(timespec="seconds"),
                expires=(now + timedelta(seconds=ttl_s)).isoformat(),
                token=uuid.uuid4().hex,
                ttl_s=ttl_s,
                machine=_machine(),
            )
            if not storage.create_bytes(_uri(folder, entry.number), _to_bytes(entry)):
                continue
            numbers = _numbers(folder)
            if max(numbers) > entry.number:
                # The number was used before, and its entry deleted since: numbers must not be reused.
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
        self._stop.set()
        self._thread.join()
        if self._successor is not None:
            return
        with contextlib.suppress(StorageError, OSError):  # the commits are done, and the lease expires without help
            storage.write_bytes(_uri(self._folder, self.number), _to_bytes(replace(self._entry, released=True)))

    def check(self) -> None:
        """Raise `LeaseLost` if this process has noticed that another one took over."""
        if self._successor is not None:
            raise LeaseLost(
                f"{self._successor.holder} took over the lease {_uri(self._folder, self.number)}, which was not "
                f"renewed for {self._ttl_s:.0f} s; nothing was written since, run the same command again"
            )

    def _keep_renewing(self) -> None:
        while not self._stop.wait(self._ttl_s / _RENEWALS):
            try:
                last = _latest(self._folder)
                if last is not None and last.number > self.number:
                    self._successor = last
                    return
                expires = datetime.now(UTC) + timedelta(seconds=self._ttl_s)
                self._entry = replace(self._entry, expires=expires.isoformat())
                storage.write_bytes(_uri(self._folder, self.number), _to_bytes(self._entry))
            except (StorageError, OSError):
                continue  # try again at the next renewal; if another run takes over before that, commits are refused


def _wait_until_free(folder: str, seen: _Entry, table: str) -> None:
    """Return when the lease is free or has not been renewed for its TTL. Raises `LeaseHeld` once it is renewed."""
    until = time.monotonic() + seen.ttl_s
    while time.monotonic() < until:
        time.sleep(min(1.0, seen.ttl_s / (4 * _RENEWALS)))
        now = _latest(folder)
        if now is None or now.is_free(folder):
            return
        if now != seen:
            raise LeaseHeld(
                f"the table {table!r} is being written by {now.holder}, since {now.since}; wait until that run has "
                "ended, or end it"
            )


def _latest(folder: str) -> _Entry | None:
    """The entry with the highest number, or None when there is none."""
    while numbers := _numbers(folder):
        uri = _uri(folder, max(numbers))
        try:
            content = json.loads(storage.read_bytes(uri))
            entry = _Entry(**{one.name: content[one.name] for one in fields(_Entry) if one.name in content})
            if entry.number != max(numbers):
                raise ValueError(f"its number is {entry.number}")
            return entry
        except StorageError:
            if storage.exists(uri):
                raise  # otherwise it was deleted by the holder of the next number
        except (ValueError, TypeError, RecursionError) as error:
            raise StorageError(
                f"{uri} cannot be read as a lease ({error}); if no run is writing to this table, delete it"
            ) from error
    return None


def _numbers(folder: str) -> list[int]:
    uris = [file.uri for file in storage.list_files(folder, (".json",))]
    numbers = [(uri, int(name)) for uri in uris if (name := uri.rsplit("/", 1)[1].removesuffix(".json")).isdecimal()]
    return [number for uri, number in numbers if uri == _uri(folder, number)]


def _uri(folder: str, number: int) -> str:
    return storage.join(folder, f"{number:08d}.json")


def _to_bytes(entry: _Entry) -> bytes:
    return json.dumps(asdict(entry)).encode()


def _machine() -> str:
    """Where a process id names one process: this boot of this kernel, in this PID namespace. Empty if it is unknown.

    A host name does not tell: containers of one pod, and machines in two networks, can have the same one.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
