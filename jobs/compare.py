"""Compare evaluations of the same requests: several plugs, seeds, controls and ways to retrieve.

Reads `metrics.json` and `losses.parquet`, which `jobs.evaluate` wrote, from each of `--evaluations`, and `judged.json`,
which `jobs.judge` wrote, from each of `--judged`. Writes
`<out>/comparison.json` and `<out>/comparison.html`. Plugs that differ only in the seed of their training share a row,
with their mean and their spread. Needs neither Ray nor a model.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.runtime import cli, log, tracked_results, tracking
from jobs.runtime.cli import Summary
from jobs.runtime.job_options import flat_settings
from persona.errors import InputError, UsageError
from persona.options import Track

if TYPE_CHECKING:
    from persona.evaluation.saved_run import Evaluation


@dataclass(frozen=True, kw_only=True)
class Config:
    """Configuration of jobs.compare."""

    evaluations: tuple[str, ...]
    """Folders that jobs.evaluate wrote (its --out), local or s3://."""
    out: str
    """Folder for comparison.json and comparison.html, local or s3://."""
    judged: tuple[str, ...] = ()
    """Folders that jobs.judge wrote (its --out); what judges say of the answers is shown on the page as well."""
    names: tuple[str, ...] = ()
    """One name for each evaluation; the names of their folders by default."""
    against: str | None = None
    """The reference row, NAME or NAME/PERSONA; the row `own` of the first evaluation by default."""
    seed: int = 0
    """Seed of the bootstrap."""
    track: Track = "none"
    """Report numbers and the page to this experiment tracker; the environment says where it is."""
    dry_run: bool = False
    """Print the comparison and write nothing."""

    def __post_init__(self) -> None:
        """Raises UsageError for flags that do not go together."""
        if not self.evaluations:
            raise UsageError("--evaluations: give at least one folder")
        if self.names and len(self.names) != len(self.evaluations):
            raise UsageError(
                f"--names: give as many as --evaluations, {len(self.evaluations)}, not {len(self.names)}; of several "
                "seeds of one plug the first name counts"
            )


def main(config: Config) -> Summary:
    """Runs the job."""
    import json

    from persona import storage
    from persona.evaluation.many_runs import compare
    from persona.evaluation.saved_run import LOSSES, METRICS
    from persona.report.pages import comparison_page

    out = storage.check_uri(config.out, flag="--out")
    storage.check_reachable(out, flag="--out", write=True)
    folders = [storage.check_uri(folder, flag="--evaluations") for folder in config.evaluations]
    for folder in folders:
        for file in (METRICS, LOSSES):
            storage.check_reachable(storage.join(folder, file), flag="--evaluations")
    names = config.names or [folder.rstrip("/").rsplit("/", 1)[-1] for folder in folders]
    evaluations = read_evaluations(folders, names)
    found = {**compare(evaluations, against=config.against, seed=config.seed), "judged": _judged(config)}
    files = {
        "comparison.json": (json.dumps(cli.plain(found), indent=2, allow_nan=False) + "\n").encode(),
        "comparison.html": comparison_page(found),
    }
    if not config.dry_run:
        for name, data in files.items():
            storage.write_bytes(storage.join(out, name), data)
        with tracking.tracked(config.track, job="compare", place=out, settings=flat_settings(config)) as tracked:
            tracked.results(tracked_results.comparison_numbers(found), files)
    for text in found["warnings"]:
        log.say(f"warning: {text}", level="warning")
    return Summary(table=table(found), result={"job": "compare", "out": out, "dry_run": config.dry_run, **found})


def _judged(config: Config) -> list[dict[str, Any]]:
    """What judges say of each variant, by folder. Raises InputError for a folder that jobs.judge did not write."""
    import json

    from persona import storage

    found = []
    for given in config.judged:
        uri = storage.join(storage.check_uri(given, flag="--judged"), "judged.json")
        storage.check_reachable(uri, flag="--judged")
        try:
            content = json.loads(storage.read_bytes(uri))
            found.append({"name": given.rstrip("/").rsplit("/", 1)[-1], "scores": content["scores"]})
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"--judged {given}: judged.json is not from jobs.judge ({type(error).__name__}); give its --out"
            ) from error
    return found


def read_evaluations(folders: Sequence[str], names: Sequence[str]) -> "list[Evaluation]":
    """The evaluations in some folders."""
    from persona import storage
    from persona.evaluation.saved_run import LOSSES, METRICS, Evaluation

    return [
        Evaluation.read(
            name, *(storage.read_bytes(storage.join(folder, file)) for file in (METRICS, LOSSES)), source=folder
        )
        for name, folder in zip(names, folders, strict=True)
    ]


def table(found: Mapping[str, Any]) -> list[Sequence[str]]:
    """The table of a summary: a row for each plug and kind of persona."""
    from persona.report.wording import RANKINGS, rankings_of

    scores = list(dict.fromkeys(name for row in found["rows"] for name in row["scores"]))
    ways = rankings_of(row["ranking"] for row in found["rows"])
    heads = [
        f"{found['requests']:,} requests of {found['users']:,} users",
        "nats a token",
        f"difference to {found['against']}",
        "seeds",
        *scores,
        *(f"ranking {RANKINGS[way]}" for way in ways),
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


def _interval(interval: Mapping[str, float], template: str) -> str:
    mean, low, high = (template.format(interval[name]) for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


if __name__ == "__main__":
    sys.exit(cli.run(Config, main))
