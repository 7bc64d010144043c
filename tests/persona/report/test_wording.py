"""The sentences of the reports match the numbers and claim no more."""

from typing import Any

import pytest

from persona.report import wording

GAIN = {"mean": 0.25, "low": 0.125, "high": 0.5}
LOSS = {"mean": -0.25, "low": -0.5, "high": -0.125}
NOISE = {"mean": 0.125, "low": -0.25, "high": 0.5}
ONE_USER = {"mean": 0.25, "low": float("nan"), "high": float("nan")}


def reading(training: dict[str, Any] | None = None, **saved: dict[str, float]) -> str:
    metrics = {"loss": {"own": GAIN}, "loss_saved_by_own": saved, "training": training or {}}
    return " ".join(wording.evaluation_reading(metrics))


@pytest.mark.parametrize(
    ("other", "number", "meaning"),
    [
        (GAIN, "+0.2500 nats a token [0.1250, 0.5000]: a gain, the interval excludes zero.", "own history that helps"),
        (LOSS, "-0.2500 nats a token [-0.5000, -0.1250]: a loss, the interval excludes zero.", "does worse"),
        (NOISE, "+0.1250 nats a token [-0.2500, 0.5000]: noise, the interval includes zero.", "do not show"),
        (ONE_USER, "+0.2500 nats a token: one user gives no interval, so this may be noise.", ""),
        # As in metrics.json.
        ({**ONE_USER, "low": None, "high": None}, "+0.2500 nats a token: one user gives no interval", ""),
    ],
)
def test_own_against_another_user(other: dict[str, float], number: str, meaning: str) -> None:
    text = reading(other=other)
    assert f"Against another user's persona, the own persona saves {number}" in text
    assert meaning in text


def test_a_gain_against_none_or_bare_may_be_the_task() -> None:
    text = reading(none=GAIN, bare=GAIN)
    assert "Another user's persona was not measured" in text
    assert "Against no history, the own persona saves +0.2500" in text
    assert "A gain against no history or the LLM without the plug may be just the task" in text
    assert "may be just the task" not in reading(other=GAIN)


def test_the_control_is_named_or_missing() -> None:
    assert "jobs.train --empty-history 1 --alignment 0), is not part of this page" in reading(other=GAIN)
    assert "it is the control" in reading({"empty_history": 1.0}, other=GAIN)


def row(name: str, persona: str, above: dict[str, float] | None, *, control: bool = False, own: Any = None) -> Any:
    return {
        "name": name,
        "persona": persona,
        "above_reference": above,
        "above_own": own,
        "trained_without_history": control,
    }


def test_a_comparison_is_read_against_its_reference() -> None:
    rows = [
        row("a", "own", None),
        row("a", "other", GAIN, own=GAIN),
        row("b", "own", LOSS),
        row("c", "own", GAIN),
        row("d", "own", NOISE),
        row("d", "none", GAIN, own=GAIN),
    ]
    text = " ".join(wording.comparison_reading({"against": "a/own", "rows": rows}))
    # More nats than the reference is worse.
    for part in (
        "Better than a/own: b/own.",
        "Worse than a/own: c/own.",
        "Not distinguishable from a/own (the interval of the difference includes zero): d/own.",
        "Against another user's persona, the own persona of a saves +0.2500",
        "a plug trained without any history (prompt tuning, jobs.train --empty-history 1 --alignment 0), is not part",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("above", "meaning"),
    [(GAIN, "worth more than the task"), (LOSS, "worth less than the task"), (NOISE, "worth no more than the task")],
)
def test_the_control_is_compared_with_the_reference(above: dict[str, float], meaning: str) -> None:
    rows = [
        row("a", "own", None),
        row("tuning", "own", NOISE, control=True),
        row("tuning", "none", above, control=True),
    ]
    text = " ".join(wording.comparison_reading({"against": "a/own", "rows": rows}))
    assert "tuning/none is the control" in text and meaning in text
    rows[0]["trained_without_history"] = True
    assert "it is the control" in " ".join(wording.comparison_reading({"against": "a/own", "rows": rows}))


def test_equal_weights_are_recognized() -> None:
    def example(*weights: float) -> dict[str, Any]:
        return {"listened_to": [{"weight": weight} for weight in weights]}

    assert wording.weighs_all_the_same([example(0.2, 0.2), example(1.0), example()])
    assert not wording.weighs_all_the_same([example(0.2, 0.2), example(0.7, 0.3)])
    # With one behavior per request, the weights cannot differ.
    assert not wording.weighs_all_the_same([example(1.0), example()])
