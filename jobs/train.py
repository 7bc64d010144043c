"""Train a plug: from requests with targets and their users' stored vectors, it learns to steer the frozen LLM.

Reads `--requests` (and `--validation`) and `<store>/behaviors`; writes checkpoints under `<runs>/<run>` and, at the
end, the plug folder `--plug`. The same `--run` again resumes at the last checkpoint.
"""

import re
import sys
import time
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from jobs.runtime import cli, cost, profile, retrieval, session
from jobs.runtime.cli import Summary
from jobs.runtime.progress import progress
from jobs.runtime.tally import Counts, new_tally, totals
from jobs.runtime.training.inputs import TrainingInputs, join_and_split
from jobs.runtime.training.publish import publish, summary
from jobs.runtime.training.run import Run
from jobs.runtime.training.spec import RunSpec
from jobs.runtime.training.trainer import fit
from persona.errors import PlugMismatch, UsageError
from persona.options import CostOptions, PlugOptions, Retrieval, TrainingOptions

if TYPE_CHECKING:
    from persona.inputs.files import Split
    from persona.models.resolve import ModelFolder
    from persona.store.store import Identity


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


def main(config: Config) -> Summary:
    """Runs the job."""
    started = time.perf_counter()
    spec, inputs = _spec(config), _inputs(config)
    run = Run.find(spec, inputs)
    if config.dry_run:
        return _plan(config, inputs, resumes=run.record is not None)
    machines = session.connect()
    n_workers = config.workers or machines.gpus or 1
    config.check_training(n_workers)
    tally = new_tally()
    requests = join_and_split(spec, inputs, run.behaviors_version, tally)
    requests.check(global_batch=config.global_batch, n_workers=n_workers)
    run.begin(requests.n_train)
    with progress(tally, _progress_line):
        result = fit(spec, inputs, requests, tally, machines, n_workers=n_workers, max_failures=config.max_failures)
    published = publish(spec, inputs, result, requests.n_train)
    counts, seconds = totals(tally), time.perf_counter() - started
    found = summary(
        published,
        counts,
        global_batch=config.global_batch,
        seconds=seconds,
        max_reject_fraction=config.max_reject_fraction,
    )
    found = cost.spent(found, config, machines, n_models=n_workers, seconds=seconds)
    return _with_profile(found, counts, n_workers, machines, seconds) if config.profile else found


def _spec(config: Config) -> RunSpec:
    """The part of the configuration that defines the plug."""
    options = {
        "plug": config.options(PlugOptions),
        "training": config.options(TrainingOptions),
        "retrieval": config.options(Retrieval),
    }
    names = [field.name for field in fields(RunSpec) if field.name not in options]
    return RunSpec(**options, **{name: getattr(config, name) for name in names})


def _inputs(config: Config) -> TrainingInputs:
    """Finds and checks what the run reads and where it writes."""
    from persona import storage
    from persona.models import resolve as models
    from persona.store.store import Store

    requests = storage.check_uri(config.requests, flag="--requests")
    store_uri = storage.check_uri(config.store, flag="--store")
    runs = storage.check_uri(config.runs, flag="--runs")
    plug = storage.check_uri(config.plug, flag="--plug")
    storage.check_reachable(requests, flag="--requests")
    storage.check_reachable(store_uri, flag="--store")
    storage.check_reachable(runs, flag="--runs", write=True)
    storage.check_reachable(plug, flag="--plug", write=True)
    splits = _splits(requests, flag="--requests")
    held_out = None
    if config.validation is not None:
        held_out = _splits(storage.check_uri(config.validation, flag="--validation"), flag="--validation")
    store = Store.open(store_uri)
    return TrainingInputs(
        store=store,
        encoder=store_encoder(store.identity, config.encoder),
        llm=models.resolve(config.llm, revision=config.llm_revision, flag="--llm"),
        requests=splits,
        validation=held_out,
        histories=retrieval.plan(config),
        runs=runs,
        plug=plug,
    )


def _splits(uri: str, *, flag: str) -> "list[Split]":
    """The splits of requests with targets. Raises InputError when a column is missing."""
    from persona.inputs import files, requests

    splits = files.plan_splits(uri, flag=flag)
    requests.check_columns(splits, needs_target=True)
    return splits


def store_encoder(identity: "Identity", given: str | None) -> "ModelFolder":
    """The store's encoder, at `given` or where the store says. Raises PlugMismatch when another model is there."""
    from persona.models import resolve as models

    name = given or identity.encoder
    folder = models.resolve(name, revision=identity.revision, flag="--encoder")
    if folder.fingerprint != identity.fingerprint:
        raise PlugMismatch(
            f"--encoder {name!r} has fingerprint {folder.fingerprint[:12]}, but the store was made by "
            f"{identity.encoder!r} with {identity.fingerprint[:12]}; give the store's encoder with --encoder, or "
            "create a store with this one"
        )
    return folder


def _plan(config: Config, inputs: TrainingInputs, *, resumes: bool) -> Summary:
    """The summary of a dry run."""
    from persona.cost import tokens_of_text, training_flops

    verb = "resume" if resumes else "start"
    would = f"{verb} run {config.run!r}: a {config.weights} plug of {config.persona_tokens} tokens for {config.llm}"
    n_bytes = sum(split.end - split.start for split in inputs.requests)
    # An upper bound: counts all bytes of a row as input, cut to --max-input-tokens; targets are short in comparison.
    flops = cost.known(
        lambda: training_flops(
            inputs.llm.config,
            inputs.encoder.config,
            # --contrast reads each request a second time, with another history.
            n_requests=tokens_of_text(n_bytes) / config.max_input_tokens * (2 if config.contrast else 1),
            inputs=config.max_input_tokens + config.front_tokens,
            outputs=0,
            query=config.max_query_tokens,
            epochs=config.epochs,
        )
    )
    plan = Summary(table=[("would", would)], result={"dry_run": True, "would": would})
    return cost.planned(plan, config, flops=flops, if_all="for the whole run, with inputs of full length")


def _with_profile(
    summary: Summary, counts: Counts, n_workers: int, machines: session.Machines, seconds: float
) -> Summary:
    # Only the first worker reports its seconds; the others run in step with it.
    noted = {"time": {name: n_workers * spent for name, spent in counts.get("time", {}).items()}}
    faster = "more GPUs (--workers), a larger --micro-batch where memory allows, or fewer --max-input-tokens"
    rarely = "validate less often (--validate-every) or on fewer rows (--validation-rows)"
    stages = [
        profile.stage(noted, "time", n_workers, faster, seconds="step", name="train"),
        profile.stage(noted, "time", n_workers, rarely, seconds="validate", name="validate"),
        profile.stage(noted, "time", n_workers, "save less often (--validate-every)", seconds="save", name="save"),
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
