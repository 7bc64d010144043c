"""The numbers of a run as metrics for Prometheus, made of what workers note in the tally.

Ray exports them on every node's metrics port with `ray_` in front, and `_total` behind a counter. What is looked at and
what raises an alarm stands in `cluster/monitoring/`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PREFIX = "persona_"


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A metric: its name without the prefix, what it says, and whether it is told apart by `stage`."""

    name: str
    says: str
    by_stage: bool = False


_COMPARED = Measure(name="behaviors_compared", says="Behaviors of the input that were looked up in the store.")
_MODEL_S = Measure(name="model_seconds", says="Seconds in which a model worked, over all actors.", by_stage=True)
_WAITING_S = Measure(name="model_waiting_seconds", says="Seconds in which a model waited for input.", by_stage=True)
COUNTERS: dict[tuple[str, str], Measure] = {
    ("read", "rows"): Measure(name="rows_read", says="Valid rows of the input."),
    ("read", "rejects"): Measure(name="rows_rejected", says="Rows of the input that went to the table of rejects."),
    ("read", "unreadable"): Measure(name="rows_unreadable", says="Files and lines that could not be read as rows."),
    ("compare", "known"): _COMPARED,
    ("compare", "new"): _COMPARED,
    ("compare", "edited"): _COMPARED,
    ("encode", "rows"): Measure(name="behaviors_encoded", says="Behaviors that became vectors."),
    ("encode", "tokens"): Measure(name="tokens_encoded", says="Tokens that the encoder read."),
    ("encode", "seconds"): _MODEL_S,
    ("encode", "waiting"): _WAITING_S,
    ("generate", "answers"): Measure(name="answers_made", says="Answers that the LLM gave."),
    ("generate", "tokens"): Measure(name="tokens_generated", says="Tokens of those answers."),
    ("generate", "seconds"): _MODEL_S,
    ("generate", "waiting"): _WAITING_S,
    ("time", "step"): _MODEL_S,
    ("time", "waiting"): _WAITING_S,
    ("commit", "rows"): Measure(name="rows_committed", says="Rows that readers of the tables can see since."),
}
"""What a count of a stage adds to."""
GAUGES: dict[tuple[str, str], Measure] = {
    ("train", "step"): Measure(name="train_step", says="Optimizer steps done."),
    ("train", "of"): Measure(name="train_steps", says="Optimizer steps of the whole run."),
    ("train", "loss"): Measure(name="train_loss", says="Loss of the last step, nats a token."),
    ("train", "validation"): Measure(name="train_held_out_loss", says="Loss on the held-out requests, nats a token."),
    ("train", "requests_per_s"): Measure(name="train_requests_per_second", says="Requests of the last step a second."),
}
"""What a count of a stage is."""
BEHIND = Measure(name="behaviors_behind", says="Behaviors that the input has and the store does not have yet.")
BATCH_S = Measure(name="batch_seconds", says="Seconds that a model took for one block of rows.", by_stage=True)
_BATCH_BOUNDS_S = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]
_STAGES = {"time": "train"}  # a worker of `train` notes its seconds under `time`


def exported_names() -> set[str]:
    """The names of all metrics as Prometheus sees them."""
    counters = {f"ray_{PREFIX}{one.name}_total" for one in COUNTERS.values()}
    gauges = {f"ray_{PREFIX}{one.name}" for one in [*GAUGES.values(), BEHIND]}
    return counters | gauges | {f"ray_{PREFIX}{BATCH_S.name}_{part}" for part in ("bucket", "count", "sum")}


class RunMetrics:
    """The metrics of one run, in the process that keeps the tally."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        self._counters = {one: self._new(Counter, one) for one in COUNTERS.values()}
        self._gauges = {one: self._new(Gauge, one) for one in [*GAUGES.values(), BEHIND]}
        self._batches = self._new(Histogram, BATCH_S, boundaries=_BATCH_BOUNDS_S)
        self._behind = 0.0

    @staticmethod
    def _new(kind: Any, one: Measure, **more: Any) -> Any:
        return kind(f"{PREFIX}{one.name}", description=one.says, tag_keys=("stage",) * one.by_stage, **more)

    def note(self, stage: str, before: Mapping[str, float], now: Mapping[str, float]) -> None:
        """A unit of a stage has these counts now, and had those before; a unit that is done again counts once."""
        for name, value in now.items():
            key, added = (stage, name), value - before.get(name, 0.0)
            if key in COUNTERS and added > 0:
                one = COUNTERS[key]
                self._counters[one].inc(added, {"stage": _STAGES.get(stage, stage)} if one.by_stage else None)
            elif key in GAUGES:
                self._gauges[GAUGES[key]].set(value)
        if stage in ("encode", "generate") and not before:
            self._batches.observe(now["seconds"], {"stage": stage})
        self._note_behind(stage, before, now)

    def _note_behind(self, stage: str, before: Mapping[str, float], now: Mapping[str, float]) -> None:
        missing = {"compare": 1, "commit": -1}.get(stage, 0)
        if missing:
            self._behind += missing * sum(now.get(name, 0) - before.get(name, 0) for name in ("new", "edited"))
            self._gauges[BEHIND].set(max(0.0, self._behind))
