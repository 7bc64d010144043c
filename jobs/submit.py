"""Submit a command to a Ray cluster, wait for it, and end with its exit code: what a scheduler calls.

`ray job submit` ends with 1 whatever the command's code was, with 0 for a job that was stopped, and with 0 when only
the connection that follows the log is lost. This asks the cluster how the job is doing until it is over. An id that is
already there is not started again: this waits for that job instead, so a repeated schedule does nothing twice.
"""

import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from jobs.runtime import cli, log
from jobs.runtime.cli import Summary
from persona.errors import PersonaError, UsageError
from persona.options import check_at_least

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

AnswerT = TypeVar("AnswerT")

_POLL_S = 2.0
# Of the job's own output: its summary, or the end of a traceback.
_LAST_LINES = 60


@dataclass(frozen=True, kw_only=True)
class Config:
    """What `jobs.submit` can be told."""

    entrypoint: str
    """The command, as a shell takes it: 'python -m jobs.embed --histories ... --store ...'."""
    id: str
    """Id of the job, made of the time it is due: the same id is never started twice."""
    address: str = ""
    """Of the cluster's dashboard, http://host:8265; default RAY_API_SERVER_ADDRESS."""
    working_dir: str | None = None
    """Folder that is sent along and in which the command runs; without it the code of the nodes' image is used."""
    patience_s: int = 600
    """How long a cluster that does not answer is asked again, as while its head is being replaced."""
    dry_run: bool = False
    """Say what would be submitted, and submit nothing."""

    def __post_init__(self) -> None:
        """Refuses what can be refused without a cluster."""
        check_at_least(self, 0, "patience_s")
        if not self.entrypoint.strip():
            raise UsageError("--entrypoint '': must be a command")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:-]*", self.id):
            raise UsageError(f"--id {self.id!r}: must be made of letters, digits and . _ : -")


def main(config: Config) -> Summary:
    """Runs the job."""
    if config.dry_run:
        would = f"submit {config.entrypoint!r} as {config.id}, unless it is there"
        return Summary(table=[("would", would)], result={"dry_run": True, "would": would})
    started = time.perf_counter()
    client = _retry_while_away(lambda: _client(config), config.patience_s)
    is_new = _submit(client, config)
    said = "submitted" if is_new else "is there already and is not started again; waiting for it"
    log.say(f"submit: {config.id} {said}")
    details = _wait(client, config)
    lines = _retry_while_away(lambda: client.get_job_logs(config.id), config.patience_s).splitlines()
    print("\n".join(lines[-_LAST_LINES:]), file=sys.stderr, flush=True)
    status, code = str(details.status.value), _exit_code(details)
    result = {
        "job": "submit",
        "id": config.id,
        "started": is_new,
        "status": status,
        "exit_code": code,
        "result": _last_json(lines),
        "seconds": round(time.perf_counter() - started, 1),
    }
    table = [("id", config.id), ("status", f"{status}, exit code {code}"), ("seconds", f"{result['seconds']:,}")]
    if code and details.message:
        table.append(("reason", str(details.message).strip().splitlines()[0]))
    return Summary(table=table, result=result, exit_code=code)


def _client(config: Config) -> "JobSubmissionClient":
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(config.address or None)


def _submit(client: "JobSubmissionClient", config: Config) -> bool:
    """Whether the job was started now; False where its id is known."""
    environment: dict[str, Any] = {"working_dir": config.working_dir} if config.working_dir else {}

    def submit() -> bool:
        try:
            client.submit_job(entrypoint=config.entrypoint, submission_id=config.id, runtime_env=environment)
        except RuntimeError as error:
            # An earlier run of this schedule; or the answer to our own request was lost, and this is the second one.
            if "already exists" in str(error):
                return False
            raise
        return True

    return _retry_while_away(submit, config.patience_s)


def _wait(client: "JobSubmissionClient", config: Config) -> Any:
    """What the cluster knows of the job once it is over."""
    while True:
        details = _retry_while_away(lambda: client.get_job_info(config.id), config.patience_s)
        if details.status.is_terminal():
            return details
        time.sleep(_POLL_S)


def _retry_while_away(ask: Callable[[], AnswerT], patience_s: float) -> AnswerT:
    """What the cluster answers, asked again while it is away. A refusal is final."""
    from ray.exceptions import AuthenticationError

    until = time.monotonic() + patience_s
    while True:
        try:
            return ask()
        except AuthenticationError as error:
            raise UsageError(
                "the cluster wants its token, and the one given is none or another: set RAY_AUTH_MODE=token and "
                f"RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN ({str(error).strip().splitlines()[0]})"
            ) from error
        except (OSError, RuntimeError) as error:
            if re.search(r"status code 4\d\d|\b4\d\d Client Error", str(error)):
                raise UsageError(f"the cluster refuses: {str(error).strip()}") from error
            if time.monotonic() > until:
                raise PersonaError(
                    f"the cluster has not answered for {patience_s} s (--patience-s); is --address or "
                    f"RAY_API_SERVER_ADDRESS right, and its head alive? ({error})"
                ) from error
            time.sleep(_POLL_S)


def _exit_code(details: Any) -> int:
    """0 for a job that succeeded; what its process ended with, or 1 when it was stopped, killed, or never began."""
    if details.status.value == "SUCCEEDED":
        return 0
    return details.driver_exit_code if details.driver_exit_code and details.driver_exit_code > 0 else 1


def _last_json(lines: list[str]) -> Any:
    """The job's own result: the last line that is a JSON object, or None."""
    for line in reversed(lines[-_LAST_LINES:]):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except json.JSONDecodeError:
                continue
    return None


if __name__ == "__main__":
    sys.exit(cli.run(Config, main))
