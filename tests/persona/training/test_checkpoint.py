"""The progress in a checkpoint, as JSON."""

import json
from pathlib import Path

import pytest

from persona.training.checkpoint import STATE, Progress

SAVED = {
    "step": 2,
    "seconds": 1.25,
    "tokens": 40,
    "training_curve": [[1, 5.0], [2, 4.5]],
    "validation_curve": [[2, 4.75]],
    "none_curve": [[2, 4.9]],
    "micro_batch": 8,
    "notes": ["--compile: slower"],
    "token_norm": 1.5,
    "scale": 30.0,
    "llm_width": 48,
    "validation_loss": 4.75,
}


def test_progress_is_read_and_written_in_the_same_form(tmp_path: Path):
    (tmp_path / STATE).write_text(json.dumps(SAVED))
    progress = Progress.read(tmp_path)
    assert json.loads(progress.to_json()) == SAVED
    progress.add_step(4.123456, n_tokens=10, seconds=0.5)
    progress.add_validation(4.3, none=4.4)
    expected = {
        **SAVED,
        "step": 3,
        "seconds": 1.75,
        "tokens": 50,
        "training_curve": [[1, 5.0], [2, 4.5], [3, 4.12346]],
        "validation_curve": [[2, 4.75], [3, 4.3]],
        "none_curve": [[2, 4.9], [3, 4.4]],
        "validation_loss": 4.3,
    }
    assert json.loads(progress.to_json()) == expected


def test_before_the_first_validation_there_is_no_validation_loss():
    progress = Progress(token_norm=1.5, scale=30.0, llm_width=48)
    assert "validation_loss" not in json.loads(progress.to_json())


@pytest.mark.parametrize(
    ("losses", "patience", "stops"),
    [
        ([5.0, 4.0, 4.1, 4.2], 2, True),
        ([5.0, 4.0, 4.1, 4.0], 2, True),  # as low is not lower
        ([5.0, 4.0, 4.1, 3.9], 2, False),
        ([5.0, 4.0, 4.1], 2, False),
        ([5.0, 4.9, 4.8, 4.7], 1, False),
        ([5.0, 5.1], 1, True),  # the loss before the first step is the first
        ([5.0], 1, False),
        ([5.0, 6.0, 7.0, 8.0], 0, False),
    ],
)
def test_a_run_stops_after_validations_without_a_new_lowest_loss(
    tmp_path: Path, losses: list[float], patience: int, stops: bool
):
    progress = Progress(token_norm=1.5, scale=30.0, llm_width=48)
    for loss in losses:
        progress.add_validation(loss)
    assert progress.has_converged(patience) is stops
    # A resumed run decides the same.
    (tmp_path / STATE).write_text(progress.to_json())
    assert Progress.read(tmp_path).has_converged(patience) is stops
