"""Tests for `--profile`: which stage is the bottleneck, and that jobs report real numbers."""

from pathlib import Path
from typing import Any

import pytest

from jobs import embed, generate
from jobs.runtime import profile
from jobs.runtime.cli import Summary
from tests.jobs.conftest import Job, behaviors, requests, write


def found(stages: dict[str, tuple[float, int]], *, wall_s: float, waited_s: float) -> tuple[str, str]:
    """The name of the bottleneck and its line in the summary; the first stage is the model's."""
    made = [
        profile.Stage(name=name, seconds=seconds, n_parallel=n, advice=f"help {name}")
        for name, (seconds, n) in stages.items()
    ]
    before = Summary(table=[("rows", "7")], result={"rows": 7})
    after = profile.added(before, made, wall_s=wall_s, waited_s=waited_s, starving="feed it")
    assert before == Summary(table=[("rows", "7")], result={"rows": 7})
    assert after.result["rows"] == 7
    assert [row[0] for row in after.table] == ["rows", "time spent", "bottleneck"]
    return after.result["profile"]["bottleneck"], after.table[-1][1]


@pytest.mark.parametrize(
    ("stages", "wall_s", "waited_s", "name", "text"),
    [
        ({"encode": (180.0, 2), "read": (40.0, 4)}, 100.0, 10.0, "encode", "encode, busy 95% of the time: help encode"),
        ({"encode": (40.0, 2), "read": (300.0, 4)}, 100.0, 140.0, "read", "read: the model waited 78% of"),
        ({"encode": (40.0, 2), "read": (100.0, 4)}, 100.0, 140.0, "waiting", "the model waited 78% of the"),
        ({"encode": (8.0, 2), "read": (1.0, 4)}, 10.0, 0.5, "start", "the start and the end of the run"),
        ({"encode": (0.0, 2), "read": (1.0, 4)}, 10.0, 0.0, "start", "the start and the end of the run"),
    ],
)  # fmt: skip
def test_the_bottleneck_comes_with_advice(stages, wall_s, waited_s, name, text):
    got = found(stages, wall_s=wall_s, waited_s=waited_s)
    assert got[0] == name
    assert got[1].startswith(text)
    assert got[1].endswith(("help encode", "help read", "feed it", "put more work into one run"))


def test_jobs_report_the_seconds_of_each_stage(
    do: Job, store: Path, plug: str, models: dict[str, str], tmp_path: Path
) -> None:
    histories, new = write(str(tmp_path / "histories.parquet"), behaviors()), str(tmp_path / "new-store")
    flags: dict[str, Any] = {"histories": histories, "store": new, "encoder": models["encoder"], "max_tokens": 32}
    done = do(embed, profile=True, actors=1, **flags)
    spent = done.result["profile"]["seconds"]
    assert set(spent) == {"encode", "read", "compare", "tokenize", "write", "commit", "waiting"}
    assert all(seconds > 0 for seconds in spent.values())
    assert spent["encode"] + spent["waiting"] < done.result["seconds"]

    source = write(str(tmp_path / "requests.parquet"), requests(3, 2))
    answering = {"beams": 1, "max_new_tokens": 4, "precision": "fp32", "actors": 1, "profile": True}
    done = do(generate, requests=source, store=str(store), plug=plug, **answering)
    spent = done.result["profile"]["seconds"]
    assert set(spent) == {"generate", "read", "join", "write", "commit", "waiting"}
    assert all(seconds > 0 for seconds in spent.values())
    assert done.result["profile"]["bottleneck"] in {*spent, "start"}
