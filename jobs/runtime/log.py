"""Log lines on stderr: plain text for people, or with PERSONA_LOG=json one JSON object a line for log collectors.

The last line of stdout, with the job's result, is JSON either way.
"""

import json
import os
import sys
from datetime import UTC, datetime


def in_json() -> bool:
    """Whether lines are JSON."""
    return os.environ.get("PERSONA_LOG", "") == "json"


def say(message: str, *, level: str = "info", trace: str | None = None) -> None:
    """Writes a message to stderr, after its traceback if there is one."""
    if in_json():
        fields = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "level": level, "message": message}
        line = json.dumps(fields if trace is None else {**fields, "traceback": trace})
    else:
        line = f"{trace or ''}{'error: ' if level == 'error' else ''}{message}"
    if "tqdm" in sys.modules:  # a bar may be on the terminal: write above it
        from tqdm import tqdm

        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()
    else:
        print(line, file=sys.stderr, flush=True)
