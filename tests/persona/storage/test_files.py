"""Paths and object stores: refused URIs, reading and writing, and no leaked secrets."""

import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from persona import storage
from persona.errors import PersonaError, StorageError, UsageError
from persona.storage import s3
from persona.storage.s3 import client as s3_client


def file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_local_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.check_uri("a b/é/", flag="--store") == str(tmp_path / "a b" / "é")
    assert storage.check_uri(f"file://{tmp_path}/x", flag="--store") == str(tmp_path / "x")


def test_an_s3_uri_loses_its_extra_slashes() -> None:
    assert storage.check_uri("s3://bucket/a//b/", flag="--store") == "s3://bucket/a/b"
    assert storage.check_uri("s3://bucket", flag="--store") == "s3://bucket"


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("s3://", "no bucket"),
        ("s3:///key", "no bucket"),
        ("s3://Bucket_1/x", "not a valid bucket name"),
        ("s3://bucket/a b", "a space"),
        ("s3://bucket/é", "'é'"),
        ("s3://bucket/a\nb", r"\n"),
        ("s3://bucket/x?region=y", "'?'"),
        ("s3://bucket/../x", "contains . or .."),
        ("gs://bucket/x", "Google Cloud Storage (gs://) is not supported"),
        ("az://container/x", "Azure Storage (az://) is not supported"),
        ("abfss://container@account/x", "Azure Storage (abfss://) is not supported"),
        ("s3a://bucket/x", "s3a://"),
    ],
)
def test_a_uri_that_would_be_misread_is_refused_by_flag(uri: str, expected: str) -> None:
    with pytest.raises(UsageError, match="^--store: ") as caught:
        storage.check_uri(uri, flag="--store")
    assert expected in str(caught.value)


def test_a_secret_in_a_uri_is_not_repeated() -> None:
    with pytest.raises(UsageError) as caught:
        storage.check_uri("s3://key:hush@bucket/x", flag="--store")
    assert "hush" not in str(caught.value)


def test_a_part_of_a_file_is_read(each_root: str) -> None:
    uri = storage.join(each_root, "a.run")
    storage.write_bytes(uri, b"0123456789")
    assert [storage.read_range(uri, start, 4) for start in (0, 3, 6)] == [b"0123", b"3456", b"6789"]
    with pytest.raises(StorageError, match="has only 2 of 4 bytes"):
        storage.read_range(uri, 8, 4)


def test_written_files_are_read_and_listed(each_root: str) -> None:
    for name in ["b.jsonl", "sub/a.jsonl", "sub/x.txt", "_hidden/c.jsonl", ".d.jsonl"]:
        storage.write_bytes(storage.join(each_root, "in", name), name.encode())
    folder = storage.join(each_root, "in")
    listed = storage.list_files(folder, [".jsonl"])
    assert [entry.uri for entry in listed] == [storage.join(folder, "b.jsonl"), storage.join(folder, "sub/a.jsonl")]
    assert [entry.size_bytes for entry in listed] == [7, 11]
    assert storage.read_bytes(listed[1].uri) == b"sub/a.jsonl"
    assert storage.list_files(storage.join(folder, "sub/x.txt"), [".jsonl"])[0].size_bytes == 9
    assert storage.list_files(storage.join(each_root, "nowhere")) == []
    assert storage.exists(folder) and not storage.exists(storage.join(each_root, "nowhere"))


def test_writing_replaces_the_file_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    target = tmp_path / "state.json"
    storage.write_bytes(str(target), b"1")
    storage.write_bytes(str(target), b"2")
    assert target.read_bytes() == b"2" and file_names(tmp_path) == ["state.json"]


def test_one_of_twelve_concurrent_creators_wins(each_root: str) -> None:
    uri, writers = storage.join(each_root, "lease.json"), [f"writer {i}".encode() for i in range(12)]
    barrier = threading.Barrier(len(writers))

    def create(data: bytes) -> bool:
        barrier.wait()
        return storage.create_bytes(uri, data)

    with ThreadPoolExecutor(len(writers)) as pool:
        winners = [data for data, ok in zip(writers, pool.map(create, writers), strict=True) if ok]
    assert winners == [storage.read_bytes(uri)]
    assert not storage.create_bytes(uri, b"late") and storage.read_bytes(uri) == winners[0]
    assert [entry.uri for entry in storage.list_files(each_root)] == [uri]


def test_deleting_is_idempotent(each_root: str) -> None:
    uri, other = storage.join(each_root, "file"), storage.join(each_root, "file-2")
    for name in (uri, other):
        storage.write_bytes(name, b"1")
    storage.delete(uri)
    storage.delete(uri)
    assert not storage.exists(uri) and storage.exists(other)
    assert storage.create_bytes(uri, b"2") and storage.read_bytes(uri) == b"2"


def test_a_common_name_prefix_is_not_a_folder(each_root: str) -> None:
    storage.write_bytes(storage.join(each_root, "a-b", "file"), b"1")
    storage.write_bytes(storage.join(each_root, "a.txt"), b"1")
    assert not storage.exists(storage.join(each_root, "a")) and storage.list_files(storage.join(each_root, "a")) == []


def test_listing_follows_all_pages(other_s3: str) -> None:
    with s3.client(other_s3[5:]) as client:
        for i in range(1003):
            client.put_object(Bucket=other_s3[5:], Key=f"many/{i:04d}", Body=b"")
    assert len(storage.list_files(f"{other_s3}/many")) == 1003


def test_a_key_with_an_empty_part_is_named(s3: str) -> None:
    with s3_client(s3[5:]) as client:
        client.put_object(Bucket=s3[5:], Key="in//a.jsonl", Body=b"{}")
    with pytest.raises(StorageError, match="the key 'in//a.jsonl' below .* has an empty part"):
        storage.list_files(f"{s3}/in")


def test_a_folder_is_copied_within_the_store(each_s3: str) -> None:
    data = os.urandom(9 * 2**20)  # large enough for a multipart upload
    storage.write_bytes(f"{each_s3}/plug/weights", data)
    storage.write_bytes(f"{each_s3}/plug/sub/plug.json", b"{}")
    storage.copy_folder(f"{each_s3}/plug", f"{each_s3}/copy")
    assert storage.read_bytes(f"{each_s3}/copy/weights") == data
    assert storage.read_bytes(f"{each_s3}/copy/sub/plug.json") == b"{}"


def test_reading_a_missing_file_is_a_storage_error(each_root: str) -> None:
    with pytest.raises(StorageError, match="nothing-here"):
        storage.read_bytes(storage.join(each_root, "nothing-here"))


def test_a_folder_goes_to_the_store_and_back(each_root: str, tmp_path: Path) -> None:
    plug = tmp_path / "plug"
    (plug / "sub").mkdir(parents=True)
    (plug / "plug.json").write_bytes(b"{}")
    (plug / "sub" / "weights").write_bytes(os.urandom(100_000))
    there, back = storage.join(each_root, "there"), tmp_path / "back"
    back.mkdir()
    (back / "old").write_bytes(b"of an earlier copy")
    storage.copy_folder(str(plug), there)
    storage.copy_folder(there, str(back))
    assert (back / "sub" / "weights").read_bytes() == (plug / "sub" / "weights").read_bytes()
    assert file_names(back) == ["plug.json", "sub"]
    assert not [name for name in file_names(tmp_path) if name.startswith(".")]
    with storage.local_folder(there) as folder:
        assert (folder / "plug.json").read_bytes() == b"{}"


def test_copying_nothing_is_an_error_and_leaves_the_target(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    with pytest.raises(StorageError, match="no files to copy"):
        storage.copy_folder(str(tmp_path / "nothing"), str(tmp_path / "kept"))
    assert file_names(tmp_path / "kept") == ["file"]


def test_a_filesystem_uses_the_endpoint_of_the_environment(each_s3: str) -> None:
    filesystem, path = storage.open_filesystem(f"{each_s3}/x")
    assert isinstance(filesystem, pafs.S3FileSystem) and path == f"{each_s3[5:]}/x"
    assert filesystem.get_file_info(each_s3[5:]).type == pafs.FileType.Directory


def test_reachable_paths_pass(each_root: str) -> None:
    storage.write_bytes(storage.join(each_root, "x", "file"), b"1")
    storage.check_reachable(storage.join(each_root, "x"), flag="--histories")
    storage.check_reachable(storage.join(each_root, "new", "folder"), flag="--store", write=True)


def test_nothing_to_read_is_refused(each_root: str) -> None:
    with pytest.raises(UsageError, match="--histories: .*nowhere"):
        storage.check_reachable(storage.join(each_root, "nowhere"), flag="--histories")


def test_writing_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="--store: .*cannot be written"):
        storage.check_reachable(str(tmp_path / "file" / "store"), flag="--store", write=True)


def test_a_bucket_that_does_not_exist_is_refused(each_s3: str) -> None:
    with pytest.raises(UsageError, match="--store: there is no bucket 'absent-bucket'"):
        storage.check_reachable("s3://absent-bucket/x", flag="--store", write=True)


def test_missing_credentials_name_the_variables_to_set(each_s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UsageError, match="--store: .*AWS_ACCESS_KEY_ID"):
        storage.check_reachable(f"{each_s3}/x", flag="--store", write=True)


def test_an_unknown_profile_is_named_rather_than_the_network(
    each_s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(UsageError, match=r"--store: .*profile \(nobody\) could not be found; check the AWS_ variables"):
        storage.check_reachable(f"{each_s3}/x", flag="--store", write=True)


def test_an_unreachable_endpoint_is_reported_without_the_secret(each_s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(PersonaError) as caught:
            storage.check_reachable(f"{each_s3}/x", flag="--store")
    assert isinstance(caught.value, StorageError) and "AWS_ENDPOINT_URL" in str(caught.value)
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in str(caught.value)


def test_delta_options_hold_no_credentials(each_s3: str) -> None:
    options = storage.delta_options(f"{each_s3}/store")
    assert options["AWS_ENDPOINT_URL"] == os.environ["AWS_ENDPOINT_URL"]
    assert not set(options.values()) & {os.environ["AWS_SECRET_ACCESS_KEY"], os.environ["AWS_ACCESS_KEY_ID"]}


def test_a_folder_that_comes_and_goes_can_be_listed(tmp_path: Path) -> None:
    """Like the folder of leases when several runs start at once."""
    folder = tmp_path / "folder"
    ended = threading.Event()

    def come_and_go() -> None:
        while not ended.is_set():
            folder.mkdir()
            folder.rmdir()

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(5_000):
            assert storage.list_files(str(folder)) == []
    finally:
        ended.set()
        thread.join()
