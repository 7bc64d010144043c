"""Both schedules for Airflow 3: a task for each step of steps.sh, whose exit code decides.

Copy this file and steps.sh into the folder of DAGs. A refused plug (exit code 4) marks `promote` as skipped, and
`generate` answers with the live plug. Tasks are not retried: a job that was submitted once is not started again under
the same id, and the job itself is resumed by the next night.
"""

import subprocess
from datetime import UTC, datetime
from pathlib import Path

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG

STEPS = Path(__file__).with_name("steps.sh")
REFUSED = 4


def schedule(name: str, cron: str) -> DAG:
    """The DAG of a schedule: its steps one after the other."""
    listed = subprocess.run(["bash", STEPS, "--list", name], stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603, S607
    with DAG(
        dag_id=f"persona_plug_{name}",
        schedule=cron,
        start_date=datetime(2026, 1, 1, tzinfo=UTC),
        catchup=False,
        max_active_runs=1,
        default_args={"retries": 0},
    ) as dag:
        before = None
        for step in listed.stdout.split():
            task = BashOperator(
                task_id=step,
                bash_command=f"bash {STEPS} {step} {{{{ ds }}}}",
                append_env=True,
                skip_on_exit_code=REFUSED,
                trigger_rule="none_failed",
            )
            if before is not None:
                before >> task
            before = task
    return dag


nightly = schedule("nightly", "0 2 * * 1-6")
weekly = schedule("weekly", "0 2 * * 0")
