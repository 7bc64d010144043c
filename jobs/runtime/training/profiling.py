"""Where the time of a training run went."""

from jobs.runtime import profile
from jobs.runtime.cli import Summary
from jobs.runtime.session import Machines
from jobs.runtime.tally import Counts


def with_profile(summary: Summary, counts: Counts, n_workers: int, machines: Machines, seconds: float) -> Summary:
    """The summary with where the time of a run went, and what would make it faster."""
    # Only the first worker reports its seconds; the others run in step with it.
    noted = {"time": {name: n_workers * spent for name, spent in counts.get("time", {}).items()}}
    faster = "more GPUs (--workers), a larger --micro-batch where memory allows, or fewer --max-input-tokens"
    rarely = "validate less often (--validate-every) or on fewer rows (--validation-rows)"
    stages = [
        profile.stage(noted, "time", n_workers, faster, seconds="step", name="train"),
        profile.stage(noted, "time", n_workers, rarely, seconds="validate", name="validate"),
        profile.stage(noted, "time", n_workers, "save less often (--validate-every)", seconds="save", name="save"),
        profile.stage(counts, "join", machines.cores, "more CPUs for Ray"),
        profile.stage(counts, "windows", machines.cores, "more CPUs for Ray", name="read histories"),
    ]
    waited_s = noted["time"].get("waiting", 0.0)
    return profile.added(summary, stages, wall_s=seconds, waited_s=waited_s, starving="more CPUs for Ray would feed it")
