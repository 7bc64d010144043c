"""LaMP's scores, on small cases computed by hand."""

import math
import tracemalloc

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.scoring import BootstrapAggregator

from persona.errors import InputError
from persona.evaluation.scores import score, score_intervals, score_requests
from persona.inputs.lamp import TASKS
from persona.options import Metric

CITATION = Metric(kind="label", labels=("[1]", "[2]"))
RATING = Metric(kind="rating", labels=("1", "2", "3", "4", "5"))
TEXT = Metric(kind="text")


def by_id(*texts: str) -> dict[str, str]:
    return {f"r{position}": text for position, text in enumerate(texts)}


def test_label_answers_are_stripped_and_otherwise_matched_exactly() -> None:
    predictions = by_id(" [1]\n", "[2]", "1", "[1]")
    golds = by_id("[1]", "[2]", "[1]", "[2]")
    # [1]: one hit among 2 answers and 2 golds; [2]: one hit among 1 answer and 2 golds
    assert score(CITATION, predictions, golds) == pytest.approx({"accuracy": 2 / 4, "f1": (2 / 4 + 2 / 3) / 2})


def test_case_matters_in_labels() -> None:
    metric = Metric(kind="label", labels=("comedy", "action"))
    assert score(metric, by_id("Comedy"), by_id("comedy"))["accuracy"] == 0


def test_a_label_in_neither_answers_nor_golds_counts_zero_in_f1() -> None:
    metric = Metric(kind="label", labels=("comedy", "action", "classic", "violence"))
    assert score(metric, by_id("comedy", "action"), by_id("comedy", "action"))["f1"] == 2 / 4


def test_f1_equals_that_of_scikit_learn() -> None:
    golds, predictions = by_id(*"aabbbccabc"), by_id(*"abbbxcdada")
    # scikit-learn 1.9.1: f1_score(golds, predictions, labels=list("abcd"), average="macro", zero_division=0)
    expected = 0.43452380952380953
    assert score(Metric(kind="label", labels=("a", "b", "c", "d")), predictions, golds)["f1"] == pytest.approx(expected)


def official_label_scores(answers: list[str], golds: list[str], labels: list[str]) -> tuple[float, float]:
    """Accuracy and macro F1 by LaMP's rule: the position of the stripped text among the labels, -1 for others."""

    def numbers(texts: list[str]) -> np.ndarray:
        stripped = [text.strip() for text in texts]
        return np.array([labels.index(text) if text in labels else -1 for text in stripped])

    found, right = numbers(answers), numbers(golds)
    f1 = []
    for label in range(len(labels)):
        either = int((found == label).sum() + (right == label).sum())
        f1.append(2 * int(((found == label) & (right == label)).sum()) / either if either else 0.0)
    return float((found == right).mean()), float(np.mean(f1))


def test_any_answer_and_a_blank_gold_are_scored_by_the_official_rule_in_flat_memory() -> None:
    labels = ["comedy", "action", "classic"]
    answers = ["x" * 200_000, "comedy\0", "comedy", "none", " action ", "comedy", ""] + ["action"] * 2_000
    golds = ["comedy", "comedy", "comedy", "", "action", " ", " \n"] + ["action"] * 2_000
    metric = Metric(kind="label", labels=tuple(labels))
    tracemalloc.start()
    scores = score(metric, by_id(*answers), by_id(*golds))
    intervals = score_intervals(metric, by_id(*answers), by_id(*golds), [f"u{n % 9}" for n in range(len(golds))])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    expected = official_label_scores(answers, golds, labels)
    assert (scores["accuracy"], scores["f1"]) == pytest.approx(expected)
    assert (intervals["accuracy"].mean, intervals["f1"].mean) == pytest.approx(expected)
    assert peak < 4 * 200_000  # a NumPy array of strings would take 200,000 characters for each answer


@pytest.mark.parametrize(
    ("answer", "gold", "error"),
    [
        ("4", "5", 1.0),
        (" 3.5\n", "5", 1.5),
        ("great", "5", 4.0),
        ("great", "4", 3.0),
        ("great", "3", 2.0),
        ("great", "2", 3.0),
        ("", "1", 4.0),
        ("nan", "1", 4.0),
        ("-inf", "5", 4.0),
    ],
)
def test_an_unreadable_rating_counts_as_the_worst(answer: str, gold: str, error: float) -> None:
    assert score_requests(RATING, by_id(answer), by_id(gold))["mae"] == [error]


def test_rating_errors_are_averaged_plainly_and_squared() -> None:
    assert score(RATING, by_id("1", "2", "5"), by_id("1", "5", "1")) == pytest.approx(
        {"mae": 7 / 3, "rmse": math.sqrt(25 / 3)}
    )


def test_rouge_counts_words_and_their_order() -> None:
    scores = score_requests(TEXT, by_id("the cat sat", "c b a"), by_id("The cat, sat down", "a b c"))
    assert scores["rouge1"] == pytest.approx([2 * 3 / (3 + 4), 1.0])
    assert scores["rougeL"] == pytest.approx([2 * 3 / (3 + 4), 1 / 3])


def test_rouge_does_not_stem() -> None:
    assert score_requests(TEXT, by_id("running"), by_id("runs"))["rouge1"] == [0.0]


def test_the_rouge_median_depends_on_the_seed_and_the_mean_does_not() -> None:
    answers = [" ".join(["word"] * n) for n in range(1, 40)]
    predictions, golds = by_id(*answers), by_id(*["word word word"] * 39)
    first, again, other = (score(TEXT, predictions, golds, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first["rouge1"] != other["rouge1"]
    assert first["rouge1_mean"] == other["rouge1_mean"] == score_requests(TEXT, predictions, golds)["rouge1"].mean()
    # the median of 1000 resampled means is well within a standard error of the mean
    spread = score_requests(TEXT, predictions, golds)["rouge1"].std() / math.sqrt(39)
    assert abs(first["rouge1"] - first["rouge1_mean"]) < spread / 2


def test_request_scores_follow_sorted_ids() -> None:
    golds = {"b": "[1]", "a": "[2]", "c": "[1]"}
    predictions = {"c": "[1]", "b": "[2]", "a": "[2]"}
    assert score_requests(CITATION, predictions, golds)["accuracy"].tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("predictions", "golds", "message"),
    [
        ({"a": "x"}, {"a": "x", "b": "x"}, "1 of 2 requests have no answer, the first is 'b'"),
        ({"a": "x", "b": "x"}, {"a": "x"}, "1 of 2 requests have no gold, the first is 'b'"),
        ({}, {}, "nothing to score"),
    ],
)
def test_answers_and_golds_must_be_for_the_same_requests(
    predictions: dict[str, str], golds: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        score(TEXT, predictions, golds)


@pytest.mark.parametrize(("metric", "gold"), [(CITATION, "[3]"), (RATING, "five")])
def test_a_gold_that_the_metric_does_not_allow_is_refused(metric: Metric, gold: str) -> None:
    with pytest.raises(InputError, match="gold"):
        score(metric, by_id("[1]"), by_id(gold))


F_2_OF_3 = 2 * 2 / (2 + 3)  # two words in common, of two in the answer and three in the gold
# Answers, golds, and the scores that do not depend on the seed.
BY_HAND = {
    "LaMP_1": (
        ["[1]", " [2] ", "[1", "2"],
        ["[1]", "[1]", "[1]", "[2]"],
        # [1]: 1 hit, 1 answer, 3 golds; [2]: no hit. "[1" and "2" are not labels.
        {"accuracy": 1 / 4, "f1": (2 / 4 + 0) / 2},
    ),
    "LaMP_2": (
        ["sci-fi", "Comedy", "a comedy", "violence\n"],
        ["sci-fi", "comedy", "comedy", "violence"],
        # Two of fifteen tags have F1 1; comedy is only among the golds, and twelve do not occur.
        {"accuracy": 2 / 4, "f1": 2 / 15},
    ),
    "LaMP_3": (
        ["4", "five", "3.5", "no idea", "5 stars"],
        ["5", "1", "3", "3", "2"],
        # Off by 1; by 4, since 1 is farthest from 5; by a half; by 2 (a tie goes to 5); by 3.
        {"mae": (1 + 4 + 0.5 + 2 + 3) / 5, "rmse": math.sqrt((1 + 16 + 0.25 + 4 + 9) / 5)},
    ),
    **{
        f"LaMP_{task}": (
            ["Big News!", "", "three blind mice", "cats"],
            ["big news today", "something", "mice, blind: three", "cat"],
            # Case and punctuation do not count, order counts for ROUGE-L only, and there is no stemming.
            {"rouge1_mean": (F_2_OF_3 + 0 + 1 + 0) / 4, "rougeL_mean": (F_2_OF_3 + 0 + 1 / 3 + 0) / 4},
        )
        for task in (4, 5, 7)
    },
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_the_scores_computed_by_hand(task: str) -> None:
    predictions, golds, expected = BY_HAND[task]
    scores = score(TASKS[task].metric, by_id(*predictions), by_id(*golds))
    assert {name: scores[name] for name in expected} == pytest.approx(expected)
    assert set(scores) - set(expected) == ({"rouge1", "rougeL"} if "rouge1_mean" in expected else set())


@pytest.mark.parametrize("task", TASKS)
def test_every_task_refuses_unequal_ids(task: str) -> None:
    predictions, golds, _ = BY_HAND[task]
    with pytest.raises(InputError, match="requests have no answer, the first is 'r3'"):
        score(TASKS[task].metric, by_id(*predictions[:3]), by_id(*golds))
    with pytest.raises(InputError, match="requests have no gold, the first is 'r3'"):
        score(TASKS[task].metric, by_id(*predictions), by_id(*golds[:3]))


def test_the_rouge_median_equals_that_of_the_official_aggregator() -> None:
    words = list("abcdefgh")
    rng = np.random.default_rng(0)
    golds = by_id(*(" ".join(rng.choice(words, 5)) for _ in range(60)))
    predictions = by_id(*(" ".join(rng.choice(words, 5)) for _ in range(60)))
    np.random.seed(3)  # noqa: NPY002 - the aggregator uses it
    aggregator = BootstrapAggregator(confidence_interval=0.95, n_samples=1000)
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    for name, gold in golds.items():
        aggregator.add_scores(scorer.score(gold, predictions[name]))
    official, ours = aggregator.aggregate(), score(TEXT, predictions, golds)
    for name, values in score_requests(TEXT, predictions, golds).items():
        # Four standard errors of the difference of two medians of 1000 draws each.
        error = 4 * math.sqrt(2) * 1.2533 * values.std() / math.sqrt(60) / math.sqrt(1000)
        assert ours[name] == pytest.approx(official[name].mid.fmeasure, abs=error)


@pytest.mark.parametrize("task", TASKS)
def test_an_interval_is_around_the_score_itself(task: str) -> None:
    predictions, golds, expected = BY_HAND[task]
    intervals = score_intervals(
        TASKS[task].metric, by_id(*predictions), by_id(*golds), ["u", "v", "w", "x", "y"][: len(golds)]
    )
    assert {name: interval.mean for name, interval in intervals.items()} == pytest.approx(expected)
    assert all(interval.low < interval.high for interval in intervals.values())
    assert all(interval.low <= interval.mean <= interval.high for interval in intervals.values())


def test_the_interval_of_f1_is_over_users() -> None:
    # With u alone F1 is 1, with v alone 0, with both: [1] has 1 hit in 2 answers and 1 gold, [2] none.
    interval = score_intervals(CITATION, by_id("[1]", "[1]"), by_id("[1]", "[2]"), ["u", "v"])["f1"]
    assert (interval.low, interval.mean, interval.high) == pytest.approx((0, (2 / 3) / 2, 1 / 2))


LONG = Metric(kind="long_text")


def test_meteor_counts_exact_and_stem_matches_and_no_synonyms() -> None:
    gold = "the parser reads sentences"
    # All four words match in one chunk, the last two by their stem: precision = recall = 1, penalty 0.5 · (1/4)³.
    same = score(LONG, by_id("the parser reading sentence"), by_id(gold))["meteor_stem"]
    assert same == pytest.approx(1 - 0.5 * (1 / 4) ** 3)
    # Three of four words match, in one chunk; "words" would match "sentences" neither by form nor by stem.
    part = score(LONG, by_id("the parser reads words"), by_id(gold))["meteor_stem"]
    assert part == pytest.approx(3 / 4 * (1 - 0.5 * (1 / 3) ** 3))
    assert score(LONG, by_id("", "?"), by_id(gold, gold))["meteor_stem"] == 0


def test_a_long_text_has_rouge_as_well_and_an_interval_of_meteor() -> None:
    answers, golds = by_id("a b c", "x y"), by_id("a b d", "x y")
    assert score(LONG, answers, golds).items() > score(TEXT, answers, golds).items()
    intervals = score_intervals(LONG, answers, golds, ["u", "v"])
    assert set(intervals) == {"rouge1_mean", "rougeL_mean", "meteor_stem"}
    assert "meteor_stem" not in score(TEXT, answers, golds)
