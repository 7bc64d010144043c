"""Counters of a run, kept by one actor: workers report what each unit of work did, the driver reads the sums."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from jobs.runtime.telemetry import RunMetrics
from persona.errors import RunLost

if TYPE_CHECKING:
    from ray import ObjectRef

T = TypeVar("T")

Counts = dict[str, dict[str, float]]
"""Sums by stage and name: `counts["read"]["rows"]`. A stage that has reported nothing is absent."""


@dataclass(frozen=True)
class Tally:
    """A handle to the counters of a run. It may be sent to workers; the counters end with the run.

    All methods raise `RunLost` when the actor has died: restarted counters would be wrong, and `embed --sync` deletes
    rows on the strength of them.
    """

    actor: Any
    """Ray's handle to a `TallyActor`; Ray has no type with the methods."""

    @classmethod
    def start(cls) -> "Tally":
        """Start the actor. It runs on the driver's node, so that the loss of another node does not end the run."""
        import ray

        driver_node = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        return cls(ray.remote(num_cpus=0, label_selector=driver_node)(TallyActor).remote())

    def note(self, stage: str, unit: str, counts: Mapping[str, float]) -> None:
        """Report what a unit of work did, and wait until it is counted: a worker may exit as soon as its work is done.

        A later report on the same unit replaces the earlier one, so a retried task is counted once.
        """
        _result(self.actor.add.remote(stage, unit, counts))

    def note_soon(self, stage: str, unit: str, counts: Mapping[str, float]) -> None:
        """`note` without waiting; the report may be lost if this process exits."""
        self.actor.add.remote(stage, unit, counts)

    def units(self, stage: str) -> list[str]:
        """The units of a stage that have been reported so far."""
        return _result(self.actor.units.remote(stage))

    def totals(self) -> Counts:
        """Sums over all units reported so far."""
        return _result(self.actor.totals.remote())


class TallyActor:
    """The counters themselves, for one actor."""

    def __init__(self) -> None:
        self._units: dict[tuple[str, str], Mapping[str, float]] = {}
        self._sums: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._metrics = RunMetrics()

    def add(self, stage: str, unit: str, counts: Mapping[str, float]) -> None:
        """Count a unit of a stage in place of what was reported on it before."""
        before = self._units.get((stage, unit), {})
        self._metrics.update(stage, before, counts)
        self._units[stage, unit] = dict(counts)
        sums = self._sums[stage]
        for name in {**before, **counts}:
            sums[name] += counts.get(name, 0.0) - before.get(name, 0.0)

    def units(self, stage: str) -> list[str]:
        """The units of a stage that have been reported."""
        return [unit for reported_stage, unit in self._units if reported_stage == stage]

    def totals(self) -> Counts:
        """Sums over units, by stage and name."""
        return {stage: dict(sums) for stage, sums in self._sums.items()}


def _result(reference: "ObjectRef[T]") -> T:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayActorError as error:
        raise RunLost(
            "the process that counts this run's work has died (killed, or out of memory on the driver's machine); "
            "what is committed stays committed: run the same command again"
        ) from error
