"""Contenders that encode texts: `jobs.embed`, Ray's recipe, sentence_transformers, and the limit of the hardware."""

import multiprocessing
import os
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import embed
from jobs.runtime.job_options import ActorPool
from persona.models import packaged
from tests.benchmarks import corpus
from tests.benchmarks.contest import timed

_MAX_TOKENS = 256
_CORES = 2
_RAY_STOPS_S = 3  # its actors stop after the job, during the next contender's turn unless we wait


@dataclass(frozen=True, kw_only=True)
class Block:
    """One call of a model; times are in seconds since the epoch."""

    process: int
    began: float
    ended: float
    rows: int


class OnRay:
    """A job on a running Ray, timed from when all models are at work to the last row written.

    What comes before does not grow with the input, except for the reads, whose rate `data_path` measures.
    """

    model: type[Any]
    """The class of the actors."""
    written: str
    """Pattern of the names of the output files."""

    def __init__(self, texts: list[str]) -> None:
        from jobs.runtime import session

        session.connect()
        self.folder = Path(tempfile.mkdtemp(prefix="bench-"))
        self.n = len(texts)
        corpus.write_histories(self.folder / "in" / "0.parquet", texts)

    def turn(self) -> tuple[float, float]:
        """The texts encoded in the timed span; a block that began earlier counts in part."""
        blocks_folder, out = self.folder / "blocks", self.folder / "out"
        self.job(self.folder / "in", out, recorded(self.model, blocks_folder))
        blocks = read_blocks(blocks_folder)
        first = {block.process: block.began for block in reversed(blocks)}
        if len(first) < _CORES:
            raise AssertionError(f"{len(first)} of {_CORES} models were at work")
        began = max(first.values())
        written = max(file.stat().st_mtime for file in out.rglob(self.written))
        n = sum(
            block.rows * max(0.0, block.ended - max(block.began, began)) / (block.ended - block.began)
            for block in blocks
        )
        shutil.rmtree(blocks_folder)
        shutil.rmtree(out)
        return n, written - began

    def job(self, source: Path, out: Path, model: type[Any]) -> None:
        """Read, encode and write."""
        raise NotImplementedError


def recorded(model: type[Any], folder: Path) -> type[Any]:
    """A subclass that records each call with rows in `folder`, for `read_blocks`."""
    folder.mkdir()

    class Recorded(model):
        def __call__(self, block: Any) -> Any:
            n, began = len(block["text"]), time.time()
            done = super().__call__(block)
            if n:
                (folder / f"{os.getpid()} {began} {time.time()} {n}").touch()
            return done

    return Recorded


def read_blocks(folder: Path) -> list[Block]:
    """The recorded blocks in the order in which they began."""
    names = [file.name.split() for file in folder.iterdir()]
    blocks = [
        Block(process=int(process), began=float(began), ended=float(ended), rows=int(n))
        for process, began, ended, n in names
    ]
    return sorted(blocks, key=lambda block: block.began)


class SentenceActor:
    """The actor of Ray's recipe."""

    def __init__(self) -> None:
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(str(packaged.minilm()), device="cpu")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Add the vectors."""
        batch["vector"] = self.model.encode(list(batch["text"]), show_progress_bar=False)
        return batch


class Embed(OnRay):
    """`jobs.embed`: read, compare with the store, encode, commit. With small blocks, no core waits for the last."""

    model = embed.Encode
    written = "_delta_log/*.json"

    def job(self, source: Path, out: Path, model: type[Any]) -> None:
        """Embed into a new store."""
        embed.Encode = model  # type: ignore[misc]
        config = embed.Config(
            histories=str(source),
            store=str(out),
            encoder=str(packaged.minilm()),
            max_tokens=_MAX_TOKENS,
            buckets=4,
            block_rows=self.n // 16,
            pool=ActorPool(actors=_CORES),
        )
        embed.main(config)


class RaysRecipe(OnRay):
    """The recipe for batch embeddings in Ray's documentation: an actor class in `map_batches`, then `write_parquet`."""

    model = SentenceActor
    written = "*.parquet"

    def job(self, source: Path, out: Path, model: type[Any]) -> None:
        """Encode with sentence_transformers in one actor per core."""
        import ray
        from ray.data import ActorPoolStrategy

        rows = ray.data.read_parquet(str(source)).repartition(8)
        pool = ActorPoolStrategy(size=_CORES)
        batch_size = max(1, self.n // 8)  # so that no core waits for the other
        rows.map_batches(model, batch_size=batch_size, compute=pool, num_cpus=1).write_parquet(str(out))
        time.sleep(_RAY_STOPS_S)


class SentenceTransformers:
    """`SentenceTransformer.encode` on texts in memory; in bf16 with the batch size that is fastest on a sample."""

    def __init__(self, texts: list[str], dtype: str) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        kwargs = {"dtype": getattr(torch, dtype)}
        self.model = SentenceTransformer(str(packaged.minilm()), device="cpu", model_kwargs=kwargs)
        self.model.max_seq_length = _MAX_TOKENS
        self.texts = texts
        self.batch_size = 32  # the default
        if dtype != "float32":
            sample = texts[: max(64, len(texts) // 4)]
            sizes = (8, 16, 32, 64, 128)
            best = {size: min(timed(lambda size=size: self.encode(sample, size)) for _ in range(2)) for size in sizes}
            self.batch_size = min(best, key=lambda size: best[size])

    def encode(self, texts: list[str], batch_size: int) -> None:
        """Encode the texts."""
        self.model.encode(texts, batch_size=batch_size, show_progress_bar=False)

    def turn(self) -> tuple[float, float]:
        """Encode all texts."""
        return len(self.texts), timed(lambda: self.encode(self.texts, self.batch_size))


class LinearLayers:
    """The limit: only the linear layers of the encoder, on the batches and in the precision of `jobs.embed`."""

    def __init__(self, texts: list[str]) -> None:
        self.n = len(texts)
        context = multiprocessing.get_context("spawn")
        self.pools = [ProcessPoolExecutor(1, mp_context=context) for _ in range(_CORES)]
        loading = [pool.submit(_load_linear, texts[core::_CORES]) for core, pool in enumerate(self.pools)]
        for loaded in loading:
            loaded.result()

    def turn(self) -> tuple[float, float]:
        """Process all texts, on all cores."""
        return self.n, timed(lambda: [done.result() for done in [pool.submit(_linear) for pool in self.pools]])

    def close(self) -> None:
        """Stop the processes."""
        for pool in self.pools:
            pool.shutdown()


_linear_batches: list[Any] = []


def _load_linear(texts: list[str]) -> None:
    import torch

    from persona.models.batching import pad, token_batches
    from persona.models.encoder import TextEncoder
    from persona.models.resolve import resolve

    torch.set_num_threads(1)
    encoder = TextEncoder(resolve(str(packaged.minilm()), flag="--encoder"), pooling="mean", max_tokens=_MAX_TOKENS)
    rows = encoder.tokenize(texts)
    batches = token_batches([len(row) for row in rows], encoder.token_budget)
    padded = [pad([rows[row] for row in batch], 0, encoder.device)[0] for batch in batches]
    _linear_batches.extend((encoder.model, ids_NT) for ids_NT in padded)


def _linear() -> None:
    import torch

    with torch.inference_mode():
        for model, ids_NT in _linear_batches:
            hidden_NTd = model.embeddings(ids_NT)
            for layer in model.encoder.layer:
                attention = layer.attention
                for linear in (attention.self.query, attention.self.key, attention.self.value):
                    linear(hidden_NTd)
                hidden_NTd = layer.output.dense(layer.intermediate.dense(attention.output.dense(hidden_NTd)))
