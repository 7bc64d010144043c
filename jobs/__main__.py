"""The command `persona-plug JOB [OPTIONS]`, which is also `python -m jobs JOB [OPTIONS]`: runs a job, or lists them."""

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import persona
from jobs.runtime import catalog, log
from jobs.runtime.cli import run
from jobs.runtime.usage_messages import did_you_mean


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job that the first argument names; returns the exit code."""
    program = "python -m jobs" if Path(sys.argv[0]).name == "__main__.py" else Path(sys.argv[0]).name
    first, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    names = catalog.job_names()
    if first in names:
        module = import_module(f"jobs.{first}")
        return run(module.Config, module.main, rest, program=f"{program} {first}")
    if first in ("", "--help", "-h"):
        print(_help(program, names))
        # A call without a job did nothing, and a scheduler should notice.
        return 0 if first else 2
    if first == "--version":
        print(f"persona-plug {persona.__version__}")
        return 0
    what = "flag" if first.startswith("-") else "job"
    hint = did_you_mean(first, ["--help", "--version"] if what == "flag" else names)
    log.say(f"unknown {what} {first}{hint}", level="error")
    return 2


def _help(program: str, names: Sequence[str]) -> str:
    width = max(map(len, names))
    lines = [f"  {name:<{width}}  {catalog.job_summary(name)}" for name in names]
    return "\n".join(
        [
            f"Usage: {program} JOB [OPTIONS]",
            "",
            "Jobs:",
            *lines,
            "",
            f"`{program} JOB --help` shows the options of a job, `{program} --version` the version.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
