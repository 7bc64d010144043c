"""The demo does not touch files that it did not write; `make demo` shows that it works."""

from pathlib import Path

from jobs import demo, import_lamp
from tests.jobs.conftest import Job


def test_a_folder_with_other_files_is_refused_and_left_alone(refuse: Job, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("three years")
    done = refuse(demo, out=str(tmp_path))
    assert done.code == 2
    assert "contains files that no demo has written" in done.said
    assert (tmp_path / "thesis.txt").read_text() == "three years"


def test_a_dry_run_writes_nothing(refuse: Job, tmp_path: Path) -> None:
    done = refuse(demo, out=str(tmp_path / "new"), dry_run=True)
    assert done.code == 0
    assert done.result["dry_run"]
    assert not (tmp_path / "new").exists()


def test_its_lamp_file_has_one_malformed_question(tmp_path: Path) -> None:
    summary = import_lamp.main(demo._importing(tmp_path))
    assert (summary.result["requests"], summary.result["rejects"]) == (3, 1)
