"""What a dry run says of an input's size: counted when it is small, estimated when it is large."""

from pathlib import Path

import pytest

from jobs.runtime import first_look
from jobs.runtime.inputs import Requests, find_requests
from jobs.runtime.job_options import RequestFormat
from tests.jobs.conftest import requests, write


def found(folder: Path) -> Requests:
    return find_requests(str(folder), RequestFormat(), flag="--requests", needs_target=True)


def test_the_rows_of_a_small_input_are_counted(tmp_path: Path) -> None:
    rows = requests()
    for part, name in ((rows[:5], "a.jsonl"), (rows[5:], "b.parquet")):
        write(str(tmp_path / name), part)
    amount = first_look.n_requests(found(tmp_path), needs_target=True)
    assert (amount.n, amount.is_exact, str(amount)) == (len(rows), True, str(len(rows)))
    assert amount.mean_tokens == pytest.approx(sum(len(row["input"]) for row in rows) / 4 / len(rows), abs=0.1)


def test_rows_without_a_target_are_not_counted_for_training(tmp_path: Path) -> None:
    rows = [{**row, "target": row["target"] if number % 3 else None} for number, row in enumerate(requests())]
    write(str(tmp_path / "a.jsonl"), rows)
    with_target = sum(row["target"] is not None for row in rows)
    assert first_look.n_requests(found(tmp_path), needs_target=True).n == with_target
    assert first_look.n_requests(found(tmp_path), needs_target=False).n == len(rows)


def test_the_rows_of_a_large_input_are_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = requests()
    for number in range(10):
        write(str(tmp_path / f"{number}.jsonl"), rows)
    monkeypatch.setattr(first_look, "_COUNTED_BYTES", (tmp_path / "0.jsonl").stat().st_size + 1)
    amount = first_look.n_requests(found(tmp_path), needs_target=True)
    assert (amount.n, amount.is_exact) == (10 * len(rows), False)
    assert str(amount) == "about 240"
