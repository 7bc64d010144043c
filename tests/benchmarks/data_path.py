"""The data path without an encoder, the refresh of a store, many GPUs at once, and how soon the first batch is encoded.

    python -m tests.benchmarks.data_path gpus 8

Each function prints nothing and returns numbers; those that need a Ray of their own run as a process.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from persona.models import packaged
from persona.models.encoder import Encoded
from tests.benchmarks import corpus, many_users
from tests.benchmarks.contest import timed
from tests.benchmarks.encoding import stamped, stamps

_GPU_TEXTS_PER_S = 5_000
_EACH = 5
_STARTS = 2


class DataPath:
    """`jobs.embed` with an encoder that costs next to nothing: read, find what is missing, commit.

    Its start, which does not grow with the input, is measured before the first turns and taken off.
    """

    def __init__(self, n: int) -> None:
        from jobs.runtime import session

        session.connect()
        self.folder = Path(tempfile.mkdtemp(prefix="bench-"))
        self.starts_s: list[float] = []
        self.n = many_users.write(self.folder / "all", many_users.histories(n // _EACH, _EACH))
        corpus.write_histories(self.folder / "two" / "0.parquet", ["only", "two"])

    def turn(self) -> tuple[float, float]:
        """All rows but two, less the time that the job takes for two: the median of the first turns."""
        if len(self.starts_s) < _STARTS:
            self.starts_s.append(self.embed("two"))
        return self.n - 2, self.embed("all") - statistics.median(self.starts_s)

    def embed(self, part: str) -> float:
        """Seconds of the job into a new store."""
        from jobs import embed

        embed.Encode = many_users.CheapEncode  # type: ignore[misc]
        source, store = str(self.folder / part), str(self.folder / "store")
        config = embed.Config(histories=source, store=store, encoder=str(packaged.minilm()), max_tokens=64)
        seconds = timed(lambda: embed.main(config))
        shutil.rmtree(store)
        return seconds


class ScanAndWrite:
    """The limit: pyarrow reads the same files and writes the same rows with vectors, in one process."""

    def __init__(self, n: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="bench-"))
        self.n = many_users.write(self.folder / "all", many_users.histories(n // _EACH, _EACH))

    def turn(self) -> tuple[float, float]:
        """All rows."""
        return self.n, timed(self.copy)

    def copy(self) -> None:
        """As the store has them: ids, time and 768 bytes of vector."""
        vectors = np.random.default_rng(0).normal(size=(65_536, many_users.WIDTH)).astype("<f2")
        cells = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(2 * many_users.WIDTH), len(vectors), [None, pa.py_buffer(vectors.tobytes())]
        )
        for file in sorted((self.folder / "all").iterdir()):
            source = pq.ParquetFile(file)
            with pq.ParquetWriter(
                self.folder / "copy.parquet",
                source.schema_arrow.append(pa.field("vector", cells.type)),
                compression="zstd",
                compression_level=1,
            ) as writer:
                for batch in source.iter_batches(65_536):
                    writer.write_batch(batch.append_column("vector", cells.slice(0, batch.num_rows)))


class Refresh:
    """A store built once; each turn is a refresh that finds 1 % new."""

    def __init__(self, n: int) -> None:
        from jobs.runtime import session

        session.connect()
        self.folder = Path(tempfile.mkdtemp(prefix="bench-"))
        self.n_new = n // 100
        self.n = n
        self.turns = 0
        corpus.write_histories(self.folder / "in" / "0.parquet", corpus.texts("titles", n))
        self.build_s = timed(self.embed)

    def embed(self) -> None:
        """The job on what lies there now."""
        from jobs import embed

        encoder = str(packaged.minilm())
        summary = embed.main(
            embed.Config(histories=str(self.folder / "in"), store=str(self.folder / "store"), encoder=encoder)
        )
        assert summary.result["committed"] == (self.n_new if self.turns else self.n), summary.result

    def turn(self) -> tuple[float, float]:
        """How many refreshes one build is worth, and the seconds of this one."""
        self.turns += 1
        texts = corpus.texts("titles", self.n_new, seed=self.turns)
        first = self.n + self.turns * self.n_new
        corpus.write_histories(self.folder / "in" / f"{self.turns}.parquet", texts, first=first)
        return self.build_s, timed(self.embed)


class SleepingEncoder:
    """Takes as long as a GPU that encodes 5,000 texts a second, and no CPU."""

    def encode(self, texts: list[str]) -> Encoded:
        """As `persona.models.encoder.TextEncoder.encode`; all vectors are alike."""
        time.sleep(len(texts) / _GPU_TEXTS_PER_S)
        vectors = np.full((len(texts), many_users.WIDTH), many_users.WIDTH**-0.5, np.float16)
        return Encoded(vectors=vectors, n_tokens=len(texts), n_padded=len(texts), tokenize_s=0.0)


def gpus(n_gpus: int, seconds: float = 4.0) -> dict[str, Any]:
    """Share of the time that GPUs were busy, each from its first text to its last; a Ray that believes in so many."""
    import ray

    from jobs import embed
    from jobs.runtime import session

    ray.init(num_cpus=6, num_gpus=n_gpus, include_dashboard=False, log_to_driver=False, logging_level="error")

    class Sleep(many_users.CheapEncode):
        def __init__(self, config: embed.Config, identity: Any, tally: Any, threads: session.Threads) -> None:
            super().__init__(config, identity, tally, threads)
            self.encoder = SleepingEncoder()  # type: ignore[assignment]
            self.n_blocks = 0

        def __call__(self, behaviors: pa.Table) -> pa.Table:
            if behaviors.num_rows and not self.n_blocks:
                self.idle_since = time.perf_counter()  # before the first text there is nothing to wait for
            self.n_blocks += 1
            return super().__call__(behaviors)

    embed.Encode = Sleep  # type: ignore[misc]
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    n = many_users.write(folder / "in", many_users.histories(int(n_gpus * seconds * _GPU_TEXTS_PER_S / _EACH), _EACH))
    encoder = str(packaged.minilm())
    config = embed.Config(
        histories=str(folder / "in"), store=str(folder / "store"), encoder=encoder, max_tokens=64, profile=True
    )
    result = embed.main(config).result
    shutil.rmtree(folder)
    spent = result["profile"]["seconds"]
    assert session.connect().gpus == n_gpus
    return {
        "gpus": n_gpus,
        "behaviors": n,
        "busy": spent["encode"] / (spent["encode"] + spent["waiting"]),
        "behaviors_per_s": n / ((spent["encode"] + spent["waiting"]) / n_gpus),
        "seconds": spent,
    }


def many_gpus(counts: tuple[int, ...] = (1, 2, 4, 8, 16)) -> list[dict[str, Any]]:
    """`gpus` for each count, each in a process of its own."""
    return [_process("gpus", str(count)) for count in counts]


def start_alone() -> dict[str, Any]:
    """Ray's start, one actor with the model, one text: what no job can do without."""
    import ray

    from jobs.runtime import session

    machines = session.connect()

    class Model:
        def __init__(self) -> None:
            from persona.models.encoder import TextEncoder
            from persona.models.resolve import resolve

            folder = resolve(str(packaged.minilm()), flag="--encoder")
            self.encoder = TextEncoder(folder, pooling="mean", max_tokens=64)

        def encode(self) -> float:
            self.encoder.encode(["one text"])
            return time.time()

    models = [ray.remote(num_cpus=1)(Model).remote() for _ in range(machines.cores)]
    return {"encoded_at": min(ray.get([model.encode.remote() for model in models]))}


def start_of_embed(folder: str) -> dict[str, Any]:
    """`jobs.embed` as a command; its first encoded batch."""
    from jobs import embed
    from jobs.runtime import session

    calls = Path(folder) / "calls"
    embed.Encode = stamped(embed.Encode, calls)  # type: ignore[misc]
    session.connect()
    config = embed.Config(
        histories=f"{folder}/in", store=f"{folder}/store", encoder=str(packaged.minilm()), max_tokens=64
    )
    embed.main(config)
    return {"encoded_at": min(ended for _, _, ended, _ in stamps(calls))}


def time_to_first_batch(turns: int) -> tuple[float, float, float]:
    """Medians of seconds from the command to the first encoded batch: of `jobs.embed`, alone, and of the difference."""
    ours, alone = [], []
    for _ in range(turns):
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            corpus.write_histories(Path(folder) / "in" / "0.parquet", corpus.texts("titles", 200))
            started = time.time()
            ours.append(_process("start_of_embed", folder)["encoded_at"] - started)
        started = time.time()
        alone.append(_process("start_alone")["encoded_at"] - started)
    beyond = [mine - theirs for mine, theirs in zip(ours, alone, strict=True)]
    return statistics.median(ours), statistics.median(alone), statistics.median(beyond)


def _process(name: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.data_path", name, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
    # Ray's own warnings may come behind it.
    found: dict[str, Any] = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    return found


if __name__ == "__main__":
    function, *given = sys.argv[1:]
    known: dict[str, Any] = {
        "gpus": lambda count: gpus(int(count)),
        "start_alone": start_alone,
        "start_of_embed": start_of_embed,
    }
    print(json.dumps(known[function](*given)))
