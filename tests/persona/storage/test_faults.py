"""Storage behind a proxy that fails, delays or cuts requests: work succeeds, or fails in time and says why."""

import os
import resource
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from persona import storage
from persona.errors import LeaseHeld, StorageError, UsageError
from persona.storage import s3 as objects
from persona.storage.retry import is_transient, retry_transient, timeout_s
from persona.store import log
from persona.store.store import Store
from tests.faulty_s3 import TRANSIENT, FaultyS3
from tests.stores import IDENTITY, answers

# boto3 leaves the connection of an interrupted download to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"),
]
ROWS = pa.table({"n": list(range(100))})


@pytest.fixture
def bad(each_s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """A proxy between the test and each server; it starts without faults."""
    with FaultyS3(os.environ["AWS_ENDPOINT_URL"], seed=7) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small file, one large enough for a multipart upload, and a .json file, which must be copied last."""
    folder = tmp_path / "plug"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "weights").write_bytes(os.urandom(9 * 2**20))
    (folder / "card.md").write_bytes(b"card")
    (folder / "plug.json").write_bytes(b"{}")
    return folder


def set_time_limit(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setenv("PERSONA_STORAGE_TIMEOUT_S", str(seconds))


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_work_succeeds_although_some_requests_fail(
    each_s3: str, bad: FaultyS3, share: float, folder: Path, tmp_path: Path
) -> None:
    bad.share, bad.delay_s = share, 0.1
    files = {f"{each_s3}/in/{i:02d}.json": os.urandom(100 * i) for i in range(8)}
    for uri, data in files.items():
        storage.write_bytes(uri, data)
        assert storage.create_bytes(f"{uri}.lease", data)
        assert not storage.create_bytes(f"{uri}.lease", b"another writer")
    assert [file.uri for file in storage.list_files(f"{each_s3}/in", (".json",))] == list(files)
    for uri, data in files.items():
        assert storage.read_bytes(uri) == data
        assert storage.read_bytes(f"{uri}.lease") == data
        storage.delete(f"{uri}.lease")
        assert not storage.exists(f"{uri}.lease")
    storage.copy_folder(str(folder), f"{each_s3}/there")
    storage.copy_folder(f"{each_s3}/there", f"{each_s3}/copy")
    storage.copy_folder(f"{each_s3}/copy", str(tmp_path / "back"))
    for path in ("sub/weights", "card.md", "plug.json"):
        assert (tmp_path / "back" / path).read_bytes() == (folder / path).read_bytes()
    assert bad.faults > 0.5 * share * bad.done.total(), bad.done  # half of the expected number, for this seed


def test_a_store_that_responds_with_errors_becomes_reachable(
    each_s3: str, bad: FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad.share, bad.kinds, bad.max_faults = 1.0, ("error", "slow_down"), 6  # more than the client itself retries
    storage.check_reachable(f"{each_s3}/x", flag="--store", write=True)
    assert bad.done.total() == 7

    bad.max_faults = float("inf")
    set_time_limit(monkeypatch, 1.0)
    with pytest.raises(StorageError, match=r"--store: .* cannot list .*/x: retried for "):
        storage.check_reachable(f"{each_s3}/x", flag="--store", write=True)


def everything(s3: str, folder: Path) -> dict[str, Callable[[], object]]:
    """Every kind of storage work, by the beginning of its error message."""
    uri = f"{s3}/x/file"
    return {
        f"cannot read {uri}": lambda: storage.read_bytes(uri),
        f"cannot write {uri}-2": lambda: storage.write_bytes(f"{uri}-2", b"1"),
        f"cannot write {uri}-3": lambda: storage.create_bytes(f"{uri}-3", b"1"),
        f"cannot delete {uri}-4": lambda: storage.delete(f"{uri}-4"),
        f"cannot look for {uri}-5": lambda: storage.exists(f"{uri}-5"),
        f"cannot list {s3}/x": lambda: storage.list_files(f"{s3}/x"),
        f"cannot copy {folder}/card.md to {s3}/y/card.md": lambda: storage.copy_folder(str(folder), f"{s3}/y"),
        f"cannot list {s3}/z": lambda: storage.copy_folder(f"{s3}/z", str(folder.parent / "back")),
        f"open {s3}/t": lambda: retry_transient(
            lambda: DeltaTable(f"{s3}/t", storage_options=storage.delta_options(s3)), f"open {s3}/t"
        ),
        f"arrow {uri}": lambda: retry_transient(lambda: arrow_read(uri), f"arrow {uri}"),
    }


def arrow_read(uri: str) -> bytes:
    filesystem, path = storage.open_filesystem(uri)
    with filesystem.open_input_file(path) as file:
        return file.read()


@pytest.mark.parametrize("kind", ["error", "slow_down", "reset", "delay"])
def test_a_store_that_always_fails_ends_all_work_within_the_time_limit(
    s3: str, monkeypatch: pytest.MonkeyPatch, folder: Path, kind: str
) -> None:
    set_time_limit(monkeypatch, 3.0)
    works = everything(s3, folder)
    with FaultyS3(os.environ["AWS_ENDPOINT_URL"], seed=7, share=1.0, kinds=(kind,)) as bad:
        monkeypatch.setenv("AWS_ENDPOINT_URL", bad.url)
        bad.delay_s = 60.0
        assert_all_give_up_in_time(works)
        assert bad.done.total() >= 2 * len(works)


def test_a_closed_port_is_retried_within_the_time_limit(s3: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    set_time_limit(monkeypatch, 3.0)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        assert_all_give_up_in_time(everything(s3, folder))


def assert_all_give_up_in_time(works: Mapping[str, Callable[[], object]]) -> None:
    def fail(what: str) -> float:
        began = time.monotonic()
        with pytest.raises(StorageError) as caught:
            works[what]()
        assert str(caught.value).startswith(f"{what}: retried for "), caught.value
        assert "\n" not in str(caught.value) and caught.value.__cause__ is not None
        return time.monotonic() - began

    with ThreadPoolExecutor(len(works)) as pool:
        took_s = list(pool.map(fail, works))
    # Two seconds of slack for threads on a busy machine.
    assert max(took_s) < timeout_s() + 2.0, dict(zip(works, took_s, strict=True))


def test_a_denied_request_is_not_retried(each_s3: str, bad: FaultyS3, folder: Path) -> None:
    bad.share, bad.kinds = 1.0, ("denied",)
    for what, work in everything(each_s3, folder).items():
        bad.done.clear()
        with pytest.raises((StorageError, OSError), match="(?i)access.?denied|Forbidden") as caught:
            work()
        if isinstance(caught.value, StorageError):
            assert str(caught.value).startswith(what) and "tried for" not in str(caught.value)
        assert bad.done == {"denied": 1}, what


def list_objects(bucket: str) -> None:
    with objects.client(bucket) as client:
        client.list_objects_v2(Bucket=bucket)


@pytest.mark.parametrize("kind", [*TRANSIENT, "denied"])
def test_transient_errors_of_every_library_are_recognized(s3: str, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    set_time_limit(monkeypatch, 8.0)
    objects.put(f"{s3}/file", b"12")
    write_deltalake(f"{s3}/t", ROWS, storage_options=storage.delta_options(s3))
    with FaultyS3(os.environ["AWS_ENDPOINT_URL"], seed=7, kinds=(kind,)) as bad:
        monkeypatch.setenv("AWS_ENDPOINT_URL", bad.url)
        bad.delay_s = 60.0
        options = {**storage.delta_options(s3), "max_retries": "0"}
        tables = [DeltaTable(f"{s3}/t", storage_options=options) for _ in range(3)]
        filesystem, path = storage.open_filesystem(s3)
        works: list[Callable[[], object]] = [
            lambda: objects.get(f"{s3}/file"),
            lambda: objects.put(f"{s3}/file", b"12"),
            lambda: objects.head(f"{s3}/file"),
            lambda: list_objects(s3[5:]),
            lambda: filesystem.get_file_info(f"{path}/file"),
            lambda: arrow_read(f"{s3}/file"),
            lambda: filesystem.open_output_stream(f"{path}/new").close(),
            lambda: DeltaTable(f"{s3}/t", storage_options=options),
            tables[0].update_incremental,
            lambda: pa.table(tables[1].scan(columns=["n"])),
            lambda: write_deltalake(tables[2], ROWS, mode="append"),
        ]
        bad.share = 1.0
        with ThreadPoolExecutor(len(works)) as pool:
            errors = [done.exception() for done in [pool.submit(work) for work in works]]
    for error in errors:
        assert error is not None
        assert is_transient(error) == (kind != "denied"), repr(error)


@pytest.mark.parametrize("kind", ["lost", "false_error", "cut"])
def test_a_creator_wins_even_if_the_response_is_lost(each_s3: str, bad: FaultyS3, kind: str) -> None:
    bad.share, bad.kinds, bad.max_faults = 1.0, (kind,), 1
    assert storage.create_bytes(f"{each_s3}/lease", b"mine")
    assert bad.done[kind] == 1 and storage.read_bytes(f"{each_s3}/lease") == b"mine"


def test_a_conflict_is_not_mistaken_for_an_existing_file(each_s3: str, bad: FaultyS3) -> None:
    bad.share, bad.kinds, bad.max_faults = 1.0, ("conflict",), 2
    assert storage.create_bytes(f"{each_s3}/lease", b"mine")
    bad.max_faults = 2
    assert not storage.create_bytes(f"{each_s3}/lease", b"another writer")
    assert bad.done["conflict"] == 4 and storage.read_bytes(f"{each_s3}/lease") == b"mine"


def test_a_conflict_is_not_mistaken_for_a_commit_of_another_run(each_s3: str, bad: FaultyS3) -> None:
    bad.share, bad.kinds, bad.pattern = 1.0, ("conflict",), r"PUT .*/generations/_delta_log/"
    bad.max_faults = 2
    store = Store.create(f"{each_s3}/store", IDENTITY, 4)
    assert bad.done["conflict"] == 2
    bad.max_faults = 2
    with store.writer("generations", job="jobs.generate") as writer:  # claiming the lease is a commit
        assert bad.done["conflict"] == 4
        bad.max_faults = 2
        writer.add(store.stage("generations", answers("r-1", "r-2")))
    assert bad.done["conflict"] == 6
    assert sorted(store.read_generations()["request_id"].to_pylist()) == ["r-1", "r-2"]


def test_a_denied_commit_ends_at_once_with_its_reason(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.create(f"{s3}/store", IDENTITY, 4)
    with FaultyS3(os.environ["AWS_ENDPOINT_URL"], seed=7, kinds=("denied",)) as bad:
        monkeypatch.setenv("AWS_ENDPOINT_URL", bad.url)
        bad.pattern = r"PUT .*/_delta_log/"
        with store.writer("generations", job="jobs.generate") as writer:
            staged = store.stage("generations", answers("r-1"))
            bad.share = 1.0
            with pytest.raises(StorageError, match="^cannot write to the table .*lacked the necessary privileges"):
                writer.add(staged)
        assert bad.done["denied"] == 1
        bad.share = 0.0
    monkeypatch.undo()
    assert Store.open(store.uri).read_generations().num_rows == 0


@pytest.mark.parametrize("work", ["commit", "write_bytes", "create_bytes"])
def test_a_full_disk_ends_work_at_once_with_its_reason(tmp_path: Path, work: str) -> None:
    """The limit on the size of a file stands for a full disk, and gives the same kind of error."""
    store = Store.create(str(tmp_path / "store"), IDENTITY, 4)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with store.writer("generations", job="jobs.generate") as writer:
        staged = store.stage("generations", answers("r-1"))
        works: dict[str, Callable[[], object]] = {
            "commit": lambda: writer.add(staged),
            "write_bytes": lambda: storage.write_bytes(str(tmp_path / "file"), bytes(100)),
            "create_bytes": lambda: storage.create_bytes(str(tmp_path / "file"), bytes(100)),
        }
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
        try:
            with pytest.raises(StorageError, match="^cannot write .*File too large") as caught:
                works[work]()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "retried for" not in str(caught.value)


def test_a_commit_costs_the_same_however_many_versions_there_are(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.create(f"{s3}/store", IDENTITY, 4)
    with FaultyS3(os.environ["AWS_ENDPOINT_URL"], seed=7) as counting:
        monkeypatch.setenv("AWS_ENDPOINT_URL", counting.url)
        n_requests: list[int] = []
        with store.writer("generations", job="jobs.generate") as writer:
            for i in range(log.CHECKPOINT_EVERY + 3):
                staged = store.stage("generations", answers(f"r-{i}"))
                counting.asked.clear()
                writer.add(staged)
                n_requests.append(len(counting.asked))
        # One commit writes a checkpoint, and the next one reads it.
        *others, after_checkpoint, with_checkpoint = sorted(n_requests[1:])
        assert set(others) == {8} and after_checkpoint <= 16 and with_checkpoint < 4 * log.CHECKPOINT_EVERY
        counting.asked.clear()
        assert Store.open(store.uri).table("generations").version() == log.CHECKPOINT_EVERY + 4
        assert len(counting.asked) < 4 * log.CHECKPOINT_EVERY


def test_a_large_file_appears_whole_or_not_at_all(
    each_s3: str, bad: FaultyS3, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad.kinds, bad.pattern = ("reset",), "partNumber=2"
    bad.share = 1.0
    set_time_limit(monkeypatch, 2.0)
    with pytest.raises(StorageError, match="cannot copy .*weights"):
        storage.copy_folder(str(folder), f"{each_s3}/there")
    assert [file.uri for file in storage.list_files(f"{each_s3}/there")] == [f"{each_s3}/there/card.md"]
    bad.share = 0.0
    monkeypatch.delenv("PERSONA_STORAGE_TIMEOUT_S")
    storage.copy_folder(str(folder), f"{each_s3}/there")
    bad.share, bad.kinds, bad.pattern = 1.0, ("cut",), "GET .*weights"
    set_time_limit(monkeypatch, 2.0)
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "previous").touch()
    with pytest.raises(StorageError, match="cannot copy .*weights"):
        storage.copy_folder(f"{each_s3}/there", str(tmp_path / "back"))
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["previous"]


def test_work_is_retried_until_it_succeeds() -> None:
    answers = iter([ConnectionResetError("reset"), TimeoutError("timeout"), None])

    def work() -> str:
        if error := next(answers):
            raise error
        return "done"

    assert retry_transient(work, "cannot work") == "done"


def test_a_permanent_error_is_raised_at_once() -> None:
    attempts = []

    def work() -> None:
        attempts.append(1)
        raise PermissionError("denied")

    with pytest.raises(PermissionError, match="denied"):
        retry_transient(work, "cannot work")
    assert len(attempts) == 1


def test_the_caller_decides_what_is_retried_how_long_and_what_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    set_time_limit(monkeypatch, 3600)
    attempts = []

    def work() -> None:
        attempts.append(1)
        raise KeyError("key") if len(attempts) < 9 else ConnectionError("connection")

    def is_key_error(error: BaseException) -> bool:
        return isinstance(error, KeyError)

    with pytest.raises(ConnectionError):
        retry_transient(work, "cannot work", is_transient=is_key_error, give_up_s=5.0, pauses_s=(0.001, 0.001))
    assert len(attempts) == 9

    for limit_s in (0.0, 0.4):
        attempts.clear()
        with pytest.raises(LeaseHeld, match="^cannot work: retried for 0 s; last error: KeyError: 'key'$") as caught:
            retry_transient(
                work,
                "cannot work",
                is_transient=is_key_error,
                give_up_s=limit_s,
                pauses_s=(0.1, 0.1),
                error_class=LeaseHeld,
            )
        assert isinstance(caught.value.__cause__, KeyError)
        assert len(attempts) > 1 if limit_s else len(attempts) == 1


@pytest.mark.parametrize("given", ["soon", "0", "-1", "inf", "nan"])
def test_an_invalid_time_limit_is_refused(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("PERSONA_STORAGE_TIMEOUT_S", given)
    with pytest.raises(UsageError, match="PERSONA_STORAGE_TIMEOUT_S"):
        timeout_s()
