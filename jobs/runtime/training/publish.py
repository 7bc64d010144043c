"""The end of a training run: its best checkpoint becomes the plug folder."""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.runtime import reading, retrieval
from jobs.runtime.cli import Summary
from jobs.runtime.tally import Counts

if TYPE_CHECKING:
    from jobs.runtime.training.inputs import TrainingInputs
    from jobs.runtime.training.spec import RunSpec
    from persona.plug.record import PlugRecord
    from persona.training.checkpoint import Progress


@dataclass(frozen=True, kw_only=True)
class Published:
    """The plug that a run has written, and how it was trained."""

    uri: str
    fingerprint: str
    n_requests: int
    n_steps: int
    best_step: int
    validation_loss: float
    n_parameters: int
    step_seconds: float


def publish(spec: "RunSpec", inputs: "TrainingInputs", result: Any, n_requests: int) -> Published:
    """Writes the plug folder from Ray Train's result."""
    from safetensors.torch import load_file

    from persona import storage
    from persona.plug import folder as plug_folder, record as plug_record
    from persona.training import checkpoint

    best, metrics = min(result.best_checkpoints, key=lambda pair: (pair[1]["validation_loss"], pair[1]["step"]))
    with result.checkpoint.as_directory() as latest:
        progress = checkpoint.Progress.read(Path(latest))
    with best.as_directory() as folder, tempfile.TemporaryDirectory() as staged:
        weights = load_file(Path(folder) / checkpoint.WEIGHTS)
        record = _record(spec, inputs, checkpoint.Progress.read(Path(folder)), progress, n_requests)
        target = Path(staged) / "plug"
        plug_folder.save(target, weights, record, plug_record.card(record))
        storage.copy_folder(str(target), inputs.plug)
        fingerprint = plug_record.fingerprint(target)
    return Published(
        uri=inputs.plug,
        fingerprint=fingerprint,
        n_requests=n_requests,
        n_steps=progress.step,
        best_step=metrics["step"],
        validation_loss=metrics["validation_loss"],
        n_parameters=sum(weight.numel() for weight in weights.values()),
        step_seconds=progress.seconds,
    )


def summary(
    published: Published, counts: Counts, *, global_batch: int, seconds: float, max_reject_fraction: float
) -> Summary:
    """The summary of the job."""
    joined = counts.get("join", {})
    requests_per_s = round(published.n_steps * global_batch / max(published.step_seconds, 1e-9), 2)
    n_without_history = int(joined.get("empty", 0))
    answer = {
        "job": "train",
        "plug": published.uri,
        "fingerprint": published.fingerprint,
        "requests": published.n_requests,
        "steps": published.n_steps,
        "best_step": published.best_step,
        "validation_loss": round(published.validation_loss, 5),
        "trained_parameters": published.n_parameters,
        "without_history": n_without_history,
        "untimed_behaviors": int(joined.get("untimed", 0)),
        "repeated_ids": int(joined.get("repeated", 0)),
        "rejects": int(counts.get("read", {}).get("rejects", 0)),
        "seconds": round(seconds, 1),
        "step_seconds": round(published.step_seconds, 1),
        "requests_per_s": requests_per_s,
    }
    loss = f"{published.validation_loss:.4f} nats a token at step {published.best_step:,} (the best)"
    table = [
        ("requests", f"{published.n_requests:,}, {n_without_history:,} without any visible history"),
        ("steps", f"{published.n_steps:,} of {global_batch} requests, {requests_per_s} requests/s"),
        ("trained", f"{published.n_parameters:,} parameters"),
        ("held-out loss", loss),
        ("plug", f"{published.uri} ({published.fingerprint[:12]})"),
        ("seconds", f"{seconds:,.1f}"),
        *retrieval.summary_rows(counts),
        *reading.reject_rows(counts),
    ]
    return Summary(table=table, result=answer, exit_code=reading.exit_code(counts, max_reject_fraction))


def _record(
    spec: "RunSpec", inputs: "TrainingInputs", best: "Progress", latest: "Progress", n_requests: int
) -> "PlugRecord":
    """`best` is the progress when the weights were saved, `latest` that at the end, with the whole curves."""
    from persona.plug.record import PlugRecord

    identity = inputs.store.identity
    return PlugRecord(
        options=spec.plug_options,
        encoder={"name": identity.encoder, "revision": identity.revision, "fingerprint": identity.fingerprint},
        encoder_width=identity.width,
        pooling=identity.pooling,
        encoder_max_tokens=identity.max_tokens,
        document_prompt=identity.document_prompt,
        llm=inputs.llm.card(),
        llm_width=best.llm_width,
        token_norm=best.token_norm,
        scale=best.scale,
        query_prompt=spec.query_prompt,
        max_query_tokens=spec.max_query_tokens,
        max_input_tokens=spec.max_input_tokens,
        max_behaviors=spec.max_behaviors,
        training={
            **asdict(spec.training),
            **asdict(spec.retrieval),
            "run": spec.run,
            "requests": n_requests,
            "best_step": best.step,
            "validation_loss": best.validation_loss,
            "seconds": round(latest.seconds, 1),
            "training_curve": latest.training_curve,
            "validation_curve": latest.validation_curve,
        },
    )
