"""What a job says on stderr: lines for people, or with PERSONA_LOG=json an object a line for programs that gather logs.

The last line of stdout, with the job's result, is JSON in any case.
"""

import json
import os
import sys
from datetime import UTC, datetime


def in_json() -> bool:
    """Whether lines are to be JSON."""
    return os.environ.get("PERSONA_LOG", "") == "json"


def say(message: str, *, level: str = "info", trace: str | None = None) -> None:
    """A message on stderr, with the traceback of what went wrong in front of it when there is one."""
    if in_json():
        fields = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "level": level, "message": message}
        line = json.dumps(fields if trace is None else {**fields, "traceback": trace})
    else:
        line = f"{trace or ''}{'error: ' if level == 'error' else ''}{message}"
    print(line, file=sys.stderr, flush=True)
