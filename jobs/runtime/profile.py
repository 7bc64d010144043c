"""Where the time of a run went, and what would speed it up: the lines of `--profile`.

Workers report the seconds they spend in each stage. Stages run at the same time, so the seconds of a stage are compared
with what was available to it: a pool of actors, all cores, or the driver alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jobs.runtime.cli import Summary
from jobs.runtime.tally import Counts


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One kind of work: its seconds, summed over all workers, how many run in parallel, and what speeds it up."""

    name: str
    seconds: float
    side_by_side: int
    helps: str


def stage(
    counts: Counts, reported: str, side_by_side: int, helps: str, *, seconds: str = "seconds", name: str | None = None
) -> Stage:
    """A stage from what its workers reported under the name `reported`."""
    spent = counts.get(reported, {}).get(seconds, 0.0)
    return Stage(name=name or reported, seconds=spent, side_by_side=side_by_side, helps=helps)


def writing(counts: Counts, cores: int) -> list[Stage]:
    """The last stages of every job: writing files in the workers, committing them in the driver."""
    helps = "larger blocks (--block-rows) make fewer and larger files"
    return [stage(counts, "write", cores, helps), stage(counts, "commit", 1, helps)]


def added(summary: Summary, stages: Sequence[Stage], *, wall_s: float, waited_s: float, starving: str) -> Summary:
    """The summary with two more lines, and with `profile` in its result.

    Args:
        summary: of the run without its profile.
        stages: the model's stage first.
        wall_s: seconds of the whole run.
        waited_s: seconds the model waited for input, summed over all actors.
        starving: what helps when the model waited and no other stage was busy enough to be the reason.
    """
    work, others = stages[0], stages[1:]
    alive_s = max(work.seconds + waited_s, 1e-9)
    start_s = max(0.0, wall_s - alive_s / work.side_by_side)
    busiest = max(others, key=lambda one: one.seconds / one.side_by_side)
    waited = f"the model waited {waited_s / alive_s:.0%} of the time"
    if start_s > wall_s / 2:
        name, text = "start", "the start and the end of the run; put more work into one run"
    elif work.seconds >= waited_s:
        name, text = work.name, f"{work.name}, busy {work.seconds / alive_s:.0%} of the time: {work.helps}"
    elif busiest.seconds / busiest.side_by_side > wall_s / 2:
        name, text = busiest.name, f"{busiest.name}: {waited}; {busiest.helps}"
    else:
        name, text = "waiting", f"{waited}: {starving}"
    parts = [f"{one.name} {one.seconds:,.1f} s" for one in stages]
    spent = f"{', '.join(parts)}, model waiting {waited_s:,.1f} s; start and end {start_s:,.1f} s"
    profile = {
        "seconds": {one.name: round(one.seconds, 4) for one in stages} | {"waiting": round(waited_s, 4)},
        "side_by_side": {one.name: one.side_by_side for one in stages},
        "start_seconds": round(start_s, 4),
        "bottleneck": name,
    }
    return replace(
        summary,
        table=[*summary.table, ("time spent", spent), ("bottleneck", text)],
        result={**summary.result, "profile": profile},
    )
