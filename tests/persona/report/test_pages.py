"""Each page is one self-contained file that shows its data and escapes all text."""

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from persona.evaluation import examples
from persona.evaluation.many_runs import compare
from persona.evaluation.one_run import summarize
from persona.options import Metric
from persona.report import wording
from persona.report.pages import chart_files, comparison_page, evaluation_page
from persona.versions import installed_versions
from tests.persona.evaluation.test_many_runs import NONE, OWN, evaluation
from tests.persona.evaluation.test_one_run import PERSONAS, answers, losses, with_rejected

EVIL = '<script>alert("x")</script><img src=http://e.vil/x>'
VOID = {"meta"}
INTERVAL = {"mean": 0.5, "low": 0.25, "high": 0.75}


def metrics(**changes: Any) -> dict[str, Any]:
    """What `evaluate` passes to the page for four requests."""
    rows, generated = losses(), answers(own=EVIL)
    one = examples.example(rows, PERSONAS, generated, "b", "Which title?")
    behavior = {"behavior_id": "b7", "written": "2024-05-06", "weight": 0.75, "text": "my past words"}
    return {
        **summarize(rows, PERSONAS, generated, Metric(kind="text"), seed=0),
        "limited": False,
        "unanswered_variants": [],
        "examples": [{**one, "listened_to": []}],
        "largest_gains": [{**one, "listened_to": [behavior]}],
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
        "versions": installed_versions(),
        "rejects": 0,
        "seconds": 1.5,
        **changes,
    }


class Checker(HTMLParser):
    """Asserts that all tags are closed, and that the page fetches and runs nothing."""

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


def test_the_page_is_well_formed_and_fetches_and_runs_nothing() -> None:
    page = evaluation_page(metrics())
    tags, _ = read(page)
    assert not tags & {"script", "img", "link", "iframe", "object", "form"}
    assert b"default-src 'none'" in page
    assert not re.search(rb"url\(|@import|https?://(?!e\.vil)", page)
    assert b"prefers-color-scheme: dark" in page
    assert b'name="viewport"' in page


def test_the_page_shows_the_results() -> None:
    found = metrics()
    _, words = read(evaluation_page(found))
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
def test_the_title_has_the_name_of_the_model_without_its_path(name: str, title: str) -> None:
    found = metrics()
    found["settings"]["llm"]["name"] = name
    assert f"<h1>{title} with a plug".encode() in evaluation_page(found)


def test_a_ranking_is_shown_if_there_is_one() -> None:
    found = {"likelier": {"mean": 0.625, "low": 0.5, "high": 0.75}}
    _, words = read(evaluation_page(metrics(ranking={"own": found, "none": found})))
    assert "62.5 %" in words and "[50.0, 75.0]" in words
    assert "Ranking" not in read(evaluation_page(metrics()))[1]


def test_a_column_without_content_is_left_out() -> None:
    scored = {"scores": {"own": {"accuracy": 0.5}}, "score_intervals": {"own": {"accuracy": INTERVAL}}}
    _, words = read(evaluation_page(metrics(**scored, score_gained_by_own={})))
    assert "accuracy" in words and "gained by own" not in words and "plain mean" not in words
    _, words = read(evaluation_page(metrics()))
    assert "gained by own" in words and "plain mean" in words
    ranked = {"likelier": INTERVAL}
    assert "by gain over none" not in read(evaluation_page(metrics(ranking={"own": ranked})))[1]
    ranked |= {"calibrated": INTERVAL}
    assert "by gain over none" in read(evaluation_page(metrics(ranking={"own": ranked})))[1]


def test_warnings_are_at_the_top() -> None:
    _, words = read(evaluation_page(metrics(limited=True, unanswered_variants=["mean"], rejects=2)))
    for part in ("--limit 3 was given", "variant 'mean'", "2 rows of the requests could not be read"):
        assert part in words
    assert "--limit" not in read(evaluation_page(metrics()))[1].split("Loss")[0]


def test_a_page_with_little_data_is_complete() -> None:
    nothing = {"scores": {}, "score_intervals": {}, "largest_gains": [], "map": [], "gain_by_history_length": []}
    _, words = read(evaluation_page(metrics(**nothing, training={}, loss_saved_by_own={})))
    assert "Nothing to draw here." in words
    assert "There are none." in words


def test_a_page_without_the_own_persona_leaves_out_what_needs_it() -> None:
    of_histories = ("weigh most", "history length", "map of personas", "own persona helps")
    _, words = read(evaluation_page(metrics()))
    assert all(part in words for part in of_histories)
    _, words = read(evaluation_page(metrics(loss={"none": metrics()["loss"]["none"]}, loss_saved_by_own={})))
    assert not [part for part in (*of_histories, "Saved by own", "saved by own") if part in words]
    assert "Training" in words


def test_charts_are_png_files_if_there_is_data() -> None:
    found = chart_files(metrics())
    assert set(found) == {"gain.png", "curves.png", "map.png"}
    assert all(data.startswith(b"\x89PNG") for data in found.values())
    assert set(chart_files(metrics(map=[], training={}))) == {"gain.png"}


def test_the_page_begins_with_the_result_in_words() -> None:
    top = read(evaluation_page(metrics()))[1].split("Negative log-likelihood")[0]
    for part in ("the own persona saves +1.2500 nats a token", "the interval excludes zero", "prompt tuning"):
        assert part in top


def test_noise_is_marked_in_words() -> None:
    noise = {"mean": 0.125, "low": -0.25, "high": 0.5}
    clear = evaluation_page(metrics(loss_saved_by_own={"other": INTERVAL})).decode()
    page = evaluation_page(metrics(loss_saved_by_own={"other": noise})).decode()
    marked = '<span class="range">[-0.2500, 0.5000]</span> <span class="tag">noise</span>'
    assert marked in page and '<b class="noise">+0.1250</b>' in page
    assert '<b class="gain">+0.5000</b> <span class="range">[0.2500, 0.7500]</span></td>' in clear
    # In a ranking, the interval must exclude chance.
    ranking = {"own": {"likelier": INTERVAL}}
    assert '[25.0, 75.0]</span> <span class="tag">noise</span>' in evaluation_page(metrics(ranking=ranking)).decode()


def test_equal_weights_are_one_line_instead_of_bars() -> None:
    one = metrics()["largest_gains"][0]
    behavior = {**one["listened_to"][0], "weight": 0.5}
    gains = [{**one, "listened_to": [behavior, behavior]}]
    page = evaluation_page(metrics(largest_gains=gains)).decode()
    assert "All behaviors weigh the same" in page
    assert 'class="bar"' not in page and "my past words" not in page
    settings = {**metrics()["settings"], "texts": "s3://h"}
    page = evaluation_page(metrics(largest_gains=gains, settings=settings)).decode()
    assert "my past words" in page.split("Some past texts")[1]
    assert 'class="bar"' in evaluation_page(metrics()).decode()


def test_bare_is_in_the_table_and_not_in_the_chart() -> None:
    found = metrics()
    far = {"mean": 3.0, "low": 2.9, "high": 3.1}
    found["loss"]["bare"] = found["loss_saved_by_own"]["bare"] = far
    for row in found["gain_by_history_length"]:
        row["saved_by_own"]["bare"] = far
    page = evaluation_page(found).decode()
    assert "it is only in the table" in page and "dot bare" not in page
    assert page.count('<b class="gain">+3.0000</b>') == 1 + len(found["gain_by_history_length"])
    assert "only in the table" not in evaluation_page(metrics()).decode()


def test_numbers_without_interval_are_read_from_memory_and_from_json_alike() -> None:
    # NaN in memory is null in metrics.json.
    pages = [
        evaluation_page(metrics(users=1, loss_saved_by_own={"other": {"mean": 0.5, "low": end, "high": end}}))
        for end in (float("nan"), None)
    ]
    assert pages[0] == pages[1]
    assert "All requests are from one user" in read(pages[0])[1]


def test_a_lone_surrogate_becomes_a_question_mark() -> None:
    one = {**metrics()["examples"][0], "input": "half of a pair: \ud800"}
    assert "half of a pair: ?" in read(evaluation_page(metrics(examples=[one])))[1]


def test_the_comparison_shows_the_results_and_fetches_and_runs_nothing() -> None:
    nats = {"own": OWN, "none": NONE}
    scored = {"scores": {"own": {"rouge1": 0.2}}, "score_intervals": {}, "rejected": {"own": NONE, "none": OWN}}
    evaluations = [evaluation(EVIL, nats, **scored), evaluation("y", nats, limited=True, training={"epochs": 7})]
    found = compare(evaluations, against=None, seed=0)
    page = comparison_page(found)
    tags, words = read(page)
    assert not tags & {"script", "img", "link", "iframe", "object", "form"}
    assert not re.search(rb"url\(|@import|https?://(?!e\.vil)", page)
    above = found["rows"][1]["above_reference"]
    for part in (
        *(EVIL, "y was evaluated with --limit", "epochs", f"{above['mean']:+.4f}", "the reference", "Ranking"),
        *("In short", f"difference to {EVIL}/own", "by gain over none", "against none", "prompt tuning"),
    ):
        assert part in words
    alone = compare([evaluation("x", {"own": OWN})], against=None, seed=0)
    assert "Nothing to draw here." in read(comparison_page(alone))[1]


def test_rankings_have_the_same_names_everywhere() -> None:
    found = summarize(with_rejected(), PERSONAS, {}, Metric(kind="text"), seed=0)["ranking"]
    assert set(found["own"]) == set(wording.RANKINGS)


def test_the_page_shows_plugs_over_time_when_there_are_several() -> None:
    def row(number: int | None, stage: str, mean: float, saved: float | None) -> dict[str, Any]:
        loss = {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}
        saved_by_newest = None if saved is None else {"mean": saved, "low": saved - 0.01, "high": saved + 0.01}
        named = {"version": number, "stage": stage, "since": "2026-12-06", "fingerprint": f"f{number}"}
        return {**named, "loss": loss, "saved_by_newest": saved_by_newest}

    rows = [row(2, "rolled_back", 2.5, 0.3), row(3, "live", 2.25, 0.05), row(None, "this one", 2.2, None)]
    versions = {"requests": 120, "users": 40, "left_out": [1], "rows": rows}
    tags, words = read(evaluation_page(metrics(plug_versions=versions)))
    assert "svg" in tags
    for part in ("Plugs over time", "120 requests of 40 users", "another LLM: v1", "v2", "rolled back", "+0.3000"):
        assert part in words
    assert "Plugs over time" not in read(evaluation_page(metrics(plug_versions=None)))[1]
    assert "Plugs over time" not in read(evaluation_page(metrics()))[1]
