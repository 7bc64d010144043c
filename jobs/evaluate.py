"""Measure how much the persona helps: scores of the answers, and the loss of the targets under each kind of persona.

Reads `--requests` with targets, `<store>/generations`, `<store>/behaviors`, the plug and, to show past texts in words,
`--texts`. Writes `<out>/metrics.json`, `<out>/report.html` with the same for people, its charts as PNG files,
`<out>/losses.parquet` with the numbers of each request, which `jobs.compare` reads, and for a LaMP task `<out>/lamp/`:
golds and answers in the format that LaMP's own evaluation reads.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from jobs.runtime import (
    answers as stored_answers,
    cli,
    cost,
    evaluate_summary,
    exchange,
    inspection,
    joining,
    losses,
    plug_versions,
    plugs,
    reading,
    retrieval,
    session,
    tracked_results,
    tracking,
    user_profiles,
)
from jobs.runtime.cli import Summary
from jobs.runtime.inputs import Histories, Requests, find_requests
from jobs.runtime.job_options import FLAT, InputRows, LLMPool, PastTexts, PlugModels, RequestFormat, flat_settings
from jobs.runtime.losses import Losses
from jobs.runtime.plugs import PlugRef
from jobs.runtime.pools import ModelPool
from jobs.runtime.progress import Stage, progress
from jobs.runtime.tally import Counts, Tally
from persona import strengths
from persona.errors import InputError, UsageError
from persona.front_texts import FrontTexts
from persona.option_checks import check_at_least
from persona.options import CostOptions, Metric, PersonaKind, Track

if TYPE_CHECKING:
    from persona.evaluation.one_run import Answers
    from persona.store.store import Store


@dataclass(frozen=True, kw_only=True)
class Config:
    """Configuration of jobs.evaluate."""

    requests: str
    """Requests with targets, Parquet or JSONL, local or s3://."""
    store: str
    """Folder of the tables with the answers of jobs.generate."""
    plug: str
    """Folder of the plug made by jobs.train, local or s3://; hf://OWNER/NAME; or `live` (see jobs.plugs)."""
    out: str
    """Folder for metrics.json and report.html, local or s3://."""
    variant: tuple[str, ...] = ()
    """Names of the answers to score; default those that jobs.generate writes for --persona."""
    losses_only: bool = False
    """Measure losses only and score no answers."""
    persona: tuple[PersonaKind, ...] = (PersonaKind.OWN, PersonaKind.NONE, PersonaKind.OTHER)
    """Kinds of persona whose loss is measured: own, none, other, mean or bare."""
    persona_strength: tuple[float, ...] = (1.0,)
    """Strengths of own, other and mean personas: 0 is no persona, 1 as trained, more than 1 exaggerates."""
    metric: Literal["label", "rating", "text", "long_text"] = "text"
    """How answers are scored: accuracy and F1, MAE and RMSE, ROUGE, or ROUGE and METEOR."""
    task: Literal["LaMP_1", "LaMP_2", "LaMP_3", "LaMP_4", "LaMP_5", "LaMP_7"] | None = None
    """Score by the official metric of this LaMP task instead of --metric."""
    rejected: str | None = None
    """Column of --requests with a worse answer; reports how often the target is likelier than that."""
    front: Annotated[FrontTexts, FLAT] = field(default_factory=FrontTexts)
    past_texts: Annotated[PastTexts, FLAT] = field(default_factory=PastTexts)
    models: Annotated[PlugModels, FLAT] = field(default_factory=PlugModels)
    batch_size: int = 16
    """Requests per forward pass; lower it when a GPU runs out of memory."""
    seed: int = 0
    """Seed of the bootstrap behind the intervals."""
    pool: Annotated[LLMPool, FLAT] = field(default_factory=LLMPool)
    rows: Annotated[InputRows, FLAT] = field(default_factory=InputRows)
    form: Annotated[RequestFormat, FLAT] = field(default_factory=RequestFormat)
    cost: Annotated[CostOptions, FLAT] = field(default_factory=CostOptions)
    track: Track = "none"
    """Report numbers and a page without users to this experiment tracker; the environment says where it is."""
    dry_run: bool = False
    """Show what would be done and change nothing."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        check_at_least(self, 1, "batch_size")
        self.past_texts.check_enough_for(self.front)
        if not self.persona:
            raise UsageError("--persona: give at least one of own, none, other, mean, bare")
        strengths.check(self.persona, self.persona_strength)
        if self.losses_only and self.variant:
            raise UsageError("--variant names answers to score, and --losses-only scores none; remove one of them")

    @property
    def measured(self) -> list[str]:
        """Names of the personas at each strength."""
        return strengths.names_at(self.persona, self.persona_strength)

    @property
    def scored(self) -> tuple[str, ...]:
        """Names of the answers to be scored."""
        if self.losses_only:
            return ()
        return self.variant or tuple(self.front.answers_of(persona) for persona in self.measured)


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """What the job reads and where it writes, found and checked before Ray starts."""

    requests: Requests
    store: "Store"
    plug: PlugRef
    histories: Histories | None
    out: str


def main(config: Config) -> Summary:
    """Runs the job."""
    started = time.perf_counter()
    inputs = _inputs(config)
    if config.dry_run:
        return _plan(config, inputs)

    settings = {**flat_settings(config), "plug_fingerprint": inputs.plug.fingerprint}
    with tracking.tracked(config.track, job="evaluate", place=inputs.out, settings=settings) as tracked:
        return _evaluate(config, inputs, tracked, started)


def _evaluate(config: Config, inputs: _Inputs, tracked: tracking.Tracked, started: float) -> Summary:
    # The whole report describes one state of the tables, even if another job writes to them meanwhile.
    store = inputs.store.snapshot("behaviors", "generations", *user_profiles.tables(config.front))
    variants = [variant for variant in config.scored if variant in store.variants()]
    machines = session.connect()
    pool = ModelPool.plan(machines, config.pool)
    tally = Tally.start()
    with progress(tally, "evaluate", _stage_of), exchange.run_files(inputs.out, "evaluate") as folder:
        requests = _requests(config, inputs, store, variants, tally, folder)
        n_rows = requests.found.total.rows * len(config.measured)
        measured = losses.measure(requests.rows, _loss_settings(config, inputs.plug), pool, tally, n_rows=n_rows)
    if not measured["request_id"]:
        raise InputError(f"--requests {config.requests} has no request with a target, so there is nothing to evaluate")
    answers = stored_answers.read_outputs(store, variants, measured["request_id"], measured["user_id"])
    metrics = _metrics(config, inputs, store, measured, answers, tally)
    counts = tally.totals()
    metrics["rejects"] = requests.found.total.rejects
    metrics |= {
        "without_as_of": requests.found.total.timeless,
        **inputs.requests.facts(),
        **user_profiles.facts(counts),
    }
    numbers = losses.to_parquet(measured)
    metrics["plug_versions"] = plug_versions.compared(store, inputs.plug, metrics, numbers, seed=config.seed)
    metrics["seconds"] = round(time.perf_counter() - started, 1)
    _write(inputs.out, _files(config, metrics, measured, numbers, answers))
    if tracked.is_on:
        tracked.results(tracked_results.evaluation_numbers(metrics), tracked_results.evaluation_files(metrics))
    summary = _summary(config, inputs, metrics, requests.found, counts)
    return cost.spent(summary, config.cost, machines, n_gpus=pool.all_gpus, seconds=metrics["seconds"])


def _inputs(config: Config) -> _Inputs:
    from persona import storage
    from persona.store.store import Store

    target = storage.check_uri(config.store, flag="--store")
    out = storage.check_uri(config.out, flag="--out")
    storage.check_reachable(target, flag="--store")
    storage.check_reachable(out, flag="--out", write=True)
    requests = find_requests(
        config.requests,
        config.form,
        flag="--requests",
        needs_target=True,
        rejected=config.rejected,
    )
    store = Store.open(target)
    user_profiles.check(config.front, store)
    plug = plugs.find_plug(store, config.plug, config.models, requests, retrieved_tokens=config.front.front_tokens)
    histories = retrieval.plan(config.past_texts, config.form)
    return _Inputs(requests=requests, store=store, plug=plug, histories=histories, out=out)


def _plan(config: Config, inputs: _Inputs) -> Summary:
    """The summary of a dry run."""
    scored = f"score {', '.join(config.scored)} and " if config.scored else ""
    would = f"{scored}measure the loss for {', '.join(config.measured)}"
    plan = cost.planned_requests(
        would,
        config.cost,
        inputs.requests,
        inputs.plug,
        needs_target=True,
        limit=config.rows.limit,
        passes=len(config.measured),
        if_all="for all losses",
    )
    example = plugs.prompt_example(inputs.plug, retrieved=bool(config.front.front_tokens))
    return cli.with_prompt_example(plan, example)


def _requests(
    config: Config, inputs: _Inputs, store: "Store", variants: Sequence[str], tally: Tally, folder: str
) -> joining.Joined:
    """The requests with the histories that they see under each kind of persona."""
    spec = retrieval.RetrievalSpec.of_plug(inputs.plug, config.front, inputs.histories)
    plan = joining.JoinPlan(
        job="evaluate",
        personas=config.persona,
        strengths=config.persona_strength,
        max_behaviors=inputs.plug.record.max_behaviors,
        needs_target=True,
        blank_targets=_kind(config) != "rating",
        limit=config.rows.limit,
        selection=stored_answers.AllAnswered(variants, inputs.plug),
        texts=retrieval.best_of(spec, tally),
        front=user_profiles.of(config.front, tally),
        rejected=config.rejected,
    )
    return joining.requests_with_histories(inputs.requests, store, tally, plan, folder=folder)


def _loss_settings(config: Config, plug: PlugRef) -> losses.LossSettings:
    return losses.LossSettings(
        plug=plug,
        precision=config.models.precision,
        device=config.pool.device,
        batch_size=config.batch_size,
        retrieved_tokens=config.front.front_tokens,
        with_rejected=config.rejected is not None,
    )


def _metrics(
    config: Config, inputs: _Inputs, store: "Store", measured: Losses, answers: "Answers", tally: Tally
) -> dict[str, Any]:
    """The content of `metrics.json`, except for the counts of the run."""
    from persona.evaluation.one_run import summarize
    from persona.versions import installed_versions

    metric = _metric(config, measured["target"])
    inspected = inspection.InspectionInputs(
        requests=inputs.requests, store=store, plug=inputs.plug, histories=inputs.histories, out=inputs.out
    )
    return {
        **summarize(measured, config.measured, answers, metric, seed=config.seed),
        "limited": config.rows.limit is not None,
        "unanswered_variants": [variant for variant in config.scored if variant not in answers],
        **inspection.report_parts(inspected, measured, config.measured, answers, tally),
        "training": inputs.plug.record.training,
        "settings": {
            **flat_settings(config),
            "personas": config.measured,
            "variants": config.scored,
            **evaluate_summary.origin(store, inputs.plug),
        },
        "versions": installed_versions(),
    }


def _metric(config: Config, targets: Sequence[str]) -> Metric:
    from persona.inputs.lamp import TASKS

    if config.task is not None:
        return TASKS[config.task].metric
    if config.metric == "label":
        return Metric(kind="label", labels=tuple(sorted({target.strip() for target in targets} - {""})))
    return Metric(kind=config.metric)


def _kind(config: Config) -> str:
    from persona.inputs.lamp import TASKS

    return config.metric if config.task is None else TASKS[config.task].metric.kind


def _files(
    config: Config, metrics: Mapping[str, Any], measured: Losses, numbers: bytes, answers: "Answers"
) -> dict[str, bytes]:
    """The content of each file of the output folder, by name."""
    import json
    from urllib.parse import quote

    from persona.inputs.lamp import TASKS
    from persona.inputs.lamp_files import outputs_json
    from persona.report.pages import chart_files, evaluation_page

    files = {
        "losses.parquet": numbers,
        "metrics.json": (json.dumps(cli.plain(metrics), indent=2, allow_nan=False) + "\n").encode(),
        "report.html": evaluation_page(metrics),
        **chart_files(metrics),
    }
    if config.task is not None:
        task = TASKS[config.task]
        golds = dict(zip(measured["request_id"], measured["target"], strict=True))
        files |= {f"lamp/{quote(name, safe='')}.json": outputs_json(task, outputs) for name, outputs in answers.items()}
        files["lamp/golds.json"] = outputs_json(task, golds)
    return files


def _write(out: str, files: Mapping[str, bytes]) -> None:
    from persona import storage

    for name, data in files.items():
        storage.write_bytes(storage.join(out, name), data)


def _summary(
    config: Config, inputs: _Inputs, metrics: Mapping[str, Any], found: reading.Found, counts: Counts
) -> Summary:
    from persona import storage

    # The summary goes to logs, which should contain neither ids nor texts of users.
    unprinted = (*tracked_results.PERSONAL, "training")
    printed = {name: value for name, value in metrics.items() if name not in unprinted}
    return Summary(
        table=[
            *evaluate_summary.table(metrics),
            *retrieval.summary_rows(counts),
            *user_profiles.summary_rows(counts),
            ("metrics", storage.join(inputs.out, "metrics.json")),
            ("report", storage.join(inputs.out, "report.html")),
            *reading.request_rows(inputs.requests, found),
            *joining.repeated_rows(counts),
        ],
        result={"job": "evaluate", "out": inputs.out, **printed},
        exit_code=found.exit_code(config.rows.max_reject_fraction),
    )


def _stage_of(counts: Counts) -> Stage | None:
    if not (joined := counts.get("join")):
        return None
    return Stage(name="loss", done=int(counts.get("loss", {}).get("rows", 0)), total=int(joined["kept"]), unit="rows")


if __name__ == "__main__":
    sys.exit(cli.run(Config, main))
