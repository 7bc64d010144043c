"""The progress in a checkpoint, as JSON."""

import json
from pathlib import Path

from persona.training.checkpoint import STATE, Progress

SAVED = {
    "step": 2,
    "seconds": 1.25,
    "tokens": 40,
    "training_curve": [[1, 5.0], [2, 4.5]],
    "validation_curve": [[2, 4.75]],
    "none_curve": [[2, 4.9]],
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
