"""What a Ray of our own takes the machine for."""

import os
import subprocess
import sys

import pytest

from jobs import session

PINNED = """
import os
os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
from jobs.session import usable_cores
print(usable_cores())
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no process to a core")
def test_a_process_that_is_pinned_to_one_core_counts_one() -> None:
    done = subprocess.run([sys.executable, "-c", PINNED], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]


def test_where_no_process_can_be_pinned_all_cores_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert session.usable_cores() == os.cpu_count()
