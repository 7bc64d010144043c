"""Measure what a refresh costs: 1 % new behaviors, 0.1 % edited and 0.1 % deleted, compared with a full build.

    python -m tests.benchmarks.refresh_cost --users 2000 --each 100

The encoder is real (MiniLM). The store is on an S3 server behind a proxy that counts the bytes read. The new behaviors
belong to all users, the edited and deleted ones to a few (with `--spread` to all), as when a user edits or closes an
account. Checks that the refreshed store equals one built from the new input, row for row.
"""

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs import embed
from jobs.runtime import session
from persona.models import packaged
from persona.storage import list_files
from persona.store import vectors
from persona.store.store import Store
from tests.benchmarks import many_users
from tests.conftest import s3_process
from tests.faulty_s3 import FaultyS3

_KEY = ["user_id", "behavior_id"]


def main() -> None:
    """Print the measurements, and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=2000, help="number of users")
    parser.add_argument("--each", type=int, default=100, help="behaviors per user")
    parser.add_argument("--block-rows", type=int, default=1024, help="rows per block of jobs.embed")
    parser.add_argument(
        "--spread", action="store_true", help="edit and delete behaviors of all users, not only of a few"
    )
    parser.add_argument("--cheap", action="store_true", help="replace MiniLM with an encoder that costs almost nothing")
    arguments = parser.parse_args()
    if arguments.cheap:
        embed.Encode = many_users.CheapEncode  # type: ignore[misc]
    credentials = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
    with s3_process() as upstream, FaultyS3(upstream, seed=0) as proxy, tempfile.TemporaryDirectory() as folder:
        os.environ |= {"AWS_ENDPOINT_URL": proxy.url, "AWS_EC2_METADATA_DISABLED": "true", **credentials}
        boto3.client("s3").create_bucket(Bucket="refresh")
        session.connect()
        report = _measure(arguments, proxy, Path(folder))
    for name, value in report.items():
        print(f"{name:<32} {value}")
    print(json.dumps(report))


def _measure(arguments: argparse.Namespace, proxy: FaultyS3, folder: Path) -> dict[str, Any]:
    before = pa.concat_tables(many_users.histories(arguments.users, arguments.each))
    after, n_edited, n_deleted = _changed(before, arguments)
    for name, table in (("before", before), ("after", after)):
        many_users.write(folder / name, iter([table]))
    build, build_s = _embed(folder / "before", "s3://refresh/store", arguments)
    size = sum(file.size_bytes for file in list_files("s3://refresh/store/behaviors") if "/part-" in file.uri)
    proxy.read.clear()
    refresh, refresh_s = _embed(folder / "after", "s3://refresh/store", arguments, sync=True)
    read = sum(n for path, n in proxy.read.items() if "/store/behaviors" in path)
    _, scratch_s = _embed(folder / "after", "s3://refresh/scratch", arguments)
    _compare("s3://refresh/store", "s3://refresh/scratch")
    n_new = after.num_rows - (before.num_rows - n_deleted)
    expected = {"encoded": n_new + n_edited, "new": n_new, "edited": n_edited, "gone": n_deleted}
    assert refresh.items() >= expected.items(), refresh
    return {
        "behaviors": build["committed"],
        "new, edited, gone": [n_new, n_edited, n_deleted],
        "encoded in the refresh": refresh["encoded"],
        "files rewritten": refresh["files_rewritten"],
        "store bytes": size,
        "bytes read from the store": read,
        "share of the store read": round(read / size, 4),
        "seconds, build": round(build_s, 1),
        "seconds, refresh": round(refresh_s, 1),
        "seconds, build from new input": round(scratch_s, 1),
        "row for row the same as a build": True,
    }


def _changed(before: pa.Table, arguments: argparse.Namespace) -> tuple[pa.Table, int, int]:
    """The input of the next day, and how many behaviors are edited and deleted in it."""
    n = before.num_rows // 1000
    draw = random.Random(1)
    if arguments.spread:
        rows = draw.sample(range(before.num_rows), 2 * n)
        deleted, edited = rows[:n], rows[n:]
    else:
        users = draw.sample(range(arguments.users), 2 + 10)
        deleted = [user * arguments.each + i for user in users[:2] for i in range(n // 2)]
        edited = [user * arguments.each + i for user in users[2:] for i in range(n // 10)]
    text = before["text"].to_pylist()
    for row in edited:
        text[row] += " , corrected"
    kept = np.ones(before.num_rows, bool)
    kept[deleted] = False
    before = before.set_column(before.column_names.index("text"), "text", pa.array(text)).filter(pa.array(kept))
    new = pa.concat_tables(many_users.histories(arguments.users, arguments.each + 1))
    new = new.filter(pc.equal(new["behavior_id"], f"b{arguments.each}")).slice(0, 10 * n)
    return pa.concat_tables([before, new]), len(edited), len(deleted)


def _embed(source: Path, store: str, arguments: argparse.Namespace, **flags: Any) -> tuple[dict[str, Any], float]:
    started = time.perf_counter()
    config = embed.Config(
        histories=str(source),
        store=store,
        encoder=str(packaged.minilm()),
        max_tokens=64,
        block_rows=arguments.block_rows,
        **flags,
    )
    return dict(embed.main(config).result), time.perf_counter() - started


def _compare(one: str, other: str) -> None:
    """Assert that two stores have the same behaviors."""
    stores = [Store.open(uri) for uri in (one, other)]
    assert stores[0].buckets() == stores[1].buckets()
    for bucket in stores[0].buckets():
        left, right = (store.read_histories(bucket) for store in stores)
        for name in (*_KEY, "timestamp", "text_hash"):
            assert left[name].equals(right[name]), (bucket, name)
        pair = [vectors.from_column(rows["vector"], many_users.WIDTH) for rows in (left, right)]
        # In bf16, sums depend on the other texts of a batch.
        np.testing.assert_allclose(*pair, atol=0.02, rtol=0)


if __name__ == "__main__":
    main()
