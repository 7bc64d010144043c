"""The demo protects what it did not make; that it works is seen by `make demo`."""

from pathlib import Path

from jobs import demo
from tests.jobs.conftest import Job


def test_a_folder_with_other_files_is_left_alone(refuse: Job, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("three years")
    done = refuse(demo, out=str(tmp_path))
    assert done.code == 2
    assert "not of a demo" in done.said
    assert (tmp_path / "thesis.txt").read_text() == "three years"


def test_a_dry_run_makes_nothing(refuse: Job, tmp_path: Path) -> None:
    done = refuse(demo, out=str(tmp_path / "new"), dry_run=True)
    assert done.code == 0
    assert done.result["dry_run"]
    assert not (tmp_path / "new").exists()


def test_its_lamp_file_has_one_broken_question(refuse: Job, tmp_path: Path) -> None:
    from jobs import import_lamp

    summary = import_lamp.main(demo._lamp(tmp_path))
    assert (summary.result["requests"], summary.result["rejects"]) == (3, 1)
