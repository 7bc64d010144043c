"""What judges say of each variant: scores by task, the swap gap beside each of them, and how far judges agree.

The swap gap is the score of an answer judged under the persona that should have given it, minus that of the *same*
answer judged under another one. A judge for whom it is not above 0 cannot tell whose answer it reads, so its scores
say nothing about personas.

Shapes: J judgements, U personas, T tasks.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persona.evaluation.intervals import Floats, Interval, bootstrap, interval_of
from persona.judging.rubrics import TASKS, TOXICITY

OWN, SWAPPED = "own", "swapped"


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One answer under one judge: its scores under the own and under another persona, None where there is none."""

    variant: str
    judge: str
    request_id: str
    user_id: str
    task: str
    own: int | None = None
    swapped: int | None = None


def judged(rows: Sequence[Mapping[str, Any]]) -> list[Judged]:
    """Both judgements of each answer together, given rows of the table `judgements`."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        names = ("variant", "judge", "request_id", "user_id", "task")
        key = (row["variant"], row["judge"], row["request_id"])
        one = found.setdefault(key, {name: row[name] for name in names})
        one[row["persona"]] = row["score"]
    return [Judged(**one) for _, one in sorted(found.items())]


def summarize(rows: Sequence[Mapping[str, Any]], *, seed: int) -> dict[str, Any]:
    """The scores of all judges and variants, in JSON's types.

    Args:
        rows: current judgements (columns of the table), for the same requests in each variant.
        seed: of the bootstrap, which draws personas.
    """
    groups: dict[tuple[str, str], list[Judged]] = defaultdict(list)
    for one in judged(rows):
        groups[one.judge, one.variant].append(one)
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for row in rows:
        kind = "unparsed" if row["score"] is None else "parsed"
        counts[row["judge"], row["variant"]][kind] += 1
    return {
        "judges": sorted({judge for judge, _ in groups}),
        "variants": sorted({variant for _, variant in groups}),
        "personas": len({row["user_id"] for row in rows}),
        "requests": len({row["request_id"] for row in rows}),
        "scores": [
            {
                "judge": judge,
                "variant": variant,
                "judgements": counts[judge, variant].total(),
                "unparsed": counts[judge, variant]["unparsed"],
                **_of_variant(some, seed=seed),
            }
            for (judge, variant), some in sorted(groups.items())
        ],
        "agreement": _agreement([one for some in groups.values() for one in some]),
    }


def _of_variant(some: Sequence[Judged], *, seed: int) -> dict[str, Any]:
    tasks = {}
    for task in TASKS:
        of_task = [one for one in some if one.task == task]
        if of_task:
            tasks[task] = {
                "answers": len(of_task),
                "score": _interval([(one.user_id, one.own) for one in of_task], seed=seed),
                "swap_gap": _interval([(one.user_id, _gap(one)) for one in of_task], seed=seed),
            }
    gap = _mean_of_tasks([(one, _gap(one)) for one in some], seed=seed)
    score = _mean_of_tasks([(one, one.own) for one in some], seed=seed)
    without = _mean_of_tasks([(one, one.own) for one in some if one.task != TOXICITY], seed=seed)
    missing = why_no_score(gap, tasks)
    return {
        "tasks": tasks,
        "swap_gap": gap and gap.rounded(),
        "persona_score": None if missing or score is None else score.rounded(),
        "without_toxicity": None if missing or without is None else without.rounded(),
        "no_score_because": missing,
    }


def why_no_score(gap: Interval | None, tasks: Mapping[str, Any]) -> str:
    """Why no PersonaScore is given; empty if it is."""
    if absent := [task for task in TASKS if tasks.get(task, {}).get("score") is None]:
        return f"no usable judgement of {', '.join(absent)}"
    if gap is None:
        return "no answer was judged under another persona"
    if not np.isfinite(gap.low):
        return "one persona gives no interval of the swap gap"
    if gap.low <= 0:
        return (
            f"the swap gap {gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}] is not above 0: this judge does not tell "
            "whose answer it reads"
        )
    return ""


def _gap(one: Judged) -> float | None:
    return None if one.own is None or one.swapped is None else float(one.own - one.swapped)


def _interval(values: Sequence[tuple[str, float | None]], *, seed: int) -> dict[str, float] | None:
    known = [(user, value) for user, value in values if value is not None]
    if not known:
        return None
    return bootstrap([value for _, value in known], [user for user, _ in known], seed=seed).rounded()


def _mean_of_tasks(values: Sequence[tuple[Judged, float | None]], *, seed: int) -> Interval | None:
    """The mean over tasks of the means of their answers, with its interval over personas."""
    known = [(one, value) for one, value in values if value is not None]
    if not known:
        return None
    users = {user: i for i, user in enumerate(sorted({one.user_id for one, _ in known}))}
    tasks = {task: i for i, task in enumerate(sorted({one.task for one, _ in known}))}
    sums_UT, counts_UT = np.zeros((2, len(users), len(tasks)))
    for one, value in known:
        at = users[one.user_id], tasks[one.task]
        sums_UT[at] += value
        counts_UT[at] += 1

    def mean(drawn_U: NDArray[np.intp]) -> float:
        sums_T, counts_T = sums_UT[drawn_U].sum(0), counts_UT[drawn_U].sum(0)
        # A draw may leave a task without any persona; the others then stand for it.
        return float(np.mean(sums_T[counts_T > 0] / counts_T[counts_T > 0]))

    return interval_of(mean, len(users), seed=seed)


def _agreement(some: Sequence[Judged]) -> list[dict[str, Any]]:
    """For each two judges: the answers that both scored, their mean difference, and the rank correlation."""
    by_judge: dict[str, dict[tuple[str, str], int]] = defaultdict(dict)
    for one in some:
        if one.own is not None:
            by_judge[one.judge][one.variant, one.request_id] = one.own
    found = []
    for first, second in itertools.combinations(sorted(by_judge), 2):
        shared = sorted(by_judge[first].keys() & by_judge[second].keys())
        if not shared:
            continue
        a, b = (np.array([by_judge[judge][key] for key in shared], dtype=np.float64) for judge in (first, second))
        found.append(
            {
                "judges": [first, second],
                "answers": len(shared),
                "same_score": round(float(np.mean(a == b)), 4),
                "mean_difference": round(float(np.mean(np.abs(a - b))), 4),
                "rank_correlation": _spearman(a, b),
            }
        )
    return found


def _spearman(a: Floats, b: Floats) -> float | None:
    """Spearman's rank correlation; None where a judge gives all answers the same score."""
    if len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return round(float(np.corrcoef(_ranks(a), _ranks(b))[0, 1]), 4)


def _ranks(values: Floats) -> Floats:
    """Ranks from 0, equal values with their mean rank."""
    _, of_value, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts + 1) / 2)[of_value], dtype=np.float64)
