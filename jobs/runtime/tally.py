"""Counters of a run, kept by one actor: workers report what each unit of work did, the driver reads the sums."""

from collections import OrderedDict, defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from jobs.runtime.telemetry import RunMetrics
from persona.errors import RunLost

if TYPE_CHECKING:
    from ray import ObjectRef

T = TypeVar("T")

_UNITS_KEPT = 10_000  # some 5 MB; a task that is retried reports again long before as many others have
_POINTS_KEPT = 10_000  # far more steps than a run takes until the driver asks again

Counts = dict[str, dict[str, float]]
"""Sums by stage and name: `counts["read"]["rows"]`. A stage that has reported nothing is absent."""


@dataclass(frozen=True)
class Tally:
    """A handle to the counters of a run. It may be sent to workers; the counters end with the run.

    The counters are for progress, summaries and metrics. What a job decides follows from the data: from what was read
    (`jobs.runtime.reading.Found`) and from receipts (`jobs.runtime.receipts`). All methods raise `RunLost` when the
    actor has died, because restarted counters would be wrong.
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

        A later report on the same unit replaces the earlier one, so a retried task is counted once; unless it comes
        so late that the earlier one has been folded into the sums.
        """
        _result(self.actor.add.remote(stage, unit, counts))

    def note_soon(self, stage: str, unit: str, counts: Mapping[str, float]) -> None:
        """`note` without waiting; the report may be lost if this process exits."""
        self.actor.add.remote(stage, unit, counts)

    def totals(self) -> Counts:
        """Sums over all units reported so far."""
        return _result(self.actor.totals.remote())

    def point_soon(self, step: int, numbers: Mapping[str, float]) -> None:
        """Report the numbers of a training step, without waiting; they may be lost if this process exits."""
        self.actor.add_point.remote(step, numbers)

    def take_points(self) -> list[tuple[int, dict[str, float]]]:
        """The steps reported since the last call, the latest ones if there were very many."""
        return _result(self.actor.take_points.remote())


class TallyActor:
    """The counters themselves, for one actor. It remembers the latest units only, and of the others just the sums."""

    def __init__(self) -> None:
        self._units: OrderedDict[tuple[str, str], Mapping[str, float]] = OrderedDict()  # the latest report comes last
        self._sums: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._metrics = RunMetrics()
        self._points: deque[tuple[int, dict[str, float]]] = deque(maxlen=_POINTS_KEPT)

    def add(self, stage: str, unit: str, counts: Mapping[str, float]) -> None:
        """Count a unit of a stage in place of what was reported on it before."""
        before = self._units.pop((stage, unit), {})
        self._metrics.update(stage, before, counts)
        self._units[stage, unit] = dict(counts)
        if len(self._units) > _UNITS_KEPT:
            self._units.popitem(last=False)
        sums = self._sums[stage]
        for name in {**before, **counts}:
            sums[name] += counts.get(name, 0.0) - before.get(name, 0.0)

    def add_point(self, step: int, numbers: Mapping[str, float]) -> None:
        """Keep the numbers of a step until they are taken."""
        self._points.append((step, dict(numbers)))

    def take_points(self) -> list[tuple[int, dict[str, float]]]:
        """The steps since the last call."""
        taken = list(self._points)
        self._points.clear()
        return taken

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
