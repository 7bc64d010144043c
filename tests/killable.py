"""A job as people start it, that notes what its actors do, and may be told to end itself at the nastiest moments.

python -m tests.killable KILL JOB FLAGS...    KILL: never, or before, after, before-replace, after-replace, and :N

`before` and `after` are a commit of rows; with `replace`, one that takes files out of the table. What the actors work
on is noted, a line a block with its number of rows, in `work.log` beside the store.
"""

import importlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from jobs import embed, generate
from jobs.runtime import cli, commits
from jobs.runtime.session import Threads

LOG = "work.log"
BLOCK_S = 0.6  # what a block takes at least: a real model is slower than ours, and there has to be a middle to kill in


def note(store: str, n_rows: int) -> None:
    """One write of a few bytes: those of several processes do not mix."""
    log = os.open(Path(store).parent / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(log, f"{n_rows}\n".encode())
    os.close(log)


class CountingEncode(embed.Encode):
    """The encoder's actor; rows that are gone need no work."""

    def __init__(self, config: embed.Config, identity: Any, tally: Any, threads: Threads) -> None:
        super().__init__(config, identity, tally, threads)
        self.store = config.store

    def __call__(self, behaviors: Any) -> Any:
        note(self.store, len(behaviors) - behaviors["text"].null_count)
        time.sleep(BLOCK_S)
        return super().__call__(behaviors)


class CountingGenerate(generate.Generate):
    """The LLM's actor."""

    def __init__(self, config: generate.Config, where: Any, tally: Any) -> None:
        super().__init__(config, where, tally)
        self.store = config.store

    def __call__(self, requests: Any) -> Any:
        note(self.store, requests.num_rows)
        time.sleep(BLOCK_S)
        return super().__call__(requests)


def kill_at(kill: str) -> None:
    """From now on this process ends, without another word, at that commit."""
    from persona.store.table import Table

    when, _, number = kill.partition(":")
    original, seen = Table.commit, [0]

    def commit(table: Table, add: Any = (), remove: Any = (), **more: Any) -> None:
        counts = bool(remove) if "replace" in when else bool(add or remove)
        seen[0] += counts
        now = counts and seen[0] == int(number)
        if now and when.startswith("before"):
            os.kill(os.getpid(), signal.SIGKILL)
        original(table, add, remove, **more)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)

    Table.commit = commit  # type: ignore[method-assign]


def main() -> int:
    """Runs the job."""
    from tests import killable  # workers find the classes by the name of their module, which is not __main__

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
