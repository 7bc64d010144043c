"""Write statements for `jobs.locate`: titles of papers, old against new, and then run it on these and on our own.

    python -m tests.benchmarks.locate --titles FOLDER/histories_any_author.jsonl.gz --out run

`statements.jsonl` next to this file has two personas' worth of statements, sixty that match and sixty that do not. Each
job is a separate process; results that `--out` already has are kept.
"""

import argparse
import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from persona.models import packaged

OWN = Path(__file__).parent / "statements.jsonl"
_OLD, _NEW, _PER_LABEL = "2018", "2023", 150


def main() -> None:
    """Run the jobs, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--titles", type=Path, help="authors with titles and dates; default none")
    parser.add_argument("--out", type=Path, required=True, help="folder for statements and results")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for prompt_format in ("plain", "chat"):
        _locate(OWN, arguments.out / prompt_format, "--prompt-format", prompt_format)
    if arguments.titles is not None:
        titles = arguments.out / "titles.jsonl"
        titles.write_text("".join(f"{json.dumps(row)}\n" for row in _titles(arguments.titles)))
        _locate(titles, arguments.out / "titles", "--prompt-format", "plain")


def _locate(statements: Path, out: Path, *flags: str) -> None:
    command = [sys.executable, "-m", "jobs.locate", "--statements", str(statements), "--llm", str(packaged.smollm2())]
    command += ["--out", str(out), "--restarts", "1", *flags]
    print("$", *command, flush=True)
    subprocess.run(command, check=True)


def _titles(path: Path) -> list[dict[str, object]]:
    """Titles from 2018 or before and from 2023 or later, as many of each, without the years that some of them name."""
    dates: dict[str, str] = {}
    with gzip.open(path, "rt") as file:
        for line in file:
            for item in json.loads(line)["items"]:
                dates[item["title"]] = item["date"][:4]
    plain = {title: year for title, year in dates.items() if not any(letter.isdigit() for letter in title)}
    draw = np.random.default_rng(0)
    chosen = []
    for label, found in (
        (0, sorted(title for title, year in plain.items() if year <= _OLD)),
        (1, sorted(title for title, year in plain.items() if year >= _NEW)),
    ):
        picked = draw.choice(len(found), _PER_LABEL, replace=False)
        chosen += [{"group": f"title since {_NEW}", "label": label, "text": found[number]} for number in picked]
    return chosen


if __name__ == "__main__":
    main()
