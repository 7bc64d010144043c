"""Train a plug: requests with targets, joined to their users' stored vectors, teach it what to tell the frozen LLM.

Reads `--requests` (and `--validation`) and `<store>/behaviors`; writes checkpoints under `<runs>/<run>` and, when done,
the plug folder `--plug`. The same `--run` again resumes at the last checkpoint.
"""

import re
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from jobs.runtime import cli, cost, profile, retrieval as retrieve, session
from jobs.runtime.cli import Summary
from jobs.runtime.job_options import FLAT, InputRows, PastTexts
from jobs.runtime.progress import progress
from jobs.runtime.tally import Counts, Tally
from jobs.runtime.training import inputs as train_data
from persona.errors import InputError, PlugMismatch, UsageError
from persona.options import (
    CostOptions,
    PlugOptions,
    Precision,
    RetrievalOptions,
    TrainingOptions,
    check_at_least,
)

if TYPE_CHECKING:
    from ray.data import Dataset

    from persona.models.resolve import ModelFolder
    from persona.store.identity import Identity
    from persona.store.store import Store


@dataclass(frozen=True, kw_only=True)
class Config:
    """Configuration of jobs.train."""

    requests: str
    """Requests with targets, Parquet or JSONL, local or s3://."""
    store: str
    """Folder of the tables made by jobs.embed."""
    plug: str
    """Folder for the trained plug, local or s3://."""
    run: str
    """Name of the run; the same name resumes it."""
    runs: str
    """Folder for the checkpoints of all runs; on a cluster one that every node can reach (s3://)."""
    validation: str | None = None
    """Held-out requests with targets; without it, --validation-fraction of the users is held out."""
    validation_fraction: float = 0.05
    """Share of the users of --requests held out when there is no --validation."""
    validation_rows: int = 512
    """Use at most this many held-out requests."""
    validate_every: int = 100
    """Validate and save a checkpoint after this many steps; the best checkpoint becomes the plug."""
    llm: str = "google/flan-t5-xxl"
    """Hub id or folder (local, s3://) of an encoder-decoder or decoder-only LLM with safetensors weights."""
    llm_revision: str = "main"
    """Revision of the LLM on the hub."""
    encoder: str | None = None
    """Folder or hub id of the store's encoder, if it is not where the store says."""
    query_prefix: str = ""
    """Prefix of each query (BGE: 'Represent this sentence for searching relevant passages: ')."""
    max_query_tokens: int = 276
    """Cut each query after this many tokens."""
    max_input_tokens: int = 256
    """Cut each input, and each target, after this many tokens."""
    max_behaviors: int = 512
    """Use only this many of a user's latest behaviors."""
    precision: Precision = "auto"
    """Precision of the LLM; auto is bf16 where the hardware supports it."""
    activation_checkpointing: bool = False
    """Recompute the LLM's activations in the backward pass: a fraction of the memory for a third more time."""
    plug_options: Annotated[PlugOptions, FLAT] = field(default_factory=PlugOptions)
    training: Annotated[TrainingOptions, FLAT] = field(default_factory=TrainingOptions)
    retrieval: Annotated[RetrievalOptions, FLAT] = field(default_factory=RetrievalOptions)
    past_texts: Annotated[PastTexts, FLAT] = field(default_factory=PastTexts)
    workers: int | None = None
    """Number of training workers; default one per GPU, or 1."""
    max_failures: int = 3
    """Give up after this many worker crashes; after each one the run resumes at the last checkpoint."""
    rows: Annotated[InputRows, FLAT] = field(default_factory=InputRows)
    cost: Annotated[CostOptions, FLAT] = field(default_factory=CostOptions)
    profile: bool = False
    """Show at the end where the time went, what the bottleneck was, and which flag would help."""
    dry_run: bool = False
    """Show what would be done and change nothing."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        self.past_texts.check_enough_for(self.retrieval)
        self.past_texts.check_used_by(self.retrieval)
        check_at_least(self, 1, "workers")
        self.training.check_workers(self.workers or 1)
        check_at_least(
            self, 1, "validation_rows", "validate_every", "max_query_tokens", "max_input_tokens", "max_behaviors"
        )
        check_at_least(self, 0, "max_failures")
        if self.validation is None and not 0 < self.validation_fraction < 1:
            raise UsageError(f"--validation-fraction {self.validation_fraction}: must be above 0 and below 1")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.run):
            raise UsageError(f"--run {self.run!r}: must be a name of letters, digits and . _ -")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a run is made of, found and checked before Ray starts."""

    store: "Store"
    encoder: "ModelFolder"
    llm: "ModelFolder"
    requests: list[Any]
    validation: list[Any] | None
    histories: retrieve.Histories | None
    runs: str
    plug: str


def main(config: Config) -> Summary:
    """Runs the job."""
    from jobs.runtime.training.run import Run, publish

    started = time.perf_counter()
    inputs = _inputs(config)
    run = Run.find(config, inputs)
    if config.dry_run:
        return _plan(config, inputs, resumes=run.known is not None)
    machines = session.connect()
    workers = config.workers or machines.gpus or 1
    config.training.check_workers(workers)
    tally = Tally.start()
    train_rows, validation_rows = train_data.split(config, inputs, run.behaviors_version, tally)
    n_requests, n_validation = train_rows.count(), validation_rows.count()
    if n_requests < config.training.global_batch:
        raise InputError(
            f"--requests gives {n_requests:,} requests with target to train on, fewer than --global-batch "
            f"{config.training.global_batch}"
        )
    if n_validation < workers:
        raise InputError(
            f"{n_validation} held-out requests are too few for {workers} workers; give more with --validation"
        )
    run.begin(n_requests)
    result = _fit(config, inputs, tally, train_rows, validation_rows, n_requests, workers, machines)
    counts, seconds = tally.totals(), time.perf_counter() - started
    summary = publish(config, inputs, result, counts, n_requests, seconds)
    summary = cost.spent(summary, config.cost, machines, n_models=workers, seconds=seconds)
    return _with_profile(summary, counts, workers, machines, seconds) if config.profile else summary


def _plan(config: Config, inputs: Inputs, *, resumes: bool) -> Summary:
    from persona.cost import tokens_of_text, training_flops

    how = "resume" if resumes else "start"
    plug = config.plug_options
    would = f"{how} run {config.run!r}: a {plug.weights} plug of {plug.persona_tokens} tokens for {config.llm}"
    n_bytes = sum(split.end - split.start for split in inputs.requests)
    # All of a row is taken for input, which the LLM reads as far as it may; a target is short beside it.
    flops = cost.known(
        lambda: training_flops(
            inputs.llm.config,
            inputs.encoder.config,
            # Under --contrast each is asked once more, with another history.
            n_requests=tokens_of_text(n_bytes) / config.max_input_tokens * (2 if config.training.contrast else 1),
            inputs=config.max_input_tokens + config.retrieval.front_tokens,
            outputs=0,
            query=config.max_query_tokens,
            epochs=config.training.epochs,
        )
    )
    plan = Summary(table=[("would", would)], result={"dry_run": True, "would": would})
    return cost.planned(plan, config.cost, flops=flops, if_all="for the whole run, with inputs of full length")


def _inputs(config: Config) -> Inputs:
    from persona import storage
    from persona.inputs import requests
    from persona.inputs.splits import plan_splits
    from persona.models import resolve as models
    from persona.store.store import Store

    uris = {
        name: storage.check_uri(getattr(config, name), flag=f"--{name}")
        for name in ("requests", "store", "runs", "plug")
    }
    storage.check_reachable(uris["requests"], flag="--requests")
    storage.check_reachable(uris["store"], flag="--store")
    for name in ("runs", "plug"):
        storage.check_reachable(uris[name], flag=f"--{name}", write=True)
    splits = plan_splits(uris["requests"], flag="--requests")
    requests.check_columns(splits, needs_target=True)
    held_out = None
    if config.validation is not None:
        uri = storage.check_uri(config.validation, flag="--validation")
        held_out = plan_splits(uri, flag="--validation")
        requests.check_columns(held_out, needs_target=True)
    store = Store.open(uris["store"])
    encoder = store_encoder(store.identity, config.encoder)
    llm = models.resolve(config.llm, revision=config.llm_revision, flag="--llm")
    return Inputs(
        store=store,
        encoder=encoder,
        llm=llm,
        requests=splits,
        validation=held_out,
        histories=retrieve.plan(config.past_texts),
        runs=uris["runs"],
        plug=uris["plug"],
    )


def store_encoder(identity: "Identity", given: str | None) -> "ModelFolder":
    """The encoder that made a store. Raises PlugMismatch when another model lies where it should."""
    from persona.models import resolve as models

    name = given or identity.encoder
    folder = models.resolve(name, revision=identity.revision, flag="--encoder")
    if folder.fingerprint != identity.fingerprint:
        raise PlugMismatch(
            f"--encoder {name!r} has fingerprint {folder.fingerprint[:12]}, but the store was made by "
            f"{identity.encoder!r} with {identity.fingerprint[:12]}; give the store's encoder with --encoder, or make "
            "a store with this one"
        )
    return folder


def _fit(
    config: Config,
    inputs: Inputs,
    tally: Tally,
    train_rows: "Dataset",
    validation_rows: "Dataset",
    n_requests: int,
    workers: int,
    machines: session.Machines,
) -> Any:
    """Ray Train over one dataset an epoch, each in an order of its own."""
    from ray.data import ExecutionOptions
    from ray.train import CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from jobs.runtime.training.worker import train_worker

    n_steps_epoch = n_requests // config.training.global_batch
    names = [f"epoch-{epoch}" for epoch in range(config.training.epochs)]
    epochs = {
        name: train_data.epoch_of(train_rows, epoch, config, n_requests=n_requests, workers=workers)
        for epoch, name in enumerate(names)
    }
    settings = {
        "config": config,
        "workers": workers,
        "threads": max(1, machines.cores // workers),
        "n_steps_epoch": n_steps_epoch,
        "encoder": inputs.encoder.card(),
        "llm": inputs.llm.card(),
        "identity": asdict(inputs.store.identity),
        "behaviors": train_data.vectors_seen(train_rows, n_requests, inputs.store.identity.width),
        "tally": tally,
    }
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=settings,
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=bool(machines.gpus)),
        torch_config=TorchConfig(backend="nccl" if machines.gpus else "gloo"),
        run_config=RunConfig(
            name=config.run,
            storage_path=inputs.runs,
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=2, checkpoint_score_attribute="validation_loss", checkpoint_score_order="min"
            ),
        ),
        datasets={**epochs, "validation": validation_rows},
        dataset_config=DataConfig(
            datasets_to_split=names,
            execution_options=ExecutionOptions(preserve_order=True),
            enable_shard_locality=False,
        ),
    )
    with progress(tally, _progress_line):
        return trainer.fit()


def _with_profile(
    summary: Summary, counts: Counts, workers: int, machines: session.Machines, seconds: float
) -> Summary:
    # The first worker's seconds; the others keep step with it.
    noted = {"time": {name: workers * spent for name, spent in counts.get("time", {}).items()}}
    faster = "more GPUs (--workers), a larger --micro-batch where memory allows, or fewer --max-input-tokens"
    rarely = "validate less often (--validate-every) or on fewer rows (--validation-rows)"
    stages = [
        profile.stage(noted, "time", workers, faster, seconds="step", name="train"),
        profile.stage(noted, "time", workers, rarely, seconds="validate", name="validate"),
        profile.stage(noted, "time", workers, "save less often (--validate-every)", seconds="save", name="save"),
        profile.stage(counts, "join", machines.cores, "more CPUs for Ray"),
    ]
    waited_s = noted["time"].get("waiting", 0.0)
    return profile.added(summary, stages, wall_s=seconds, waited_s=waited_s, starving="more CPUs for Ray would feed it")


def _progress_line(counts: Counts, _seconds: float) -> str:
    now = counts.get("train")
    if not now:
        return ""
    held_out = f", held-out {now['validation']:.4f}" if now["validation"] else ""
    step = f"train: step {int(now['step']):,} of {int(now['of']):,}, loss {now['loss']:.4f}{held_out}"
    return f"{step}, {now['requests_per_s']:.1f} requests/s"


if __name__ == "__main__":
    sys.exit(cli.run(Config, main))
