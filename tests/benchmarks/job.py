"""A job as a process of its own, as a user starts it."""

import subprocess
import sys
import time


def run_job(job: str, *flags: object) -> None:
    """Runs `python -m jobs.JOB` and prints command and seconds. Raises SystemExit when it fails."""
    words = ["-m", f"jobs.{job}", *map(str, flags)]
    print("$ python", *words, flush=True)
    started = time.perf_counter()
    if code := subprocess.run([sys.executable, *words], check=False).returncode:
        raise SystemExit(f"jobs.{job} ended with exit code {code}")
    print(f"── {time.perf_counter() - started:.0f} s\n", flush=True)
