"""`benchmark` with tiny models on a real Ray and an object store: the whole table, resumed after it was cut off."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import benchmark, evaluate
from persona.storage import exists, list_files, read_bytes
from tests.jobs.conftest import TRAINING, Job, behaviors, requests, write

KINDS = ("own", "none", "other", "bare")
ROWS = {
    0: [*(f"plug/{kind}" for kind in KINDS), "tuning/none"],
    1: [*(f"plug-texts/{kind}" for kind in KINDS), "tuning-texts/none"],
}


@pytest.fixture(scope="module")
def recipe(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    training = {name: value for name, value in TRAINING.items() if name != "run"}
    sections = {
        "embed": {"encoder": models["encoder"], "pooling": "cls", "max_tokens": 32, "buckets": 2},
        "train": {**training, "llm": models["llama"], "validate_every": 4, "validation_fraction": 0.2, "epochs": 1},
    }
    file = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    file.write_text(yaml.safe_dump(sections))
    return str(file)


def flags(out: str, recipe: str, histories: str, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"histories": histories, "out": out, "recipe": recipe, "held_out": 0.3, "min_history": 1}
    return {**given, "max_a_user": 2, **changes}


@pytest.mark.parametrize("retrieve", [0, pytest.param(1, marks=pytest.mark.soak)], ids=["without texts", "with texts"])
def test_the_whole_table_and_its_verdict_after_a_run_that_was_cut_off(
    do: Job, s3: str, recipe: str, monkeypatch: pytest.MonkeyPatch, retrieve: int
) -> None:
    histories = write(f"{s3}/histories.jsonl", behaviors(n_users=12, n_each=4))
    out = f"{s3}/benchmark"
    run = flags(out, recipe, histories, **({"retrieve": 1, "retrieve_tokens": 8} if retrieve else {"retrieve": 0}))
    with monkeypatch.context() as patched:
        patched.setattr(evaluate, "main", lambda config: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            do(benchmark, **run)
    assert exists(f"{out}/steps/train-plug-0.json") and not exists(f"{out}/steps/evaluate-plug-0.json")

    plan = do(benchmark, **run, dry_run=True)
    assert plan.result["done"] == ["embed", "make_requests", "train-plug-0"]
    assert plan.result["trainings"]["train-tuning-0"]["steps"] == plan.result["trainings"]["train-plug-0"]["steps"]
    assert plan.result["trainings"]["train-tuning-0"]["seconds"] > 0
    lines = {line.split()[0]: line for line in plan.table.splitlines()}
    assert "done: the plug" in lines["train-plug-0"] and "to do: prompt tuning" in lines["train-tuning-0"]

    before = {file.uri: file.tag for file in list_files(f"{out}/plugs/plug-0")}
    done = do(benchmark, **run)
    assert done.code == 0
    assert "── train-plug-0: done before" in done.table
    assert {file.uri: file.tag for file in list_files(f"{out}/plugs/plug-0")} == before
    found = json.loads(read_bytes(f"{out}/comparison.json"))
    assert [f"{row['name']}/{row['persona']}" for row in found["rows"]] == ROWS[0] + (ROWS[1] if retrieve else [])
    assert {row["name"] for row in found["rows"] if row["trained_without_history"]} <= {"tuning", "tuning-texts"}
    assert found["against"] == "tuning/none"
    asked = [check["name"] for check in found["verdict"]["checks"]]
    assert asked == ["other", "tuning", *(["texts", "added"] if retrieve else [])]
    assert found["verdict"] == done.result["verdict"]
    assert all(row["ranking"] for row in found["rows"] if row["name"] == "plug" and row["persona"] == "own")
    assert found["verdict"]["conclusion"].encode() in read_bytes(f"{out}/comparison.html")

    other = do(benchmark, **{**run, "held_out": 0.4})
    assert (other.code, "--held-out was 0.3 and is 0.4" in other.said) == (2, True)


def test_no_plug_stops_earlier_than_another_whatever_the_recipe_says() -> None:
    config = benchmark.Config(histories="h", out="o", recipe="small")
    trainings = [benchmark._training(config, "o", row, 0) for row in benchmark.ROWS]
    assert {(one.patience, one.training.epochs, one.plug_options.persona_tokens) for one in trainings} == {(0, 10, 16)}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"held_out": 0.0}, "--held-out 0.0: must be above 0"),
    ({"requests": "r.jsonl"}, "--requests and --test-requests go together"),
    ({"seeds": (1, 1)}, "--seeds: give at least one, each once"),
    ({"llm": "/no/such/llm"}, "--llm"),
    ({"recipe": "acl_next_title/bets"}, "did you mean acl_next_title/best?"),
    ({"epochs": 0}, "--epochs"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_work_is_refused_before_any_work(
    refuse: Job, tmp_path: Path, recipe: str, change: dict[str, Any], message: str
) -> None:
    histories = write(str(tmp_path / "h.jsonl"), behaviors())
    done = refuse(benchmark, **{**flags(str(tmp_path / "out"), recipe, histories), **change})
    assert (done.code, message in done.said) == (2, True), done.said
    assert not (tmp_path / "out").exists()


def test_histories_without_timestamps_are_refused(refuse: Job, tmp_path: Path, recipe: str) -> None:
    rows = [{name: value for name, value in row.items() if name != "timestamp"} for row in behaviors()]
    histories = write(str(tmp_path / "h.jsonl"), rows)
    done = refuse(benchmark, **flags(str(tmp_path / "out"), recipe, histories))
    assert (done.code, "--columns timestamp=COLUMN" in done.said) == (2, True)


def test_a_dry_run_knows_every_step_and_writes_nothing(refuse: Job, tmp_path: Path, recipe: str) -> None:
    histories = write(str(tmp_path / "h.jsonl"), behaviors())
    done = refuse(benchmark, **flags(str(tmp_path / "out"), recipe, histories, seeds=(0, 1), retrieve=0, dry_run=True))
    assert (done.code, done.result["done"], done.result["train_requests"]) == (0, [], None)
    assert list(done.result["trainings"]) == [f"train-{name}-{seed}" for seed in (0, 1) for name in ("plug", "tuning")]
    assert not (tmp_path / "out").exists()


def test_own_requests_of_measured_users_must_not_be_trained_on(refuse: Job, tmp_path: Path, recipe: str) -> None:
    histories = write(str(tmp_path / "h.jsonl"), behaviors())
    given = {
        "requests": write(str(tmp_path / "train.jsonl"), requests(n_users=4)),
        "test_requests": write(str(tmp_path / "test.jsonl"), requests(n_users=2, first_user=3)),
        "store": str(tmp_path / "store"),
    }
    done = refuse(benchmark, **flags(str(tmp_path / "out"), recipe, histories, **given))
    assert (done.code, "1 of its users are in --requests, too" in done.said) == (2, True)
