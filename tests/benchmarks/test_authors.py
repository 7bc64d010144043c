"""The author experiments: their requests, the rejected text of each request, and the flags of each job."""

from argparse import Namespace
from importlib import import_module
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.runtime.configuration import read_config
from tests.benchmarks import authors
from tests.benchmarks.author_experiments import EXPERIMENTS
from tests.benchmarks.authors import Run


@pytest.fixture
def acl(tmp_path: Path) -> Path:
    for split in ("train", "dev", "test"):
        numbers = range(7)
        ids = {"request_id": [f"{split}::{i}" for i in numbers], "user_id": [f"{split} {i // 2}" for i in numbers]}
        titles = [(f'right "{i}" [1]', f"wrong {i}") for i in numbers]
        pairs = [pair if i % 2 else pair[::-1] for i, pair in enumerate(titles)]
        questions = [f'Which? Just answer with [1] or [2]. [1]: "{one}" [2]: "{two}"' for one, two in pairs]
        labels = ["[1]" if i % 2 else "[2]" for i in numbers]
        as_of = {"as_of": list(numbers)}
        pq.write_table(
            pa.table({**ids, "input": questions, "target": labels, **as_of}), tmp_path / f"which_{split}.parquet"
        )
        rows = {**ids, "input": ["Write."] * 7, "target": [right for right, _ in titles], **as_of}
        pq.write_table(pa.table(rows), tmp_path / f"next_title_{split}.parquet")
    return tmp_path


def experiment(acl: Path, question: str) -> Run:
    return Run(Namespace(acl=acl, out=acl / "out", question=question, split="dev", train_rows=4, every=3, llm=None))


def requests(acl: Path, question: str, split: str) -> list[dict[str, object]]:
    experiment(acl, question).write_requests()
    found: list[dict[str, object]] = pq.read_table(acl / "out" / question / f"{split}.parquet").to_pylist()
    return found


def test_the_other_title_is_rejected_and_every_third_request_is_evaluated(acl: Path) -> None:
    rows = requests(acl, "next_title", "test")
    assert [row["request_id"] for row in rows] == ["test::0", "test::3", "test::6"]
    assert [(row["target"], row["rejected"]) for row in rows] == [(f'right "{i}" [1]', f"wrong {i}") for i in (0, 3, 6)]


def test_training_requests_are_a_random_sample_that_every_run_repeats(acl: Path) -> None:
    first = requests(acl, "next_title", "train")
    assert len({row["request_id"] for row in first}) == 4
    assert first == requests(acl, "next_title", "train")


def test_with_labels_the_other_label_is_rejected(acl: Path) -> None:
    rows = requests(acl, "which", "dev")
    assert [(row["target"], row["rejected"]) for row in rows] == [("[2]", "[1]"), ("[1]", "[2]"), ("[2]", "[1]")]


def test_in_an_oracle_experiment_each_history_is_the_right_answer(acl: Path) -> None:
    rows = requests(acl, "which_oracle", "dev")
    assert all(row["user_id"] == row["request_id"] and "as_of" not in row for row in rows)
    histories = pq.read_table(acl / "out" / "which_oracle" / "histories.parquet").to_pylist()
    assert {"user_id": "dev::3", "behavior_id": "dev::3", "text": 'right "3" [1]'} in histories
    assert len(histories) == 4 + 3 + 3


def test_tables_with_different_requests_are_refused(acl: Path) -> None:
    table = pq.read_table(acl / "which_dev.parquet")
    pq.write_table(table.slice(1), acl / "which_dev.parquet")
    with pytest.raises(SystemExit, match="do not have the same requests"):
        requests(acl, "next_title", "dev")


@pytest.mark.parametrize("question", EXPERIMENTS)
def test_the_jobs_accept_the_flags_of_every_row(acl: Path, question: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong flag fails here, not after an hour of training."""
    configs = []

    def read(job: str, *flags: object) -> None:
        configs.append(read_config(import_module(f"jobs.{job}").Config, [str(flag) for flag in flags]))

    monkeypatch.setattr(authors, "run_job", read)
    run = experiment(acl, question)
    for name in run.rows.keys() - {"encoder"}:
        configs.clear()
        run.evaluate(name, seed=0)
        assert len(configs) == (2 if run.experiment.generate is None else 3), name
        assert len({config.plug for config in configs}) == 1, name
