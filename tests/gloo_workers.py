"""Processes that work together over gloo, as the workers of a training run do."""

import json
import logging
import multiprocessing
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

Case = dict[str, Any]
Result = dict[str, Any]


def run_together(
    run: Callable[[Case, int, int], Result], cases: Sequence[Case], n_workers: int, folder: Path
) -> list[list[Result]]:
    """Calls `run(case, rank, n_workers)` in `n_workers` processes, case after case; results by rank, then by case."""
    rendezvous = folder / f"rendezvous-{n_workers}-{len(cases)}"
    rendezvous.unlink(missing_ok=True)
    # Workers are forked from one process that has imported the slow libraries.
    multiprocessing.set_forkserver_preload(["deepspeed", "tests.zero_worker"])
    torch.multiprocessing.start_processes(
        _work, (run, n_workers, list(cases), rendezvous, folder), nprocs=n_workers, start_method="forkserver"
    )
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(n_workers)]


def _work(
    rank: int,
    run: Callable[[Case, int, int], Result],
    n_workers: int,
    cases: list[Case],
    rendezvous: Path,
    folder: Path,
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n_workers), DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1"
    )
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=n_workers)
    found = [run(case, rank, n_workers) for case in cases]
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
