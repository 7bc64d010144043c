"""The lease: one named holder at a time, and a successor that waits no longer than necessary."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from persona import storage
from persona.errors import LeaseHeld, LeaseLost, StorageError
from persona.storage import join
from persona.store import lease as lease_module
from persona.store.lease import Lease
from persona.store.store import Store
from tests.faulty_s3 import FaultyS3
from tests.stores import IDENTITY, answers, write_rows

LONG_S = 600.0  # longer than a test may take: a lease acquired in time was not awaited until it expired
_HOLDER = """
import sys
from persona.errors import LeaseHeld
from persona.store.lease import Lease
print("ready", flush=True)
sys.stdin.readline()
try:
    with Lease.acquire(sys.argv[1], "behaviors", job="jobs.embed", ttl_s=float(sys.argv[2])) as lease:
        print("holds", lease.number, flush=True)
        sys.stdin.readline()
except LeaseHeld as error:
    print("refused", error, flush=True)
"""


@pytest.fixture
def frequent_renewal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Renew leases of `LONG_S` every 0.2 s: a busy machine does not lose them, and tests do not wait."""
    monkeypatch.setattr(lease_module, "_RENEWALS", 3000)


def entries(root: str) -> dict[int, dict[str, Any]]:
    """All entries of the lease on `behaviors`, by number."""
    files = storage.list_files(join(root, "_leases", "behaviors"))
    return {int(file.uri[-13:-5]): json.loads(storage.read_bytes(file.uri)) for file in files}


def plant(root: str, number: int, **fields: Any) -> bytes:
    """Write an entry as another machine would, with a TTL of an hour unless `fields` says otherwise."""
    entry = {"number": number, "job": "jobs.embed", "host": "elsewhere", "pid": 1, "token": "t", "ttl_s": 3600.0}
    expires = datetime.now(UTC) + timedelta(hours=1)
    entry |= {"since": "2026-01-02T03:04:05+00:00", "expires": expires.isoformat(), **fields}
    data = json.dumps(entry).encode()
    storage.write_bytes(join(root, "_leases", "behaviors", f"{number:08d}.json"), data)
    return data


def set_clock(monkeypatch: pytest.MonkeyPatch, ahead: timedelta) -> None:
    """Set the clock of this machine, as the lease sees it."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + ahead

    monkeypatch.setattr(lease_module, "datetime", Clock)


def let_time_pass(root: str, number: int, seconds: float) -> None:
    """Make the entry older by the store's clock, on disk."""
    file = Path(root, "_leases", "behaviors", f"{number:08d}.json")
    os.utime(file, (file.stat().st_mtime - seconds,) * 2)


def acquire(root: str, ttl_s: float = LONG_S, **more: Any) -> Lease:
    return Lease.acquire(root, "behaviors", job="jobs.sync", ttl_s=ttl_s, **more)


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def start(root: str, ttl_s: float) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    return subprocess.Popen([sys.executable, "-c", _HOLDER, root, str(ttl_s)], env=environment, **pipes)


def send_newline(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_exactly_one_of_several_concurrent_processes_gets_the_lease(root: str) -> None:
    processes = [start(root, 4.0) for _ in range(3)]
    assert [read_line(process) for process in processes] == ["ready"] * 3
    for process in processes:
        send_newline(process)
    lines = [read_line(process) for process in processes]
    (holder,) = [process for process, line in zip(processes, lines, strict=True) if line.startswith("holds")]
    refusals = [line for line in lines if line.startswith("refused")]
    assert len(refusals) == 2 and all(f"jobs.embed (process {holder.pid} on " in line for line in refusals)
    for process in processes:
        process.communicate("\n" if process is holder else None)
    assert [entry["released"] for entry in entries(root).values()] == [True]


@pytest.mark.usefixtures("frequent_renewal")
def test_competing_threads_hold_it_one_at_a_time_with_distinct_numbers(root: str) -> None:
    inside, numbers, overlaps = threading.Lock(), [], []

    def work() -> None:
        for _ in range(2):
            while True:
                try:
                    with acquire(root) as lease:
                        if not inside.acquire(blocking=False):
                            overlaps.append(lease.number)
                            return
                        numbers.append(lease.number)
                        lease.check()
                        inside.release()
                    break
                except LeaseHeld:
                    continue

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not overlaps
    assert numbers == sorted(set(numbers)) and len(numbers) == 8
    assert list(entries(root)) == [numbers[-1]]


@pytest.mark.usefixtures("frequent_renewal")
def test_a_second_run_is_told_the_holder_and_its_start(root: str) -> None:
    with acquire(root):
        since = entries(root)[1]["since"]
        with pytest.raises(LeaseHeld) as caught:
            Lease.acquire(root, "behaviors", job="jobs.embed", ttl_s=LONG_S)
    assert str(caught.value) == (
        f"the table 'behaviors' is being written by jobs.sync (process {os.getpid()} on {socket.gethostname()}), since "
        f"{since}; wait until that run has ended, or end it"
    )
    assert abs(datetime.fromisoformat(since) - datetime.now(UTC)) < timedelta(minutes=5)


def test_each_table_has_its_own_lease(tmp_path: Path) -> None:
    with acquire(str(tmp_path)), Lease.acquire(str(tmp_path), "personas", job="j", ttl_s=LONG_S) as other:
        assert other.number == 1


def test_a_released_lease_is_taken_at_once_and_numbers_only_grow(root: str) -> None:
    for number in (1, 2, 3):
        with acquire(root) as lease:
            assert lease.number == number
            assert list(entries(root)) == [number]
        assert entries(root)[number]["released"]


def test_the_lease_of_a_killed_process_is_taken_at_once(tmp_path: Path) -> None:
    process = start(str(tmp_path), LONG_S)
    send_newline(process)
    assert [read_line(process), read_line(process)] == ["ready", "holds 1"]
    process.kill()
    process.communicate()
    assert not entries(str(tmp_path))[1]["released"]
    with acquire(str(tmp_path)) as lease:
        assert lease.number == 2


def test_a_lease_of_another_machine_is_taken_once_its_ttl_is_over(tmp_path: Path) -> None:
    plant(str(tmp_path), 7)
    let_time_pass(str(tmp_path), 7, 3602)
    with acquire(str(tmp_path)) as lease:
        assert lease.number == 8 and list(entries(str(tmp_path))) == [8]


def test_an_object_store_tells_how_old_a_lease_is(each_s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(each_s3, 7)
    with FaultyS3(os.environ["AWS_ENDPOINT_URL"], seed=7) as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
        uri = join(each_s3, "_leases", "behaviors", "00000007.json")
        assert 0 <= (storage.age_s(uri) or 0) < 60 and storage.age_s(f"{uri}-none") is None
        store.clock_s = 3660
        with acquire(each_s3) as lease:
            assert lease.number == 8


@pytest.mark.usefixtures("frequent_renewal")
@pytest.mark.parametrize("ahead", [timedelta(days=1), timedelta(days=-1)], ids=["ahead", "behind"])
def test_a_run_with_a_wrong_clock_neither_takes_a_live_lease_nor_loses_its_own(
    root: str, monkeypatch: pytest.MonkeyPatch, ahead: timedelta
) -> None:
    with acquire(root) as lease, monkeypatch.context() as patched:
        set_clock(patched, ahead)
        with pytest.raises(LeaseHeld):
            acquire(root)
        lease.check()  # it renews with the wrong clock from here on
        patched.undo()
        with pytest.raises(LeaseHeld):
            acquire(root)
        lease.check()


def test_a_lease_of_another_machine_is_taken_if_not_renewed_whatever_its_clock_says(root: str) -> None:
    plant(root, 7, ttl_s=0.5, expires=(datetime.now(UTC) + timedelta(days=400)).isoformat())
    started = time.monotonic()
    with acquire(root) as lease:
        assert lease.number == 8 and time.monotonic() - started >= 0.5


@pytest.mark.parametrize("machine", ["", "this boot pid:[1]"], ids=["older version", "other container"])
def test_a_process_of_another_pid_namespace_is_not_taken_for_dead(tmp_path: Path, machine: str) -> None:
    """Its number belongs to no process here, or to another one, although the host name is the same."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    holder = {"host": socket.gethostname(), "pid": ended.pid, "machine": machine}
    plant(str(tmp_path), 7, **holder)
    threading.Timer(0.2, plant, [str(tmp_path), 7], {**holder, "expires": "renewed"}).start()
    with pytest.raises(LeaseHeld, match=f"process {ended.pid} on "):
        acquire(str(tmp_path))


def test_a_lease_whose_ttl_ends_while_it_is_watched_is_taken(tmp_path: Path) -> None:
    plant(str(tmp_path), 7)
    threading.Timer(0.2, let_time_pass, [str(tmp_path), 7, 3602.0]).start()
    with acquire(str(tmp_path)) as lease:
        assert lease.number == 8


def test_a_lease_that_is_released_while_watched_is_taken(tmp_path: Path) -> None:
    plant(str(tmp_path), 7)
    threading.Timer(0.2, plant, [str(tmp_path), 7], {"released": True}).start()
    with acquire(str(tmp_path), ttl_s=LONG_S) as lease:
        assert lease.number == 8


@pytest.mark.usefixtures("frequent_renewal")
def test_a_holder_notices_its_replacement_and_does_not_touch_the_new_lease(root: str) -> None:
    with acquire(root) as lease:
        lease.check()
        successor = plant(root, 2, job="jobs.forget", pid=99)

        def is_lost() -> bool:
            try:
                lease.check()
            except LeaseLost:
                return True
            return False

        wait_until(is_lost)
        with pytest.raises(LeaseLost, match=r"jobs.forget \(process 99 on elsewhere\) took over"):
            lease.check()
    assert storage.read_bytes(join(root, "_leases", "behaviors", "00000002.json")) == successor
    assert not entries(root)[1]["released"]


def test_a_holder_that_misses_its_replacement_does_not_touch_the_new_lease(root: str) -> None:
    with acquire(root) as lease:
        successor = plant(root, 2)
        lease.check()
    assert storage.read_bytes(join(root, "_leases", "behaviors", "00000002.json")) == successor
    plant(root, 2, ttl_s=0.2)
    with acquire(root) as third:
        assert third.number == 3 and list(entries(root)) == [3]


@pytest.mark.usefixtures("frequent_renewal")
@pytest.mark.parametrize("error", [StorageError("no connection"), PermissionError("stale handle")])
def test_a_holder_survives_a_storage_outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    failed = threading.Semaphore(0)

    def fail(*_: Any) -> None:
        failed.release()
        raise error

    with acquire(str(tmp_path)) as lease:
        before = entries(str(tmp_path))[1]["expires"]
        for name in ("write_bytes", "list_files"):
            with monkeypatch.context() as patched:
                patched.setattr(storage, name, fail)
                assert all(failed.acquire(timeout=60) for _ in range(2))
        wait_until(lambda: entries(str(tmp_path))[1]["expires"] > before)
        lease.check()


def _no_connection(*_: Any) -> None:
    raise StorageError("no connection")


def test_a_storage_outage_at_release_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched, acquire(str(tmp_path)):
        patched.setattr(storage, "write_bytes", _no_connection)
    assert not entries(str(tmp_path))[1]["released"]


def test_a_storage_outage_at_release_does_not_hide_the_error_that_ended_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(lease: Lease) -> None:
        with lease:
            monkeypatch.setattr(storage, "write_bytes", _no_connection)
            raise ZeroDivisionError

    lease = acquire(str(tmp_path))
    with pytest.raises(ZeroDivisionError):
        end(lease)


def test_a_past_number_is_not_reused(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run pauses after reading; its number is free again because two others came, went, and were cleaned up."""
    read = lease_module._latest

    def paused(folder: str) -> Any:
        latest = read(folder)
        monkeypatch.setattr(lease_module, "_latest", read)
        for number in (2, 3):
            with acquire(root) as other:
                assert other.number == number
        return latest

    with acquire(root):
        pass
    monkeypatch.setattr(lease_module, "_latest", paused)
    with acquire(root) as lease:
        assert lease.number == 4 and list(entries(root)) == [4]


def test_entries_written_in_the_same_instant_differ(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An object with identical bytes would count as the run's own, written by an attempt whose response was lost."""
    create, written = storage.create_bytes, []

    def recorded(uri: str, data: bytes) -> bool:
        written.append(data)
        return create(uri, data)

    moment = datetime.now(UTC)

    class StoppedClock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return moment

    monkeypatch.setattr(storage, "create_bytes", recorded)
    monkeypatch.setattr(lease_module, "datetime", StoppedClock)
    for folder in ("one", "two"):
        with acquire(join(s3, folder)):
            pass
    assert written[0] != written[1]


def test_other_files_in_the_folder_are_ignored(root: str) -> None:
    for name in ("notes.txt", "copy of 00000001.json", ".00000009.json.draft", "7.json", "old/00000009.json"):
        uri = join(root, "_leases", "behaviors", name.replace(" ", "_"))
        storage.write_bytes(uri, b"{}")
    with acquire(root) as lease:
        assert lease.number == 1


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b"[" * 100_000, b"\xff", b'{"number": 1, "colour": "red"}'])
def test_an_unreadable_entry_is_named(tmp_path: Path, data: bytes) -> None:
    uri = join(str(tmp_path), "_leases", "behaviors", "00000001.json")
    storage.write_bytes(uri, data)
    with pytest.raises(StorageError, match=r"00000001\.json cannot be read as a lease .* delete it"):
        acquire(str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"ttl_s": 0.0}, "ttl_s, 0.0, is not a number of seconds above 0"),
        ({"ttl_s": float("nan")}, "ttl_s must be float, not 'nan'"),
        ({"expires": 5}, "expires must be str, not '5'"),
        ({"released": "no"}, "released must be bool, not 'no'"),
        ({"pid": True}, "pid must be int, not 'True'"),
        ({"pid": 2**80, "host": socket.gethostname()}, "there is no process"),
        ({"pid": -1, "host": socket.gethostname()}, "there is no process -1"),
        ({"number": 2}, "its number is 2"),
    ],
)
def test_an_entry_that_no_holder_writes_is_named(tmp_path: Path, fields: dict[str, Any], reason: str) -> None:
    plant(str(tmp_path), 1)
    file = tmp_path / "_leases" / "behaviors" / "00000001.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    with pytest.raises(StorageError, match=rf"00000001\.json cannot be read as a lease \({reason}.*delete it"):
        acquire(str(tmp_path))


@pytest.mark.usefixtures("frequent_renewal")
def test_a_table_has_one_writer(root: str) -> None:
    store = Store.create(join(root, "store"), IDENTITY, 4)
    with store.writer("generations", job="jobs.generate"):
        with pytest.raises(LeaseHeld, match="'generations' is being written by jobs.generate"):
            write_rows(store, "generations", answers("r1"))
        with store.writer("behaviors", job="jobs.embed"):
            pass
    write_rows(store, "generations", answers("r1"))
    assert store.table("generations").lease() == 2
    assert [run["job"] for run in store.table("generations").runs()] == ["test", "jobs.generate"]


def test_numbers_continue_from_the_log_when_lease_objects_are_deleted(root: str) -> None:
    """As after copying only the tables: number 1 would be lower than the last holder's."""
    store = Store.create(join(root, "store"), IDENTITY, 4)
    for name in ("r1", "r2"):
        write_rows(store, "generations", answers(name))
    for file in storage.list_files(join(store.uri, "_leases")):
        storage.delete(file.uri)
    write_rows(store, "generations", answers("r3"))
    assert store.table("generations").lease() == 3 and store.read_generations().num_rows == 3
