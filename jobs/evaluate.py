"""Tell how much the persona is worth: scores of the answers, and the loss of the targets under each kind of persona.

Reads `--requests` with targets, `<store>/generations`, `<store>/behaviors` and the plug; writes `<out>/metrics.json`.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from jobs import command, flow, session
from jobs.command import Summary
from jobs.generate import load_personalized, plug_sources
from persona.errors import InputError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa

    from persona.metrics import Metric
    from persona.store import Store

Persona = Literal["own", "none", "other", "mean"]
_EXAMPLES = 6
_SMALLER_IS_BETTER = ("mae",)
_GATHERED = ("request_id", "user_id", "persona", "input", "target", "nats", "tokens", "n_behaviors")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What `jobs.evaluate` can be told."""

    requests: str
    """Requests with targets, Parquet or JSONL, local or s3://."""
    store: str
    """Folder of the tables with the answers of jobs.generate."""
    plug: str
    """Folder of the plug that jobs.train made, local or s3://."""
    out: str
    """Folder for metrics.json, local or s3://."""
    variants: tuple[str, ...] = ("own", "none", "other")
    """Answers to be scored, by their names in the table."""
    personas: tuple[Persona, ...] = ("own", "none", "other")
    """Kinds of persona whose loss is measured."""
    metric: Literal["label", "rating", "text"] = "text"
    """How answers are scored: exact match and F1, MAE and RMSE, or ROUGE."""
    task: Literal["LaMP_1", "LaMP_2", "LaMP_3", "LaMP_4", "LaMP_5", "LaMP_7"] | None = None
    """A LaMP task, whose official metric is taken instead."""
    llm: str | None = None
    """Where the plug's LLM lies, when not where the plug says."""
    encoder: str | None = None
    """Where the plug's encoder lies, when not where the plug says."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the LLM; auto is bf16 where the hardware multiplies it natively."""
    batch_size: int = 16
    """Requests of one forward pass."""
    actors: int | None = None
    """LLM actors; default one a GPU, or one a core."""
    cpus_per_actor: int = 1
    """Cores of an actor where there is no GPU."""
    seed: int = 0
    """Of the bootstrap."""
    max_reject_fraction: float = 0.01
    """More bad rows than this end the job with exit code 3."""
    limit: int | None = None
    """Take only this many requests (the scores are then not those of the whole set)."""
    dry_run: bool = False
    """Say what would be done, and start nothing."""

    def check(self) -> None:
        """Refuses what can be refused without looking at any data."""
        for name in ("batch_size", "actors", "cpus_per_actor"):
            command.at_least(self, name, 1)
        if not self.personas:
            raise UsageError("--personas: give one at least, of own, none, other, mean")


def main(config: Config) -> Summary:
    """Runs the job."""
    import json

    from persona import inputs, requests, storage
    from persona.store import Store

    started = time.perf_counter()
    source = storage.check_uri(config.requests, flag="--requests")
    target = storage.check_uri(config.store, flag="--store")
    out = storage.check_uri(config.out, flag="--out")
    storage.check_reachable(source, flag="--requests")
    storage.check_reachable(target, flag="--store")
    storage.check_reachable(out, flag="--out", write=True)
    splits = inputs.plan_splits(source, flag="--requests")
    requests.check_columns(splits, needs_target=True)
    store = Store.open(target)
    where = plug_sources(store, config.plug, llm=config.llm, encoder=config.encoder)
    if config.dry_run:
        would = f"score {', '.join(config.variants)} and measure the loss for {', '.join(config.personas)}"
        return Summary(table=[("would", would)], result={"dry_run": True, "would": would})

    answered = [v for v in config.variants if store.read_generations([v], ["request_id"]).num_rows]
    machines = session.connect()
    tally = flow.new_tally()
    losses = _losses(config, splits, store, where, answered, machines, tally)
    if not losses["request_id"]:
        raise InputError(f"--requests {source} gives no request with a target, so there is nothing to evaluate")
    metrics = _metrics(config, losses, _answers(store, answered, losses))
    metrics["unanswered_variants"] = [variant for variant in config.variants if variant not in answered]
    counts = flow.totals(tally)
    metrics["settings"] = {**asdict(config), "plug_fingerprint": where["fingerprint"], "llm": where["record"].llm}
    metrics["rejects"] = int(counts.get("read", {}).get("rejects", 0))
    metrics["seconds"] = round(time.perf_counter() - started, 1)
    storage.write_bytes(storage.join(out, "metrics.json"), (json.dumps(metrics, indent=2) + "\n").encode())
    return Summary(
        table=[*_table(metrics), ("metrics", storage.join(out, "metrics.json")), *flow.reject_rows(counts)],
        result={"job": "evaluate", "out": out, **metrics},
        exit_code=flow.exit_code(counts, config.max_reject_fraction),
    )


def _losses(
    config: Config,
    splits: Sequence[Any],
    store: "Store",
    where: Mapping[str, Any],
    answered: Sequence[str],
    machines: session.Machines,
    tally: Any,
) -> dict[str, list[Any]]:
    """Loss of each request under each kind of persona: a few numbers a request, gathered here."""
    rows = (
        flow.requests_with_histories(
            splits,
            store,
            tally,
            job="evaluate",
            personas=config.personas,
            max_behaviors=where["record"].max_behaviors,
            needs_target=True,
            versions={"behaviors": store.version("behaviors")},
            limit=config.limit,
            keep=_Answered(answered),
        )
        .repartition(target_num_rows_per_block=16 * config.batch_size)
        .map_batches(
            Losses,
            fn_constructor_kwargs={"config": config, "where": where, "tally": tally},
            batch_size=16 * config.batch_size,
            batch_format="pyarrow",
            **machines.pool(config.actors, config.cpus_per_actor),
        )
    )
    gathered: dict[str, list[Any]] = {name: [] for name in _GATHERED}
    with flow.progress(tally, _progress_line):
        for table in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
            for row in cast("pa.Table", table).to_pylist():
                for name in _GATHERED:
                    gathered[name].append(row[name])
    return gathered


class _Answered:
    """Refuses requests without an answer when their bucket is joined, which is long before all losses are known."""

    adds = ()

    def __init__(self, variants: Sequence[str]) -> None:
        self.variants = variants

    def __call__(self, joined: "pa.Table", store: "Store", bucket: int, _counts: Any) -> "pa.Table":
        """The rows as they came."""
        asked = set(joined["request_id"].to_pylist())
        for variant in self.variants:
            missing = sorted(asked.difference(store.answers(variant, bucket)["request_id"].to_pylist()))
            if missing:
                raise InputError(
                    f"the variant {variant!r} has no answer to {missing[0]!r} and perhaps others; answer all requests "
                    "with jobs.generate, or leave the variant out of --variants"
                )
        return joined


class Losses:
    """Plug and LLM in an actor: requests with histories and targets in, losses out."""

    def __init__(self, config: Config, where: Mapping[str, Any], tally: Any) -> None:
        session.quiet_models(config.cpus_per_actor)
        self.model = load_personalized(where, config.precision)
        self.batch_size = config.batch_size
        self.tally = tally

    def __call__(self, requests: "pa.Table") -> "pa.Table":
        """Adds `nats` and `tokens`."""
        from persona.generation import loss_of_all

        losses = loss_of_all(self.model, requests, batch_size=self.batch_size)
        rows = requests.select(["request_id", "user_id", "persona", "input", "target", "n_behaviors"])
        for name in ("nats", "tokens"):
            rows = rows.append_column(name, losses[name])
        if rows.num_rows:
            unit = f"{rows['request_id'][0]}/{rows['persona'][0]}"
            flow.note(self.tally, "loss", unit, {"rows": rows.num_rows})
        return rows


def _metrics(
    config: Config, losses: Mapping[str, list[Any]], answers: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    """Everything that `metrics.json` holds about losses, scores and examples."""
    import numpy as np

    from persona.metrics import bootstrap, paired_bootstrap, score, score_requests

    order = sorted(range(len(losses["request_id"])), key=lambda i: losses["request_id"][i])
    of = {p: [i for i in order if losses["persona"][i] == p] for p in config.personas}
    first = of[config.personas[0]]
    users = [losses["user_id"][i] for i in first]
    tokens = np.array([losses["tokens"][i] for i in first])
    nats = {p: np.array([losses["nats"][i] for i in of[p]]) for p in config.personas}
    golds = {losses["request_id"][i]: losses["target"][i] for i in first}
    if len(golds) < len(first):
        raise InputError(f"--requests {config.requests}: a request_id stands for several users; make the ids unique")

    metric = _metric(config, golds)
    scores, of_each = {}, {}
    for variant, outputs in answers.items():
        scores[variant] = score(metric, outputs, golds, seed=config.seed)
        of_each[variant] = score_requests(metric, outputs, golds)
    own = of_each.get("own", {})
    return {
        "requests": len(first),
        "users": len(set(users)),
        "limited": config.limit is not None,
        "loss": {p: _interval(bootstrap(nats[p], users, weights=tokens, seed=config.seed)) for p in config.personas},
        "loss_saved_by_own": {
            p: _interval(paired_bootstrap(nats[p], nats["own"], users, weights=tokens, seed=config.seed))
            for p in config.personas
            if p != "own" and "own" in nats
        },
        "scores": scores,
        "score_gained_by_own": {
            name: {
                variant: _interval(paired_bootstrap(*_better_first(name, own, values), users, seed=config.seed))
                for variant, values in of_each.items()
                if variant != "own"
            }
            for name in own
        },
        "examples": _examples(losses, first, answers),
    }


def _better_first(name: str, own: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[Any, Any]:
    """Two scores in the order in which a positive difference speaks for `own`."""
    return (other[name], own[name]) if name in _SMALLER_IS_BETTER else (own[name], other[name])


def _answers(store: "Store", variants: Sequence[str], losses: Mapping[str, list[Any]]) -> dict[str, dict[str, str]]:
    """Outputs by variant and request."""
    asked = set(losses["request_id"])
    found: dict[str, dict[str, str]] = {}
    for variant in variants:
        table = store.read_generations([variant], ["request_id", "output"])
        rows = zip(table["request_id"].to_pylist(), table["output"].to_pylist(), strict=True)
        found[variant] = {request: output for request, output in rows if request in asked}
    return found


def _metric(config: Config, golds: Mapping[str, str]) -> "Metric":
    from persona.metrics import Metric

    if config.task is not None:
        from persona.lamp import TASKS

        return TASKS[config.task].metric
    if config.metric == "label":
        return Metric(kind="label", labels=tuple(sorted({gold.strip() for gold in golds.values()})))
    return Metric(kind=config.metric)


def _examples(
    losses: Mapping[str, list[Any]], first: Sequence[int], answers: Mapping[str, Mapping[str, str]]
) -> list[dict[str, Any]]:
    """Requests side by side, evenly spaced over the set; one further each time, since users may ask alike in order."""
    n_shown = min(_EXAMPLES, len(first))
    gap = len(first) // n_shown
    chosen = [first[k * len(first) // n_shown + k % gap] for k in range(n_shown)]
    return [
        {
            "request_id": losses["request_id"][i],
            "input": losses["input"][i],
            **{variant: outputs[losses["request_id"][i]] for variant, outputs in answers.items()},
            "target": losses["target"][i],
            "n_behaviors": losses["n_behaviors"][i],
        }
        for i in chosen
    ]


def _interval(interval: Any) -> dict[str, float]:
    return {name: round(value, 5) for name, value in asdict(interval).items()}


def _table(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
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
    for variant, scores in metrics["scores"].items():
        rows.append((f"scores, {variant}", ", ".join(f"{name} {value:.4f}" for name, value in scores.items())))
    return rows


def _progress_line(counts: flow.Counts, seconds: float) -> str:
    joined = counts.get("join", {})
    done = int(counts.get("loss", {}).get("rows", 0))
    return f"evaluate: loss of {done:,} of {int(joined['kept']):,} rows, {done / seconds:,.1f}/s" if joined else ""


if __name__ == "__main__":
    sys.exit(command.run(Config, main))
