"""How many cores and threads a local run uses, and how a signal ends it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs import embed
from jobs.runtime import cli, session
from jobs.runtime.cli import Summary

PINNED = """
import os
os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
from jobs.runtime.session import usable_cores
print(usable_cores())
"""

# Prints how many threads rayon uses.
TOKENIZING = """
import os, sys
import psutil
os.environ["TOKENIZERS_PARALLELISM"] = "false"
from tokenizers import Tokenizer, models
from jobs.runtime import session
session.usable_cores = lambda: 4
session.tokenize_with(int(sys.argv[1]))
before = psutil.Process().num_threads()
Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).encode_batch(["a"] * 1000)
print(max(1, psutil.Process().num_threads() - before))
"""


# What a library under Ray says while it starts must reach the user.
SAYS_SOMETHING = """
import os, ray
from jobs.runtime import log, session
init = ray.init
def and_say(**options):
    init(**options)
    os.write(2, b"said by a library" + bytes([10]))
ray.init = and_say
session.connect()
log.say("connected")
ray.shutdown()
"""


def test_of_what_is_written_to_stderr_while_ray_starts_only_rays_notice_is_dropped() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", SAYS_SOMETHING], env=environment, capture_output=True, text=True, check=True, timeout=240
    )
    assert done.stderr.splitlines() == ["said by a library", "connected"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin a process to a core")
def test_a_process_pinned_to_one_core_may_use_one() -> None:
    done = subprocess.run([sys.executable, "-c", PINNED], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]


def test_without_pinning_all_cores_are_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert session.usable_cores() == os.cpu_count()


def test_on_gpus_the_cores_are_shared_out_for_tokenizing_and_on_cpus_one_thread_tokenizes() -> None:
    on_gpus, on_cores = (
        session.Machines(cores=16, gpus=2, is_ours=True),
        session.Machines(cores=16, gpus=0, is_ours=True),
    )
    assert on_gpus.tokenizing_threads == 8
    assert on_cores.tokenizing_threads == 1
    assert session.Machines(cores=2, gpus=8).tokenizing_threads == 1


@pytest.mark.parametrize(("given", "found"), [(1, 1), (2, 2)])
def test_a_process_tokenizes_with_the_given_number_of_threads(given: int, found: int) -> None:
    done = subprocess.run([sys.executable, "-c", TOKENIZING, str(given)], capture_output=True, text=True, check=True)
    assert int(done.stdout) == found


def _end_itself(_config: embed.Config) -> Summary:
    session.connect()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)
    raise AssertionError("the signal was ignored")


def test_sigterm_ends_a_job_in_order_and_with_one_line(local_ray: None, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    capfd.readouterr()
    try:
        assert cli.run(embed.Config, _end_itself, ["--histories", "a", "--store", "b"]) == 143
    finally:
        signal.signal(signal.SIGTERM, before)
    said = capfd.readouterr()
    assert (said.out, said.err) == (
        "",
        "terminated; what is committed stays, and the same command continues from there\n",
    )


def test_a_ray_that_does_not_start_is_told_in_one_sentence(tmp_path: Path) -> None:
    code = (
        "from jobs.runtime import session\n"
        "from persona.errors import RunLost\n"
        "try: session.connect()\n"
        "except RunLost as error: print(error)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["RAY_TMPDIR"] = str(tmp_path / ("a" * 100))  # longer than a socket's path may be
    done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.startswith("Ray does not start on this machine (")
    assert "AF_UNIX path length" in done.stdout
