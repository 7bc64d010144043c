"""The versions of a plug on the requests that their evaluations share."""

from typing import Any

import pytest

from persona.evaluation.plug_versions import Version, over_time
from tests.persona.evaluation.test_gate import USERS, evaluation


def version(number: int | None, own: float, stage: str = "retired", **more: Any) -> Version:
    name = str(number)
    return Version(
        number=number, stage=stage, since="2026-12-06", fingerprint=name, evaluation=evaluation(name, own, **more)
    )


def test_each_version_has_its_loss_and_what_the_newest_saves() -> None:
    found = over_time([version(1, 2.5), version(2, 2.2, "live")], version(None, 2.0))
    assert found is not None
    assert (found["requests"], found["users"], found["left_out"]) == (USERS, USERS, [])
    assert [row["version"] for row in found["rows"]] == [1, 2, None]
    assert [row["loss"]["mean"] for row in found["rows"]] == pytest.approx([2.5, 2.2, 2.0], abs=0.02)
    saved = [row["saved_by_newest"] for row in found["rows"]]
    assert [one["mean"] for one in saved[:2]] == pytest.approx([0.5, 0.2])
    assert saved[2] is None


def test_all_are_compared_on_the_requests_that_all_have() -> None:
    found = over_time([version(1, 2.5, users=range(5, 45)), version(2, 2.2, users=range(35))], version(3, 2.0))
    assert found is not None
    assert found["users"] == 30


def test_a_version_with_other_requests_or_another_llm_is_left_out() -> None:
    few = version(1, 2.5, users=range(30, 70))
    another = version(2, 2.5, settings={"llm": {"fingerprint": "another"}})
    found = over_time([few, another, version(3, 2.2)], version(4, 2.0))
    assert found is not None
    assert ([row["version"] for row in found["rows"]], found["left_out"]) == ([3, 4], [1, 2])
    assert over_time([few, another], version(4, 2.0)) is None
    assert over_time([], version(4, 2.0)) is None
