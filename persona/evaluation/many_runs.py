"""Evaluations side by side: of several plugs, seeds or ways to retrieve, each request held against itself.

An evaluation is what `jobs.evaluate` has written into one folder. Plugs that differ in nothing but the seed of their
training are one row. Shapes: R requests, in the order of their ids; K seeds.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from persona.errors import InputError, UsageError
from persona.evaluation.one_run import outcomes
from persona.evaluation.scores import Floats, bootstrap, paired_bootstrap
from persona.options import PlugOptions, RetrievalOptions, TrainingOptions

METRICS, LOSSES = "metrics.json", "losses.parquet"
_NEEDED = ("request_id", "user_id", "persona", "nats", "tokens")
_RETRIEVAL = ("retrieve", "retriever", "retrieve_tokens")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation: its `metrics.json`, and its losses by kind of persona, each table in the order of request ids."""

    name: str
    metrics: Mapping[str, Any]
    losses: Mapping[str, pa.Table]

    @classmethod
    def read(cls, name: str, metrics: bytes, losses: bytes, *, source: str) -> "Evaluation":
        """From the bytes of its two files. Raises InputError, naming `source`, for files that are something else."""
        try:
            found = json.loads(metrics)
            rows = pq.read_table(pa.BufferReader(losses))
        except (ValueError, pa.ArrowInvalid) as error:
            raise InputError(f"{source}: {METRICS} or {LOSSES} cannot be read: {error}") from error
        missing = [column for column in _NEEDED if column not in rows.column_names]
        if missing or not rows.num_rows or not {"settings", "training", "limited"} <= set(found):
            raise InputError(f"{source}: {METRICS} and {LOSSES} are not those of jobs.evaluate; evaluate once more")
        personas = dict.fromkeys(rows["persona"].to_pylist())
        rows = rows.sort_by("request_id")
        of = {p: rows.filter(pc.equal(rows["persona"], p)) for p in found["settings"]["personas"] if p in personas}
        ids = [one["request_id"].to_pylist() for one in of.values()]
        if any(one != ids[0] or len(set(one)) < len(one) for one in ids):
            raise InputError(f"{source}: {LOSSES} does not have each request once for each persona; evaluate once more")
        return cls(name=name, metrics=found, losses=of)

    @property
    def requests(self) -> dict[str, list[Any]]:
        """`request_id`, `user_id` and `tokens` of the requests, which are the same for every kind of persona."""
        first = next(iter(self.losses.values()))
        return {name: first[name].to_pylist() for name in ("request_id", "user_id", "tokens")}

    @property
    def seed(self) -> int:
        """The seed of the plug's training."""
        return int(self.metrics["training"].get("seed", 0))

    def options(self) -> dict[str, Any]:
        """All that its numbers depend on but the seed; what older plugs do not know is at its default."""
        settings, training = self.metrics["settings"], self.metrics["training"]
        of_plug = {one.name: settings["plug_options"].get(one.name, one.default) for one in fields(PlugOptions)}
        of_run = {one.name: training.get(one.name, one.default) for one in fields(TrainingOptions)}
        found = self._retrieval()
        retrieval = {name: getattr(found, name) for name in _RETRIEVAL} if found.retrieve else {"retrieve": 0}
        models = {kind: settings[kind]["fingerprint"] for kind in ("llm", "encoder")}
        del of_run["seed"]
        return {**of_plug, **of_run, "requests": training.get("requests"), **retrieval, **models}

    def variant(self, persona: str) -> str:
        """The name of that persona's answers, as `jobs.generate` names them."""
        return self._retrieval().answers_of(persona)

    def _retrieval(self) -> RetrievalOptions:
        """How it retrieved; nothing, where it is older than that."""
        settings = self.metrics["settings"]
        return RetrievalOptions(**{name: settings[name] for name in _RETRIEVAL if name in settings})


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One kind of persona under plugs that differ in nothing but their seed."""

    name: str
    persona: str
    of: tuple[Evaluation, ...]

    @property
    def label(self) -> str:
        return f"{self.name}/{self.persona}"

    def nats(self) -> Floats:
        """Nats (K, R) of each request under each seed."""
        return np.stack([one.losses[self.persona]["nats"].to_numpy() for one in self.of])


def compare(evaluations: Sequence[Evaluation], *, against: str | None, seed: int) -> dict[str, Any]:
    """A row for each plug (its seeds together) and kind of persona, each beside the row `against`: plain values.

    `against` is NAME/PERSONA, or NAME for its row `own`; None is the row `own` of the first evaluation. Differences are
    paired: of each request the mean over the seeds on one side less that on the other, in nats a token, so that below 0
    is better than the reference.

    Raises:
        UsageError: no row is called `against`, or two are called alike.
        InputError: the evaluations are not of the same requests.
    """
    _check_same_requests(evaluations)
    rows = _rows(evaluations)
    reference = _reference(rows, against)
    shared = evaluations[0].requests
    users, tokens_R = shared["user_id"], np.array(shared["tokens"])
    reference_R = reference.nats().mean(0)
    limited = [one.name for one in evaluations if one.metrics["limited"]]
    return {
        "requests": len(users),
        "users": len(set(users)),
        "against": reference.label,
        "warnings": [f"{name} was evaluated with --limit: not the numbers of the whole set" for name in limited],
        "rows": [_described(row, reference, reference_R, users, tokens_R, seed=seed) for row in rows],
        "evaluations": [_origin(one) for one in evaluations],
        "differing": _differing(rows),
    }


def _described(
    row: _Row, reference: _Row, reference_R: Floats, users: Sequence[str], tokens_R: Floats, *, seed: int
) -> dict[str, Any]:
    nats_KR = row.nats()
    nats_R = nats_KR.mean(0)
    of_seeds = (nats_KR.sum(1) / tokens_R.sum()).tolist()
    above = None
    if row is not reference:
        above = asdict(paired_bootstrap(nats_R, reference_R, users, weights=tokens_R, seed=seed))
    return {
        "name": row.name,
        "persona": row.persona,
        "evaluations": [one.name for one in row.of],
        "seeds": [one.seed for one in row.of],
        "loss": asdict(bootstrap(nats_R, users, weights=tokens_R, seed=seed)),
        "loss_of_seeds": _spread(of_seeds),
        "above_reference": above,
        "scores": _scores(row),
        "ranking": _ranking(row, users, seed=seed),
    }


def _spread(values: Sequence[float]) -> dict[str, Any] | None:
    """How far apart the seeds are; one seed tells nothing of it."""
    if len(values) < 2:
        return None
    return {"low": min(values), "high": max(values), "deviation": statistics.stdev(values), "values": [*values]}


def _scores(row: _Row) -> dict[str, Any]:
    """The mean over the seeds of each score of the answers, where all have answers; the interval of a single seed."""
    found = [one.metrics["scores"].get(one.variant(row.persona)) for one in row.of]
    if not all(found):
        return {}
    only = row.of[0].metrics.get("score_intervals", {}) if len(row.of) == 1 else {}
    intervals = only.get(row.of[0].variant(row.persona), {})
    return {
        name: {
            "value": statistics.fmean(scores[name] for scores in found),
            "interval": intervals.get(name),
            "of_seeds": _spread([scores[name] for scores in found]),
        }
        for name in found[0]
    }


def _ranking(row: _Row, users: Sequence[str], *, seed: int) -> dict[str, Any]:
    """Shares of the requests whose target is likelier than the rejected text, the mean over the seeds of each."""
    if not all("rejected_nats" in one.losses[row.persona].column_names for one in row.of):
        return {}
    found = [outcomes({p: rows.to_pydict() for p, rows in one.losses.items()})[row.persona] for one in row.of]
    ways = [way for way in found[0] if all(way in one for one in found)]
    means = {way: np.mean([one[way] for one in found], axis=0) for way in ways}
    return {way: asdict(bootstrap(means_R, users, seed=seed)) for way, means_R in means.items()}


def _check_same_requests(evaluations: Sequence[Evaluation]) -> None:
    first = evaluations[0]
    expected = first.requests
    for other in evaluations[1:]:
        found = other.requests
        here, there = set(expected["request_id"]), set(found["request_id"])
        if here != there:
            raise InputError(
                f"{first.name} and {other.name} are not of the same requests: {len(here - there):,} of {len(here):,} "
                f"are only in {first.name}, {len(there - here):,} of {len(there):,} only in {other.name}; evaluate "
                "both on the same --requests, and without --limit"
            )
        for column in ("user_id", "tokens"):
            pairs = zip(expected["request_id"], expected[column], found[column], strict=True)
            apart = [one for one, a, b in pairs if a != b]
            if apart:
                raise InputError(
                    f"{first.name} and {other.name} do not agree on the {column} of {len(apart):,} requests, the first "
                    f"is {apart[0]!r}: not the same targets, or not the same LLM; nats a token cannot be compared"
                )


def _rows(evaluations: Sequence[Evaluation]) -> list[_Row]:
    groups: list[list[Evaluation]] = []
    for one in evaluations:
        seeds_of = (
            group
            for group in groups
            if group[0].options() == one.options() and one.seed not in [other.seed for other in group]
        )
        group = next(seeds_of, None)
        if group is None:
            groups.append([one])
        else:
            group.append(one)
    names = [group[0].name for group in groups]
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled is not None:
        raise UsageError(
            f"two evaluations that differ in more than the seed are both called {doubled!r}; give --names, one for each"
        )
    return [
        _Row(name=group[0].name, persona=persona, of=tuple(one for one in group if persona in one.losses))
        for group in groups
        for persona in dict.fromkeys(kind for one in group for kind in one.losses)
    ]


def _reference(rows: Sequence[_Row], against: str | None) -> _Row:
    wanted = f"{rows[0].name}/own" if against is None else against
    for label in (wanted, f"{wanted}/own"):
        found = next((row for row in rows if row.label == label), None)
        if found is not None:
            return found
    mine = [row for row in rows if wanted == row.name]
    if len(mine) == 1:
        return mine[0]
    raise UsageError(f"--against {wanted}: there is no such row; there are {', '.join(row.label for row in rows)}")


def _origin(one: Evaluation) -> dict[str, Any]:
    settings = one.metrics["settings"]
    return {
        "name": one.name,
        "seed": one.seed,
        "plug": settings["plug"],
        "plug_fingerprint": settings["plug_fingerprint"],
        "requests": settings["requests"],
        "limited": one.metrics["limited"],
    }


def _differing(rows: Sequence[_Row]) -> dict[str, dict[str, Any]]:
    """By name, the options in which the plugs, or the ways to retrieve, differ."""
    options = {row.name: row.of[0].options() for row in rows}
    every = dict.fromkeys(name for found in options.values() for name in found)
    # Options are few and some are no hashable values, so they are held against the first one's.
    first = next(iter(options.values()))
    apart = [name for name in every if any(found.get(name) != first.get(name) for found in options.values())]
    return {row: {name: found.get(name) for name in apart} for row, found in options.items()}
