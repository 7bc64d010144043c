"""Tests for the cost of a job, planned and spent: work from model sizes, hours from a speed, money from a price."""

from pathlib import Path
from typing import Any

import pytest

from jobs import embed, evaluate, generate, train
from jobs.runtime import cost
from jobs.runtime.cli import Summary
from jobs.runtime.session import Machines
from persona.options import CostOptions
from tests.jobs.conftest import TRAINING, Job, behaviors, requests, write

ON_GPUS, ON_CPUS = Machines(cores=8, gpus=4), Machines(cores=8, gpus=0)


def test_a_dry_run_shows_the_cost(refuse: Job, store: Path, plug: str, models: dict[str, str], tmp_path: Path) -> None:
    priced: dict[str, Any] = {"dry_run": True, "tflops": 1e-6, "gpu_hour_price": 2.0}
    source = write(str(tmp_path / "requests.jsonl"), requests())
    histories = write(str(tmp_path / "histories.jsonl"), behaviors())
    plans = [
        refuse(embed, histories=histories, store=store, encoder=models["encoder"], max_tokens=32, **priced),
        refuse(generate, requests=source, store=store, plug=plug, **priced),
        refuse(evaluate, requests=source, store=store, plug=plug, out=tmp_path / "report", **priced),
        refuse(
            train,
            **TRAINING,
            requests=source,
            store=store,
            plug=tmp_path / "plug",
            runs=tmp_path / "runs",
            llm=models["llama"],
            **priced,
        ),
    ]
    for done in plans:
        assert done.code == 0, done.said
        found = done.result["cost"]
        # `tflop` is rounded to three decimals.
        assert found["gpu_hours"] == pytest.approx(found["tflop"] / 1e-6 / 3600, abs=0.0005 / 1e-6 / 3600)
        assert found["gpu_hours"] > 0
        assert found["price"] == pytest.approx(2.0 * found["gpu_hours"], abs=1e-3)
        assert "at your price" in done.table


def test_without_a_speed_neither_hours_nor_price_are_shown(refuse: Job, models: dict[str, str], tmp_path: Path) -> None:
    histories = write(str(tmp_path / "histories.jsonl"), behaviors())
    store = tmp_path / "store"
    done = refuse(embed, histories=histories, store=store, encoder=models["encoder"], dry_run=True, gpu_hour_price=1.0)
    assert done.result["cost"].keys() == {"tflop"} and "--tflops" in done.table


def test_hours_of_waiting_gpus_count() -> None:
    done = cost.spent(
        Summary(table=[], result={}),
        CostOptions(gpu_hour_price=2.5),
        ON_GPUS,
        n_gpus=4,
        seconds=1800.0,
        flops=90e15,
        model_s=4000.0,
    )
    assert done.result["cost"] == {"gpu_hours": 2.0, "price": 5.0, "tflops": 22.5}


def test_a_run_on_cpus_has_a_speed_but_no_gpu_hours() -> None:
    empty, options = Summary(table=[], result={}), CostOptions(gpu_hour_price=2.5)
    assert cost.spent(empty, options, ON_CPUS, n_gpus=4, seconds=9.0) == empty
    found = cost.spent(empty, options, ON_CPUS, n_gpus=4, seconds=9.0, flops=9e12, model_s=3.0)
    assert found.result["cost"] == {"tflops": 3.0}


def test_a_model_of_unknown_size_has_no_cost() -> None:
    assert cost.known(lambda: {}["hidden_size"]) == 0.0
    empty = Summary(table=[], result={})
    assert cost.planned(empty, CostOptions(), flops=0.0, if_all="") == empty


@pytest.mark.parametrize("flag", ["gpu_hour_price", "tflops"])
def test_a_price_or_a_speed_of_zero_is_refused(refuse: Job, flag: str) -> None:
    done = refuse(embed, histories="a", store="b", **{flag: 0})
    assert done.code == 2 and f"--{flag.replace('_', '-')} 0" in done.said
