"""Runs a job from the command line: reads its config, prints its summary, and turns errors into exit codes.

A job prints a short table and, as the last line of stdout, one JSON object. An error becomes one line on stderr.
"""

import itertools
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from jobs.runtime import log
from jobs.runtime.configuration import read_config
from jobs.runtime.remote_errors import find_persona_error
from jobs.runtime.session import TERMINATED

ConfigT = TypeVar("ConfigT")

INTERRUPTED = 130  # what shells report for a process ended by Ctrl-C
_CONTINUES = "what is committed stays, and the same command continues from there"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a job did: rows of cells for people, `result` for programs, `exit_code` for schedulers."""

    table: Sequence[Sequence[str]]
    result: Mapping[str, Any]
    exit_code: int = 0


def run(
    config_type: type[ConfigT],
    main: Callable[[ConfigT], Summary],
    argv: Sequence[str] | None = None,
    *,
    program: str | None = None,
) -> int:
    """Reads a `config_type` from flags and file, passes it to `main`, prints the summary, returns the exit code.

    A PersonaError, also one that Ray brings back from a worker, ends as one message on stderr; `--verbose` (or
    PERSONA_VERBOSE=1) adds the traceback. Any other exception is a bug and passes through with its traceback. A Ray
    that `main` started is stopped. `program` is how the job was called, for the usage line.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    verbose = "--verbose" in arguments or os.environ.get("PERSONA_VERBOSE", "") not in ("", "0")
    ray_was_running = _ray_is_running()
    try:
        try:
            config = read_config(config_type, arguments, program=program)
            if config is None:  # --help
                return 0
            summary = main(config)
        finally:
            # A thread of Ray prints the workers' logs, which must not come after the JSON line.
            if not ray_was_running and _ray_is_running():
                sys.modules["ray"].shutdown()
    except KeyboardInterrupt:
        log.say(f"interrupted; {_CONTINUES}", level="warning")
        return INTERRUPTED
    except SystemExit as end:
        if end.code != TERMINATED:
            raise
        log.say(f"terminated; {_CONTINUES}", level="warning")
        return TERMINATED
    except Exception as error:
        known = find_persona_error(error)
        if known is None and not log.in_json():
            raise
        trace = "".join(traceback.format_exception(error)) if verbose or known is None else None
        log.say(str(known or repr(error)), level="error", trace=trace)
        return known.exit_code if known is not None else 1
    print_summary(summary)
    return summary.exit_code


def with_prompt_example(plan: Summary, example: str) -> Summary:
    """The summary of a dry run, with a line that shows what the LLM reads."""
    table = [*plan.table, ("the LLM reads", json.dumps(example, ensure_ascii=False))]
    return replace(plan, table=table, result={**plan.result, "prompt_example": example})


def print_summary(summary: Summary) -> None:
    """Prints the table with aligned columns, and then the result as one line of JSON, in which NaN is null."""
    columns = itertools.zip_longest(*summary.table, fillvalue="")
    widths = [max(map(len, column)) for column in columns]
    for row in summary.table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip())
    print(json.dumps(plain(summary.result), allow_nan=False), flush=True)


def plain(value: Any) -> Any:
    """The value in JSON's own types; a number that is not finite becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if hasattr(value, "item"):  # a NumPy scalar
        return plain(value.item())
    return str(value)


def _ray_is_running() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())
