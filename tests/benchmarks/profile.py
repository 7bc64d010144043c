"""Choose demonstrations by likelihood on ACL authors: chosen on earlier pairs, tested on later ones.

    python -m tests.benchmarks.profile --acl FOLDER --out margins.jsonl --split test --users 128

A pair is an author's next title against the wrong title of the `which` question for the same request: a title of
another author and the same year. Each author's newest pairs are the test; the older ones train and validate. Prints,
for each kind of text in front of the request, how often the author's title wins, with intervals over authors:
`likelier` compares the nats of the two titles, `calibrated` the nats that the texts in front save on each. Authors that
`--out` already has are kept, so the same command resumes.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from persona.evaluation.intervals import Interval, bootstrap, paired_bootstrap
from persona.models import packaged
from persona.models.frozen_llm import FrozenLLM
from persona.models.resolve import resolve
from persona.options import PromptOptions
from persona.profiling.likelihood import Floats, LikelihoodJudge, choose, demonstration_sets
from persona.profiling.options import ProfileOptions
from persona.profiling.pairs import Pair, Split, split
from persona.profiling.profile import demonstration_text
from tests.benchmarks.authors import candidates

NONE, RANDOM = "none", "random own"
Measured = dict[str, Any]
"""Of one author: `validation` (share right), `margins` (by row of the table, a value per held-out pair), `cpu_s`."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--acl", type=Path, required=True, help="folder with the requests")
    parser.add_argument("--out", type=Path, required=True, help="file for the numbers of each author")
    parser.add_argument(
        "--split", choices=("dev", "test"), default="test", help="dev to choose settings, test at the end"
    )
    parser.add_argument("--users", type=int, default=128, help="number of authors")
    parser.add_argument("--llm", type=Path, help="folder of the frozen LLM; default the packaged SmolLM2-135M-Instruct")
    parser.add_argument(
        "--prompt-format", choices=("chat", "plain"), default="plain", help="how the LLM reads requests"
    )
    parser.add_argument("--holdout", type=float, default=0.3, help="share of each author's pairs to test on")
    parser.add_argument("--candidates", type=int, default=10, help="random sets of demonstrations per author")
    parser.add_argument("--demonstrations", type=int, default=4, help="most demonstrations")
    arguments = parser.parse_args()
    options = ProfileOptions(
        holdout=arguments.holdout, candidates=arguments.candidates, demonstrations=arguments.demonstrations
    )
    prompt = PromptOptions(prompt_format=arguments.prompt_format)
    folder = resolve(str(arguments.llm or packaged.smollm2()), flag="--llm")
    judge = LikelihoodJudge(FrozenLLM.load(folder, prompt=prompt), front_tokens=512)
    pairs = pairs_by_author(arguments.acl, arguments.split)
    splits = {author: found for author, of_author in pairs.items() if (found := split(of_author, options))}
    splits = dict(list(splits.items())[: arguments.users])
    known = read(arguments.out)
    with arguments.out.open("a") as file:
        for author, another in zip(splits, [*list(splits)[1:], *splits], strict=False):
            if author not in known:
                known[author] = measure(author, splits[author], splits[another], judge, options)
                print(json.dumps({"author": author, **known[author]}), file=file, flush=True)
    measured = {author: known[author] for author in splits}
    n_pairs = sum(len(one["margins"][NONE]) for one in measured.values())
    validation = bootstrap([one["validation"] for one in measured.values()], list(measured))
    print(f"{len(measured)} authors, {n_pairs} held-out pairs, {arguments.prompt_format} prompts")
    print(f"CPU seconds: {sum(one['cpu_s'] for one in measured.values()):.0f}")
    print(f"right on the validation pairs that chose: {_cell(validation)}\n")
    print(table(measured))


def read(out: Path) -> dict[str, Measured]:
    """What earlier runs have measured, by author."""
    lines = map(json.loads, out.read_text().splitlines()) if out.exists() else ()
    return {line.pop("author"): line for line in lines}


def pairs_by_author(acl: Path, split_name: str) -> dict[str, list[Pair]]:
    """The preference pairs of each author."""
    which, titles = (
        pq.read_table(acl / f"{name}_{split_name}.parquet").to_pylist() for name in ("which", "next_title")
    )
    found: defaultdict[str, list[Pair]] = defaultdict(list)
    for question, request in zip(which, titles, strict=True):
        target, rejected = candidates(question["input"], question["target"])
        names = ("request_id", "input", "as_of")
        pair = Pair(**{name: request[name] for name in names}, target=target, rejected=rejected)
        found[request["user_id"]].append(pair)
    return dict(sorted(found.items()))


def measure(author: str, own: Split, another: Split, judge: LikelihoodJudge, options: ProfileOptions) -> Measured:
    """The margins of an author's held-out pairs for each row of the table, and the score on validation."""
    started = time.process_time()
    profile = choose(author, own, judge, options)
    none, newest, *random = demonstration_sets(author, own.train, options)
    fronts = {
        "chosen own": tuple(one.pair for one in profile.demonstrations),
        "newest own": newest,
        RANDOM: random[0] if random else newest,
        "another author's newest": another.train[-options.demonstrations :],
        NONE: none,
    }
    margins = {
        row: judge.margins([demonstration_text(p.input, p.target) for p in front], own.held_out).tolist()
        for row, front in fronts.items()
    }
    cpu_s = time.process_time() - started
    return {"validation": profile.validation_score, "margins": margins, "cpu_s": cpu_s}


def table(measured: Mapping[str, Measured]) -> str:
    """Markdown, a row for each kind of texts in front."""
    authors = [author for author, one in measured.items() for _ in one["margins"][NONE]]
    rows = next(iter(measured.values()))["margins"]
    margins = {row: np.concatenate([one["margins"][row] for one in measured.values()]) for row in rows}
    lines = ["| texts in front | likelier | calibrated | margin minus random own, nats |", "|---|---|---|---|"]
    for row in rows:
        likelier = _cell(bootstrap(_wins(margins[row]), authors))
        calibrated = "" if row == NONE else _cell(bootstrap(_wins(margins[row] - margins[NONE]), authors))
        gain = "" if row == RANDOM else _gain(paired_bootstrap(margins[row], margins[RANDOM], authors))
        lines.append(f"| {row} | {likelier} | {calibrated} | {gain} |")
    return "\n".join(lines)


def _wins(margins_P: Floats) -> Floats:
    wins_P: Floats = (np.sign(margins_P) + 1) / 2
    return wins_P


def _cell(share: Interval) -> str:
    return f"{share.mean:.1%} [{share.low:.1%}, {share.high:.1%}]"


def _gain(nats: Interval) -> str:
    return f"{nats.mean:+.2f} [{nats.low:+.2f}, {nats.high:+.2f}]"


if __name__ == "__main__":
    main()
