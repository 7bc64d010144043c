"""What the log of a large table costs: CPU seconds of this process, and requests to an S3 server.

    python tests/benchmarks/log_size.py --files 20000

Makes a log of that many files of `behaviors` without the files themselves, on an S3 server in a process of its own.
"""

import argparse
import os
import pickle
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import boto3
import pyarrow as pa

from persona.store.data_files import DataFile
from persona.store.store import Store
from persona.store.writer import Writer, staged_files
from tests.conftest import s3_process
from tests.recorded_s3 import RecordedS3
from tests.stores import IDENTITY

_FILES_PER_COMMIT = 500
_USERS_PER_FILE = 500
_FILES_PER_BUCKET = 10


def data_file(number: int) -> DataFile:
    """An entry of the log; there is no such file."""
    bucket, first = divmod(number, _FILES_PER_BUCKET)
    users = (f"user-{first * _USERS_PER_FILE:09}", f"user-{(first + 1) * _USERS_PER_FILE - 1:09}")
    path = f"bucket={bucket}/part-{uuid.uuid4().hex}.parquet"
    return DataFile(path=path, partition=str(bucket), n_rows=50_000, size_bytes=80 * 10**6, stats={"user_id": users})


def staged(numbers: range, change: str = "new") -> pa.Table:
    """Entries as workers send them."""
    return staged_files((data_file(number), change) for number in numbers)


@contextmanager
def writing(store: Store) -> Iterator[Writer]:
    with store.writer("behaviors", job="benchmark") as writer:
        yield writer


def measured(what: str, requests: RecordedS3, work: Callable[[], object]) -> object:
    """The result of `work`; prints its CPU seconds and its requests."""
    requests.asked.clear()
    began, started = time.process_time(), time.perf_counter()
    result = work()
    cpu_s, wall_s = time.process_time() - began, time.perf_counter() - started
    counts = Counter("LIST" if "list-type" in asked else asked.split()[0] for asked in requests.asked)
    asked = ", ".join(f"{n} {method}" for method, n in sorted(counts.items())) or "none"
    print(f"{what:40} {cpu_s:8.3f} CPU s {wall_s:8.2f} s   requests: {asked}", flush=True)
    return result


def main(n_files: int) -> None:
    with s3_process() as endpoint, RecordedS3(endpoint) as requests:
        os.environ |= {"AWS_ENDPOINT_URL": requests.url, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
        os.environ |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
        boto3.client("s3").create_bucket(Bucket="benchmark")
        store = Store.create("s3://benchmark/store", IDENTITY, n_files)
        with writing(store) as writer:
            for start in range(0, n_files, _FILES_PER_COMMIT):
                writer.add(staged(range(start, min(start + _FILES_PER_COMMIT, n_files))))
        print(f"{n_files:,} files, version {store.version('behaviors')}")

        opened = measured("open", requests, lambda: Store.open(store.uri))
        assert isinstance(opened, Store)
        snapshot = measured("snapshot", requests, lambda: opened.snapshot("behaviors"))
        packed = measured("pickle the snapshot", requests, lambda: pickle.dumps(snapshot))
        assert isinstance(packed, bytes)
        print(f"{'':40} {len(packed):,} bytes")
        measured("a task: unpack, files of one bucket", requests, lambda: _files(packed))
        with writing(opened) as writer:
            measured("commit", requests, lambda: writer.add(staged(range(n_files, n_files + 1))))
            measured("commit again", requests, lambda: writer.add(staged(range(n_files + 1, n_files + 2))))
            files = writer.table.files()[:5]
            new = [data_file(n_files + 2 + i) for i in range(5)]
            measured("commit with removal", requests, lambda: writer.exchange(list(zip(files, new, strict=True))))
            some = staged(range(0, n_files, 4), "edited")
            touched = measured("touched by a quarter as many staged", requests, lambda: writer.touched(some))
            assert isinstance(touched, list) and touched


def _files(packed: bytes) -> int:
    return len(pickle.loads(packed).table("behaviors").files([7]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=20_000)
    main(parser.parse_args().files)
