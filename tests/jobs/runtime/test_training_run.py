"""The record of a training run."""

from pathlib import Path

import pytest

from jobs.runtime.training.run import RunRecord
from persona.errors import InputError

RECORD = RunRecord(behaviors="a table", behaviors_version=3, requests=12, settings={"limit": None, "exclude": []})


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    uri = str(tmp_path / "settings.json")
    assert RunRecord.read(uri) is None
    RECORD.write(uri)
    assert RunRecord.read(uri) == RECORD


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"behaviors": 1, "behaviors_version": 1, "requests": 1, "settings": {}}']
)
def test_a_broken_record_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(InputError, match=r"settings.json is broken .*; give the run another name with --run"):
        RunRecord.read(str(tmp_path / "settings.json"))
