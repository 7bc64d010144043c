"""Scores of answers as LaMP's own evaluation computes them, and their intervals over users.

Shapes: R requests, U users, C labels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, assert_never

import numpy as np
from numpy.typing import NDArray

from persona.errors import InputError
from persona.evaluation.intervals import Floats, Interval, bootstrap, interval_of
from persona.options import Metric

ROUGE_SAMPLES = 1000  # as in LaMP's own evaluation


def score(
    metric: Metric, predictions: Mapping[str, str], golds: Mapping[str, str], *, seed: int = 0
) -> dict[str, float]:
    """Scores of all answers as LaMP computes them; both mappings go from request id to text.

    `label` gives `accuracy` and `f1`, the mean over *all* labels; a label in neither answers nor golds counts 0. Any
    answer that is no label equals a blank gold, and no other.
    `rating` gives `mae` and `rmse`. `text` gives `rouge1` and `rougeL`, the median of a bootstrap over requests (LaMP's
    number, here with a seed), and `rouge1_mean` and `rougeL_mean`, the plain means, which depend on no seed.
    `long_text` adds `meteor_stem`, the mean of METEOR without synonyms.

    Raises `InputError` if the ids differ or the metric does not allow a gold.
    """
    rows = score_requests(metric, predictions, golds)
    match metric.kind:
        case "label":
            return {"accuracy": float(rows["accuracy"].mean()), "f1": _macro_f1(metric, predictions, golds)}
        case "rating":
            return {"mae": float(rows["mae"].mean()), "rmse": float(np.sqrt((rows["mae"] ** 2).mean()))}
        case "text" | "long_text":
            medians = _bootstrap_median(np.stack([rows["rouge1"], rows["rougeL"]]), seed)
            means = {_mean_name(name): float(values_R.mean()) for name, values_R in rows.items()}
            return {"rouge1": float(medians[0]), "rougeL": float(medians[1])} | means
    assert_never(metric.kind)


def score_requests(metric: Metric, predictions: Mapping[str, str], golds: Mapping[str, str]) -> dict[str, Floats]:
    """The score of each request (R,), in the order of sorted ids, for `bootstrap` and `paired_bootstrap`.

    `accuracy` (0 or 1), `mae` (the absolute error), or `rouge1`, `rougeL` and `meteor_stem`. Raises
    `InputError` as `score` does.
    """
    _check_same_ids(predictions, golds)
    pairs = [(predictions[request_id], golds[request_id]) for request_id in sorted(golds)]
    match metric.kind:
        case "label":
            for request_id, gold in golds.items():
                if gold.strip() not in ("", *metric.labels):
                    labels = ", ".join(metric.labels)
                    raise InputError(f"the gold {gold!r} of request {request_id!r} is not one of the labels {labels}")
            answers_R, golds_R = _label_numbers(metric, predictions, golds)
            return {"accuracy": (answers_R == golds_R).astype(float)}
        case "rating":
            rated = [(answer, _gold_rating(gold)) for answer, gold in pairs]
            return {"mae": np.array([abs(_rating(answer, gold) - gold) for answer, gold in rated])}
        case "text":
            return _rouge(pairs)
        case "long_text":
            return _rouge(pairs) | {"meteor_stem": _meteor(pairs)}
    assert_never(metric.kind)


def score_intervals(
    metric: Metric, predictions: Mapping[str, str], golds: Mapping[str, str], users: Sequence[str], *, seed: int = 0
) -> dict[str, Interval]:
    """The scores of `score` with intervals over `users` (R,), which are in the order of sorted request ids.

    For ROUGE it is the plain mean that gets an interval. Raises `InputError` as `score` does.
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
        case "text" | "long_text":
            return {_mean_name(name): bootstrap(values_R, users, seed=seed) for name, values_R in rows.items()}
    assert_never(metric.kind)


def _check_same_ids(predictions: Mapping[str, str], golds: Mapping[str, str]) -> None:
    if not golds:
        raise InputError("nothing to score: there are no golds")
    for here, there, what in ((golds, predictions, "answer"), (predictions, golds, "gold")):
        missing = sorted(here.keys() - there.keys())
        if missing:
            raise InputError(
                f"{len(missing)} of {len(here)} requests have no {what}, the first is {missing[0]!r}; "
                "answers and golds must cover the same requests"
            )


def _macro_f1(metric: Metric, predictions: Mapping[str, str], golds: Mapping[str, str]) -> float:
    return _mean_f1(*_label_counts(metric, predictions, golds, [0] * len(golds), 1).sum(1))


def _macro_f1_interval(
    metric: Metric, predictions: Mapping[str, str], golds: Mapping[str, str], users: Sequence[str], seed: int
) -> Interval:
    names, user_of_R = np.unique(np.asarray(users), return_inverse=True)
    both_UC, either_UC = _label_counts(metric, predictions, golds, user_of_R, len(names))

    def f1(drawn_U: NDArray[np.intp]) -> float:
        return _mean_f1(both_UC[drawn_U].sum(0), either_UC[drawn_U].sum(0))

    return interval_of(f1, len(names), seed=seed)


def _label_numbers(
    metric: Metric, predictions: Mapping[str, str], golds: Mapping[str, str]
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The positions of answers and golds (R,), by sorted id, among the labels; -1 for a text that is no label."""
    position = {label: n for n, label in enumerate(metric.labels)}
    numbers = [
        np.array([position.get(texts[request_id].strip(), -1) for request_id in sorted(golds)], dtype=np.intp)
        for texts in (predictions, golds)
    ]
    return numbers[0], numbers[1]


def _label_counts(
    metric: Metric,
    predictions: Mapping[str, str],
    golds: Mapping[str, str],
    user_of_R: Sequence[int] | NDArray[np.intp],
    n_users: int,
) -> Floats:
    """Two arrays (2, U, C): how often both answer and gold are the label, and how many of answers and golds are."""
    counts_2UC = np.zeros((2, n_users, len(metric.labels)))
    users_R = np.asarray(user_of_R)
    answers_R, golds_R = _label_numbers(metric, predictions, golds)
    for array_UC, labels_R, chosen_R in (
        (counts_2UC[0], golds_R, (answers_R == golds_R) & (golds_R >= 0)),
        (counts_2UC[1], golds_R, golds_R >= 0),
        (counts_2UC[1], answers_R, answers_R >= 0),
    ):
        np.add.at(array_UC, (users_R[chosen_R], labels_R[chosen_R]), 1)
    return counts_2UC


def _mean_f1(both_C: Floats, either_C: Floats) -> float:
    """The mean over all labels of 2·both / (answers + golds); a label in neither counts 0."""
    return float(np.mean(2 * both_C / np.maximum(either_C, 1)))


def _gold_rating(gold: str) -> float:
    try:
        return float(gold)
    except ValueError as error:
        raise InputError(f"the gold {gold!r} is not a rating: expected a number from 1 to 5") from error


def _rating(answer: str, gold: float) -> float:
    """The number in an answer; without one, the end of the scale that is farther from the gold (5 if equally far).

    Unlike in LaMP's code, NaN and infinity count as no number: a single one would make the whole score NaN or infinite.
    """
    try:
        rating = float(answer)
    except ValueError:
        rating = float("nan")
    if np.isfinite(rating):
        return rating
    return 1.0 if abs(1 - gold) > abs(5 - gold) else 5.0


def _rouge(pairs: Sequence[tuple[str, str]]) -> dict[str, Floats]:
    """F-measures (R,), without stemming; the official tokenizer keeps only ASCII letters and digits."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    scores: list[dict[str, Any]] = [scorer.score(target=gold, prediction=answer) for answer, gold in pairs]
    return {name: np.array([one[name].fmeasure for one in scores]) for name in ("rouge1", "rougeL")}


def _mean_name(name: str) -> str:
    """What the plain mean of a score is called: ROUGE has an official number besides."""
    return f"{name}_mean" if name.startswith("rouge") else name


def _meteor(pairs: Sequence[tuple[str, str]]) -> Floats:
    """METEOR (R,) of NLTK by exact and stem matches (Banerjee and Lavie, 2005).

    Its third stage, synonyms of WordNet, is left out: it needs data that no package brings along.
    """
    from nltk.tokenize import NLTKWordTokenizer
    from nltk.translate.meteor_score import single_meteor_score

    words = NLTKWordTokenizer().tokenize
    return np.array([single_meteor_score(words(gold), words(answer), wordnet=_NO_SYNONYMS) for answer, gold in pairs])


class _NoSynonyms:
    """A WordNet without an entry."""

    def synsets(self, _word: str) -> list[Any]:
        return []


_NO_SYNONYMS = _NoSynonyms()


def _bootstrap_median(values_KR: Floats, seed: int) -> Floats:
    """For each of the K rows (K, R): the median of the means of `ROUGE_SAMPLES` samples of requests."""
    rng = np.random.default_rng(seed)
    n_requests = values_KR.shape[1]
    samples = (rng.integers(n_requests, size=n_requests) for _ in range(ROUGE_SAMPLES))
    means = [values_KR[:, drawn_R].mean(axis=1) for drawn_R in samples]
    return np.asarray(np.median(means, axis=0), dtype=np.float64)
