"""The page is one file that needs nothing else, shows what it is given, and lets no text become markup."""

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from persona.evaluation import one_run as comparison
from persona.evaluation.scores import Metric
from persona.report import charts, evaluation_page as report, markup, pictures
from tests.persona.evaluation.test_one_run import PERSONAS, answers, losses

EVIL = '<script>alert("x")</script><img src=http://e.vil/x>'
VOID = {"meta"}


def metrics(**changes: Any) -> dict[str, Any]:
    """What `evaluate` would hand over for four requests."""
    rows, said = losses(), answers(own=EVIL)
    one = comparison.example(rows, PERSONAS, said, "b", "Which title?")
    heard = {"behavior_id": "b7", "written": "2024-05-06", "weight": 0.75, "text": "my past words"}
    return {
        **comparison.compare(rows, PERSONAS, said, Metric(kind="text"), seed=0),
        "limited": False,
        "unanswered_variants": [],
        "examples": [{**one, "listened_to": []}],
        "largest_gains": [{**one, "listened_to": [heard]}],
        "largest_losses": [],
        "map": [
            {"user_id": user, "x": x, "y": -x, "saved": x, "n_behaviors": 3}
            for user, x in (("u", 0.5), ("v", -0.5), ("w", 1.0))
        ],
        "training": {"training_curve": [[1, 5.0], [2, 4.0]], "validation_curve": [[2, 4.5]], "seconds": 12.5},
        "settings": {
            "requests": "r",
            "out": EVIL,
            "texts": None,
            "limit": 3,
            "variants": ["own", "none"],
            "llm": {"name": "an-llm"},
            "plug_fingerprint": "f00d",
            "plug_options": {"persona_tokens": 4},
        },
        "versions": report.versions(),
        "rejects": 0,
        "seconds": 1.5,
        **changes,
    }


class Checker(HTMLParser):
    """Follows the tags of a page: what is opened is closed, and nothing is fetched or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        assert not {name for name, _ in attrs} & {"src", "href", "srcset", "onload", "onclick"}
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def read(page: bytes) -> tuple[set[str], str]:
    checker = Checker()
    checker.feed(page.decode())
    assert checker.open == []
    return checker.seen, " ".join(checker.words)


def test_the_page_is_whole_and_fetches_and_runs_nothing() -> None:
    page = report.page(metrics())
    tags, _ = read(page)
    assert not tags & {"script", "img", "link", "iframe", "object", "form"}
    assert b"default-src 'none'" in page
    assert not re.search(rb"url\(|@import|https?://(?!e\.vil)", page)
    assert b"prefers-color-scheme: dark" in page
    assert b'name="viewport"' in page


def test_the_page_says_what_was_found() -> None:
    found = metrics()
    _, words = read(report.page(found))
    saved = found["loss_saved_by_own"]["other"]
    assert f"{saved['mean']:+.4f}" in words
    assert f"[{saved['low']:.4f}, {saved['high']:.4f}]" in words
    assert "4 requests of 2 users" in words
    for part in ("an-llm", "f00d", "my past words", "75.0 %", "2024-05-06", "Which title?", "12.5", EVIL):
        assert part in words
    assert all(value in words for value in found["versions"].values())


@pytest.mark.parametrize(
    ("name", "title"),
    [("google/flan-t5-xl", "google/flan-t5-xl"), ("/models/SmolLM2/", "SmolLM2"), ("s3://corp/models/llm", "llm")],
)
def test_the_title_has_the_name_of_the_model_and_not_the_way_to_it(name: str, title: str) -> None:
    found = metrics()
    found["settings"]["llm"]["name"] = name
    assert f"<h1>{title} with a plug".encode() in report.page(found)


def test_a_ranking_is_shown_where_there_is_one() -> None:
    found = {"likelier": {"mean": 0.625, "low": 0.5, "high": 0.75}}
    _, words = read(report.page(metrics(ranking={"own": found, "none": found})))
    assert "62.5 %" in words and "[50.0, 75.0]" in words
    assert "Ranking" not in read(report.page(metrics()))[1]


def test_a_column_that_says_nothing_is_left_out() -> None:
    assert read(markup.table(["a", "b"], [["1", ""], ["2", ""]]).encode())[1].split() == ["a", "1", "2"]
    assert read(markup.table(["a", "b"], [["1", ""], ["2", "3"]]).encode())[1].split() == ["a", "b", "1", "2", "3"]
    assert read(markup.table(["a", "b"], []).encode())[1].split() == ["a", "b"]


def test_warnings_stand_at_the_top() -> None:
    _, words = read(report.page(metrics(limited=True, unanswered_variants=["mean"], rejects=2)))
    for part in ("--limit 3 was given", "variant 'mean'", "2 rows of the requests could not be read"):
        assert part in words
    assert "--limit" not in read(report.page(metrics()))[1].split("Loss")[0]


def test_a_page_of_little_is_still_a_page() -> None:
    nothing = {"scores": {}, "score_intervals": {}, "largest_gains": [], "map": [], "gain_by_history_length": []}
    _, words = read(report.page(metrics(**nothing, training={}, loss_saved_by_own={})))
    assert "Nothing to draw here." in words
    assert "There are none." in words


def test_a_page_without_the_own_persona_tells_of_nobodys_history() -> None:
    of_histories = ("listened to", "history length", "map of personas", "own persona helps")
    _, words = read(report.page(metrics()))
    assert all(part in words for part in of_histories)
    _, words = read(report.page(metrics(loss={"none": metrics()["loss"]["none"]}, loss_saved_by_own={})))
    assert not [part for part in (*of_histories, "Saved by own", "saved by own") if part in words]
    assert "Training" in words


def test_pictures_are_png_files_of_what_there_is() -> None:
    found = pictures.draw(metrics())
    assert set(found) == {"gain.png", "curves.png", "map.png"}
    assert all(data.startswith(b"\x89PNG") for data in found.values())
    assert set(pictures.draw(metrics(map=[], training={}))) == {"gain.png"}


@pytest.mark.parametrize("scale", [1e-4, 1.0, 37.0, 1e5])
def test_marks_of_an_axis_are_round_and_few_and_within(scale: float) -> None:
    values = [0.13 * scale, 0.91 * scale]
    chart = charts.lines({"own": [[0, values[0]], [10, values[1]]]}, x="x", y="y")
    marks = [float(text.replace(",", "")) for text in re.findall(r'class="end"[^>]*>([^<]+)<', chart)]
    assert 3 <= len(marks) <= 7
    assert all(values[0] - 0.1 * scale <= mark <= values[1] + 0.1 * scale for mark in marks)


def test_a_dot_lies_where_its_value_is() -> None:
    rows = [("1–2", {"other": (1.0, 0.5, 2.0)}), ("3", {"other": (2.0, float("nan"), float("nan"))})]
    chart = charts.groups(rows, x="x", y="y")
    first, second = (float(y) for y in re.findall(r'<circle class="dot other" cx="[^"]+" cy="([^"]+)"', chart))
    zero = float(re.findall(r'class="zero"[^>]*y1="([^"]+)"', chart)[0])
    assert (zero - second) / (zero - first) == pytest.approx(2, rel=0.01)
    # A single user has no interval, and so no whisker.
    assert chart.count("whisker") == 1


def test_a_long_curve_is_thinned_to_means() -> None:
    chart = charts.lines({"train": [[step, 1.0 + step % 2] for step in range(10_000)]}, x="x", y="y")
    points = re.findall(r'points="([^"]+)"', chart)[0].split()
    assert len(points) == 200
    assert len({point.split(",")[1] for point in points}) == 1
