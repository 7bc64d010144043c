"""Analyze the layers of hidden states: a task a layer gathers a sample and measures it, tasks a few runs scan it.

A task reads only the rows of its layer and comparison, keeps a bounded number of them, and leaves its result as one
file. A run that resumes leaves out what has its file.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from jobs.runtime import cli, exchange
from jobs.runtime.tally import Tally

if TYPE_CHECKING:
    import pyarrow as pa

    from persona.locating.comparison import Comparison
    from persona.locating.runs import ScanOptions

RUNS_PER_TASK = 10


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What is analyzed, and how.

    Attributes:
        states: folder of the parts (`persona.locating.state_files`).
        results: folder of samples and results.
        parts: names of the parts.
        comparisons: what is compared in each layer.
        n_states: layers, the embeddings among them.
        most: rows of each side; of more, the same ones are taken in all layers.
        n_components: principal components of the cluster metrics.
        n_runs: runs of the scan; 0 for none.
        scan: how a run scans.
        seed: of folds and shufflings.
    """

    states: str
    results: str
    parts: Sequence[str]
    comparisons: "Sequence[Comparison]"
    n_states: int
    most: int
    n_components: int
    n_runs: int
    scan: "ScanOptions"
    seed: int

    def layers(self) -> "list[Layer]":
        """Every layer of every comparison."""
        numbers = range(len(self.comparisons))
        return [Layer(number=number, layer=layer) for number in numbers for layer in range(self.n_states)]

    def scans(self) -> "list[Scans]":
        """The runs of every layer, a few to a task."""
        firsts = range(0, self.n_runs, RUNS_PER_TASK)
        return [
            Scans(layer=one, first=first, end=min(first + RUNS_PER_TASK, self.n_runs))
            for one in self.layers()
            for first in firsts
        ]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer of the comparison with this number."""

    number: int
    layer: int

    @property
    def name(self) -> str:
        """For names of files."""
        return f"{self.number:04}-{self.layer:03}"


@dataclass(frozen=True, kw_only=True)
class Scans:
    """The runs `first` to `end` of a layer."""

    layer: Layer
    first: int
    end: int

    @property
    def file(self) -> str:
        """The name of the file with their results."""
        return f"scan/{self.layer.name}-{self.first:05}.parquet"


def analyze(analysis: Analysis, tally: Tally) -> None:
    """Measure and scan all layers that have no result yet."""
    from persona import storage

    done = {entry.uri.removeprefix(analysis.results).lstrip("/") for entry in storage.list_files(analysis.results)}
    layers = analysis.layers()
    scans = [one for one in analysis.scans() if one.file not in done]
    measured = [one for one in layers if _metrics_file(one) in done]
    tally.note("layers", "before", {"done": len(measured), "of": len(layers)})
    for _ in exchange.results(
        [one for one in layers if _metrics_file(one) not in done], _measure, analysis=analysis, tally=tally
    ):
        pass
    tally.note("scan", "before", {"done": len(analysis.scans()) - len(scans), "of": len(analysis.scans())})
    # Only the samples are read from here on.
    for _ in exchange.results(scans, _scan, analysis=replace(analysis, parts=()), tally=tally):
        pass


def rows_of_layers(analysis: Analysis) -> Iterator[tuple[Layer, dict[str, Any]]]:
    """What was measured, in the order of comparisons and layers."""
    from persona import storage

    for one in analysis.layers():
        yield one, json.loads(storage.read_bytes(storage.join(analysis.results, _metrics_file(one))))


def runs_of(analysis: Analysis, one: Layer) -> "pa.Table | None":
    """The runs of a layer, in their order; None if it has too few rows for a scan."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    from persona import storage

    tables = [
        pq.read_table(io.BytesIO(storage.read_bytes(storage.join(analysis.results, scans.file))))
        for scans in analysis.scans()
        if scans.layer == one
    ]
    found = pa.concat_tables(tables) if tables else None
    return found if found is not None and found.num_rows else None


def _metrics_file(one: Layer) -> str:
    return f"layers/{one.name}.json"


def _sample_uri(analysis: Analysis, one: Layer) -> str:
    from persona import storage

    return storage.join(analysis.results, f"samples/{one.name}.parquet")


def _measure(one: Layer, *, analysis: Analysis, tally: Tally) -> None:
    from persona import storage
    from persona.locating import comparison

    compared = analysis.comparisons[one.number]
    uri = _sample_uri(analysis, one)
    sample = comparison.gather(analysis.states, analysis.parts, compared, layer=one.layer, most=analysis.most, to=uri)
    row = comparison.layer_row(
        sample, compared, layer=one.layer, n_components=analysis.n_components, seed=analysis.seed
    )
    storage.write_bytes(storage.join(analysis.results, _metrics_file(one)), json.dumps(cli.plain(row)).encode())
    tally.note("layers", one.name, {"done": 1})


def _scan(scans: Scans, *, analysis: Analysis, tally: Tally) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from persona import storage
    from persona.locating import comparison, runs

    sample = comparison.read(_sample_uri(analysis, scans.layer))
    found = [runs.run(sample, number, analysis.scan) for number in range(scans.first, scans.end)]
    lists = ("units", "units_shuffled")
    rows = [
        {**asdict(one), **{name: getattr(one, name).tolist() for name in lists}} for one in found if one is not None
    ]
    table = pa.Table.from_pylist(rows, schema=_runs_schema())
    with storage.write_file(storage.join(analysis.results, scans.file)) as path:
        pq.write_table(table, path)
    tally.note("scan", scans.file, {"done": 1})


def _runs_schema() -> "pa.Schema":
    import pyarrow as pa

    return pa.schema(
        [
            ("number", pa.int32()),
            ("score", pa.float64()),
            ("score_shuffled", pa.float64()),
            ("threshold", pa.float64()),
            ("units", pa.list_(pa.int32())),
            ("n_found", pa.int32()),
            ("n_scanned", pa.int32()),
            ("precision", pa.float64()),
            ("recall", pa.float64()),
            ("units_shuffled", pa.list_(pa.int32())),
        ]
    )
