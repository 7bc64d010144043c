"""Counts of a run, kept by one actor: what each unit of work did, summed by stage."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from jobs.runtime.telemetry import RunMetrics
from persona.errors import RunLost

Counts = dict[str, dict[str, float]]


class Tally:
    """Counts of a run, kept by an actor. A unit of work that is done twice after a failure is counted once."""

    def __init__(self) -> None:
        self._units: dict[tuple[str, str], Mapping[str, float]] = {}
        self._sums: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._metrics = RunMetrics()

    def add(self, stage: str, unit: str, counts: Mapping[str, float]) -> None:
        """Notes what a unit of a stage did; the last word on a unit counts."""
        before = self._units.get((stage, unit), {})
        self._metrics.note(stage, before, counts)
        self._units[stage, unit] = dict(counts)
        sums = self._sums[stage]
        for name in {**before, **counts}:
            sums[name] += counts.get(name, 0.0) - before.get(name, 0.0)

    def units(self, stage: str) -> list[str]:
        """The units of a stage that have been noted."""
        return [unit for at, unit in self._units if at == stage]

    def totals(self) -> Counts:
        """Sums over units, by stage and name."""
        return {stage: dict(sums) for stage, sums in self._sums.items()}


def new_tally() -> Any:
    """A handle to a Tally actor that lives as long as this run: on the driver's node, so as not to die before it."""
    import ray

    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    return ray.remote(num_cpus=0, label_selector=here)(Tally).remote()


def note(tally: Any, stage: str, unit: str, counts: Mapping[str, float]) -> None:
    """Adds to the tally and waits until it is in: a worker may end as soon as its work is done."""
    _answer(tally.add.remote(stage, unit, counts))


def totals(tally: Any) -> Counts:
    """What the tally knows now."""
    sums: Counts = _answer(tally.totals.remote())
    return sums


def units(tally: Any, stage: str) -> list[str]:
    """The units of a stage that the tally knows now."""
    found: list[str] = _answer(tally.units.remote(stage))
    return found


def _answer(promise: Any) -> Any:
    """What the tally answers. Counts that began anew would be wrong, and `--sync` acts on them: so it has one life."""
    import ray

    try:
        return ray.get(promise)
    except ray.exceptions.RayActorError as error:
        raise RunLost(
            "the process that counts the work of this run has died (killed, or out of memory on the driver's machine); "
            "what is committed stays: run the same command again"
        ) from error
