"""Print what a build needs for a million to a billion behaviors, as computed before any row is read.

    python -m tests.benchmarks.size_plan

Tasks, memory and requests are those of `persona.exchange.plan`, whose tests hold the limits. The rates of the encoder
and the prices are flags.
"""

import argparse
import math
from collections.abc import Iterator, Sequence

from persona.exchange.plan import plan_exchange

_ROWS = (10**6, 10**7, 10**8, 10**9)
_LOG_BYTES = 340  # of a data file in a checkpoint, see log_size
_MIN_BUCKETS, _MAX_BUCKETS, _ROWS_PER_BUCKET = 64, 1000, 10**5


def main() -> None:
    """Print the table as Markdown."""
    print("\n".join(table()))


def table(flags: Sequence[str] | None = None) -> list[str]:
    """The lines of the table; the flags are by default those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--row-bytes", type=int, default=650, help="a behavior in memory: a text of 500 bytes, its keys"
    )
    parser.add_argument("--width", type=int, default=768, help="width of a vector")
    parser.add_argument("--gpus", type=int, default=16, help="GPUs")
    parser.add_argument("--per-gpu", type=int, default=5_050, help="behaviors that a GPU encodes per second")
    parser.add_argument("--put-price", type=float, default=5e-6, help="dollars per request that writes or lists")
    parser.add_argument("--get-price", type=float, default=4e-7, help="dollars per request that reads")
    arguments = parser.parse_args(flags)
    columns = [_column(n_rows, arguments) for n_rows in _ROWS]
    heads = ["", *(f"{n_rows:,}" for n_rows in _ROWS)]
    return list(_markdown(heads, [[name, *(column[name] for column in columns)] for name in columns[0]]))


def buckets(n_rows: int) -> int:
    """What to give as `--buckets`: one per 100,000 behaviors to come, at least the default and at most 1,000."""
    return min(max(n_rows // _ROWS_PER_BUCKET, _MIN_BUCKETS), _MAX_BUCKETS)


def _column(n_rows: int, arguments: argparse.Namespace) -> dict[str, str]:
    n_buckets = buckets(n_rows)
    plan = plan_exchange(n_rows * arguments.row_bytes, n_buckets)
    n_files = plan.n_data_files(n_rows, arguments.width, arguments.gpus)
    block_rows = plan.block_rows(n_rows, arguments.width, arguments.gpus, on_gpus=True)
    hours = n_rows / (arguments.gpus * arguments.per_gpu) / 3600
    n_commits = min(n_files, math.ceil(hours * 3600))
    n_writes = plan.n_runs + 2 * n_files + 2 * n_commits
    n_reads = plan.n_store_requests - plan.n_runs + 6 * n_commits
    return {
        "buckets": f"{n_buckets:,}",
        "map tasks": f"{plan.n_tasks:,}",
        "run files": f"{plan.n_runs:,}",
        "partitions": f"{plan.n_partitions:,}",
        "shards that the driver owns": "0",
        "driver: names and offsets": f"{plan.driver_bytes / 2**20:,.1f} MiB",
        "worker: rows in memory": f"{plan.worker_bytes / 2**20:,.0f} MiB",
        "encoder: vectors in memory": f"{block_rows * 2 * arguments.width / 2**20:,.0f} MiB",
        "data files, at most": f"{n_files:,}",
        "log with all of them": f"{n_files * _LOG_BYTES / 2**20:,.1f} MiB",
        "commits, at most": f"{n_commits:,}",
        "requests to the store, at most": f"{n_writes + n_reads:,}",
        "their price": f"${n_writes * arguments.put_price + n_reads * arguments.get_price:,.2f}",
        f"hours on {arguments.gpus} GPUs": f"{hours:,.2f}",
    }


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"


if __name__ == "__main__":
    main()
