"""The experiments on authors: who is asked what, which text is the wrong one, and what each job is told."""

from argparse import Namespace
from importlib import import_module
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.runtime.configuration import read_config
from tests.benchmarks.authors import EXPERIMENTS, Run


@pytest.fixture
def acl(tmp_path: Path) -> Path:
    for split in ("train", "dev", "test"):
        numbers = range(7)
        ids = {"request_id": [f"{split}::{i}" for i in numbers], "user_id": [f"{split} {i // 2}" for i in numbers]}
        titles = [(f'right "{i}" [1]', f"wrong {i}") for i in numbers]
        pairs = [pair if i % 2 else pair[::-1] for i, pair in enumerate(titles)]
        asked = [f'Which? Just answer with [1] or [2]. [1]: "{one}" [2]: "{two}"' for one, two in pairs]
        labels = ["[1]" if i % 2 else "[2]" for i in numbers]
        as_of = {"as_of": list(numbers)}
        pq.write_table(
            pa.table({**ids, "input": asked, "target": labels, **as_of}), tmp_path / f"which_{split}.parquet"
        )
        rows = {**ids, "input": ["Write."] * 7, "target": [right for right, _ in titles], **as_of}
        pq.write_table(pa.table(rows), tmp_path / f"next_title_{split}.parquet")
    return tmp_path


def experiment(acl: Path, question: str) -> Run:
    return Run(Namespace(acl=acl, out=acl / "out", question=question, split="dev", train_rows=4, every=3))


def requests(acl: Path, question: str, split: str) -> list[dict[str, object]]:
    experiment(acl, question).write_requests()
    found: list[dict[str, object]] = pq.read_table(acl / "out" / question / f"{split}.parquet").to_pylist()
    return found


def test_the_other_title_is_rejected_and_every_third_request_is_judged(acl: Path) -> None:
    rows = requests(acl, "next_title", "test")
    assert [row["request_id"] for row in rows] == ["test::0", "test::3", "test::6"]
    assert [(row["target"], row["rejected"]) for row in rows] == [(f'right "{i}" [1]', f"wrong {i}") for i in (0, 3, 6)]


def test_training_takes_some_at_random_and_the_same_each_time(acl: Path) -> None:
    first = requests(acl, "next_title", "train")
    assert len({row["request_id"] for row in first}) == 4
    assert first == requests(acl, "next_title", "train")


def test_of_labels_the_other_one_is_rejected(acl: Path) -> None:
    rows = requests(acl, "which", "dev")
    assert [(row["target"], row["rejected"]) for row in rows] == [("[2]", "[1]"), ("[1]", "[2]"), ("[2]", "[1]")]


def test_an_oracles_users_have_the_right_answer_for_a_history(acl: Path) -> None:
    rows = requests(acl, "which_oracle", "dev")
    assert all(row["user_id"] == row["request_id"] and "as_of" not in row for row in rows)
    histories = pq.read_table(acl / "out" / "which_oracle" / "histories.parquet").to_pylist()
    assert {"user_id": "dev::3", "behavior_id": "dev::3", "text": 'right "3" [1]'} in histories
    assert len(histories) == 4 + 3 + 3


def test_tables_that_ask_other_requests_are_refused(acl: Path) -> None:
    table = pq.read_table(acl / "which_dev.parquet")
    pq.write_table(table.slice(1), acl / "which_dev.parquet")
    with pytest.raises(SystemExit, match="do not ask the same requests"):
        requests(acl, "next_title", "dev")


@pytest.mark.parametrize("question", EXPERIMENTS)
def test_the_jobs_accept_the_flags_of_every_row(acl: Path, question: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before an hour of training, not after it."""
    asked = []

    def read(_: Run, job: str, *flags: object) -> None:
        asked.append(read_config(import_module(f"jobs.{job}").Config, [str(flag) for flag in flags]))

    monkeypatch.setattr(Run, "_job", read)
    run = experiment(acl, question)
    for name in run.rows.keys() - {"encoder"}:
        asked.clear()
        run.judge(name, seed=0)
        assert len(asked) == (2 if run.experiment.generate is None else 3), name
        assert len({config.plug for config in asked}) == 1, name
