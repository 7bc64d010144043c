"""Prometheus metrics of a run, computed from what workers report to the tally.

Ray exports them on the metrics port of every node, with the prefix `ray_` and, for counters, the suffix `_total`. The
dashboard and the alerts are in `cluster/monitoring/`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

PREFIX = "persona_"


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A metric: its name without the prefix, its description, and whether it has the label `stage`."""

    name: str
    description: str
    by_stage: bool = False

    @property
    def full_name(self) -> str:
        """The name that is given to Ray."""
        return f"{PREFIX}{self.name}"

    @property
    def tag_keys(self) -> tuple[str, ...]:
        """The labels."""
        return ("stage",) if self.by_stage else ()


_COMPARED = Measure(name="behaviors_compared", description="Behaviors of the input that were looked up in the store.")
_MODEL_S = Measure(
    name="model_seconds", description="Seconds that models spent working, over all actors.", by_stage=True
)
_WAITING_S = Measure(
    name="model_waiting_seconds", description="Seconds that models spent waiting for input.", by_stage=True
)
COUNTERS: dict[tuple[str, str], Measure] = {
    ("read", "rows"): Measure(name="rows_read", description="Valid rows of the input."),
    ("read", "rejects"): Measure(name="rows_rejected", description="Input rows that went to the rejects table."),
    ("read", "unreadable"): Measure(
        name="rows_unreadable", description="Files and lines that could not be read as rows."
    ),
    ("compare", "known"): _COMPARED,
    ("compare", "new"): _COMPARED,
    ("compare", "edited"): _COMPARED,
    ("encode", "rows"): Measure(name="behaviors_encoded", description="Behaviors that were encoded."),
    ("encode", "tokens"): Measure(name="tokens_encoded", description="Tokens that the encoder read."),
    ("encode", "seconds"): _MODEL_S,
    ("encode", "waiting"): _WAITING_S,
    ("generate", "answers"): Measure(name="answers_made", description="Answers that the LLM generated."),
    ("generate", "tokens"): Measure(name="tokens_generated", description="Tokens of the generated answers."),
    ("generate", "seconds"): _MODEL_S,
    ("generate", "waiting"): _WAITING_S,
    ("time", "step"): _MODEL_S,
    ("time", "waiting"): _WAITING_S,
    ("commit", "rows"): Measure(name="rows_committed", description="Rows that were committed, visible to readers."),
}
"""Counters by the stage and name whose reports increase them."""
GAUGES: dict[tuple[str, str], Measure] = {
    ("train", "step"): Measure(name="train_step", description="Optimizer steps done."),
    ("train", "of"): Measure(name="train_steps", description="Optimizer steps of the whole run."),
    ("train", "loss"): Measure(name="train_loss", description="Loss of the last step, in nats per token."),
    ("train", "validation"): Measure(
        name="train_held_out_loss", description="Loss on the held-out requests, in nats per token."
    ),
    ("train", "requests_per_s"): Measure(
        name="train_requests_per_second", description="Requests per second in the last step."
    ),
}
"""Gauges by the stage and name whose latest report they show."""
BEHIND = Measure(
    name="behaviors_behind", description="Behaviors of the input that are not in the store yet, or with an older text."
)
BATCH_S = Measure(name="batch_seconds", description="Seconds that a model took for one block of rows.", by_stage=True)
_BATCH_BOUNDS_S = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]
_STAGE_LABELS = {"time": "train"}  # training workers report their seconds under `time`


class RunMetrics:
    """The metrics of one run, in the process of the tally."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        self._counters = {
            one: Counter(one.full_name, description=one.description, tag_keys=one.tag_keys) for one in COUNTERS.values()
        }
        self._gauges = {
            one: Gauge(one.full_name, description=one.description, tag_keys=one.tag_keys)
            for one in [*GAUGES.values(), BEHIND]
        }
        self._batches = Histogram(
            BATCH_S.full_name,
            description=BATCH_S.description,
            boundaries=_BATCH_BOUNDS_S,
            tag_keys=BATCH_S.tag_keys,
        )
        self._behind = 0.0

    def update(self, stage: str, before: Mapping[str, float], now: Mapping[str, float]) -> None:
        """Take in a report on a unit of a stage; `before` is the earlier report on the same unit, which it replaces."""
        for name, value in now.items():
            key, added = (stage, name), value - before.get(name, 0.0)
            if key in COUNTERS and added > 0:
                one = COUNTERS[key]
                self._counters[one].inc(added, {"stage": _STAGE_LABELS.get(stage, stage)} if one.by_stage else {})
            elif key in GAUGES:
                self._gauges[GAUGES[key]].set(value)
        if stage in ("encode", "generate") and not before:
            self._batches.observe(now["seconds"], {"stage": stage})
        self._update_behind(stage, before, now)

    def _update_behind(self, stage: str, before: Mapping[str, float], now: Mapping[str, float]) -> None:
        sign = {"compare": 1, "commit": -1}.get(stage, 0)
        if sign:
            self._behind += sign * sum(now.get(name, 0) - before.get(name, 0) for name in ("new", "edited"))
            self._gauges[BEHIND].set(max(0.0, self._behind))
