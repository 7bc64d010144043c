"""A training run as it lies in storage: what it was started with, and the plug that comes out of it."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jobs.runtime import reading, retrieval as retrieve
from jobs.runtime.cli import Summary
from jobs.runtime.job_options import PastTexts, flat_settings
from jobs.runtime.tally import Counts
from persona import storage
from persona.errors import UsageError
from persona.options import PlugOptions, RetrievalOptions, TrainingOptions

if TYPE_CHECKING:
    from jobs.train import Config, Inputs
    from persona.options import Pooling

_OPTIONS = (PlugOptions, TrainingOptions, RetrievalOptions, PastTexts)
# What a run cannot be resumed without, besides these options.
_FIXED = (
    "requests",
    "validation",
    "validation_fraction",
    "validation_rows",
    "query_prefix",
    "max_query_tokens",
    "max_input_tokens",
    "max_behaviors",
    "precision",
    "limit",
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run is known by: whoever resumes it must want the same, and reads the same version of the store."""

    uri: str
    settings: Mapping[str, Any]
    behaviors_version: int
    known: Mapping[str, Any] | None

    @classmethod
    def find(cls, config: "Config", inputs: "Inputs") -> "Run":
        """The run of that name. Raises UsageError when it was started with other settings."""
        uri = storage.join(inputs.runs, config.run, "settings.json")
        given = flat_settings(config)
        settings = {
            **{name: given[name] for name in (*_FIXED, *(option.name for kind in _OPTIONS for option in fields(kind)))},
            "llm": inputs.llm.fingerprint,
            "encoder": inputs.encoder.fingerprint,
        }
        known = json.loads(storage.read_bytes(uri)) if storage.exists(uri) else None
        if known is not None:
            # What the version that started the run did not know was off in it.
            off = {option.name: option.default for kind in _OPTIONS for option in fields(kind)}
            pairs = {name: (known["settings"].get(name, off.get(name)), settings[name]) for name in settings}
            differing = [f"{name} was {was!r} and is {now!r}" for name, (was, now) in pairs.items() if was != now]
            if differing:
                raise UsageError(
                    f"--run {config.run}: was started with other settings ({'; '.join(differing)}); go back to those, "
                    "or give it another name"
                )
            if not inputs.store.table("behaviors").has(known["behaviors_version"]):
                raise UsageError(
                    f"--run {config.run}: reads version {known['behaviors_version']} of the behaviors, and what that "
                    "held has been taken away since by jobs.forget or jobs.store vacuum; give the run another name, to "
                    "train on what is there now"
                )
        version = known["behaviors_version"] if known else inputs.store.version("behaviors")
        return cls(uri=uri, settings=settings, behaviors_version=version, known=known)

    def begin(self, n_requests: int) -> None:
        """Notes a new run; refuses to resume one whose requests are others now."""
        if self.known is None:
            facts = {"behaviors_version": self.behaviors_version, "requests": n_requests, "settings": self.settings}
            storage.write_bytes(self.uri, json.dumps(facts, indent=2).encode())
        elif self.known["requests"] != n_requests:
            raise UsageError(
                f"--requests gives {n_requests:,} requests to train on, and gave {self.known['requests']:,} when the "
                "run was started; give it another name with --run"
            )


def publish(
    config: "Config", inputs: "Inputs", result: Any, counts: Counts, n_requests: int, seconds: float
) -> Summary:
    """The best checkpoint becomes the plug folder."""
    from safetensors.torch import load_file

    from persona.plug import folder as plug_folder, record as plug_record
    from persona.training import checkpoint

    best, metrics = min(result.best_checkpoints, key=lambda pair: (pair[1]["validation_loss"], pair[1]["step"]))
    with best.as_directory() as folder, tempfile.TemporaryDirectory() as staged:
        # The scale is measured before the first step and kept with the latest state, which holds all curves, too.
        weights = load_file(Path(folder) / checkpoint.WEIGHTS)
        state = json.loads((Path(folder) / checkpoint.STATE).read_text())
        with result.checkpoint.as_directory() as latest:
            curves = json.loads((Path(latest) / checkpoint.STATE).read_text())
        record = _record(config, inputs, state, curves, n_requests)
        target = Path(staged) / "plug"
        plug_folder.save(target, weights, record, plug_record.card(record))
        storage.copy_folder(str(target), inputs.plug)
        fingerprint = plug_record.fingerprint(target)
    answer = {
        "job": "train",
        "plug": inputs.plug,
        "fingerprint": fingerprint,
        "requests": n_requests,
        "steps": curves["step"],
        "best_step": metrics["step"],
        "validation_loss": round(metrics["validation_loss"], 5),
        "trained_parameters": sum(weight.numel() for weight in weights.values()),
        "without_history": int(counts.get("join", {}).get("empty", 0)),
        "untimed_behaviors": int(counts.get("join", {}).get("untimed", 0)),
        "repeated_ids": int(counts.get("join", {}).get("repeated", 0)),
        "rejects": int(counts.get("read", {}).get("rejects", 0)),
        "seconds": round(seconds, 1),
        "step_seconds": round(curves["seconds"], 1),
        "requests_per_s": round(curves["step"] * config.training.global_batch / max(curves["seconds"], 1e-9), 2),
    }
    table = [
        ("requests", f"{n_requests:,}, {answer['without_history']:,} without any visible history"),
        (
            "steps",
            f"{answer['steps']:,} of {config.training.global_batch} requests, {answer['requests_per_s']} requests/s",
        ),
        ("trained", f"{answer['trained_parameters']:,} parameters"),
        ("held-out loss", f"{answer['validation_loss']:.4f} nats a token at step {answer['best_step']:,} (the best)"),
        ("plug", f"{inputs.plug} ({fingerprint[:12]})"),
        ("seconds", f"{seconds:,.1f}"),
        *retrieve.summary_rows(counts),
        *reading.reject_rows(counts),
    ]
    return Summary(table=table, result=answer, exit_code=reading.exit_code(counts, config.rows.max_reject_fraction))


def _record(
    config: "Config", inputs: "Inputs", state: Mapping[str, Any], curves: Mapping[str, Any], n_requests: int
) -> Any:
    from persona.plug.record import PlugRecord

    identity = inputs.store.identity
    return PlugRecord(
        options=config.plug_options,
        encoder={"name": identity.encoder, "revision": identity.revision, "fingerprint": identity.fingerprint},
        encoder_width=identity.width,
        pooling=cast("Pooling", identity.pooling),
        encoder_max_tokens=identity.max_tokens,
        llm=inputs.llm.card(),
        llm_width=state["llm_width"],
        token_norm=state["token_norm"],
        scale=state["scale"],
        query_prefix=config.query_prefix,
        max_query_tokens=config.max_query_tokens,
        max_input_tokens=config.max_input_tokens,
        max_behaviors=config.max_behaviors,
        training={
            **asdict(config.training),
            **asdict(config.retrieval),
            "run": config.run,
            "requests": n_requests,
            "best_step": state["step"],
            "validation_loss": state["validation_loss"],
            "seconds": round(curves["seconds"], 1),
            "training_curve": curves["training_curve"],
            "validation_curve": curves["validation_curve"],
        },
    )
