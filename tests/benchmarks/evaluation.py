"""The rate and the memory of teacher-forced evaluation, for any number of requests.

    python -m tests.benchmarks.evaluation --requests demo-run/requests-test.parquet --store demo-run/store \
        --plug demo-run/plug --counts 2500 10000

`jobs.evaluate` in a process of its own for each count. Where there are fewer requests than that, they come again under
other ids. Memory is resident and private, of the driver and of the largest worker.
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
    """Prints a line a count, the rate between the first and the last, and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=Path, required=True, help="a Parquet file with targets")
    parser.add_argument("--store", required=True)
    parser.add_argument("--plug", required=True)
    parser.add_argument("--counts", type=int, nargs="+", default=(2_500, 10_000))
    parser.add_argument("--batch-size", type=int, default=32)
    arguments = parser.parse_args()
    requests = pq.read_table(arguments.requests)
    found = []
    for count in arguments.counts:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            pq.write_table(_repeated(requests, count), Path(folder) / "requests.parquet")
            found.append({"requests": count, **_evaluate(Path(folder), arguments)})
        print("{requests:>8,} requests  {seconds:8.1f} s  peak MiB {peak_mib}".format(**found[-1]), flush=True)
    first, last = found[0], found[-1]
    more, longer_s = last["requests"] - first["requests"], last["seconds"] - first["seconds"]
    per_s = round(more / longer_s, 1) if more else None
    print(f"each further second   {per_s} requests")
    print(json.dumps({"runs": found, "requests_per_s": per_s}))


def _repeated(requests: pa.Table, count: int) -> pa.Table:
    parts = []
    for number in range(-(-count // requests.num_rows)):
        ids = pc.binary_join_element_wise(requests["request_id"], str(number), "/")
        parts.append(requests.set_column(requests.schema.get_field_index("request_id"), "request_id", ids))
    return pa.concat_tables(parts).slice(0, count)


def _evaluate(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The losses of all requests under their own persona, without answers."""
    flags = {"requests": folder / "requests.parquet", "out": folder / "out", "batch-size": arguments.batch_size}
    flags |= {"store": arguments.store, "plug": arguments.plug, "personas": "own", "variants": "none-is-asked-for"}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "jobs.evaluate", *words]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as job, Memory(job.pid) as memory:
        out, _ = job.communicate()
    if job.returncode:
        raise SystemExit(f"jobs.evaluate ended with {job.returncode}")
    seconds = time.perf_counter() - started
    peaks = memory.peaks_mib
    workers = max((mib for name, mib in peaks.items() if name.startswith("ray::MapWorker")), default=0.0)
    loss = json.loads(out.splitlines()[-1])["loss"]["own"]["mean"]
    peak_mib = {"driver": round(peaks["driver"]), "worker": round(workers)}
    return {"seconds": round(seconds, 1), "loss": loss, "peak_mib": peak_mib}


if __name__ == "__main__":
    main()
