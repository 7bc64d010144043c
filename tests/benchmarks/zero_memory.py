"""Measure the memory that a training worker takes when ZeRO-3 shards the LLM.

    python -m tests.benchmarks.zero_memory
    python -m tests.benchmarks.zero_memory --layers 4 --workers 1 2     # to try the program

A Llama in float32 with random weights trains a small plug: in one process that holds the whole LLM, then sharded over
two and four processes. Memory is what a process holds by itself, beyond what it held before it loaded the LLM. Pages of
the LLM's files do not count: they are the system's cache, which it takes back when memory runs short.
"""

import argparse
import ctypes
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from persona.models.resolve import resolve
from persona.options import TrainingOptions
from persona.training.checkpoint import Progress
from tests import models, plugs
from tests.gloo_workers import run_together

_MIB = 2**20
_M_MMAP_THRESHOLD = -3  # of mallopt(3)
_ROWS, _STEPS = 4, 2


class Peak:
    """The most bytes that this process held itself at any moment inside the `with` block."""

    def __enter__(self) -> Self:
        self.bytes = held_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.bytes = max(self.bytes, held_bytes())


def held_bytes() -> int:
    """Resident memory of this process that is not a page of a file (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


def new_llm(folder: Path, *, width: int, layers: int, vocabulary: int) -> int:
    """Saves a Llama with random weights and the tiny tokenizer; returns its bytes in float32.

    The files are in bf16, as those of most LLMs, so that no process can compute with their pages.
    """
    models.tiny_llama(folder)
    config = AutoConfig.from_pretrained(folder)
    config.update(
        {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_hidden_layers": layers,
            "initializer_range": 0.02,
        }
    )
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="400MB")
    return 4 * sum(parameter.numel() for parameter in model.parameters())


def train(case: dict[str, Any], rank: int, n_workers: int) -> dict[str, Any]:
    """Loads the LLM of a case (`llm`, `encoder`, `stage`, `save`), trains for two steps, and saves a checkpoint."""
    import deepspeed  # noqa: F401 - its import takes memory, too

    from persona.training import checkpoint
    from persona.training.deepspeed import deepspeed_settings, gathered, load_llm, new_engine
    from persona.training.step import train_step

    # glibc's allocator would keep the memory of freed tensors.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**16)
    options = TrainingOptions(global_batch=_ROWS, micro_batch=1, learning_rate=1e-3, zero_stage=case["stage"])
    settings = deepspeed_settings(options, n_workers)
    start = held_bytes()
    with Peak() as loading:
        llm = load_llm(resolve(case["llm"], flag="--llm"), settings, precision="fp32", device="cpu")
    with Peak() as training:
        with gathered(llm.model.get_input_embeddings()):
            model = plugs.new_model(resolve(case["encoder"], flag="--encoder"), llm)
        engine = new_engine(model, options, settings)
        share = _ROWS // n_workers
        rows = [plugs.row(number, number) for number in range(rank * share, (rank + 1) * share)]
        losses = [train_step(engine, rows, step=i, n_steps=_STEPS, options=options)[0] for i in range(_STEPS)]
    progress = Progress(token_norm=model.plug.token_norm, scale=model.plug.scale, llm_width=llm.width)
    checkpoint.save(engine, Path(case["save"]), progress, write=rank == 0)
    return {"loading": loading.bytes - start, "training": training.bytes - start, "losses": losses}


def compare(folder: Path, workers: Sequence[int], **shape: int) -> tuple[int, dict[int, dict[str, Any]]]:
    """Trains with each number of workers; one worker holds the whole LLM.

    Returns:
        the LLM's bytes, and by number of workers: the largest worker's peaks `loading` and `training` in bytes, the
        `losses` of the steps, and the trained `weights`.
    """
    llm, encoder = folder / "llm", models.tiny_encoder(folder / "encoder")
    n_bytes, found = new_llm(llm, **shape), {}
    for n in workers:
        case = {"llm": str(llm), "encoder": str(encoder), "stage": 1 if n == 1 else 3, "save": str(folder / f"{n}")}
        ranks = [results[0] for results in run_together(train, [case], n, folder)]
        peaks = {name: max(rank[name] for rank in ranks) for name in ("loading", "training")}
        weights = load_file(folder / f"{n}" / "plug.safetensors")
        found[n] = {**peaks, "losses": ranks[0]["losses"], "weights": weights}
    return n_bytes, found


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=36, help="36 layers of width 1024 and 32,000 tokens: 1.6 GB")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        n_bytes, found = compare(
            Path(folder), arguments.workers, width=1024, layers=arguments.layers, vocabulary=32_000
        )
    print(f"An LLM of {n_bytes / _MIB:,.0f} MiB in float32\n")
    print("| workers | largest worker's peak, loading | training | losses of two steps |\n|---|---|---|---|")
    for n, row in found.items():
        losses = ", ".join(f"{loss:.6f}" for loss in row["losses"])
        print(f"| {n} | {row['loading'] / _MIB:,.0f} MiB | {row['training'] / _MIB:,.0f} MiB | {losses} |")


if __name__ == "__main__":
    main()
