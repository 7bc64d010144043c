"""What a refresh costs: 1 % of the behaviors new, 0.1 % edited, 0.1 % gone, beside the build of the whole store.

    python -m tests.benchmarks.refresh_cost --users 2000 --each 100

The encoder is real (MiniLM), the store lies on an S3 server behind a proxy that counts the bytes it hands out. New
behaviors are of all users; edited and gone ones of few, as when someone tidies or leaves an account (`--spread`: of
all). The result is compared, row for row, with a store that is built from the new input.
"""

import argparse
import json
import os
import random
import sys
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
from persona.store.store import Store
from tests.benchmarks import many_users
from tests.conftest import s3_process
from tests.faulty_s3 import FaultyS3

_KEY = ["user_id", "behavior_id"]


def main() -> None:
    """Prints what was found, and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=2000)
    parser.add_argument("--each", type=int, default=100, help="behaviors of a user")
    parser.add_argument("--block-rows", type=int, default=1024)
    parser.add_argument("--spread", action="store_true", help="edited and gone behaviors are of all users")
    parser.add_argument("--cheap", action="store_true", help="an encoder that costs nothing in the place of MiniLM")
    arguments = parser.parse_args()
    if arguments.cheap:
        embed.Encode = many_users.CheapEncode  # type: ignore[misc]
    credentials = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
    with s3_process() as upstream, FaultyS3(upstream, seed=0) as proxy, tempfile.TemporaryDirectory() as folder:
        os.environ |= {"AWS_ENDPOINT_URL": proxy.url, "AWS_EC2_METADATA_DISABLED": "true", **credentials}
        boto3.client("s3").create_bucket(Bucket="refresh")
        session.connect()
        found = _measure(arguments, proxy, Path(folder))
    for name, value in found.items():
        print(f"{name:<32} {value}")
    print(json.dumps(found))


def _measure(arguments: argparse.Namespace, proxy: FaultyS3, folder: Path) -> dict[str, Any]:
    before = pa.concat_tables(many_users.histories(arguments.users, arguments.each))
    after, n_edited, n_gone = _changed(before, arguments)
    for name, table in (("before", before), ("after", after)):
        many_users.write(folder / name, iter([table]))
    build, build_s = _embed(folder / "before", "s3://refresh/store", arguments)
    size = sum(file.size_bytes for file in list_files("s3://refresh/store/behaviors") if "/part-" in file.uri)
    proxy.read.clear()
    refresh, refresh_s = _embed(folder / "after", "s3://refresh/store", arguments, sync=True)
    read = sum(n for path, n in proxy.read.items() if "/store/behaviors" in path)
    _, scratch_s = _embed(folder / "after", "s3://refresh/scratch", arguments)
    _compare("s3://refresh/store", "s3://refresh/scratch")
    n_new = after.num_rows - (before.num_rows - n_gone)
    assert (refresh["encoded"], refresh["new"], refresh["edited"], refresh["gone"]) == (
        n_new + n_edited,
        n_new,
        n_edited,
        n_gone,
    ), refresh
    return {
        "behaviors": build["committed"],
        "new, edited, gone": [n_new, n_edited, n_gone],
        "encoded by the refresh": refresh["encoded"],
        "files rewritten": f"{refresh['files_rewritten']}",
        "store bytes": size,
        "bytes read from the store": read,
        "share of the store read": round(read / size, 4),
        "seconds, build": round(build_s, 1),
        "seconds, refresh": round(refresh_s, 1),
        "seconds, build from new input": round(scratch_s, 1),
        "row for row the same as a build": True,
    }


def _changed(before: pa.Table, arguments: argparse.Namespace) -> tuple[pa.Table, int, int]:
    """The histories of the next day, and how many behaviors of the day before are edited and gone."""
    n = before.num_rows // 1000
    draw = random.Random(1)
    if arguments.spread:
        rows = draw.sample(range(before.num_rows), 2 * n)
        gone, edited = rows[:n], rows[n:]
    else:
        users = draw.sample(range(arguments.users), 2 + 10)
        gone = [user * arguments.each + i for user in users[:2] for i in range(n // 2)]
        edited = [user * arguments.each + i for user in users[2:] for i in range(n // 10)]
    text = before["text"].to_pylist()
    for row in edited:
        text[row] += " , corrected"
    kept = np.ones(before.num_rows, bool)
    kept[gone] = False
    before = before.set_column(before.column_names.index("text"), "text", pa.array(text)).filter(pa.array(kept))
    new = pa.concat_tables(many_users.histories(arguments.users, arguments.each + 1))
    new = new.filter(pc.equal(new["behavior_id"], f"b{arguments.each}")).slice(0, 10 * n)
    return pa.concat_tables([before, new]), len(edited), len(gone)


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
    """Raises AssertionError where two stores differ."""
    stores = [Store.open(uri) for uri in (one, other)]
    assert stores[0].buckets() == stores[1].buckets()
    for bucket in stores[0].buckets():
        mine, theirs = (store.read_histories(bucket) for store in stores)
        for name in (*_KEY, "timestamp", "text_hash"):
            assert mine[name].equals(theirs[name]), (bucket, name)
        vectors = [np.frombuffer(b"".join(table["vector"].to_pylist()), "<f2") for table in (mine, theirs)]
        # bf16 sums depend on the batch that a text shares.
        np.testing.assert_allclose(*vectors, atol=0.02, rtol=0)


if __name__ == "__main__":
    sys.exit(main())
