"""Measure `jobs.embed` apart from its encoder: data path, refresh, many GPUs, and the time to the first batch.

    python -m tests.benchmarks.data_path gpus 8

Functions that need a fresh Ray run as a separate process of this module, which prints its result as JSON.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from persona.models import packaged
from persona.models.encoder import Encoded, TextEncoder
from tests.benchmarks import corpus, many_users
from tests.benchmarks.contest import timed
from tests.benchmarks.encoding import read_blocks, recorded

GPU_TEXTS_PER_S = 5_000
"""Texts per second of a simulated GPU."""
_N_EACH = 5  # behaviors per user
_STARTS = 2


class DataPath:
    """`jobs.embed` with an encoder that costs almost nothing: read, find what is missing, commit.

    The start-up time, which does not grow with the input, is measured in the first turns and subtracted.
    """

    def __init__(self, n: int) -> None:
        from jobs.runtime import session

        session.connect()
        self.folder = Path(tempfile.mkdtemp(prefix="bench-"))
        self.starts_s: list[float] = []
        self.n = many_users.write(self.folder / "all", many_users.histories(n // _N_EACH, _N_EACH))
        corpus.write_histories(self.folder / "two" / "0.parquet", ["only", "two"])

    def turn(self) -> tuple[float, float]:
        """All rows but two, and the time beyond that of a job with two rows."""
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
        self.n = many_users.write(self.folder / "all", many_users.histories(n // _N_EACH, _N_EACH))

    def turn(self) -> tuple[float, float]:
        """Copy all rows."""
        return self.n, timed(self.copy)

    def copy(self) -> None:
        """Write the input with a vector column, as a store has it."""
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
    """A store that is built once, and refreshed in each turn with 1 % new behaviors."""

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
        """Run the job on all input files."""
        from jobs import embed

        encoder = str(packaged.minilm())
        summary = embed.main(
            embed.Config(histories=str(self.folder / "in"), store=str(self.folder / "store"), encoder=encoder)
        )
        assert summary.result["committed"] == (self.n_new if self.turns else self.n), summary.result

    def turn(self) -> tuple[float, float]:
        """The seconds of the build, and those of a refresh: the rate is how many refreshes take as long as a build."""
        self.turns += 1
        texts = corpus.texts("titles", self.n_new, seed=self.turns)
        first = self.n + self.turns * self.n_new
        corpus.write_histories(self.folder / "in" / f"{self.turns}.parquet", texts, first=first)
        return self.build_s, timed(self.embed)


class SleepingEncoder(TextEncoder):
    """Takes as long as a GPU that encodes `GPU_TEXTS_PER_S`, and no CPU time."""

    def __init__(self) -> None:
        """Loads no model."""

    def encode(self, texts: Sequence[str], *, on_batch: Callable[[int], None] | None = None) -> Encoded:
        """Like `TextEncoder.encode`; all vectors are equal."""
        time.sleep(len(texts) / GPU_TEXTS_PER_S)
        if on_batch is not None:
            on_batch(len(texts))
        vectors = np.full((len(texts), many_users.WIDTH), many_users.WIDTH**-0.5, np.float16)
        return Encoded(vectors=vectors, n_tokens=len(texts), n_padded=len(texts), tokenize_s=0.0)


@dataclass(frozen=True, kw_only=True)
class GpuUse:
    """How well the simulated GPUs were fed."""

    gpus: int
    behaviors: int
    busy: float
    """Share of the time that the GPUs were encoding, each from its first text to its last."""
    behaviors_per_s: float
    seconds: dict[str, float]
    """Seconds of each step, from the profile of the job."""


def gpus(n_gpus: int, seconds: float = 4.0) -> dict[str, Any]:
    """A `GpuUse`: `jobs.embed` on a Ray with simulated GPUs, on enough texts for `seconds` of encoding."""
    import ray

    from jobs import embed
    from jobs.runtime import session

    ray.init(num_cpus=6, num_gpus=n_gpus, include_dashboard=False, log_to_driver=False, logging_level="error")

    class Sleep(many_users.CheapEncode):
        def __init__(self, *settings: Any, **more: Any) -> None:
            super().__init__(*settings, **more)
            self.encoder = SleepingEncoder()
            self.n_blocks = 0

        def __call__(self, behaviors: pa.Table) -> pa.Table:
            if behaviors.num_rows and not self.n_blocks:
                self.idle_since = time.perf_counter()  # the wait for the first text does not count
            self.n_blocks += 1
            return super().__call__(behaviors)

    embed.Encode = Sleep  # type: ignore[misc]
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    n_users = int(n_gpus * seconds * GPU_TEXTS_PER_S / _N_EACH)
    n = many_users.write(folder / "in", many_users.histories(n_users, _N_EACH))
    encoder = str(packaged.minilm())
    config = embed.Config(
        histories=str(folder / "in"), store=str(folder / "store"), encoder=encoder, max_tokens=64, profile=True
    )
    result = embed.main(config).result
    shutil.rmtree(folder)
    spent = result["profile"]["seconds"]
    assert session.connect().gpus == n_gpus
    total_s = spent["encode"] + spent["waiting"]
    use = GpuUse(
        gpus=n_gpus,
        behaviors=n,
        busy=spent["encode"] / total_s,
        behaviors_per_s=n / (total_s / n_gpus),
        seconds=spent,
    )
    return asdict(use)


def measure_gpus(n_gpus: int) -> GpuUse:
    """`gpus` in a separate process."""
    return GpuUse(**_process("gpus", str(n_gpus)))


def start_alone() -> dict[str, float]:
    """The least that any job needs: start Ray, load the model in one actor per core, encode one text."""
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


def start_of_embed(folder: str) -> dict[str, float]:
    """`jobs.embed` on the histories in `folder`, and when its first batch was encoded."""
    from jobs import embed
    from jobs.runtime import session

    blocks = Path(folder) / "blocks"
    embed.Encode = recorded(embed.Encode, blocks)  # type: ignore[misc]
    session.connect()
    config = embed.Config(
        histories=f"{folder}/in", store=f"{folder}/store", encoder=str(packaged.minilm()), max_tokens=64
    )
    embed.main(config)
    return {"encoded_at": min(block.ended for block in read_blocks(blocks))}


def time_to_first_batch(turns: int) -> tuple[float, float, float]:
    """Median seconds to the first encoded batch: of `jobs.embed`, of `start_alone`, and of their difference."""
    ours, alone = [], []
    for _ in range(turns):
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            corpus.write_histories(Path(folder) / "in" / "0.parquet", corpus.texts("titles", 200))
            started = time.time()
            ours.append(_process("start_of_embed", folder)["encoded_at"] - started)
        started = time.time()
        alone.append(_process("start_alone")["encoded_at"] - started)
    beyond = [ours_s - alone_s for ours_s, alone_s in zip(ours, alone, strict=True)]
    return statistics.median(ours), statistics.median(alone), statistics.median(beyond)


def _process(name: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.data_path", name, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
    # Ray may print warnings after the result.
    result: dict[str, Any] = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    return result


if __name__ == "__main__":
    function, *words = sys.argv[1:]
    functions: dict[str, Any] = {
        "gpus": lambda count: gpus(int(count)),
        "start_alone": start_alone,
        "start_of_embed": start_of_embed,
    }
    print(json.dumps(functions[function](*words)))
