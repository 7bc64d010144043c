"""Measure the speed and memory of the data path for any number of users.

    python -m tests.benchmarks.scale --users 1000000 --each 5

Three steps in one process tree: `embed` of all histories, a refresh with 1 % more behaviors, one each of other users,
and the join of `generate` for a request of every tenth user. The encoder costs almost nothing. Memory is resident minus
shared, so it does not include Ray's object store.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs import embed
from jobs.runtime import exchange, joining, session
from jobs.runtime.inputs import find_requests
from jobs.runtime.job_options import RequestFormat
from jobs.runtime.tally import Tally
from persona.models import packaged
from persona.options import PersonaKind, VectorOptions
from persona.store.store import Store
from tests.benchmarks import many_users
from tests.benchmarks.contest import Memory


def main() -> None:
    """Print one line per step and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=100_000, help="number of users")
    parser.add_argument("--each", type=int, default=5, help="behaviors per user, at most 100")
    parser.add_argument("--width", type=int, default=many_users.WIDTH, help="components of a vector")
    parser.add_argument("--block-rows", type=int, help="behaviors of a data file; few by default on CPUs")
    parser.add_argument("--folder", help="working folder (default: a temporary one, deleted at the end)")
    arguments = parser.parse_args()
    folder = Path(arguments.folder or tempfile.mkdtemp(prefix="scale-"))
    embed.Encode = many_users.CheapEncode  # type: ignore[misc]
    n_rows = many_users.write(folder / "histories", many_users.histories(arguments.users, arguments.each))
    cores = session.connect().cores
    report: dict[str, Any] = {"users": arguments.users, "behaviors": n_rows, "cores": cores}
    config = embed.Config(
        histories=str(folder / "histories"),
        store=str(folder / "store"),
        encoder=str(packaged.minilm()),
        max_tokens=64,
        vectors=VectorOptions(width=arguments.width),
        block_rows=arguments.block_rows,
    )
    with Memory(os.getpid()) as memory:
        started = time.perf_counter()
        assert embed.main(config).result["committed"] == n_rows
        _report(report, "embed", _rate(n_rows, started, cores), memory)
        input_bytes, store_bytes = _size(folder / "histories"), _size(folder / "store" / "behaviors")

        n_new = n_rows // 100
        one_more = many_users.histories(n_new, arguments.each + 1)
        many_users.write(folder / "histories" / "more", (_behavior(table, arguments.each) for table in one_more))
        started = time.perf_counter()
        refreshed = embed.main(config).result
        assert refreshed["committed"] == n_new
        shares = {
            "of_build": round((time.perf_counter() - started) / report["embed"]["seconds"], 4),
            "of_input": round(refreshed["bytes"] / input_bytes, 4),
            "of_store": round(refreshed["store_bytes_read"] / store_bytes, 4),
        }
        _report(report, "refresh", {**_rate(n_new, started, cores), **shares}, memory)

        pq.write_table(_requests(arguments.users), folder / "requests.parquet")
        started = time.perf_counter()
        n_requests = _join(folder)
        _report(report, "join", {**_rate(n_requests, started, cores), "requests": n_requests}, memory)
    print(f"refresh    reads {shares['of_input']:.2%} of the input and {shares['of_store']:.2%} of the store's bytes,")
    print(f"           and takes {shares['of_build']:.2%} of the time of embed")
    if arguments.folder is None:
        shutil.rmtree(folder)
    print(json.dumps(report))


def _report(report: dict[str, Any], step: str, measured: dict[str, Any], memory: Memory) -> None:
    """Add a step, and print it at once, because the next one may take long or fail."""
    report[step] = measured
    report["peak_mib"] = {name: round(mib) for name, mib in sorted(memory.peaks_mib.items())}
    print(f"{step:<10} {measured['seconds']:8.1f} s   {measured['per_s_core']:10,.0f} per second and core", end="   ")
    largest = max((mib, name) for name, mib in report["peak_mib"].items() if name != "driver")
    print(f"driver {report['peak_mib']['driver']:,} MiB, largest worker {largest[0]:,} MiB ({largest[1]})", flush=True)


def _rate(n: int, started: float, cores: int) -> dict[str, float]:
    seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 1), "per_s_core": round(n / seconds / cores)}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _behavior(table: pa.Table, number: int) -> pa.Table:
    return table.filter(pc.equal(table["behavior_id"], f"b{number}"))


def _requests(n_users: int) -> pa.Table:
    name = pc.utf8_lpad(pa.array(range(0, n_users, 10)).cast(pa.string()), 9, "0")
    users = pc.binary_join_element_wise("user", name, "-")
    return pa.table({"request_id": users, "user_id": users, "input": pa.repeat("What next?", len(users))})


def _join(folder: Path) -> int:
    """Join the requests with their vectors as `generate` does, and return how many there were."""
    store = Store.open(str(folder / "store")).snapshot("behaviors")
    with exchange.run_files(str(folder), "scale") as run_files:
        joined = joining.requests_with_histories(
            find_requests(str(folder / "requests.parquet"), RequestFormat(), flag="--requests", needs_target=False),
            store,
            Tally.start(),
            joining.JoinPlan(job="generate", personas=[PersonaKind.OWN], max_behaviors=512, needs_target=False),
            folder=run_files,
        )
        return sum(table.num_rows for table in joined.rows.iter_batches(batch_size=None, batch_format="pyarrow"))


if __name__ == "__main__":
    main()
