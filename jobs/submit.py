"""Submit a command to a Ray cluster, wait for it, and exit with its exit code: the command for a scheduler.

`ray job submit` exits with 1 whatever the command's exit code was, with 0 for a job that was stopped, and with 0 when
it merely loses the connection that follows the log. `jobs.submit` asks the cluster for the job's status until the job
has ended. It does not start an id that exists already but waits for that job: a schedule that fires twice runs once. An
id that belongs to another command is refused, because that job's success would say nothing about this command.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from jobs.runtime import cli, log
from jobs.runtime.cli import Summary
from persona.errors import PersonaError, UsageError
from persona.option_checks import check_at_least

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

T = TypeVar("T")

_POLL_S = 2.0
_LAST_LINES = 60  # of the job's log: its summary, or the end of a traceback


@dataclass(frozen=True, kw_only=True)
class Config:
    """Configuration of jobs.submit."""

    entrypoint: str
    """The command, as for a shell: 'python -m jobs.embed --histories ... --store ...'."""
    id: str
    """Id of the job, derived from the time it is due, like refresh-2026-01-31: an id never starts twice."""
    address: str = ""
    """Address of the cluster's dashboard, http://host:8265; default RAY_API_SERVER_ADDRESS."""
    working_dir: str | None = None
    """Folder to upload and run the command in; leave it out to use the code in the nodes' image."""
    patience_s: int = 600
    """Seconds to wait for a cluster that does not answer; raise it if replacing a failed head takes longer."""
    dry_run: bool = False
    """Print what would be submitted, and submit nothing."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        check_at_least(self, 0, "patience_s")
        if not self.entrypoint.strip():
            raise UsageError("--entrypoint '': must be a command")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:-]*", self.id):
            raise UsageError(
                f"--id {self.id!r}: must start with a letter or digit and contain only letters, digits and . _ : -"
            )


def main(config: Config) -> Summary:
    """Runs the job."""
    if config.dry_run:
        would = f"submit {config.entrypoint!r} as {config.id}, unless that id exists"
        return Summary(table=[("would", would)], result={"dry_run": True, "would": would})
    started = time.perf_counter()
    client = _answer(config, lambda: _client(config))
    is_new = _submit(client, config)
    if not is_new:
        _check_same_command(client, config)
    log.say(f"submit: {config.id} {'submitted' if is_new else 'exists and is not started again; waiting for it'}")
    details = _wait(client, config)
    lines = _answer(config, lambda: client.get_job_logs(config.id)).splitlines()
    print("\n".join(lines[-_LAST_LINES:]), file=sys.stderr, flush=True)
    status, exit_code = str(details.status.value), _exit_code(details)
    result = {
        "job": "submit",
        "id": config.id,
        "started": is_new,
        "status": status,
        "exit_code": exit_code,
        "result": _last_json(lines),
        "seconds": round(time.perf_counter() - started, 1),
    }
    table = [("id", config.id), ("status", f"{status}, exit code {exit_code}"), ("seconds", f"{result['seconds']:,}")]
    if exit_code and details.message:
        table.append(("reason", str(details.message).strip().splitlines()[0]))
    return Summary(table=table, result=result, exit_code=exit_code)


def _client(config: Config) -> "JobSubmissionClient":
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(config.address or None)


def _submit(client: "JobSubmissionClient", config: Config) -> bool:
    """Submit the job; False if its id exists."""
    environment: dict[str, Any] = {"working_dir": config.working_dir} if config.working_dir else {}

    def submit() -> bool:
        try:
            client.submit_job(entrypoint=config.entrypoint, submission_id=config.id, runtime_env=environment)
        except RuntimeError as error:
            # From an earlier run of this schedule, or from an attempt of ours whose response was lost.
            if "already exists" in str(error):
                return False
            raise
        return True

    return _answer(config, submit)


def _check_same_command(client: "JobSubmissionClient", config: Config) -> None:
    """Raises UsageError if the id belongs to a job with another entrypoint."""
    existing = _answer(config, lambda: client.get_job_info(config.id))
    if existing.entrypoint != config.entrypoint:
        raise UsageError(
            f"--id {config.id!r} belongs to another command, {existing.entrypoint!r} ({existing.status.value}); "
            "nothing was submitted: give this command an id of its own"
        )


def _wait(client: "JobSubmissionClient", config: Config) -> "JobDetails":
    """The job's details after it has ended."""
    while True:
        details = _answer(config, lambda: client.get_job_info(config.id))
        if details.status.is_terminal():
            return details
        time.sleep(_POLL_S)


def _answer(config: Config, request: Callable[[], T]) -> T:
    """The cluster's answer to a request, which is repeated while the cluster is away.

    Raises:
        UsageError: the cluster refuses the request; it is not repeated.
        PersonaError: the cluster has not answered for `--patience-s`.
    """
    from ray.exceptions import AuthenticationError

    from persona.storage.retry import retry_transient

    def ask() -> T:
        try:
            return request()
        except AuthenticationError as error:
            raise UsageError(
                "the cluster requires a token, and none or a wrong one was given: set RAY_AUTH_MODE=token and "
                f"RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN ({str(error).strip().splitlines()[0]})"
            ) from error
        except (OSError, RuntimeError) as error:
            if re.search(r"status code 4\d\d|\b4\d\d Client Error", str(error)):
                raise UsageError(f"the cluster refuses: {str(error).strip()}") from error
            raise

    return retry_transient(
        ask,
        "the cluster does not answer; check that --address or RAY_API_SERVER_ADDRESS is right and its head is running, "
        f"or raise --patience-s {config.patience_s}",
        is_transient=lambda error: isinstance(error, OSError | RuntimeError),
        give_up_s=config.patience_s,
        pauses_s=(_POLL_S, _POLL_S),
        error_class=PersonaError,
    )


def _exit_code(details: "JobDetails") -> int:
    """0 if the job succeeded; else its exit code, or 1 if it was stopped, was killed or never started."""
    if details.status.value == "SUCCEEDED":
        return 0
    return details.driver_exit_code if details.driver_exit_code and details.driver_exit_code > 0 else 1


def _last_json(lines: Sequence[str]) -> object:
    """The job's own result: the last line of its log that is a JSON object, or None."""
    for line in reversed(lines[-_LAST_LINES:]):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except json.JSONDecodeError:
                continue
    return None


if __name__ == "__main__":
    sys.exit(cli.run(Config, main))
