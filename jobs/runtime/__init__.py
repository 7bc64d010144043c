"""Code that the jobs share. Nothing in here can be run."""

import sys

if sys.argv[:1] == ["-m"]:
    # Python sets this only while it looks for the module of `python -m`, so that module is in this package. It has no
    # command line, so it would end silently with exit code 0.
    print("error: jobs.runtime is shared code, not a job; `python -m jobs` lists the jobs", file=sys.stderr)
    raise SystemExit(2)
