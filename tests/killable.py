"""Run a job that logs what its actors do, and kills its driver at a chosen commit.

python -m tests.killable KILL JOB FLAGS...    KILL: never, (before|after)[-replace|-sources]:N, or ending:MS

The driver dies before or after its Nth commit; with `replace`, only commits that remove files are counted, with
`sources`, only those of that table. With `ending`, it dies so many milliseconds after the last rows have reached it.
For each block that an actor begins, a line with the number of its rows goes to `work.log` next to the store.
"""

import importlib
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from jobs import embed, generate
from jobs.runtime import cli, commits

LOG = "work.log"
BLOCK_S = 0.6  # minimum time per block: with a tiny model alone, a run would be over before anything could be killed


def log_block(store: str, n_rows: int) -> None:
    """Append a line in one small write, so that lines of several processes do not mix."""
    log = os.open(Path(store).parent / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(log, f"{n_rows}\n".encode())
    os.close(log)


class CountingEncode(embed.Encode):
    """The encoder's actor; `gone` rows need no work."""

    def __init__(self, config: embed.Config, *settings: Any, **more: Any) -> None:
        super().__init__(config, *settings, **more)
        self.store = config.store

    def __call__(self, behaviors: Any) -> Any:
        log_block(self.store, len(behaviors) - behaviors["text"].null_count)
        time.sleep(BLOCK_S)
        return super().__call__(behaviors)


class CountingGenerate(generate.Generate):
    """The LLM's actor."""

    def __init__(self, config: generate.Config, *settings: Any, **more: Any) -> None:
        super().__init__(config, *settings, **more)
        self.store = config.store

    def __call__(self, requests: Any) -> Any:
        log_block(self.store, requests.num_rows)
        time.sleep(BLOCK_S)
        return super().__call__(requests)


def kill_at(kill: str) -> None:
    """Make this process kill itself at that commit."""
    from persona.store.table import Table

    when, _, number = kill.partition(":")
    if when == "ending":
        kill_while_ending(int(number) / 1000)
        return
    original, seen = Table.commit, [0]

    def commit(table: Table, add: Any = (), remove: Any = (), **more: Any) -> None:
        counts = bool(remove) if "replace" in when else bool(add or remove)
        counts = counts and ("sources" not in when or table.name == "sources")
        seen[0] += counts
        now = counts and seen[0] == int(number)
        if now and when.startswith("before"):
            os.kill(os.getpid(), signal.SIGKILL)
        original(table, add, remove, **more)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)

    Table.commit = commit  # type: ignore[method-assign]


def kill_while_ending(after_s: float) -> None:
    """Make this process kill itself that long after it has been given the last rows to commit."""
    original = commits.Committer.__exit__

    def ending(committer: commits.Committer, *error: Any) -> None:
        timer = threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True  # a run that has ended by then has not been killed
        timer.start()
        original(committer, *error)

    commits.Committer.__exit__ = ending  # type: ignore[method-assign]


def main() -> int:
    """Runs the job."""
    from tests import killable  # workers import the classes from here, because they have another __main__

    kill, name, *flags = sys.argv[1:]
    embed.Encode = killable.CountingEncode  # type: ignore[misc]
    generate.Generate = killable.CountingGenerate  # type: ignore[misc]
    commits._REPLACED_AFTER_S = 1.0
    if kill != "never":
        kill_at(kill)
    module = importlib.import_module(f"jobs.{name}")
    return cli.run(module.Config, module.main, flags)


if __name__ == "__main__":
    sys.exit(main())
