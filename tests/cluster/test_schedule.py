"""`cluster/schedule`: the commands of steps.sh, how its exit codes decide, and the files of Airflow and Argo."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.manifests import CLUSTER, documents, every, parse_job

FOLDER = CLUSTER / "schedule"
STEPS = FOLDER / "steps.sh"
DAY = "2026-12-06"
SCHEDULES = ("nightly", "weekly")
# Prints the DAGs as Airflow itself reads the folder: by id, its errors, schedule, and tasks with what follows them.
READ_DAGS = """
import json, sys
from airflow.dag_processing.dagbag import DagBag
bag = DagBag(dag_folder=sys.argv[1])
dags = {
    name: {
        "order": [task.task_id for task in dag.topological_sort()],
        "next": {task.task_id: sorted(task.downstream_task_ids) for task in dag.tasks},
        "commands": {task.task_id: task.bash_command for task in dag.tasks},
        "skips": {task.task_id: list(task.skip_on_exit_code) for task in dag.tasks},
        "rules": sorted({task.trigger_rule.value for task in dag.tasks}),
    }
    for name, dag in bag.dags.items()
}
print(json.dumps({"errors": bag.import_errors, "dags": dags}))
"""


def steps(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(STEPS), *words]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


def listed(schedule: str) -> list[str]:
    return steps("--list", schedule).stdout.split()


def test_the_weekly_steps_come_in_their_order() -> None:
    assert listed("weekly") == ["refresh", "make_requests", "train", "evaluate", "promote", "generate"]
    assert set(listed("nightly")) < set(listed("weekly"))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_command_parses_and_has_the_day_in_it(schedule: str) -> None:
    lines = steps(schedule, f"{DAY}T02:00:00Z", WHERE="print").stdout.splitlines()
    configs = [parse_job(line) for line in lines]
    assert len(configs) == len(listed(schedule)) + (schedule == "weekly")  # requests for training and for the test
    assert {config.store for config in configs if hasattr(config, "store")} == {"s3://corp/persona/store"}
    if schedule == "weekly":
        *_, train, evaluate, promote, generate = configs
        assert train.plug == evaluate.plug == promote.plug == f"s3://corp/persona/plugs/{DAY}"
        assert promote.evaluation == evaluate.out
        assert generate.plug == "live"


@pytest.mark.parametrize(
    ("given", "day"),
    [
        (DAY, DAY),
        (f"{DAY}T02:00:00Z", DAY),
        ("weekly-29942040", DAY),  # the Job of a CronJob: minutes since 1970
        ("weekly-by-hand-1", "weekly-by-hand-1"),
    ],
)
def test_the_day_is_that_when_the_schedule_was_due(given: str, day: str) -> None:
    (line,) = steps("train", given, WHERE="print").stdout.splitlines()
    assert parse_job(line).run == day


def test_what_is_not_a_schedule_or_lacks_its_day_is_refused() -> None:
    unknown = steps("monthly", DAY)
    assert unknown.returncode == 2 and "not 'monthly'" in unknown.stderr
    dayless = steps("weekly")
    assert dayless.returncode == 2 and "give the day" in dayless.stderr


@pytest.fixture
def jobs_that_end_with(tmp_path: Path) -> Any:
    """A `python` that only notes which job it was called for, and ends as it is told."""

    def make(**codes: int) -> tuple[dict[str, str], Path]:
        log = tmp_path / "log"
        cases = "\n".join(f'*"jobs.{job} "*) exit {code} ;;' for job, code in codes.items())
        script = tmp_path / "python"
        script.write_text(f'#!/bin/sh\necho "$*" >> {log}\ncase "$* " in\n{cases}\nesac\n')
        script.chmod(0o755)
        return {"PATH": f"{tmp_path}:{os.environ['PATH']}"}, log

    return make


def ran(log: Path) -> list[str]:
    """The ids of the jobs that were submitted."""
    return [line.split("--id ")[1].split()[0] for line in log.read_text().splitlines()]


def test_a_step_that_fails_ends_the_schedule_with_its_exit_code(jobs_that_end_with: Any) -> None:
    environment, log = jobs_that_end_with(train=3)
    done = steps("weekly", DAY, **environment)
    assert (done.returncode, done.stderr) == (3, "steps.sh: train ended with 3\n")
    assert ran(log) == [f"{one}-{DAY}" for one in ("refresh", "requests-train", "requests-held-out", "train")]


def test_requests_that_fail_end_the_schedule_at_once(jobs_that_end_with: Any) -> None:
    environment, log = jobs_that_end_with(make_requests=2)
    assert steps("weekly", DAY, **environment).returncode == 2
    assert ran(log) == [f"refresh-{DAY}", f"requests-train-{DAY}"]


def test_a_refused_plug_does_not_stop_the_answers(jobs_that_end_with: Any) -> None:
    environment, log = jobs_that_end_with(plugs=4)
    done = steps("weekly", DAY, **environment)
    assert (done.returncode, done.stderr) == (4, "steps.sh: promote ended with 4\n")
    assert ran(log)[-2:] == [f"promote-{DAY}", f"generate-{DAY}"]


def test_a_schedule_without_failures_ends_with_0(jobs_that_end_with: Any) -> None:
    environment, log = jobs_that_end_with()
    assert steps("nightly", DAY, **environment, GPUS="4").returncode == 0
    assert ran(log) == [f"refresh-{DAY}", f"generate-{DAY}"]
    assert "--entrypoint env PERSONA_GPUS=4 python -m jobs.embed " in log.read_text()


def test_cron_runs_every_day_once() -> None:
    lines = [line for line in (FOLDER / "crontab").read_text().splitlines() if "steps.sh" in line]
    days = [day for line in lines for day in every_day(line.split()[4])]
    assert sorted(days) == list(range(7))
    for line in lines:
        words = line.split()
        assert (words[5], words[6] in SCHEDULES) == ("cluster/schedule/steps.sh", True)
        assert words[7:] == ['"$(date', "-u", '+\\%F)"']


def every_day(text: str) -> list[int]:
    low, _, high = text.partition("-")
    return list(range(int(low), int(high or low) + 1))


def airflow() -> str:
    """A Python with Airflow: this one, or that of AIRFLOW_PYTHON, since Airflow pins many packages."""
    if found := os.environ.get("AIRFLOW_PYTHON"):
        return found
    if importlib.util.find_spec("airflow") is None:
        pytest.skip("Airflow is not installed; give AIRFLOW_PYTHON, a Python of its own that has apache-airflow")
    return sys.executable


def test_airflow_reads_both_schedules_from_the_steps(tmp_path: Path) -> None:
    environment = {**os.environ, "AIRFLOW_HOME": str(tmp_path), "AIRFLOW__CORE__LOAD_EXAMPLES": "false"}
    environment.pop("PYTHONPATH", None)
    command = [airflow(), "-c", READ_DAGS, str(FOLDER)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["errors"] == {}
    assert set(found["dags"]) == {f"persona_plug_{schedule}" for schedule in SCHEDULES}
    for schedule in SCHEDULES:
        dag = found["dags"][f"persona_plug_{schedule}"]
        names = listed(schedule)
        assert dag["order"] == names
        assert dag["next"] == {name: names[i + 1 : i + 2] for i, name in enumerate(names)}
        assert dag["commands"] == {name: f"bash {STEPS} {name} {{{{ ds }}}}" for name in names}
        assert set(map(tuple, dag["skips"].values())) == {(4,)}
        assert dag["rules"] == ["none_failed"]


def argo() -> dict[str, dict[str, Any]]:
    """The documents of argo.yaml, by name."""
    return {one["metadata"]["name"]: one for one in documents(FOLDER / "argo.yaml")}


def test_argo_accepts_every_field() -> None:
    models = pytest.importorskip("hera.workflows.models", reason="Argo's model is not installed: pip install hera")
    for name, document in argo().items():
        read = getattr(models, document["kind"]).model_validate(document)
        # Unknown fields would be gone.
        assert json.loads(read.model_dump_json(by_alias=True, exclude_none=True)) == document, name


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_argo_runs_the_steps_in_their_order(schedule: str) -> None:
    (template,) = argo()[f"persona-plug-{schedule}"]["spec"]["workflowSpec"]["templates"]
    found = [one for (one,) in template["steps"]]
    given = [{p["name"]: p["value"] for p in one["arguments"]["parameters"]} for one in found]
    names = [one["step"] for one in given if "step" in one]
    assert names == listed(schedule)
    assert {one["day"] for one in given if "day" in one} == {"{{workflow.scheduledTime}}"}
    goes_on = {one["name"] for one in found if "continueOn" in one}
    assert goes_on == ({"promote"} if schedule == "weekly" else set())
    (container,) = [one for one in every("container", argo()["persona-plug-step"]) if "args" in one]
    assert container["command"] == ["bash", "/etc/persona-plug/steps.sh"]
