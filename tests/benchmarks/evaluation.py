r"""Measure the speed and memory of `jobs.evaluate` on any number of requests.

    python -m tests.benchmarks.evaluation --requests demo-run/requests-test.parquet --store demo-run/store \
        --plug demo-run/plug --counts 2500 10000

Runs `jobs.evaluate` in a separate process for each count, and repeats the requests under new ids if there are too few.
Memory is resident minus shared, of the driver and of the largest worker.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tests.benchmarks.contest import Memory


def main() -> None:
    """Print one line per count, the rate between the first and the last count, and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=Path, required=True, help="Parquet file of requests with targets")
    parser.add_argument("--store", required=True, help="folder of the store")
    parser.add_argument("--plug", required=True, help="folder of the plug")
    parser.add_argument(
        "--counts", type=int, nargs="+", default=(2_500, 10_000), help="numbers of requests, one run for each"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="batch size of jobs.evaluate")
    arguments = parser.parse_args()
    requests = pq.read_table(arguments.requests)
    runs = []
    for count in arguments.counts:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            pq.write_table(_repeated(requests, count), Path(folder) / "requests.parquet")
            runs.append({"requests": count, **_evaluate(Path(folder), arguments)})
        print("{requests:>8,} requests  {seconds:8.1f} s  peak MiB {peak_mib}".format(**runs[-1]), flush=True)
    more = runs[-1]["requests"] - runs[0]["requests"]
    per_s = round(more / (runs[-1]["seconds"] - runs[0]["seconds"]), 1) if more else None
    print(f"requests per second beyond the first run: {per_s}")
    print(json.dumps({"runs": runs, "requests_per_s": per_s}))


def _repeated(requests: pa.Table, count: int) -> pa.Table:
    parts = []
    for number in range(-(-count // requests.num_rows)):
        ids = pc.binary_join_element_wise(requests["request_id"], str(number), "/")
        parts.append(requests.set_column(requests.schema.get_field_index("request_id"), "request_id", ids))
    return pa.concat_tables(parts).slice(0, count)


def _evaluate(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the losses of all requests with their own persona."""
    flags = {"requests": folder / "requests.parquet", "out": folder / "out", "batch-size": arguments.batch_size}
    flags |= {"store": arguments.store, "plug": arguments.plug, "persona": "own", "variant": "no-such-variant"}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "jobs.evaluate", *words]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as job, Memory(job.pid) as memory:
        out, _ = job.communicate()
    if job.returncode:
        raise SystemExit(f"jobs.evaluate ended with exit code {job.returncode}")
    seconds = time.perf_counter() - started
    peaks = memory.peaks_mib
    workers = max((mib for name, mib in peaks.items() if name.startswith("ray::MapWorker")), default=0.0)
    loss = json.loads(out.splitlines()[-1])["loss"]["own"]["mean"]
    peak_mib = {"driver": round(peaks["driver"]), "worker": round(workers)}
    return {"seconds": round(seconds, 1), "loss": loss, "peak_mib": peak_mib}


if __name__ == "__main__":
    main()
