"""Steps of a long job: done once, and never mixed with those of other settings."""

from pathlib import Path

import pytest

from jobs.runtime.cli import Summary
from jobs.runtime.steps import StepFailed, Steps
from persona.errors import InputError, UsageError
from persona.storage import join


def test_a_step_is_done_once_and_its_result_stays(root: str) -> None:
    steps, calls = Steps(uri=join(root, "steps")), []

    def work() -> Summary:
        calls.append(1)
        return Summary(table=[], result={"rows": 3, "loss": float("nan")})

    assert steps.result("embed") is None
    for _ in range(2):
        assert steps.run("embed", work)[0] == {"rows": 3, "loss": None}
    assert len(calls) == 1


def test_a_step_that_fails_is_not_done(tmp_path: Path) -> None:
    steps = Steps(uri=str(tmp_path))
    with pytest.raises(StepFailed, match="embed ended with exit code 3"):
        steps.run("embed", lambda: Summary(table=[], result={}, exit_code=3))
    with pytest.raises(ZeroDivisionError):
        steps.run("embed", lambda: Summary(table=[], result={"x": 1 / 0}))
    assert steps.result("embed") is None


def test_other_settings_are_refused_by_the_name_of_their_flag(tmp_path: Path) -> None:
    steps = Steps(uri=str(tmp_path))
    steps.check_settings({"max_rows": 1, "seeds": (0, 1)})
    steps.begin({"max_rows": 1, "seeds": (0, 1)})
    steps.check_settings({"max_rows": 1, "seeds": (0, 1)})
    with pytest.raises(UsageError, match="--max-rows was 1 and is 2"):
        steps.check_settings({"max_rows": 2, "seeds": (0, 1)})


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_result_says_what_to_do(tmp_path: Path, text: str) -> None:
    (tmp_path / "embed.json").write_text(text)
    with pytest.raises(InputError, match="delete it to do the step again"):
        Steps(uri=str(tmp_path)).result("embed")
