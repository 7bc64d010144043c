"""Several evaluations side by side, paired by request: of plugs, seeds, controls or ways to retrieve.

Plugs that differ only in the seed of their training share a row.

Shapes: R requests, in the order of their ids; K seeds.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from persona.errors import InputError, UsageError
from persona.evaluation.intervals import Floats, bootstrap, paired_bootstrap
from persona.evaluation.ranking import outcomes
from persona.evaluation.saved_run import Evaluation


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One kind of persona under plugs that differ only in their seed."""

    name: str
    persona: str
    evaluations: tuple[Evaluation, ...]

    @property
    def label(self) -> str:
        return f"{self.name}/{self.persona}"

    def nats(self) -> Floats:
        """Nats (K, R) of each request under each seed."""
        return np.stack([one.losses[self.persona]["nats"].to_numpy() for one in self.evaluations])


@dataclass(frozen=True, kw_only=True)
class _Intervals:
    """Intervals over the users of the shared requests, for JSON."""

    users: Sequence[str]
    tokens_R: Floats
    seed: int

    def loss(self, row: _Row) -> dict[str, float]:
        """Nats a token of a row, the mean over its seeds."""
        return asdict(bootstrap(row.nats().mean(0), self.users, weights=self.tokens_R, seed=self.seed))

    def difference(self, row: _Row, reference: _Row | None) -> dict[str, float] | None:
        """Nats a token of `row` − `reference`; None without a reference, or for the reference itself."""
        if reference is None or row is reference:
            return None
        nats_R, reference_R = row.nats().mean(0), reference.nats().mean(0)
        return asdict(paired_bootstrap(nats_R, reference_R, self.users, weights=self.tokens_R, seed=self.seed))

    def mean(self, values_R: Floats) -> dict[str, float]:
        """The mean of one value a request (R,)."""
        return asdict(bootstrap(values_R, self.users, seed=self.seed))


def compare(evaluations: Sequence[Evaluation], *, against: str | None, seed: int) -> dict[str, Any]:
    """A row for each plug (all its seeds) and kind of persona, compared with the row `against`: plain values for JSON.

    Differences are paired, row − reference in nats a token, of the mean over the seeds of each request: below 0 is
    better than the reference.

    Args:
        evaluations: at least one.
        against: the reference, as NAME/PERSONA, or NAME for its row `own`; None is the row `own` of the first one.
        seed: of the bootstrap.

    Raises:
        UsageError: there is no row `against`, or two different plugs have the same name.
        InputError: the evaluations do not have the same requests.
    """
    _check_same_requests(evaluations)
    rows = _rows(evaluations)
    reference = _reference(rows, against)
    requests = evaluations[0].requests
    users = requests["user_id"]
    intervals = _Intervals(users=users, tokens_R=np.array(requests["tokens"]), seed=seed)
    limited = [one.name for one in evaluations if one.metrics["limited"]]
    return {
        "requests": len(users),
        "users": len(set(users)),
        "against": reference.label,
        "warnings": [f"{name} was evaluated with --limit: not the numbers of the whole set" for name in limited],
        "rows": [_summary(row, reference, rows, intervals) for row in rows],
        "evaluations": [_origin(one) for one in evaluations],
        "differing": _differing(rows),
    }


def _summary(row: _Row, reference: _Row, rows: Sequence[_Row], intervals: _Intervals) -> dict[str, Any]:
    own = next((one for one in rows if (one.name, one.persona) == (row.name, "own")), None)
    of_seeds = (row.nats().sum(1) / intervals.tokens_R.sum()).tolist()
    return {
        "name": row.name,
        "persona": row.persona,
        "evaluations": [one.name for one in row.evaluations],
        "seeds": [one.seed for one in row.evaluations],
        "trained_without_history": row.evaluations[0].trained_without_history,
        "loss": intervals.loss(row),
        "loss_of_seeds": _spread(of_seeds),
        "above_reference": intervals.difference(row, reference),
        "above_own": intervals.difference(row, own),
        "scores": _scores(row),
        "ranking": _ranking(row, intervals),
    }


def _spread(values: Sequence[float]) -> dict[str, Any] | None:
    """How far apart the seeds are; None for a single seed."""
    if len(values) < 2:
        return None
    return {"low": min(values), "high": max(values), "deviation": statistics.stdev(values), "values": [*values]}


def _scores(row: _Row) -> dict[str, Any]:
    """The mean over the seeds of each score, if all seeds have answers. Only a single seed has intervals."""
    found = [one.metrics["scores"].get(one.variant(row.persona)) for one in row.evaluations]
    if not all(found):
        return {}
    first = row.evaluations[0]
    only = first.metrics.get("score_intervals", {}) if len(row.evaluations) == 1 else {}
    intervals = only.get(first.variant(row.persona), {})
    return {
        name: {
            "value": statistics.fmean(scores[name] for scores in found),
            "interval": intervals.get(name),
            "of_seeds": _spread([scores[name] for scores in found]),
        }
        for name in found[0]
    }


def _ranking(row: _Row, intervals: _Intervals) -> dict[str, Any]:
    """Shares of the requests whose target is ranked above the rejected text, with the mean over the seeds of each."""
    if not all("rejected_nats" in one.losses[row.persona].column_names for one in row.evaluations):
        return {}
    found = [_outcomes(one)[row.persona] for one in row.evaluations]
    ways = [way for way in found[0] if all(way in one for one in found)]
    return {way: intervals.mean(np.mean([one[way] for one in found], axis=0)) for way in ways}


def _outcomes(one: Evaluation) -> dict[str, dict[str, Floats]]:
    return outcomes(
        {
            persona: (rows["nats"].to_numpy(), rows["rejected_nats"].to_numpy())
            for persona, rows in one.losses.items()
            if "rejected_nats" in rows.column_names
        }
    )


def _check_same_requests(evaluations: Sequence[Evaluation]) -> None:
    first = evaluations[0]
    expected = first.requests
    for other in evaluations[1:]:
        found = other.requests
        here, there = set(expected["request_id"]), set(found["request_id"])
        if here != there:
            raise InputError(
                f"{first.name} and {other.name} have different requests: {len(here - there):,} of {len(here):,} are "
                f"only in {first.name}, {len(there - here):,} of {len(there):,} only in {other.name}; evaluate both on "
                "the same --requests, without --limit"
            )
        for column in ("user_id", "tokens"):
            pairs = zip(expected["request_id"], expected[column], found[column], strict=True)
            apart = [one for one, a, b in pairs if a != b]
            if apart:
                raise InputError(
                    f"{first.name} and {other.name} differ in the {column} of {len(apart):,} requests, the first is "
                    f"{apart[0]!r}: the targets or the LLMs differ, so nats a token cannot be compared"
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
            f"two evaluations that differ in more than the seed are both named {doubled!r}; give --names, one for each"
        )
    return [
        _Row(name=group[0].name, persona=persona, evaluations=tuple(one for one in group if persona in one.losses))
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
    raise UsageError(f"--against {wanted}: no such row; the rows are {', '.join(row.label for row in rows)}")


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
    """By name, the options of plug, training and retrieval that are not the same for all."""
    options = {row.name: row.evaluations[0].options() for row in rows}
    every = dict.fromkeys(name for found in options.values() for name in found)
    # Some values are not hashable, so a set cannot tell whether they differ.
    first = next(iter(options.values()))
    apart = [name for name in every if any(found.get(name) != first.get(name) for found in options.values())]
    return {row: {name: found.get(name) for name in apart} for row, found in options.items()}
