"""`jobs.embed` beside what its user would write without it, on the same texts with the same model."""

import multiprocessing
import os
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from jobs import embed
from persona.models import packaged
from tests.benchmarks import corpus
from tests.benchmarks.contest import timed

_MAX_TOKENS = 256
_CORES = 2
_RAY_ENDS_S = 3  # its actors end behind the job, which the next one in turn must not pay for


class OnRay:
    """A job on a Ray that is up, from the moment when all models are at work to the last row that is written.

    What is before does not grow with the input, but for the reads, whose rate is that of the data path.
    """

    model: type[Any]
    """The class of the actors."""
    written: str
    """What a pattern of file names finds in the output when all is written."""

    def __init__(self, texts: list[str]) -> None:
        from jobs.runtime import session

        session.connect()
        self.folder = Path(tempfile.mkdtemp(prefix="bench-"))
        self.n = len(texts)
        corpus.write_histories(self.folder / "in" / "0.parquet", texts)

    def turn(self) -> tuple[float, float]:
        """The texts that were encoded in that time; of a block that had been begun before, its share."""
        calls, out = self.folder / "calls", self.folder / "out"
        self.job(self.folder / "in", out, stamped(self.model, calls))
        blocks = stamps(calls)
        first = {process: began for process, began, _, _ in reversed(blocks)}
        if len(first) < _CORES:
            raise AssertionError(f"{len(first)} of {_CORES} models were at work")
        begun = max(first.values())
        written = max(file.stat().st_mtime for file in out.rglob(self.written))
        n = sum(rows * max(0.0, ended - max(began, begun)) / (ended - began) for _, began, ended, rows in blocks)
        shutil.rmtree(calls)
        shutil.rmtree(out)
        return n, written - begun

    def job(self, source: Path, out: Path, model: type[Any]) -> None:
        """Reads, encodes, writes."""
        raise NotImplementedError


def stamped(model: type[Any], folder: Path) -> type[Any]:
    """The same class; each block that is not empty leaves one of `stamps` in the folder."""
    folder.mkdir()

    class Stamped(model):
        def __call__(self, block: Any) -> Any:
            n, began = len(block["text"]), time.time()
            done = super().__call__(block)
            if n:
                (folder / f"{os.getpid()} {began} {time.time()} {n}").touch()
            return done

    return Stamped


def stamps(folder: Path) -> list[tuple[int, float, float, int]]:
    """Of each block the process, when it began and ended (seconds of the clock), and its rows; by its beginning."""
    found = [file.name.split() for file in folder.iterdir()]
    blocks = [(int(process), float(began), float(ended), int(n)) for process, began, ended, n in found]
    return sorted(blocks, key=lambda block: block[1])


class SentenceActor:
    """The class of Ray's recipe."""

    def __init__(self) -> None:
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(str(packaged.minilm()), device="cpu")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Adds the vectors."""
        batch["vector"] = self.model.encode(list(batch["text"]), show_progress_bar=False)
        return batch


class Embed(OnRay):
    """Ours: read, compare with the store, encode, commit; in blocks so small that no core waits for the last one."""

    model = embed.Encode
    written = "_delta_log/*.json"

    def job(self, source: Path, out: Path, model: type[Any]) -> None:
        """`jobs.embed` into a new store."""
        embed.Encode = model  # type: ignore[misc]
        config = embed.Config(
            histories=str(source),
            store=str(out),
            encoder=str(packaged.minilm()),
            max_tokens=_MAX_TOKENS,
            buckets=4,
            block_rows=self.n // 16,
            actors=_CORES,
        )
        embed.main(config)


class RaysRecipe(OnRay):
    """Ray's documentation on batch embeddings: a class with a model for `map_batches`, then `write_parquet`."""

    model = SentenceActor
    written = "*.parquet"

    def job(self, source: Path, out: Path, model: type[Any]) -> None:
        """`sentence_transformers` in one actor a core."""
        import ray
        from ray.data import ActorPoolStrategy

        rows = ray.data.read_parquet(str(source)).repartition(8)
        pool = ActorPoolStrategy(size=_CORES)
        batch_size = max(1, self.n // 8)  # no core waits for the other one
        rows.map_batches(model, batch_size=batch_size, compute=pool, num_cpus=1).write_parquet(str(out))
        time.sleep(_RAY_ENDS_S)


class SentenceTransformers:
    """`encode` on texts in memory by a model that is loaded; in bf16 with the batch size that is best for a sample."""

    def __init__(self, texts: list[str], dtype: str) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        kwargs = {"dtype": getattr(torch, dtype)}
        self.model = SentenceTransformer(str(packaged.minilm()), device="cpu", model_kwargs=kwargs)
        self.model.max_seq_length = _MAX_TOKENS
        self.texts = texts
        self.batch_size = 32  # as it comes
        if dtype != "float32":
            sample = texts[: max(64, len(texts) // 4)]
            sizes = (8, 16, 32, 64, 128)
            best = {size: min(timed(lambda size=size: self.encode(sample, size)) for _ in range(2)) for size in sizes}
            self.batch_size = min(best, key=lambda size: best[size])

    def encode(self, texts: list[str], batch_size: int) -> None:
        """All of them."""
        self.model.encode(texts, batch_size=batch_size, show_progress_bar=False)

    def turn(self) -> tuple[float, float]:
        """All texts."""
        return len(self.texts), timed(lambda: self.encode(self.texts, self.batch_size))


class LinearLayers:
    """The limit: the matrix products of the encoder alone, on the batches and in the precision of `jobs.embed`."""

    def __init__(self, texts: list[str]) -> None:
        self.n = len(texts)
        context = multiprocessing.get_context("spawn")
        self.pools = [ProcessPoolExecutor(1, mp_context=context) for _ in range(_CORES)]
        loading = [pool.submit(_load_linear, texts[core::_CORES]) for core, pool in enumerate(self.pools)]
        for loaded in loading:
            loaded.result()

    def turn(self) -> tuple[float, float]:
        """All texts, on all cores."""
        return self.n, timed(lambda: [done.result() for done in [pool.submit(_linear) for pool in self.pools]])

    def end(self) -> None:
        """Its processes."""
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
