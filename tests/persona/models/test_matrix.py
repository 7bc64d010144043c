"""Every family of LLMs: the short form of `make models`, and docs/models.md says what it finds."""

from pathlib import Path

import pytest
import torch

from persona.models import frozen_llm
from tests.llms import LLMS, Family, build
from tests.matrix import page
from tests.matrix.llm_checks import SHORT, check_llm
from tests.matrix.ours import OurLLM

VERDICTS = {cells[1]: cells[4] for line in page.PAGE.read_text().splitlines() if len(cells := line.split(" | ")) == 4}


def family(name: str) -> Family:
    return next(family for family in LLMS if family.name == name)


@pytest.mark.filterwarnings("ignore")  # libraries warn about random weights
@pytest.mark.parametrize("family", LLMS, ids=lambda family: family.name)
def test_an_llm_equals_plain_transformers_or_is_refused(family: Family, tmp_path: Path) -> None:
    findings = check_llm(family, build(family, tmp_path), SHORT)
    assert not findings.failures
