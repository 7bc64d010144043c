"""The end of a training run: its best checkpoint, or its last one, becomes the plug folder."""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jobs.runtime import evaluate_summary, joining, reading, retrieval
from jobs.runtime.cli import Summary
from jobs.runtime.tally import Counts
from jobs.runtime.training import held_out

if TYPE_CHECKING:
    from jobs.runtime.training.inputs import TrainingInputs
    from jobs.runtime.training.spec import RunSpec
    from persona.options import Select
    from persona.plug.record import PlugRecord
    from persona.store.store import Store
    from persona.training.checkpoint import Progress


@dataclass(frozen=True, kw_only=True)
class Published:
    """A run's plug, and how it was trained. `step`, `validation_loss` and `held_out` are those of its weights."""

    uri: str
    store: "Store"
    fingerprint: str
    n_requests: int
    n_steps: int
    planned_steps: int
    step: int
    select: "Select"
    validation_loss: float
    n_parameters: int
    micro_batch: int
    notes: list[str]
    step_seconds: float
    held_out: dict[str, Any] | None

    @property
    def stopped_early(self) -> str:
        """Where and after how many planned steps --patience ended the run; empty for a run of all steps."""
        if self.n_steps == self.planned_steps:
            return ""
        return f"stopped early at step {self.n_steps:,} of {self.planned_steps:,}"


def publish(spec: "RunSpec", inputs: "TrainingInputs", result: Any, n_requests: int) -> Published:
    """Writes the plug folder from Ray Train's result."""
    from safetensors.torch import load_file

    from jobs.runtime.training.inputs import prompt_example
    from persona import storage
    from persona.plug import folder as plug_folder, record as plug_record
    from persona.training import checkpoint

    with result.checkpoint.as_directory() as latest:
        progress = checkpoint.Progress.read(Path(latest))
    reported = [*result.best_checkpoints, (result.checkpoint, result.metrics)]
    chosen, _ = held_out.selected(reported, spec.select)
    measured = held_out.summarize(result.return_value)
    with chosen.as_directory() as folder, tempfile.TemporaryDirectory() as staged:
        weights = load_file(Path(folder) / checkpoint.WEIGHTS)
        selected = checkpoint.Progress.read(Path(folder))
        record = _record(spec, inputs, selected, progress, n_requests, measured)
        target = Path(staged) / "plug"
        plug_folder.save(target, weights, record, plug_record.card(record, example=prompt_example(spec, inputs)))
        storage.copy_folder(str(target), inputs.plug)
        fingerprint = plug_record.fingerprint(target)
    return Published(
        uri=inputs.plug,
        store=inputs.store,
        fingerprint=fingerprint,
        n_requests=n_requests,
        n_steps=progress.step,
        planned_steps=spec.training.n_steps(n_requests),
        step=selected.step,
        select=spec.select,
        validation_loss=cast("float", selected.validation_loss),
        n_parameters=sum(weight.numel() for weight in weights.values()),
        micro_batch=progress.micro_batch,
        notes=progress.notes,
        step_seconds=progress.seconds,
        held_out=measured,
    )


def summary(
    published: Published,
    found: reading.Found,
    counts: Counts,
    inputs: "TrainingInputs",
    *,
    global_batch: int,
    seconds: float,
    max_reject_fraction: float,
) -> Summary:
    """The summary of the job."""
    joined = counts.get("join", {})
    requests_per_s = round(published.n_steps * global_batch / max(published.step_seconds, 1e-9), 2)
    n_without_history = int(joined.get("empty", 0))
    answer = {
        "job": "train",
        "store": published.store.uri,
        "plug": published.uri,
        "fingerprint": published.fingerprint,
        "requests": published.n_requests,
        "steps": published.n_steps,
        "planned_steps": published.planned_steps,
        "stopped_early": bool(published.stopped_early),
        "select": published.select,
        "selected_step": published.step,
        "validation_loss": round(published.validation_loss, 5),
        "held_out": published.held_out,
        "trained_parameters": published.n_parameters,
        "micro_batch": published.micro_batch,
        "notes": published.notes,
        "without_history": n_without_history,
        "without_as_of": found.total.timeless,
        **inputs.requests.facts(),
        "untimed_behaviors": int(joined.get("untimed", 0)),
        "repeated_ids": int(joined.get("repeated", 0)),
        "rejects": found.total.rejects,
        "seconds": round(seconds, 1),
        "step_seconds": round(published.step_seconds, 1),
        "requests_per_s": requests_per_s,
    }
    loss = f"{published.validation_loss:.4f} nats a token at step {published.step:,} (the {published.select})"
    stopped = f"; {published.stopped_early}" if published.stopped_early else ""
    table = [
        ("requests", f"{published.n_requests:,}, {n_without_history:,} without any visible history"),
        ("steps", f"{published.n_steps:,} of {global_batch} requests, {requests_per_s} requests/s{stopped}"),
        ("micro-batch", f"{published.micro_batch:,} requests a pass"),
        *(("note", note) for note in published.notes),
        ("trained", f"{published.n_parameters:,} parameters"),
        ("held-out loss", loss),
        *_measured_rows(published.held_out),
        ("store", published.store.label),
        ("plug", f"{published.uri} ({published.fingerprint[:12]})"),
        ("seconds", f"{seconds:,.1f}"),
        *retrieval.summary_rows(counts),
        *inputs.validation_rows(),
        *reading.request_rows(inputs.requests, found),
        *joining.repeated_rows(counts),
    ]
    return Summary(table=table, result=answer, exit_code=found.exit_code(max_reject_fraction))


def _measured_rows(found: dict[str, Any] | None) -> list[tuple[str, str]]:
    """The losses as in the summary of jobs.evaluate, and the warning."""
    if found is None:
        return []
    warning = [("warning", found["warning"])] if found["warning"] else []
    return [*evaluate_summary.loss_rows(found), *warning]


def _record(
    spec: "RunSpec",
    inputs: "TrainingInputs",
    selected: "Progress",
    latest: "Progress",
    n_requests: int,
    measured: dict[str, Any] | None,
) -> "PlugRecord":
    """`selected` is the progress when the weights were saved, `latest` that at the end, with the whole curves."""
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
        llm_width=selected.llm_width,
        token_norm=selected.token_norm,
        scale=selected.scale,
        llm_quantization=spec.llm_quantization,
        query_prompt=spec.query_prompt,
        max_query_tokens=spec.max_query_tokens,
        max_input_tokens=spec.max_input_tokens,
        max_target_tokens=spec.max_target_tokens,
        prompt=spec.prompt,
        max_behaviors=spec.max_behaviors,
        training={
            **asdict(spec.training),
            "micro_batch": latest.micro_batch if spec.training.micro_batch == "auto" else spec.training.micro_batch,
            **asdict(spec.retrieval),
            "run": spec.run,
            "requests": n_requests,
            "steps": latest.step,
            "planned_steps": spec.training.n_steps(n_requests),
            "patience": spec.patience,
            "select": spec.select,
            "selected_step": selected.step,
            "validation_loss": selected.validation_loss,
            "seconds": round(latest.seconds, 1),
            "training_curve": latest.training_curve,
            "validation_curve": latest.validation_curve,
            "none_curve": latest.none_curve,
            "held_out": measured,
        },
    )
