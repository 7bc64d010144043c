"""Official LaMP scores, and how far a different sample of users would have moved a number.

Shapes: R requests, U users, C labels, S bootstrap samples.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, assert_never

import numpy as np
from numpy.typing import ArrayLike, NDArray

from persona.errors import InputError

Floats = NDArray[np.float64]

ROUGE_SAMPLES = 1000  # of the official bootstrap
INTERVAL_SAMPLES = 2000
INTERVAL_LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How the answers of a task are scored.

    `label`: one of `labels`, scored by accuracy and macro-F1; `rating`: a number from 1 to 5, scored by MAE
    and RMSE; `text`: free text, scored by ROUGE-1 and ROUGE-L.
    """

    kind: Literal["label", "rating", "text"]
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean and the central `INTERVAL_LEVEL` of its bootstrap distribution; one user gives NaN bounds."""

    mean: float
    low: float
    high: float


def score(
    metric: Metric, predictions: Mapping[str, str], golds: Mapping[str, str], *, seed: int = 0
) -> dict[str, float]:
    """Score all answers, both mappings from request id to text, as LaMP's own evaluation does.

    `label` gives `accuracy` and `f1`, the mean over *all* labels, in which one that nobody gave or wanted
    counts 0. `rating` gives `mae` and `rmse`. `text` gives `rouge1` and `rougeL`: the median of a bootstrap
    over requests, as LaMP reports it but seeded, and `rouge1_mean` and `rougeL_mean`, the plain means that no
    seed can move.

    Raises `InputError` if the ids differ or a gold is none that the metric knows.
    """
    rows = score_requests(metric, predictions, golds)
    match metric.kind:
        case "label":
            return {"accuracy": float(rows["accuracy"].mean()), "f1": _macro_f1(metric, predictions, golds)}
        case "rating":
            return {"mae": float(rows["mae"].mean()), "rmse": float(np.sqrt((rows["mae"] ** 2).mean()))}
        case "text":
            medians = _bootstrap_median(np.stack([rows["rouge1"], rows["rougeL"]]), seed)
            means = {f"{name}_mean": float(values_R.mean()) for name, values_R in rows.items()}
            return {"rouge1": float(medians[0]), "rougeL": float(medians[1])} | means
    assert_never(metric.kind)


def score_requests(metric: Metric, predictions: Mapping[str, str], golds: Mapping[str, str]) -> dict[str, Floats]:
    """Each request's own score (R,), in the order of sorted ids, for `bootstrap` and `paired_bootstrap`.

    `accuracy` (0 or 1), `mae` (the absolute error), or `rouge1` and `rougeL`. Raises `InputError` as `score`
    does.
    """
    _check_same_ids(predictions, golds)
    pairs = [(predictions[request_id], golds[request_id]) for request_id in sorted(golds)]
    match metric.kind:
        case "label":
            for request_id, gold in golds.items():
                if gold.strip() not in metric.labels:
                    labels = ", ".join(metric.labels)
                    raise InputError(f"gold {gold!r} of request {request_id!r} is none of {labels}")
            return {"accuracy": np.array([float(answer.strip() == gold.strip()) for answer, gold in pairs])}
        case "rating":
            rated = [(answer, _gold_rating(gold)) for answer, gold in pairs]
            return {"mae": np.array([abs(_rating(answer, gold) - gold) for answer, gold in rated])}
        case "text":
            return _rouge(pairs)
    assert_never(metric.kind)


def score_intervals(
    metric: Metric, predictions: Mapping[str, str], golds: Mapping[str, str], users: Sequence[str], *, seed: int = 0
) -> dict[str, Interval]:
    """Each score of `score` with its interval when users vary; `users` (R,) are those of the sorted request ids.

    The ROUGE of a text is the plain mean. Raises `InputError` as `score` does.
    """
    rows = score_requests(metric, predictions, golds)
    match metric.kind:
        case "label":
            f1 = _macro_f1_interval(metric, predictions, golds, users, seed)
            return {"accuracy": bootstrap(rows["accuracy"], users, seed=seed), "f1": f1}
        case "rating":
            squared = bootstrap(rows["mae"] ** 2, users, seed=seed)
            rmse = Interval(**{name: math.sqrt(value) for name, value in asdict(squared).items()})
            return {"mae": bootstrap(rows["mae"], users, seed=seed), "rmse": rmse}
        case "text":
            return {f"{name}_mean": bootstrap(values_R, users, seed=seed) for name, values_R in rows.items()}
    assert_never(metric.kind)


def bootstrap(
    values: ArrayLike,
    users: Sequence[str],
    *,
    weights: ArrayLike | None = None,
    n: int = INTERVAL_SAMPLES,
    seed: int = 0,
) -> Interval:
    """The mean of `values` (R,), with `weights` (R,) a ratio of sums, and its interval when *users* vary.

    Requests of one user resemble each other: drawing requests instead would promise too narrow an interval.
    For a loss, values are summed nats and weights are tokens, which gives nats a token.

    Raises `ValueError` for unequal lengths, no requests, values that are not finite, weights that are not
    positive.
    """
    values_R = np.asarray(values, dtype=np.float64)
    weights_R = np.ones_like(values_R) if weights is None else np.asarray(weights, dtype=np.float64)
    if not values_R.shape == weights_R.shape == (len(users),) or not len(users):
        raise ValueError(
            f"expected one value, one weight and one user a request, and at least one request: got values "
            f"{values_R.shape}, weights {weights_R.shape}, users ({len(users)},)"
        )
    if not (np.isfinite(values_R).all() and np.isfinite(weights_R).all() and (weights_R > 0).all()):
        raise ValueError("values must be finite, weights finite and above 0")
    _, user_of_R = np.unique(np.asarray(users), return_inverse=True)
    values_U = np.bincount(user_of_R, weights=values_R)
    weights_U = np.bincount(user_of_R, weights=weights_R)
    return _interval(lambda drawn_U: float(values_U[drawn_U].sum() / weights_U[drawn_U].sum()), len(values_U), n, seed)


def _interval(statistic: Callable[[NDArray[np.intp]], float], n_users: int, n: int, seed: int) -> Interval:
    """A statistic of all users, and its interval over `n` samples of users."""
    mean = statistic(np.arange(n_users))
    if n_users == 1:
        return Interval(mean=mean, low=float("nan"), high=float("nan"))
    rng = np.random.default_rng(seed)
    # A sample at a time, so that memory does not grow with samples times users.
    values_S = np.array([statistic(rng.integers(n_users, size=n_users)) for _ in range(n)])
    tail = (1 - INTERVAL_LEVEL) / 2
    low, high = np.quantile(values_S, [tail, 1 - tail])
    return Interval(mean=mean, low=float(low), high=float(high))


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    users: Sequence[str],
    *,
    weights: ArrayLike | None = None,
    n: int = INTERVAL_SAMPLES,
    seed: int = 0,
) -> Interval:
    """How much `a` exceeds `b` on the same requests: a user who is hard for both does not widen the interval.

    Shapes, weights and errors are those of `bootstrap`, which sees the differences.
    """
    a_R, b_R = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a_R.shape != b_R.shape:
        raise ValueError(f"a pair needs the same requests on both sides: got {a_R.shape} and {b_R.shape}")
    return bootstrap(a_R - b_R, users, weights=weights, n=n, seed=seed)


def _check_same_ids(predictions: Mapping[str, str], golds: Mapping[str, str]) -> None:
    if not golds:
        raise InputError("nothing to score: there are no golds")
    for here, there, what in ((golds, predictions, "answer"), (predictions, golds, "gold")):
        missing = sorted(here.keys() - there.keys())
        if missing:
            raise InputError(
                f"{len(missing)} of {len(here)} requests have no {what}, the first is {missing[0]!r}: "
                "golds and answers must be for the same requests"
            )


def _macro_f1(metric: Metric, predictions: Mapping[str, str], golds: Mapping[str, str]) -> float:
    return _f1(*(counts_RC.sum(0) for counts_RC in _label_counts(metric, predictions, golds)))


def _macro_f1_interval(
    metric: Metric, predictions: Mapping[str, str], golds: Mapping[str, str], users: Sequence[str], seed: int
) -> Interval:
    names, user_of_R = np.unique(np.asarray(users), return_inverse=True)
    both_UC, either_UC = (np.zeros((len(names), len(metric.labels))) for _ in range(2))
    for counts_UC, counts_RC in zip((both_UC, either_UC), _label_counts(metric, predictions, golds), strict=True):
        np.add.at(counts_UC, user_of_R, counts_RC)
    return _interval(
        lambda drawn_U: _f1(both_UC[drawn_U].sum(0), either_UC[drawn_U].sum(0)), len(names), INTERVAL_SAMPLES, seed
    )


def _label_counts(metric: Metric, predictions: Mapping[str, str], golds: Mapping[str, str]) -> tuple[Floats, Floats]:
    """For each request (sorted ids) and label: whether answer and gold are both the label, and how many of them are."""
    labels_C = np.array(metric.labels)
    answers_R1 = np.array([[predictions[request_id].strip()] for request_id in sorted(golds)])
    golds_R1 = np.array([[golds[request_id].strip()] for request_id in sorted(golds)])
    is_answer_RC, is_gold_RC = (answers_R1 == labels_C).astype(float), (golds_R1 == labels_C).astype(float)
    return is_answer_RC * is_gold_RC, is_answer_RC + is_gold_RC


def _f1(both_C: Floats, either_C: Floats) -> float:
    """The mean over all labels of 2·both / (answers + golds); a label without either counts 0."""
    return float(np.mean(2 * both_C / np.maximum(either_C, 1)))


def _gold_rating(gold: str) -> float:
    try:
        return float(gold)
    except ValueError as error:
        raise InputError(f"gold {gold!r} is no rating: expected a number from 1 to 5") from error


def _rating(answer: str, gold: float) -> float:
    """The number an answer gives; if none, the end of the scale farther from the gold (5 if equally far).

    NaN and infinity count as none, unlike in LaMP's code: one such answer would be the whole score.
    """
    try:
        rating = float(answer)
    except ValueError:
        rating = float("nan")
    if np.isfinite(rating):
        return rating
    return 1.0 if abs(1 - gold) > abs(5 - gold) else 5.0


def _rouge(pairs: Sequence[tuple[str, str]]) -> dict[str, Floats]:
    """F-measures (R,) without stemming; the official tokenizer keeps ASCII letters and digits only."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    scores: list[dict[str, Any]] = [scorer.score(target=gold, prediction=answer) for answer, gold in pairs]
    return {name: np.array([one[name].fmeasure for one in scores]) for name in ("rouge1", "rougeL")}


def _bootstrap_median(values_KR: Floats, seed: int) -> Floats:
    """The median, for each of K rows, of the means of `ROUGE_SAMPLES` samples of requests."""
    rng = np.random.default_rng(seed)
    n_requests = values_KR.shape[1]
    samples = (rng.integers(n_requests, size=n_requests) for _ in range(ROUGE_SAMPLES))
    means = [values_KR[:, drawn_R].mean(axis=1) for drawn_R in samples]
    return np.asarray(np.median(means, axis=0), dtype=np.float64)
