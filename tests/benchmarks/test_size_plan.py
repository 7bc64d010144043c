"""The plan for a billion behaviors: the table in the docs, and the limits for wide vectors."""

import re

import pytest

from tests.benchmarks import size_plan
from tests.pages import ROOT


def test_the_table_in_the_docs_is_what_the_code_computes() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    assert "\n".join(size_plan.table([])) in page


@pytest.mark.parametrize("width", [384, 1024, 4096])
def test_a_billion_behaviors_stay_within_the_limits_whatever_the_width(width: int) -> None:
    rows = {line.split(" | ")[0]: line.split(" | ")[-1] for line in size_plan.table(["--width", str(width)])}

    def number(name: str) -> float:
        return float(re.sub(r"[^\d.]", "", rows[f"| {name}"]))

    assert number("data files, at most") <= 20_000
    assert number("encoder: vectors in memory") <= 1024
    assert number("worker: rows in memory") <= 1024
    assert number("driver: names and offsets") <= 1024
