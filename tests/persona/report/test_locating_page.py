"""The page of `locate`: self-contained, with a curve a group, and the control beside each number."""

import re
from typing import Any

import pytest

from persona.report import charts
from persona.report.layer_wording import group_reading
from persona.report.pages import locating_page
from persona.versions import installed_versions
from tests.persona.report.test_pages import EVIL, Checker

NUMBERS = {
    "rows": 60,
    "rows_other": 58,
    "auc": 0.875,
    "auc_shuffled": 0.5,
    "silhouette": 0.25,
    "silhouette_shuffled": 0.0,
    "scan_p": 0.048,
    "scan_precision": 0.75,
    "scan_recall": 0.5,
    "n_units": 17,
    "n_units_shuffled": 3,
}
MOVED = {
    "moved": 0.375,
    "moved_shuffled": 0.5,
    "cosine": 0.9,
    "cosine_shuffled": 0.8,
    "user_in_nearest": 0.7,
    "user_in_nearest_shuffled": 0.01,
}
HEADLINE = {
    "rows": 60,
    "rows_other": 58,
    "auc": 0.875,
    "auc_layer": 2,
    "auc_shuffled_high": 0.5625,
    "readable_from": 1,
    "silhouette": 0.25,
    "silhouette_layer": 2,
    "silhouette_shuffled": 0.0,
    "scan_p": 0.048,
    "scan_precision": 0.75,
    "scan_recall": 0.5,
    "scan_layer": 2,
    "n_units": 17,
    "n_units_shuffled": 3,
}


def result(*groups: str, paired: bool = False, **changes: Any) -> dict[str, Any]:
    """The content of `locate.json` for groups of three layers."""
    rows = [
        {"group": group, "layer": layer, **NUMBERS, **(MOVED if paired else {})}
        for group in groups
        for layer in range(3)
    ]
    overlap = {"layer": 2, "first": groups[0], "second": groups[-1], "units_first": 17, "units_second": 9}
    return {
        "llm": {"name": "/models/an-llm"},
        "states": 3,
        "width": 48,
        "reads": EVIL,
        "warnings": ["c is left out"],
        "settings": {"out": EVIL, "components": 3, "statements": "s"},
        "versions": installed_versions(),
        "groups": [{"group": group, **HEADLINE} for group in groups],
        "layers": rows,
        "overlaps": [
            {**overlap, "shared": 5, "expected": 3.25, "p": 0.125, "shared_shuffled": 2, "expected_shuffled": 1.5}
        ],
        **changes,
    }


def read(found: dict[str, Any]) -> tuple[Checker, str]:
    page = locating_page(found).decode()
    checker = Checker()
    checker.feed(page)
    assert not checker.open
    return checker, page


@pytest.mark.parametrize("paired", [False, True])
def test_a_page_is_one_file_that_shows_the_numbers_and_escapes_all_texts(paired):
    checker, page = read(result("kind", EVIL, paired=paired))
    assert "script" not in checker.seen and "img" not in checker.seen
    text = " ".join(" ".join(checker.words).split())
    for shown in ("an-llm", "c is left out", "AUC 0.88", "0.56", "60 + 58", "0.048", "3.2", "0.12"):
        assert shown in text
    assert ("moved" in text) == paired
    assert page.count("<figure>") == (8 if paired else 5)
    assert "by chance" in text


def test_every_group_has_its_curve_also_where_there_are_more_than_colors():
    names = [f"group {number}" for number in range(charts.CURVES_A_CHART + 2)]
    _, page = read(result(*names))
    assert page.count("<figure>") == 5 * 2
    legends = re.findall(r"<figcaption.*?</figcaption>", page, re.DOTALL)
    shown = [name for name in names if any(f"</i>{name}</span>" in legend for legend in legends[:2])]
    assert shown == names


def test_numbers_that_are_not_there_are_left_out():
    rows = [{"group": "a", "layer": 0, "rows": 1, "rows_other": 1, "n_units": None, "n_units_shuffled": None}]
    _, page = read(result("a", layers=rows, overlaps=[], groups=[{"group": "a", "rows": 1, "rows_other": 1}]))
    assert "too few rows." in page
    assert "<figure>" not in page


def test_each_sentence_has_what_chance_gives():
    sentences = " ".join(group_reading({**HEADLINE, "moved": 0.4, "moved_layer": 1, "moved_shuffled": 0.9}))
    for number in (
        "AUC 0.88",
        "at most 0.56",
        "from layer 1 on",
        "silhouette 0.25",
        "shuffled 0.00",
        "by 0.40",
        "0.90 to",
    ):
        assert number in sentences
    assert "17 units (shuffled 3)" in sentences
    assert "does not read it" not in sentences
    by_chance = " ".join(group_reading({**HEADLINE, "auc": 0.54}))
    assert "does not read it; its best layer is" in by_chance and "nearly as well" not in by_chance
    assert "p ≤ 0.048" in sentences
