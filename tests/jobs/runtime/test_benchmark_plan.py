"""What a benchmark knows before it works: estimates, the control's settings, and requests that cannot be used."""

from pathlib import Path
from typing import Any

import pytest

from jobs import train
from jobs.runtime import benchmark_plan
from jobs.runtime.cli import Summary
from jobs.runtime.inputs import Requests, find_requests
from jobs.runtime.job_options import InputRows, RequestFormat
from persona.errors import UsageError
from persona.options import CostOptions, PlugOptions, RetrievalOptions, TrainingOptions
from tests.jobs.conftest import requests, write


def training(llm: str, **changes: Any) -> train.Config:
    options = TrainingOptions(epochs=2, global_batch=16, alignment=0.12, contrast=0.5)
    places: dict[str, Any] = dict.fromkeys(("requests", "store", "plug", "run", "runs"), "x")
    return train.Config(**places, llm=llm, training=options, validation_fraction=0.1, **changes)


def test_the_plugs_differ_in_histories_and_texts_alone() -> None:
    recipe = PlugOptions(weights="attention", persona_tokens=4, learn_temperature=True)
    for row in benchmark_plan.ROWS:
        plug, options = row.plug(recipe), row.training(TrainingOptions(alignment=0.12, contrast=0.5, seed=3))
        assert (plug.n_soft, options.seed, options.epochs) == (recipe.n_soft, 3, 2)
        assert (options.empty_history == 1) == (not row.histories)
        assert (options.alignment == 0.12) == (row.histories and not row.texts)
        assert (plug == recipe) == row.histories


def test_an_estimate_rests_on_requests_steps_and_the_slowest_rate(models: dict[str, str]) -> None:
    config = training(models["llama"], retrieval=RetrievalOptions(), rows=InputRows(limit=1000))
    assert benchmark_plan.estimate(config, None, known=None, rates=[]) is None
    one = benchmark_plan.estimate(config, 5000, known=None, rates=[])
    assert one is not None
    assert (one.steps, one.seconds) == (900 // 16 * 2, None)
    assert one.tokens == 2 * 900 * (config.plug_options.n_soft + 256 + 256)
    assert one.tflop > 0
    known = benchmark_plan.estimate(config, 5000, known={"requests": 160}, rates=[4.0, 2.0])
    assert known is not None
    assert (known.steps, known.seconds) == (20, 160.0)


def test_a_plan_prices_only_what_is_left(models: dict[str, str]) -> None:
    trainings = {name: training(models["llama"]) for name in ("plug-0", "tuning-0")}
    steps: dict[str, tuple[str, dict[str, Any] | None]] = {
        "make_requests": ("make requests", {"train_requests": 1000}),
        "train-plug-0": ("the plug", None),
        "train-tuning-0": ("prompt tuning", None),
    }
    both = benchmark_plan.plan("out", steps, trainings, CostOptions()).result["cost"]["tflop"]
    steps["train-plug-0"] = ("the plug", {"requests": 900, "requests_per_s": 3.0})
    plan = benchmark_plan.plan("out", steps, trainings, CostOptions())
    assert plan.result["cost"]["tflop"] == pytest.approx(both / 2, rel=0.05)
    assert dict(plan.table)["train-tuning-0"].startswith("to do: prompt tuning; about 112 steps")


@pytest.mark.parametrize("counts", [{}, {"train_requests": 3}, {"held_out_requests": 3, "train_requests": 0}])
def test_requests_on_one_side_only_are_refused(counts: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="to train on and"):
        benchmark_plan.checked_requests(Summary(table=[], result=counts))


def test_measured_users_must_not_be_trained_on(tmp_path: Path) -> None:
    def some(name: str, first: int, n: int) -> Requests:
        uri = write(str(tmp_path / name), requests(n_users=n, first_user=first))
        return find_requests(uri, RequestFormat(), flag="--requests", needs_target=True)

    train_requests = some("train.parquet", 0, 4)
    assert benchmark_plan.check_users(train_requests, some("test.jsonl", 4, 2)).exit_code == 0
    with pytest.raises(UsageError, match="1 of its users"):
        benchmark_plan.check_users(train_requests, some("both.jsonl", 3, 2))
