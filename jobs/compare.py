"""Put evaluations side by side: several plugs, seeds, controls and ways to retrieve, on the same requests.

Reads `metrics.json` and `losses.parquet` of each of `--evaluations`, which `jobs.evaluate` wrote. Writes
`<out>/comparison.json` and `<out>/comparison.html`. Plugs that differ in nothing but the seed of their training are one
row: the mean over the seeds, and how far apart they are. Needs no Ray and no model.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.runtime import cli, log
from jobs.runtime.cli import Summary
from persona.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Config:
    """What `jobs.compare` can be told."""

    evaluations: tuple[str, ...]
    """Folders that jobs.evaluate wrote (its --out), local or s3://."""
    out: str
    """Folder for comparison.json and comparison.html, local or s3://."""
    names: tuple[str, ...] = ()
    """A name for each evaluation; default the names of their folders."""
    against: str | None = None
    """The row that all others are held against, NAME or NAME/PERSONA; default `own` of the first evaluation."""
    seed: int = 0
    """Of the bootstrap."""
    dry_run: bool = False
    """Say what would be done, and write nothing."""

    def __post_init__(self) -> None:
        """Refuses what can be refused without looking at any data."""
        if not self.evaluations:
            raise UsageError("--evaluations: give one folder at least")
        if self.names and len(self.names) != len(self.evaluations):
            raise UsageError(
                f"--names: give as many as --evaluations, {len(self.evaluations)}, not {len(self.names)}; of seeds of "
                "one plug the first name counts"
            )


def main(config: Config) -> Summary:
    """Runs the job."""
    import json

    from persona import storage
    from persona.evaluation.many_runs import LOSSES, METRICS, Evaluation, compare
    from persona.report import comparison_page

    out = storage.check_uri(config.out, flag="--out")
    storage.check_reachable(out, flag="--out", write=True)
    places = [storage.check_uri(place, flag="--evaluations") for place in config.evaluations]
    for place in places:
        for file in (METRICS, LOSSES):
            storage.check_reachable(storage.join(place, file), flag="--evaluations")
    names = config.names or [place.rstrip("/").rsplit("/", 1)[-1] for place in places]
    evaluations = [
        Evaluation.read(
            name, *(storage.read_bytes(storage.join(place, file)) for file in (METRICS, LOSSES)), source=place
        )
        for name, place in zip(names, places, strict=True)
    ]
    found = compare(evaluations, against=config.against, seed=config.seed)
    files = {
        "comparison.json": (json.dumps(cli.plain(found), indent=2, allow_nan=False) + "\n").encode(),
        "comparison.html": comparison_page.page(found),
    }
    if not config.dry_run:
        for name, data in files.items():
            storage.write_bytes(storage.join(out, name), data)
    for text in found["warnings"]:
        log.say(f"warning: {text}", level="warning")
    return Summary(table=_table(found), result={"job": "compare", "out": out, "dry_run": config.dry_run, **found})


def _table(found: Mapping[str, Any]) -> list[Sequence[str]]:
    scores = list(dict.fromkeys(name for row in found["rows"] for name in row["scores"]))
    ways = list(dict.fromkeys(name for row in found["rows"] for name in row["ranking"]))
    heads = [
        f"{found['requests']:,} requests of {found['users']:,} users",
        "nats a token",
        f"less {found['against']}",
        "seeds",
        *scores,
        *(f"ranking, {way}" for way in ways),
    ]
    return [heads, *(_line(row, scores, ways) for row in found["rows"])]


def _line(row: Mapping[str, Any], scores: Sequence[str], ways: Sequence[str]) -> list[str]:
    spread, above = row["loss_of_seeds"], row["above_reference"]
    return [
        f"{row['name']}/{row['persona']}",
        _interval(row["loss"], "{:.4f}"),
        _interval(above, "{:+.4f}") if above else "–",
        f"{len(row['seeds'])}, {spread['low']:.4f}–{spread['high']:.4f}, σ {spread['deviation']:.4f}"
        if spread
        else "1",
        *(f"{row['scores'][name]['value']:.4f}" if name in row["scores"] else "–" for name in scores),
        *(_interval(row["ranking"][way], "{:.3f}") if way in row["ranking"] else "–" for way in ways),
    ]


def _interval(found: Mapping[str, float], form: str) -> str:
    mean, low, high = (form.format(found[name]) for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


if __name__ == "__main__":
    sys.exit(cli.run(Config, main))
