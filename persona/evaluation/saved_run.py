"""An evaluation as `jobs.evaluate` saved it: `metrics.json` and the losses of each request."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from persona.errors import InputError
from persona.front_texts import FrontTexts
from persona.options import PlugOptions, PromptOptions, TrainingOptions

METRICS, LOSSES = "metrics.json", "losses.parquet"
_NEEDED = ("request_id", "user_id", "persona", "nats", "tokens")
_RETRIEVAL = ("retrieve", "retriever", "retrieve_tokens")
_PROFILE = ("user_profile", "user_profile_tokens")
# How the plug and its LLM read a request.
READ_AS = (
    "max_input_tokens",
    "max_target_tokens",
    "llm_quantization",
    "max_behaviors",
    "query_prompt",
    "max_query_tokens",
)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation: its `metrics.json`, and for each kind of persona its losses in the order of request ids."""

    name: str
    metrics: Mapping[str, Any]
    losses: Mapping[str, pa.Table]

    @classmethod
    def read(cls, name: str, metrics: bytes, losses: bytes, *, source: str) -> "Evaluation":
        """From the bytes of its two files. Raises InputError, which names `source`, if they are not an evaluation's."""
        try:
            found = json.loads(metrics)
            rows = pq.read_table(pa.BufferReader(losses))
        except (ValueError, pa.ArrowInvalid) as error:
            raise InputError(f"{source}: {METRICS} or {LOSSES} cannot be read: {error}") from error
        missing = [column for column in _NEEDED if column not in rows.column_names]
        if missing or not rows.num_rows or not {"settings", "training", "limited"} <= set(found):
            raise InputError(
                f"{source}: {METRICS} and {LOSSES} are not from jobs.evaluate, or from an older version; evaluate again"
            )
        personas = dict.fromkeys(rows["persona"].to_pylist())
        rows = rows.sort_by("request_id")
        of = {p: rows.filter(pc.equal(rows["persona"], p)) for p in found["settings"]["personas"] if p in personas}
        ids = [one["request_id"].to_pylist() for one in of.values()]
        if any(one != ids[0] or len(set(one)) < len(one) for one in ids):
            raise InputError(f"{source}: {LOSSES} does not have each request once for each persona; evaluate again")
        return cls(name=name, metrics=found, losses=of)

    @property
    def requests(self) -> dict[str, list[Any]]:
        """The columns `request_id`, `user_id` and `tokens`, which are the same for every kind of persona."""
        first = next(iter(self.losses.values()))
        return {name: first[name].to_pylist() for name in ("request_id", "user_id", "tokens")}

    @property
    def seed(self) -> int:
        """The seed of the plug's training."""
        return int(self.metrics["training"].get("seed", 0))

    def options(self) -> dict[str, Any]:
        """Everything but the seed that its numbers depend on; options that an older plug lacks have their defaults."""
        settings, training = self.metrics["settings"], self.metrics["training"]
        of_plug = {one.name: settings["plug_options"].get(one.name, one.default) for one in fields(PlugOptions)}
        of_run = {one.name: training.get(one.name, one.default) for one in fields(TrainingOptions)}
        del of_run["seed"], of_run["micro_batch"]  # losses do not depend on the size of a pass
        of_run |= {name: training.get(name) for name in ("requests", "select", "patience")}
        trained = _RETRIEVAL if training.get("retrieve") else ("retrieve",)
        of_run |= {f"trained_{name}": training.get(name, 0) for name in trained}
        read_as = {name: settings.get(name) for name in READ_AS}
        prompt = {one.name: settings.get("prompt", {}).get(one.name) for one in fields(PromptOptions)}
        found = self._front_texts()
        named = _RETRIEVAL if found.retrieve else ("retrieve",)
        front = {name: getattr(found, name) for name in (*named, *(_PROFILE if found.user_profile else ()))}
        models = {kind: settings[kind]["fingerprint"] for kind in ("llm", "encoder")}
        return {**of_plug, **of_run, **read_as, **prompt, **front, **models}

    @property
    def trained_without_history(self) -> bool:
        """Whether the plug is the control: prompt tuning, which never sees a history."""
        return bool(self.options()["empty_history"] == 1)

    def variant(self, persona: str) -> str:
        """The name of the answers under that persona, as `jobs.generate` names them."""
        return self._front_texts().answers_of(persona)

    def _front_texts(self) -> FrontTexts:
        """The texts in front of its requests; none if it is older than such texts."""
        settings = self.metrics["settings"]
        return FrontTexts(**{name: settings[name] for name in (*_RETRIEVAL, *_PROFILE) if name in settings})
