"""Tell how much the persona is worth: scores of the answers, and the loss of the targets under each kind of persona.

Reads `--requests` with targets, `<store>/generations`, `<store>/behaviors`, the plug and, to show past texts in words,
`--texts`. Writes `<out>/metrics.json`, `<out>/report.html` with the same for people, its pictures as PNG files,
`<out>/losses.parquet` with the numbers of each request, which `jobs.compare` reads, and for a LaMP task `<out>/lamp/`:
golds and answers in the form that LaMP's own evaluation reads.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from jobs.generate import load_personalized, plug_sources
from jobs.runtime import cli, cost, inspection as look, joining, pools, reading, retrieval as retrieve, session
from jobs.runtime.cli import Summary
from jobs.runtime.job_options import FLAT, ActorPool, InputRows, PastTexts, PlugModels, flat_settings
from jobs.runtime.progress import progress
from jobs.runtime.tally import Counts, Tally
from persona.errors import InputError, UsageError
from persona.options import CostOptions, PersonaKind, RetrievalOptions, check_at_least

if TYPE_CHECKING:
    import pyarrow as pa

    from persona.options import Metric
    from persona.store.store import Store

# What is kept of each request and kind of persona: numbers, and no texts.
_KEPT = ("request_id", "user_id", "persona", "n_behaviors", "nats", "tokens")
_KEPT_OF_REJECTED = ("rejected_nats", "rejected_tokens")
_BUCKETS_TOGETHER = 16


@dataclass(frozen=True, kw_only=True)
class Config:
    """Configuration of jobs.evaluate."""

    requests: str
    """Requests with targets, Parquet or JSONL, local or s3://."""
    store: str
    """Folder of the tables with the answers of jobs.generate."""
    plug: str
    """Folder of the plug made by jobs.train, local or s3://."""
    out: str
    """Folder for metrics.json and report.html, local or s3://."""
    variants: tuple[str, ...] = ()
    """Names of the answers to score; default those that jobs.generate writes for --personas."""
    losses_only: bool = False
    """Measure losses only and score no answers."""
    personas: tuple[PersonaKind, ...] = (PersonaKind.OWN, PersonaKind.NONE, PersonaKind.OTHER)
    """Kinds of persona whose loss is measured: own, none, other, mean or bare."""
    metric: Literal["label", "rating", "text"] = "text"
    """How answers are scored: accuracy and F1, MAE and RMSE, or ROUGE."""
    task: Literal["LaMP_1", "LaMP_2", "LaMP_3", "LaMP_4", "LaMP_5", "LaMP_7"] | None = None
    """Score by the official metric of this LaMP task instead of --metric."""
    rejected: str | None = None
    """Column of --requests with a worse answer; reports how often the target is likelier than that."""
    retrieval: Annotated[RetrievalOptions, FLAT] = field(default_factory=RetrievalOptions)
    past_texts: Annotated[PastTexts, FLAT] = field(default_factory=PastTexts)
    models: Annotated[PlugModels, FLAT] = field(default_factory=PlugModels)
    batch_size: int = 16
    """Requests per forward pass; lower it when a GPU runs out of memory."""
    seed: int = 0
    """Seed of the bootstrap behind the intervals."""
    pool: Annotated[ActorPool, FLAT] = field(default_factory=ActorPool)
    rows: Annotated[InputRows, FLAT] = field(default_factory=InputRows)
    cost: Annotated[CostOptions, FLAT] = field(default_factory=CostOptions)
    dry_run: bool = False
    """Show what would be done and change nothing."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        check_at_least(self, 1, "batch_size")
        self.past_texts.check_enough_for(self.retrieval)
        if not self.personas:
            raise UsageError("--personas: give at least one of own, none, other, mean, bare")
        if self.losses_only and self.variants:
            raise UsageError("--variants names answers to score, and --losses-only scores none; remove one of them")

    @property
    def scored(self) -> tuple[str, ...]:
        """Names of the answers to be scored."""
        if self.losses_only:
            return ()
        return self.variants or tuple(self.retrieval.answers_of(persona) for persona in self.personas)


def main(config: Config) -> Summary:  # noqa: PLR0915
    """Runs the job."""
    import json
    from urllib.parse import quote

    from persona import storage
    from persona.evaluation.one_run import summarize
    from persona.inputs import requests
    from persona.inputs.lamp import TASKS, outputs_json
    from persona.inputs.splits import plan_splits
    from persona.report.pages import chart_files, evaluation_page
    from persona.store.store import Store
    from persona.versions import installed_versions

    started = time.perf_counter()
    source = storage.check_uri(config.requests, flag="--requests")
    target = storage.check_uri(config.store, flag="--store")
    out = storage.check_uri(config.out, flag="--out")
    storage.check_reachable(source, flag="--requests")
    storage.check_reachable(target, flag="--store")
    storage.check_reachable(out, flag="--out", write=True)
    splits = plan_splits(source, flag="--requests")
    requests.check_columns(splits, needs_target=True, rejected=config.rejected)
    store = Store.open(target)
    where = plug_sources(store, config.plug, llm=config.models.llm, encoder=config.models.encoder)
    histories = retrieve.plan(config.past_texts)
    if config.dry_run:
        size: dict[str, Any] = {"times": len(config.personas), "if_all": "with inputs of full length"}
        return cost.planned_requests(_would_do(config), config.cost, splits, where, **size)

    # The whole report is of one state of the tables, whoever writes to them meanwhile.
    store = store.snapshot("behaviors", "generations")
    answered = [variant for variant in config.scored if variant in store.variants()]
    machines = session.connect()
    tally = Tally.start()
    losses = _losses(config, splits, store, where, histories, answered, machines, tally)
    if not losses["request_id"]:
        raise InputError(f"--requests {source} gives no request with a target, so there is nothing to evaluate")
    answers = _answers(store, answered, losses)
    golds = dict(zip(losses["request_id"], losses["target"], strict=True))
    metrics = summarize(losses, config.personas, answers, _metric(config, golds), seed=config.seed)
    metrics |= {"limited": config.rows.limit is not None}
    metrics["unanswered_variants"] = [variant for variant in config.scored if variant not in answered]
    metrics |= _looked_at(config, splits, store, where, tally, histories, losses, answers)
    counts = tally.totals()
    metrics["training"] = where["record"].training
    metrics["settings"] = {**flat_settings(config), "variants": config.scored, **_origin(store, where)}
    metrics["versions"] = installed_versions()
    metrics["rejects"] = int(counts.get("read", {}).get("rejects", 0))
    metrics["seconds"] = round(time.perf_counter() - started, 1)
    files = {
        "losses.parquet": _as_parquet(losses),
        "metrics.json": (json.dumps(cli.plain(metrics), indent=2, allow_nan=False) + "\n").encode(),
        "report.html": evaluation_page(metrics),
    }
    files |= chart_files(metrics)
    if config.task is not None:
        task = TASKS[config.task]
        files |= {f"lamp/{quote(name, safe='')}.json": outputs_json(task, answers[name]) for name in answered}
        files["lamp/golds.json"] = outputs_json(task, golds)
    _write(out, files)
    # What is printed ends in logs, where nobody's id and nobody's words belong.
    of_persons = {"examples", "largest_gains", "largest_losses", "map"}
    brief = {name: metrics[name] for name in metrics if name not in {*of_persons, "training"}}
    summary = Summary(
        table=[
            *_table(metrics),
            *retrieve.summary_rows(counts),
            ("metrics", storage.join(out, "metrics.json")),
            ("report", storage.join(out, "report.html")),
            *reading.reject_rows(counts),
        ],
        result={"job": "evaluate", "out": out, **brief},
        exit_code=reading.exit_code(counts, config.rows.max_reject_fraction),
    )
    n_models = machines.n_models(config.pool.actors, config.pool.cpus_per_actor)
    return cost.spent(summary, config.cost, machines, n_models=n_models, seconds=metrics["seconds"])


def _write(out: str, files: Mapping[str, bytes]) -> None:
    from persona import storage

    for name, data in files.items():
        storage.write_bytes(storage.join(out, name), data)


def _would_do(config: Config) -> str:
    scored = f"score {', '.join(config.scored)} and " if config.scored else ""
    return f"{scored}measure the loss for {', '.join(config.personas)}"


def _looked_at(
    config: Config,
    splits: Sequence[Any],
    store: "Store",
    where: Mapping[str, Any],
    tally: Tally,
    histories: Any,
    losses: Mapping[str, list[Any]],
    answers: Mapping[str, Mapping[str, str]],
) -> dict[str, Any]:
    """What the report shows of single requests and users."""
    import numpy as np

    from persona.evaluation import examples

    chosen = examples.choose(losses, config.personas)
    user_of = dict(zip(losses["request_id"], losses["user_id"], strict=True))
    ids = sorted({*chosen.examples, *chosen.mapped})
    found = look.look(splits, ids, frozenset(user_of[one] for one in ids), store, where, tally, histories)

    def example(request_id: str) -> dict[str, Any]:
        seen = found[request_id]
        one = examples.example(losses, config.personas, answers, request_id, seen["input"])
        return {**one, "listened_to": examples.heaviest_behaviors(seen)}

    # Who has no behavior has no place on a map of personas.
    mapped = [request_id for request_id in chosen.mapped if found[request_id]["n_behaviors"]]
    vectors_UF = np.array([np.frombuffer(found[one]["persona_vector"], "<f4") for one in mapped])
    users = [user_of[request_id] for request_id in mapped]
    return {
        "examples": [example(one) for one in chosen.even],
        "largest_gains": [example(one) for one in chosen.largest_gains],
        "largest_losses": [example(one) for one in chosen.largest_losses],
        "map": examples.persona_map(vectors_UF, users, losses, config.personas),
    }


def _origin(store: "Store", where: Mapping[str, Any]) -> dict[str, Any]:
    record = where["record"]
    return {
        "plug_fingerprint": where["fingerprint"],
        "plug_options": asdict(record.options),
        "llm": record.llm,
        "encoder": record.encoder,
        **{f"{table}_version": version for table, version in store.versions.items()},
    }


def _losses(
    config: Config,
    splits: Sequence[Any],
    store: "Store",
    where: Mapping[str, Any],
    histories: retrieve.Histories | None,
    answered: Sequence[str],
    machines: session.Machines,
    tally: Tally,
) -> dict[str, list[Any]]:
    """Loss of each request under each kind of persona: a few numbers a request, gathered here."""
    joined = joining.requests_with_histories(
        splits,
        store,
        tally,
        joining.JoinPlan(
            job="evaluate",
            personas=config.personas,
            max_behaviors=where["record"].max_behaviors,
            needs_target=True,
            limit=config.rows.limit,
            selection=_Answered(answered, where["fingerprint"]),
            texts=retrieve.best_of(histories, config.retrieval, where, tally),
            rejected=config.rejected,
        ),
    )
    pool = pools.ModelPool.plan(machines, actors=config.pool.actors, cpus_per_actor=config.pool.cpus_per_actor)
    of_actors = {"config": config, "where": where, "tally": tally}
    rows = pools.by_models(joined, Losses, block_rows=8 * config.batch_size, pool=pool, **of_actors)
    names = [*_KEPT, "target", *(_KEPT_OF_REJECTED if config.rejected is not None else ())]
    gathered: dict[str, list[Any]] = {name: [] for name in names}
    with progress(tally, _progress_line):
        for table in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
            for row in cast("pa.Table", table).to_pylist():
                for name in names:
                    gathered[name].append(row[name])
    return gathered


def _as_parquet(losses: Mapping[str, list[Any]]) -> bytes:
    """The numbers of each request and kind of persona, for `jobs.compare` and whoever else wants to count."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    kept = pa.table({name: losses[name] for name in (*_KEPT, *_KEPT_OF_REJECTED) if name in losses})
    sink = io.BytesIO()
    pq.write_table(kept.sort_by([("request_id", "ascending"), ("persona", "ascending")]), sink)
    return sink.getvalue()


class _Answered:
    """Refuses requests without an answer, or with one of another plug, whose scores are not to stand beside this loss.

    It does so when their bucket is joined, which is long before all losses are known.
    """

    adds = ()

    def __init__(self, variants: Sequence[str], plug: str) -> None:
        self.variants = variants
        self.plug = plug

    def __call__(self, joined: "pa.Table", store: "Store", bucket: int, _counts: Any) -> "pa.Table":
        """The rows as they came."""
        asked = set(joined["request_id"].to_pylist())
        for variant in self.variants:
            answered = store.answers(variant, bucket)
            plug_of = dict(zip(answered["request_id"].to_pylist(), answered["plug"].to_pylist(), strict=True))
            wrong = min((request for request in asked if plug_of.get(request) != self.plug), default=None)
            if wrong is not None:
                plug = plug_of.get(wrong)
                of_another = f"an answer to {wrong!r} of another plug ({plug}, and --plug is {self.plug})"
                found = of_another if plug else f"no answer to {wrong!r}"
                raise InputError(
                    f"the variant {variant!r} has {found} and perhaps others; answer all requests with jobs.generate "
                    "and this plug, or name with --variants those to be scored, or score none with --losses-only"
                )
        return joined


class Losses:
    """Plug and LLM in an actor: requests with histories and targets in, losses out."""

    def __init__(self, config: Config, where: Mapping[str, Any], tally: Tally) -> None:
        session.quiet_models(config.pool.cpus_per_actor)
        self.model = load_personalized(where, config)
        self.batch_size = config.batch_size
        self.with_rejected = config.rejected is not None
        self.tally = tally

    def __call__(self, requests: "pa.Table") -> "pa.Table":
        """Adds `nats` and `tokens` of the target, and perhaps those of the rejected text."""
        from persona.plug.request_tables import loss_of_all

        losses = loss_of_all(self.model, requests, batch_size=self.batch_size)
        rows = requests.select(["request_id", "user_id", "persona", "target", "n_behaviors"])
        for name in ("nats", "tokens"):
            rows = rows.append_column(name, losses[name])
        if self.with_rejected:
            place = requests.column_names.index("target")
            instead = requests.set_column(place, "target", requests["rejected"])
            losses = loss_of_all(self.model, instead, batch_size=self.batch_size)
            for name in ("nats", "tokens"):
                rows = rows.append_column(f"rejected_{name}", losses[name])
        if rows.num_rows:
            unit = f"{rows['request_id'][0]}/{rows['persona'][0]}"
            self.tally.note("loss", unit, {"rows": rows.num_rows})
        return rows


def _answers(store: "Store", variants: Sequence[str], losses: Mapping[str, list[Any]]) -> dict[str, dict[str, str]]:
    """Outputs by variant and request, a few buckets at a time: a variant may have a million times as many."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    from persona.inputs.histories import bucket_of

    asked = pa.array(sorted(set(losses["request_id"])), pa.string())
    buckets = np.unique(bucket_of(pa.array(losses["user_id"], pa.string()), store.n_buckets)).tolist()
    found: dict[str, dict[str, str]] = {variant: {} for variant in variants}
    for variant, outputs in found.items():
        for first in range(0, len(buckets), _BUCKETS_TOGETHER):
            some = buckets[first : first + _BUCKETS_TOGETHER]
            table = store.read_generations([variant], ["request_id", "output"], buckets=some)
            mine = table.filter(pc.is_in(table["request_id"], value_set=asked))
            outputs.update(zip(mine["request_id"].to_pylist(), mine["output"].to_pylist(), strict=True))
    return found


def _metric(config: Config, golds: Mapping[str, str]) -> "Metric":
    from persona.options import Metric

    if config.task is not None:
        from persona.inputs.lamp import TASKS

        return TASKS[config.task].metric
    if config.metric == "label":
        return Metric(kind="label", labels=tuple(sorted({gold.strip() for gold in golds.values()})))
    return Metric(kind=config.metric)


def _table(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    from persona.report.wording import RANKINGS

    rows = [("requests", f"{metrics['requests']:,} of {metrics['users']:,} users")]
    if metrics["limited"]:
        rows.append(("warning", "--limit was given: these are not the numbers of the whole set"))
    for persona, loss in metrics["loss"].items():
        saved = metrics["loss_saved_by_own"].get(persona)
        note = f"; own saves {saved['mean']:+.4f} [{saved['low']:+.4f}, {saved['high']:+.4f}]" if saved else ""
        rows.append(
            (f"loss, {persona}", f"{loss['mean']:.4f} nats a token [{loss['low']:.4f}, {loss['high']:.4f}]{note}")
        )
    rows += [(f"scores, {variant}", "no answers in the store") for variant in metrics["unanswered_variants"]]
    for persona, found in metrics.get("ranking", {}).items():
        shares = [f"{RANKINGS[way]} {100 * one['mean']:.1f} % {_percent(one)}" for way, one in found.items()]
        rows.append((f"ranking, {persona}", f"target before rejected: {', '.join(shares)}"))
    for variant, scores in metrics["scores"].items():
        rows.append((f"scores, {variant}", ", ".join(f"{name} {value:.4f}" for name, value in scores.items())))
    return rows


def _percent(interval: Mapping[str, float]) -> str:
    return f"[{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"


def _progress_line(counts: Counts, seconds: float) -> str:
    joined = counts.get("join", {})
    done = int(counts.get("loss", {}).get("rows", 0))
    return f"evaluate: loss of {done:,} of {int(joined['kept']):,} rows, {done / seconds:,.1f}/s" if joined else ""


if __name__ == "__main__":
    sys.exit(cli.run(Config, main))
