"""Train a plug: requests with targets, joined to their users' stored vectors, teach it what to tell the frozen LLM.

Reads `--requests` (and `--validation`) and `<store>/behaviors`; writes checkpoints under `<runs>/<run>` and, when done,
the plug folder `--plug`. The same `--run` again resumes at the last checkpoint.
"""

import re
import sys
import time
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from jobs.runtime import cli, cost, profile, retrieval as retrieve, session
from jobs.runtime.cli import Summary
from jobs.runtime.progress import progress
from jobs.runtime.tally import Counts, new_tally, totals
from jobs.runtime.training import inputs as train_data
from persona.errors import InputError, PlugMismatch, UsageError
from persona.options import CostOptions, PlugOptions, Retrieval, TrainingOptions

if TYPE_CHECKING:
    from ray.data import Dataset

    from persona.models.resolve import ModelFolder
    from persona.store.identity import Identity
    from persona.store.store import Store


@dataclass(frozen=True, kw_only=True)
class Config(TrainingOptions, PlugOptions, Retrieval, CostOptions):
    """What `jobs.train` can be told."""

    requests: str
    """Requests with targets, Parquet or JSONL, local or s3://."""
    store: str
    """Folder of the tables that jobs.embed made."""
    plug: str
    """Folder for the trained plug, local or s3://."""
    run: str
    """Name of the run; the same name resumes it."""
    runs: str
    """Folder of all runs' checkpoints; on a cluster one that every node sees (s3://)."""
    validation: str | None = None
    """Held-out requests with targets; without it --validation-fraction of the users is held out."""
    validation_fraction: float = 0.05
    """Share of the users of --requests that is held out when there is no --validation."""
    validation_rows: int = 512
    """At most this many held-out requests are used."""
    validate_every: int = 100
    """Steps from one validation and checkpoint to the next; the best one becomes the plug."""
    llm: str = "google/flan-t5-xxl"
    """Hub id or folder (local, s3://) of the LLM with safetensors, encoder-decoder or decoder-only."""
    llm_revision: str = "main"
    """Revision of the LLM on the hub."""
    encoder: str | None = None
    """Where the store's encoder lies, when not where the store says."""
    query_prefix: str = ""
    """Put in front of each query (BGE: 'Represent this sentence for searching relevant passages: ')."""
    max_query_tokens: int = 276
    """Tokens of a query that are read."""
    max_input_tokens: int = 256
    """Tokens of an input, and of a target, that the LLM reads."""
    max_behaviors: int = 512
    """The latest behaviors of a user that are used."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the LLM; auto is bf16 where the hardware multiplies it natively."""
    activation_checkpointing: bool = False
    """Compute the LLM's activations anew in the backward pass: a fraction of the memory, a third more time."""
    workers: int | None = None
    """Training workers; default one a GPU, or 1."""
    max_failures: int = 3
    """Crashes of workers after which the run gives up; each resumes at the last checkpoint."""
    max_reject_fraction: float = 0.01
    """More bad rows than this end the job with exit code 3."""
    limit: int | None = None
    """Take only this many requests."""
    profile: bool = False
    """Say at the end where the time went, what held the run up, and which flag would help."""
    dry_run: bool = False
    """Say what would be done, and start nothing."""

    def check(self) -> None:
        """Refuses what can be refused without looking at any data."""
        PlugOptions.check(self)
        self.check_cost()
        self.check_texts_are_used()
        self.check_retrieval()
        self.check_training(self.workers or 1)
        for name in ("validation_rows", "validate_every", "max_query_tokens", "max_input_tokens", "max_behaviors"):
            cli.at_least(self, name, 1)
        cli.at_least(self, "max_failures", 0)
        if self.validation is None and not 0 < self.validation_fraction < 1:
            raise UsageError(f"--validation-fraction {self.validation_fraction}: must be above 0 and below 1")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.run):
            raise UsageError(f"--run {self.run!r}: must be a name of letters, digits and . _ -")

    def options(self, kind: type[Any]) -> Any:
        """The part of the flags that is a PlugOptions, a TrainingOptions or a Retrieval."""
        return kind(**{field.name: getattr(self, field.name) for field in fields(kind)})


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
    config.check_training(workers)
    tally = new_tally()
    train_rows, validation_rows = train_data.split(config, inputs, run.behaviors_version, tally)
    n_requests, n_validation = train_rows.count(), validation_rows.count()
    if n_requests < config.global_batch:
        raise InputError(
            f"--requests gives {n_requests:,} requests with target to train on, fewer than --global-batch "
            f"{config.global_batch}"
        )
    if n_validation < workers:
        raise InputError(
            f"{n_validation} held-out requests are too few for {workers} workers; give more with --validation"
        )
    run.begin(n_requests)
    result = _fit(config, inputs, tally, train_rows, validation_rows, n_requests, workers, machines)
    counts, seconds = totals(tally), time.perf_counter() - started
    summary = publish(config, inputs, result, counts, n_requests, seconds)
    summary = cost.spent(summary, config, machines, n_models=workers, seconds=seconds)
    return _with_profile(summary, counts, workers, machines, seconds) if config.profile else summary


def _plan(config: Config, inputs: Inputs, *, resumes: bool) -> Summary:
    from persona.cost import tokens_of_text, training_flops

    how = "resume" if resumes else "start"
    would = f"{how} run {config.run!r}: a {config.weights} plug of {config.persona_tokens} tokens for {config.llm}"
    n_bytes = sum(split.end - split.start for split in inputs.requests)
    # All of a row is taken for input, which the LLM reads as far as it may; a target is short beside it.
    flops = cost.known(
        lambda: training_flops(
            inputs.llm.config,
            inputs.encoder.config,
            # Under --contrast each is asked once more, with another history.
            n_requests=tokens_of_text(n_bytes) / config.max_input_tokens * (2 if config.contrast else 1),
            inputs=config.max_input_tokens + config.front_tokens,
            outputs=0,
            query=config.max_query_tokens,
            epochs=config.epochs,
        )
    )
    plan = Summary(table=[("would", would)], result={"dry_run": True, "would": would})
    return cost.planned(plan, config, flops=flops, if_all="for the whole run, with inputs of full length")


def _inputs(config: Config) -> Inputs:
    from persona import storage
    from persona.inputs import files as inputs, requests
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
    splits = inputs.plan_splits(uris["requests"], flag="--requests")
    requests.check_columns(splits, needs_target=True)
    held_out = None
    if config.validation is not None:
        uri = storage.check_uri(config.validation, flag="--validation")
        held_out = inputs.plan_splits(uri, flag="--validation")
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
        histories=retrieve.plan(config),
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
    tally: Any,
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

    n_steps_epoch = n_requests // config.global_batch
    names = [f"epoch-{epoch}" for epoch in range(config.epochs)]
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
