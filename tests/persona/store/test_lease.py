"""The lease: one holder at a time, who is known by name, and whose end nobody has to wait for longer than needed."""

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
from tests.stores import IDENTITY, answers

LONG_S = 600.0  # nobody waits for so long: whoever gets a lease in time did not wait for it to run out
_HOLDER = """
import sys
from persona.errors import LeaseHeld
from persona.lease import Lease
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
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases that live for long, so that a busy machine loses none, and are renewed at once, so that no test waits."""
    monkeypatch.setattr(lease_module, "_RENEWALS", 3000)


def entries(root: str) -> dict[int, dict[str, Any]]:
    """All entries of the lease of `behaviors`, by number."""
    files = storage.list_files(join(root, "_leases", "behaviors"))
    return {int(file.uri[-13:-5]): json.loads(storage.read_bytes(file.uri)) for file in files}


def plant(root: str, number: int, **fields: Any) -> bytes:
    """An entry as another machine would have written it; it runs out in an hour."""
    told = {"number": number, "job": "jobs.embed", "host": "elsewhere", "pid": 1, "token": "t"}
    hour = datetime.now(UTC) + timedelta(hours=1)
    data = json.dumps({**told, "since": "2026-01-02T03:04:05+00:00", "expires": hour.isoformat(), **fields}).encode()
    storage.write_bytes(join(root, "_leases", "behaviors", f"{number:08d}.json"), data)
    return data


def acquire(root: str, ttl_s: float = LONG_S, **more: Any) -> Lease:
    return Lease.acquire(root, "behaviors", job="jobs.sync", ttl_s=ttl_s, **more)


def eventually(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def start(root: str, ttl_s: float) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    return subprocess.Popen([sys.executable, "-c", _HOLDER, root, str(ttl_s)], env=environment, **pipes)


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")


def hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_of_several_processes_at_once_exactly_one_holds(root: str) -> None:
    processes = [start(root, 4.0) for _ in range(3)]
    assert [hear(process) for process in processes] == ["ready"] * 3
    for process in processes:
        tell(process)
    told = [hear(process) for process in processes]
    (holder,) = [process for process, words in zip(processes, told, strict=True) if words.startswith("holds")]
    refused = [words for words in told if words.startswith("refused")]
    assert len(refused) == 2 and all(f"jobs.embed (process {holder.pid} on " in words for words in refused)
    for process in processes:
        process.communicate("\n" if process is holder else None)
    assert [entry["released"] for entry in entries(root).values()] == [True]


@pytest.mark.usefixtures("often")
def test_threads_that_fight_for_it_hold_it_one_at_a_time_under_numbers_of_their_own(root: str) -> None:
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


@pytest.mark.usefixtures("often")
def test_a_second_one_learns_who_holds_it_since_when(root: str) -> None:
    with acquire(root):
        since = entries(root)[1]["since"]
        with pytest.raises(LeaseHeld) as caught:
            Lease.acquire(root, "behaviors", job="jobs.embed", ttl_s=LONG_S)
    assert str(caught.value) == (
        f"the table 'behaviors' is being written by jobs.sync (process {os.getpid()} on {socket.gethostname()}), since "
        f"{since}; wait until that run has ended, or end it"
    )
    assert abs(datetime.fromisoformat(since) - datetime.now(UTC)) < timedelta(minutes=5)


def test_tables_have_leases_of_their_own(tmp_path: Path) -> None:
    with acquire(str(tmp_path)), Lease.acquire(str(tmp_path), "personas", job="j", ttl_s=LONG_S) as other:
        assert other.number == 1


def test_one_that_was_given_back_is_taken_at_once_and_numbers_only_grow(root: str) -> None:
    for number in (1, 2, 3):
        with acquire(root) as lease:
            assert lease.number == number
            assert list(entries(root)) == [number]
        assert entries(root)[number]["released"]


def test_one_whose_process_was_killed_is_taken_at_once(tmp_path: Path) -> None:
    process = start(str(tmp_path), LONG_S)
    tell(process)
    assert [hear(process), hear(process)] == ["ready", "holds 1"]
    process.kill()
    process.communicate()
    entry = entries(str(tmp_path))[1]
    assert not entry["released"] and datetime.fromisoformat(entry["expires"]) > datetime.now(UTC)
    with acquire(str(tmp_path)) as lease:
        assert lease.number == 2


def test_one_of_another_machine_is_taken_when_it_has_run_out(root: str) -> None:
    plant(root, 7, expires=(datetime.now(UTC) - timedelta(seconds=1)).isoformat())
    with acquire(root) as lease:
        assert lease.number == 8 and list(entries(root)) == [8]


def test_one_of_another_machine_is_taken_when_it_was_not_renewed_whatever_its_clock_says(root: str) -> None:
    plant(root, 7, expires=(datetime.now(UTC) + timedelta(days=400)).isoformat())
    started = time.monotonic()
    with acquire(root, ttl_s=0.5) as lease:
        assert lease.number == 8 and time.monotonic() - started >= 0.5


def test_one_that_runs_out_while_it_is_watched_is_taken(tmp_path: Path) -> None:
    plant(str(tmp_path), 7, expires=(datetime.now(UTC) + timedelta(seconds=0.2)).isoformat())
    with acquire(str(tmp_path), ttl_s=LONG_S) as lease:
        assert lease.number == 8


def test_one_that_is_given_back_while_it_is_watched_is_taken(tmp_path: Path) -> None:
    plant(str(tmp_path), 7)
    threading.Timer(0.2, plant, [str(tmp_path), 7], {"released": True}).start()
    with acquire(str(tmp_path), ttl_s=LONG_S) as lease:
        assert lease.number == 8


@pytest.mark.usefixtures("often")
def test_a_holder_notices_that_it_was_replaced_and_leaves_its_successor_alone(root: str) -> None:
    with acquire(root) as lease:
        lease.check()
        successor = plant(root, 2, job="jobs.forget", pid=99)

        def is_lost() -> bool:
            try:
                lease.check()
            except LeaseLost:
                return True
            return False

        eventually(is_lost)
        with pytest.raises(LeaseLost, match=r"jobs.forget \(process 99 on elsewhere\) took over"):
            lease.check()
    assert storage.read_bytes(join(root, "_leases", "behaviors", "00000002.json")) == successor
    assert not entries(root)[1]["released"]


def test_a_holder_that_never_notices_leaves_its_successor_alone(root: str) -> None:
    with acquire(root) as lease:
        successor = plant(root, 2)
        lease.check()
    assert storage.read_bytes(join(root, "_leases", "behaviors", "00000002.json")) == successor
    with acquire(root, ttl_s=0.2) as third:
        assert third.number == 3 and list(entries(root)) == [3]


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("error", [StorageError("the store is away"), PermissionError("stale handle")])
def test_a_store_that_is_away_for_a_while_does_not_end_the_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    failed = threading.Semaphore(0)

    def away(*_: Any) -> None:
        failed.release()
        raise error

    with acquire(str(tmp_path)) as lease:
        before = entries(str(tmp_path))[1]["expires"]
        for name in ("write_bytes", "list_files"):
            with monkeypatch.context() as patched:
                patched.setattr(storage, name, away)
                assert all(failed.acquire(timeout=60) for _ in range(2))
        eventually(lambda: entries(str(tmp_path))[1]["expires"] > before)
        lease.check()


def _away(*_: Any) -> None:
    raise StorageError("the store is away")


def test_a_store_that_is_away_at_the_end_does_not_undo_what_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched, acquire(str(tmp_path)):
        patched.setattr(storage, "write_bytes", _away)
    assert not entries(str(tmp_path))[1]["released"]


def test_a_store_that_is_away_at_the_end_does_not_hide_why_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(lease: Lease) -> None:
        with lease:
            monkeypatch.setattr(storage, "write_bytes", _away)
            raise ZeroDivisionError

    lease = acquire(str(tmp_path))
    with pytest.raises(ZeroDivisionError):
        end(lease)


def test_a_number_of_the_past_is_not_given_again(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who looks, is paused, and finds the next number free, since two others have come, gone and been cleared away."""
    look = lease_module._last

    def paused(folder: str) -> Any:
        seen = look(folder)
        monkeypatch.setattr(lease_module, "_last", look)
        for number in (2, 3):
            with acquire(root) as other:
                assert other.number == number
        return seen

    with acquire(root):
        pass
    monkeypatch.setattr(lease_module, "_last", paused)
    with acquire(root) as lease:
        assert lease.number == 4 and list(entries(root)) == [4]


def test_two_that_write_at_the_same_moment_do_not_take_each_other_for_themselves(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that has an entry with the very same bytes counts as one whose answer was lost."""
    create, written = storage.create_bytes, []

    def twice(uri: str, data: bytes) -> bool:
        written.append(data)
        return create(uri, data)

    moment = datetime.now(UTC)

    class Stopped(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return moment

    monkeypatch.setattr(storage, "create_bytes", twice)
    monkeypatch.setattr(lease_module, "datetime", Stopped)
    for folder in ("one", "two"):
        with acquire(join(s3, folder)):
            pass
    assert written[0] != written[1]


def test_strange_files_beside_the_entries_do_no_harm(root: str) -> None:
    for name in ("notes.txt", "copy of 00000001.json", ".00000009.json.draft"):
        uri = join(root, "_leases", "behaviors", name.replace(" ", "_"))
        storage.write_bytes(uri, b"{}")
    with acquire(root) as lease:
        assert lease.number == 1


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b'{"number": 1, "colour": "red"}'])
def test_an_entry_that_cannot_be_read_is_named(tmp_path: Path, data: bytes) -> None:
    uri = join(str(tmp_path), "_leases", "behaviors", "00000001.json")
    storage.write_bytes(uri, data)
    with pytest.raises(StorageError, match=r"00000001\.json cannot be read as a lease .* delete it"):
        acquire(str(tmp_path))


@pytest.mark.usefixtures("often")
def test_a_store_has_one_writer_a_table(root: str) -> None:
    store = Store.create(join(root, "store"), IDENTITY, 4)
    with store.writer("generations", job="jobs.generate"):
        with pytest.raises(LeaseHeld, match="'generations' is being written by jobs.generate"):
            store.write("generations", answers("r1"))
        with store.writer("behaviors", job="jobs.embed"):
            pass
    store.write("generations", answers("r1"))
    assert store.table("generations").lease() == 2
    assert [run["job"] for run in store.table("generations").runs()] == ["a single write", "jobs.generate"]


def test_leases_that_were_deleted_start_above_what_the_log_knows(root: str) -> None:
    """As after a copy of the tables alone: number 1 would be older than the last holder's."""
    store = Store.create(join(root, "store"), IDENTITY, 4)
    for name in ("r1", "r2"):
        store.write("generations", answers(name))
    for file in storage.list_files(join(store.uri, "_leases")):
        storage.delete(file.uri)
    store.write("generations", answers("r3"))
    assert store.table("generations").lease() == 3 and store.read_generations().num_rows == 3
