"""Choose demonstrations by likelihood on ACL authors: chosen on earlier pairs, tested on later ones.

    python -m tests.benchmarks.profile --acl FOLDER --split test --users 128

A pair is an author's next title against the wrong title of the `which` question for the same request: a title of
another author and the same year. Each author's newest pairs are the test; the older ones train and validate. Prints,
for each kind of text in front of the request, how often the author's title wins, with intervals over authors:
`likelier` compares the nats of the two titles, `calibrated` the nats that the texts in front save on each.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

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
ROWS = ("chosen own", "newest own", RANDOM, "another author's", NONE)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--acl", type=Path, required=True, help="folder with the requests")
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
    started = time.perf_counter()
    options = ProfileOptions(
        holdout=arguments.holdout, candidates=arguments.candidates, demonstrations=arguments.demonstrations
    )
    prompt = PromptOptions(prompt_format=arguments.prompt_format)
    folder = resolve(str(arguments.llm or packaged.smollm2()), flag="--llm")
    judge = LikelihoodJudge(FrozenLLM.load(folder, prompt=prompt), front_tokens=512)
    pairs = pairs_by_author(arguments.acl, arguments.split)
    splits = {author: found for author, of_author in pairs.items() if (found := split(of_author, options))}
    chosen = dict(list(splits.items())[: arguments.users])
    margins, validation = measure(chosen, judge, options)
    n_pairs = sum(len(of_author.held_out) for of_author in chosen.values())
    seconds = time.perf_counter() - started
    print(f"{len(chosen)} authors, {n_pairs} held-out pairs, {seconds:.0f} s, {arguments.prompt_format} prompts")
    print(
        f"right on the validation pairs that chose: {_cell(bootstrap(list(validation.values()), list(validation)))}\n"
    )
    print(table(margins, [author for author, found in chosen.items() for _ in found.held_out]))


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


def measure(
    splits: Mapping[str, Split], judge: LikelihoodJudge, options: ProfileOptions
) -> tuple[dict[str, Floats], dict[str, float]]:
    """The margins of all held-out pairs for each row of the table, and each author's score on validation."""
    profiles = {author: choose(author, found, judge, options) for author, found in splits.items()}
    shown = {author: tuple(one.pair for one in profile.demonstrations) for author, profile in profiles.items()}
    authors = list(splits)
    found: defaultdict[str, list[Floats]] = defaultdict(list)
    for number, (author, of_author) in enumerate(splits.items()):
        sets = demonstration_sets(author, of_author.train, options)
        # Some author has no demonstrations: the next one who has some.
        others = (authors[(number + step) % len(authors)] for step in range(1, len(authors)))
        another = next((shown[other] for other in others if shown[other]), ())
        fronts: dict[str, tuple[Pair, ...]] = dict(
            zip(ROWS, (shown[author], sets[1], sets[min(2, len(sets) - 1)], another, ()), strict=True)
        )
        for row, front in fronts.items():
            texts = [demonstration_text(pair.input, pair.target) for pair in front]
            found[row].append(judge.margins(texts, of_author.held_out))
    scores = {author: profile.validation_score for author, profile in profiles.items()}
    return {row: np.concatenate(parts) for row, parts in found.items()}, scores


def table(margins: Mapping[str, Floats], authors: Sequence[str]) -> str:
    """Markdown, a row for each kind of texts in front."""
    lines = [
        "| texts in front | likelier | calibrated | margin minus random own, nats |",
        "|---|---|---|---|",
    ]
    for row in ROWS:
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
