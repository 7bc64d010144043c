"""Train a plug: from requests with targets and their users' stored vectors, it learns to steer the frozen LLM.

Reads `--requests` (and `--validation`) and `<store>/behaviors`; writes checkpoints under `<runs>/<run>` and, at the
end, the plug folder `--plug`. The same `--run` again resumes at the last checkpoint.
"""

import re
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated

from jobs.runtime import cli, cost, first_look, plugs, retrieval, session, tracking
from jobs.runtime.cli import Summary
from jobs.runtime.inputs import Requests, find_requests
from jobs.runtime.job_options import FLAT, InputRows, PastTexts, PreferenceInputs, RequestFormat, flat_settings
from jobs.runtime.progress import Stage, progress
from jobs.runtime.reference import Reference, find_reference
from jobs.runtime.tally import Counts, Tally
from jobs.runtime.training import held_out
from jobs.runtime.training.inputs import TrainingInputs, join_and_split, prompt_example
from jobs.runtime.training.profiling import with_profile
from jobs.runtime.training.publish import publish, summary
from jobs.runtime.training.run import Run
from jobs.runtime.training.spec import RunSpec, check_together
from jobs.runtime.training.trainer import fit
from persona.errors import PlugMismatch, UsageError
from persona.option_checks import check_at_least
from persona.options import (
    CostOptions,
    PlugOptions,
    Precision,
    PromptOptions,
    Quantization,
    RetrievalOptions,
    Select,
    Track,
    TrainingOptions,
)

if TYPE_CHECKING:
    from persona.models.prompts import PromptTokenizer
    from persona.models.resolve import ModelFolder
    from persona.store.identity import Identity


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
    """Validate and save a checkpoint after this many steps."""
    patience: int = 0
    """Stop when this many validations in a row bring no new lowest held-out loss; 0 trains for all --epochs."""
    select: Select = "best"
    """Whose weights become the plug: the checkpoint with the lowest held-out loss, or the last step (as in PPlug)."""
    llm: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """Hub id or folder (local, s3://) of an encoder-decoder or decoder-only LLM with safetensors weights."""
    llm_revision: str = "main"
    """Revision of the LLM on the hub."""
    encoder: str | None = None
    """Folder or hub id of the store's encoder, if it is not where the store says."""
    query_prompt: str | None = None
    """Text in front of each query; default the encoder's own prompt for queries, "" for none."""
    max_query_tokens: int = 276
    """Cut each query after this many tokens."""
    max_input_tokens: int = 256
    """Cut each input after this many tokens."""
    max_target_tokens: int = 256
    """Cut each target after this many tokens, end of sequence included."""
    max_behaviors: int = 512
    """Use only this many of a user's latest behaviors."""
    precision: Precision = "auto"
    """Precision of the LLM; auto is bf16 where the hardware supports it."""
    llm_quantization: Quantization = "none"
    """Keep the LLM's weights in 8 or 4 bits, in training and for answers, if it does not fit one GPU otherwise."""
    activation_checkpointing: bool = False
    """Recompute the LLM's activations in the backward pass: a fraction of the memory for a third more time."""
    compile: bool = False
    """Compile the LLM's layers on GPUs: a minute or two at the start, then faster steps with less memory."""
    plug_options: Annotated[PlugOptions, FLAT] = field(default_factory=PlugOptions)
    prompt: Annotated[PromptOptions, FLAT] = field(default_factory=PromptOptions)
    training: Annotated[TrainingOptions, FLAT] = field(default_factory=TrainingOptions)
    retrieval: Annotated[RetrievalOptions, FLAT] = field(default_factory=RetrievalOptions)
    past_texts: Annotated[PastTexts, FLAT] = field(default_factory=PastTexts)
    preferences: Annotated[PreferenceInputs, FLAT] = field(default_factory=PreferenceInputs)
    workers: int | None = None
    """Number of training workers; default one per GPU, or 1."""
    max_failures: int = 3
    """Give up after this many worker crashes; after each one the run resumes at the last checkpoint."""
    rows: Annotated[InputRows, FLAT] = field(default_factory=InputRows)
    form: Annotated[RequestFormat, FLAT] = field(default_factory=RequestFormat)
    cost: Annotated[CostOptions, FLAT] = field(default_factory=CostOptions)
    track: Track = "none"
    """Report settings, curves and the plug to this experiment tracker; the environment says where it is."""
    profile: bool = False
    """Show at the end where the time went, what the bottleneck was, and which flag would help."""
    dry_run: bool = False
    """Show what would be done and change nothing."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        self.past_texts.check_enough_for(self.retrieval)
        self.past_texts.check_used_by(self.retrieval)
        self.preferences.check_used_by(self.training)
        check_at_least(self, 1, "workers")
        self.training.check_workers(self.workers or 1)
        check_at_least(self, 1, "validation_rows", "validate_every")
        check_at_least(self, 1, "max_query_tokens", "max_input_tokens", "max_target_tokens", "max_behaviors")
        check_at_least(self, 0, "max_failures", "patience")
        check_together(
            quantization=self.llm_quantization,
            zero_stage=self.training.zero_stage,
            recomputes=self.activation_checkpointing,
            compiles=self.compile,
        )
        if self.validation is None and not 0 < self.validation_fraction < 1:
            raise UsageError(f"--validation-fraction {self.validation_fraction}: must be above 0 and below 1")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.run):
            raise UsageError(f"--run {self.run!r}: must be a name of letters, digits and . _ -")


def main(config: Config) -> Summary:
    """Runs the job."""
    started = time.perf_counter()
    inputs = _inputs(config)
    spec = _spec(config, inputs)
    run = Run.find(spec, inputs, is_tracked=config.track != "none")
    if config.dry_run:
        return _plan(config, spec, inputs, resumes=run.record is not None)
    place, settings = f"{inputs.runs}/{config.run}", flat_settings(config)
    with tracking.tracked(config.track, job="train", place=place, settings=settings) as tracked:
        return _train(config, spec, inputs, run, tracked, started)


def _train(
    config: Config, spec: RunSpec, inputs: TrainingInputs, run: Run, tracked: tracking.Tracked, started: float
) -> Summary:
    machines = session.connect()
    spec.check_gpus(machines.gpus)
    n_workers = config.workers or machines.gpus or 1
    config.training.check_workers(n_workers)
    tally = Tally.start()
    requests = join_and_split(spec, inputs, run.behaviors_version, tally)
    requests.check(global_batch=config.training.global_batch, n_workers=n_workers)
    run.begin(requests.n_train)
    with progress(tally, "train", _stage_of), tracked.following(tally):
        result = fit(
            spec,
            inputs,
            requests,
            tally,
            machines,
            n_workers=n_workers,
            max_failures=config.max_failures,
            reports_steps=tracked.is_on,
        )
    published = publish(spec, inputs, result, requests.n_train)
    tracked.plug(published.uri)
    counts, seconds = tally.totals(), time.perf_counter() - started
    found = summary(
        published,
        requests.found,
        counts,
        inputs,
        global_batch=config.training.global_batch,
        seconds=seconds,
        max_reject_fraction=config.rows.max_reject_fraction,
    )
    found = cost.spent(found, config.cost, machines, n_gpus=n_workers, seconds=seconds)
    return with_profile(found, counts, n_workers, machines, seconds) if config.profile else found


def _spec(config: Config, inputs: TrainingInputs) -> RunSpec:
    """What defines the plug: a part of the configuration, and how the encoder reads queries."""
    from persona.models.encoder_settings import settle_query

    query = settle_query(inputs.encoder, prompt=config.query_prompt, max_tokens=config.max_query_tokens)
    return RunSpec(
        run=config.run,
        plug_options=config.plug_options,
        training=config.training,
        prompt=inputs.tokenizer.options,
        retrieval=config.retrieval,
        past_texts=config.past_texts,
        preferences=config.preferences,
        requests=config.requests,
        form=config.form,
        limit=config.rows.limit,
        validation=config.validation,
        validation_fraction=config.validation_fraction,
        validation_rows=config.validation_rows,
        validate_every=config.validate_every,
        patience=config.patience,
        select=config.select,
        query_prompt=query.prompt,
        max_query_tokens=query.max_tokens,
        max_input_tokens=config.max_input_tokens,
        max_target_tokens=config.max_target_tokens,
        max_behaviors=config.max_behaviors,
        precision=config.precision,
        llm_quantization=config.llm_quantization,
        activation_checkpointing=config.activation_checkpointing,
        compile=config.compile,
    )


def _inputs(config: Config) -> TrainingInputs:
    """Finds and checks what the run reads and where it writes."""
    from persona import storage
    from persona.models import resolve as models
    from persona.store.store import Store

    store_uri = storage.check_uri(config.store, flag="--store")
    runs = storage.check_uri(config.runs, flag="--runs")
    plug = storage.check_uri(config.plug, flag="--plug")
    storage.check_reachable(store_uri, flag="--store")
    storage.check_reachable(runs, flag="--runs", write=True)
    storage.check_reachable(plug, flag="--plug", write=True)
    requests = _requests(config, config.requests, flag="--requests")
    validation = None if config.validation is None else _requests(config, config.validation, flag="--validation")
    store = Store.open(store_uri)
    encoder = store_encoder(store.identity, config.encoder)
    llm = models.resolve(config.llm, revision=config.llm_revision, flag="--llm")
    tokenizer = plugs.check_llm(
        llm,
        max_input_tokens=config.max_input_tokens,
        max_target_tokens=config.max_target_tokens,
        prompt=config.prompt,
        n_soft=config.plug_options.n_soft,
        retrieved_tokens=config.retrieval.front_tokens,
    )
    if requests.have_system or (validation is not None and validation.have_system):
        tokenizer.check_system_column()
    return TrainingInputs(
        store=store,
        encoder=encoder,
        llm=llm,
        tokenizer=tokenizer,
        requests=requests,
        validation=validation,
        histories=retrieval.plan(config.past_texts, config.form),
        reference=_reference(config, llm, tokenizer),
        runs=runs,
        plug=plug,
    )


def _requests(config: Config, uri: str, *, flag: str) -> Requests:
    """Requests with targets."""
    return find_requests(uri, config.form, flag=flag, needs_target=True, rejected=config.preferences.rejected)


def _reference(config: Config, llm: "ModelFolder", tokenizer: "PromptTokenizer") -> Reference | None:
    """The losses without the plug, measured with the lengths and the retrieval of this run."""
    if not config.preferences.reference:
        return None
    retrieved = {**asdict(config.retrieval), "max_behaviors": config.max_behaviors}
    settings = {name: getattr(config, name) for name in ("max_input_tokens", "max_target_tokens", "llm_quantization")}
    settings |= {"user_profile": None, **(retrieved if config.retrieval.retrieve else {"retrieve": 0})}
    return find_reference(config.preferences.reference, llm, tokenizer, settings)


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


def _plan(config: Config, spec: RunSpec, inputs: TrainingInputs, *, resumes: bool) -> Summary:
    """The summary of a dry run."""
    from persona.cost import training_flops

    verb = "resume" if resumes else "start"
    plug = config.plug_options
    would = f"{verb} run {config.run!r}: a plug of {plug.persona_tokens} persona tokens for {config.llm}"
    requests = first_look.n_requests(inputs.requests, needs_target=True).at_most(config.rows.limit)
    n_trained = requests.n
    if inputs.validation is None:
        n_trained = round(n_trained * (1 - config.validation_fraction))
    options = config.training
    n_steps = options.n_steps(n_trained)
    # Targets are short in comparison with inputs.
    flops = cost.known(
        lambda: training_flops(
            inputs.llm.config,
            inputs.encoder.config,
            # --contrast and --preference read each request once more, with another history or another answer.
            n_requests=n_trained * (1 + bool(options.contrast) + bool(options.preference)),
            inputs=round(min(config.max_input_tokens, requests.mean_tokens)) + config.retrieval.front_tokens,
            outputs=0,
            query=round(min(config.max_query_tokens, requests.mean_tokens)),
            epochs=options.epochs,
        )
    )
    example = prompt_example(spec, inputs)
    must_see = config.training.empty_history < 1  # prompt tuning needs no history
    seen = first_look.look(inputs.requests, inputs.store, max_behaviors=config.max_behaviors, must_see=must_see)
    about = "" if requests.is_exact and inputs.validation is not None else "about "
    at_most = "at most " if config.patience else ""
    steps = f"{at_most}{about}{n_steps:,}: {options.epochs:,} epochs in batches of {options.global_batch:,}"
    table = [("would", would), ("requests", str(requests)), ("steps", steps), *seen.rows()]
    table += [*held_out.cautions(spec, n_steps), *inputs.requests.rows(), *inputs.validation_rows()]
    result = {"dry_run": True, "would": would, "prompt": asdict(spec.prompt), "requests": requests.n, "steps": n_steps}
    result |= {**seen.facts(), **inputs.requests.facts()}
    return cost.planned(
        cli.with_prompt_example(Summary(table=table, result=result), example),
        config.cost,
        flops=flops,
        if_all="for the whole run",
    )


def _stage_of(counts: Counts) -> Stage | None:
    if not (now := counts.get("train")):
        return None
    none = f" (without persona {now['none']:.4f})" if now["none"] else ""
    held_out = f", held-out {now['validation']:.4f}{none}" if now["validation"] else ""
    resumed = f", resumed at step {int(now['begun']):,}" if now["begun"] else ""
    note = f"loss {now['mean_loss']:.4f}{held_out}{resumed}"
    return Stage(name="train", done=int(now["step"]), total=int(now["of"]), unit="steps", note=note)


if __name__ == "__main__":
    sys.exit(cli.run(Config, main))
