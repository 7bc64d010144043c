"""Where the time of a run went, and what would make it faster: the rows of `--profile`.

Workers report the seconds of each stage. Stages overlap, so the seconds of a stage are compared with the capacity that
it had: a pool of actors, all cores, or the driver alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jobs.runtime.cli import Summary
from jobs.runtime.tally import Counts


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One kind of work: its seconds summed over all workers, how many run in parallel, and advice to make it faster."""

    name: str
    seconds: float
    n_parallel: int
    advice: str


def stage(
    counts: Counts, reported: str, n_parallel: int, advice: str, *, seconds: str = "seconds", name: str | None = None
) -> Stage:
    """A stage from the counts that its workers reported as stage `reported`; `seconds` is the name of the counter."""
    spent = counts.get(reported, {}).get(seconds, 0.0)
    return Stage(name=name or reported, seconds=spent, n_parallel=n_parallel, advice=advice)


def writing(counts: Counts, cores: int) -> list[Stage]:
    """The last stages of jobs that fill a table: workers write files, the driver commits them."""
    advice = "larger blocks (--block-rows) make fewer and larger files"
    return [stage(counts, "write", cores, advice), stage(counts, "commit", 1, advice)]


def added(summary: Summary, stages: Sequence[Stage], *, wall_s: float, waited_s: float, starving: str) -> Summary:
    """The summary with two more rows, and with `profile` in its result.

    Args:
        summary: of the run.
        stages: the first one is the model's.
        wall_s: seconds of the whole run.
        waited_s: seconds that models waited for input, summed over all actors.
        starving: advice for a model that waits although no other stage is busy enough to be the reason.
    """
    model, others = stages[0], stages[1:]
    alive_s = max(model.seconds + waited_s, 1e-9)
    start_s = max(0.0, wall_s - alive_s / model.n_parallel)
    name, text = _bottleneck(model, others, wall_s=wall_s, waited_s=waited_s, start_s=start_s, starving=starving)
    parts = [f"{one.name} {one.seconds:,.1f} s" for one in stages]
    spent = f"{', '.join(parts)}, model waiting {waited_s:,.1f} s; start and end {start_s:,.1f} s"
    profile = {
        "seconds": {one.name: round(one.seconds, 4) for one in stages} | {"waiting": round(waited_s, 4)},
        "side_by_side": {one.name: one.n_parallel for one in stages},
        "start_seconds": round(start_s, 4),
        "bottleneck": name,
    }
    return replace(
        summary,
        table=[*summary.table, ("time spent", spent), ("bottleneck", text)],
        result={**summary.result, "profile": profile},
    )


def _bottleneck(
    model: Stage, others: Sequence[Stage], *, wall_s: float, waited_s: float, start_s: float, starving: str
) -> tuple[str, str]:
    """The name of the bottleneck, and a line with advice."""
    alive_s = max(model.seconds + waited_s, 1e-9)
    waited = f"the model waited {waited_s / alive_s:.0%} of the time"
    busiest = max(others, key=lambda one: one.seconds / one.n_parallel)
    if start_s > wall_s / 2:
        return "start", "the start and the end of the run; put more work into one run"
    if model.seconds >= waited_s:
        return model.name, f"{model.name}, busy {model.seconds / alive_s:.0%} of the time: {model.advice}"
    if busiest.seconds / busiest.n_parallel > wall_s / 2:
        return busiest.name, f"{busiest.name}: {waited}; {busiest.advice}"
    return "waiting", f"{waited}: {starving}"
