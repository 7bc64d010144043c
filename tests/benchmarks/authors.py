"""The experiments on ACL authors, from their tables to one comparison: baselines, controls, the paper's plug and ours.

    python -m tests.benchmarks.authors --acl FOLDER --out run
    python -m tests.benchmarks.authors --acl FOLDER --out run --question which --split dev
    python -m tests.benchmarks.authors --acl FOLDER --out run --question additions --split dev --seeds 0

Each plug is trained once a seed, writes its answers, and is judged on every third request of the split (`--every`);
then `jobs.compare` holds all of them against prompt tuning. The jobs run one after the other, each in a process of its
own, and what lies in `--out` is not done again: the same command goes on where it was stopped; `--only` takes a part.
"""

import argparse
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from persona.evaluation.intervals import bootstrap
from persona.inputs.histories import bucket_of
from persona.models import packaged, resolve as models
from persona.models.encoder import TextEncoder
from persona.options import RetrievalOptions, Retriever
from persona.store.join import seen_rows
from persona.store.store import Store

_TITLES = re.compile(r'\[1\]: "(.*)" \[2\]: "(.*)"$', re.DOTALL)


_NOTHING = RetrievalOptions()


@dataclass(frozen=True)
class Row:
    """One row of the table: how a plug is trained, and under which personas it is judged."""

    recipe: str | None = None
    """Of training; None is the LLM without a plug."""
    train: Sequence[str] = ()
    personas: Sequence[str] = ("own", "none", "other")
    retrieval: RetrievalOptions = _NOTHING
    """Past texts in the prompt, in training, answers and judgement alike."""
    one_seed: bool = False


@dataclass(frozen=True)
class Experiment:
    """One question that is asked of all authors."""

    tables: str
    rows: Mapping[str, Row]
    against: str
    generate: Sequence[str] | None = None
    """How answers are made; None asks for losses only."""
    evaluate: Sequence[str] = ()
    oracle: bool = False
    """Each request has a user of its own, whose whole history is the right answer."""


def _texts(n: int, retriever: Retriever, tokens: int) -> RetrievalOptions:
    return RetrievalOptions(retrieve=n, retriever=retriever, retrieve_tokens=tokens)


def _tokens(n: int) -> Sequence[str]:
    return "--persona-tokens", str(n)


def _rate(rate: str) -> Sequence[str]:
    return "--learning-rate", rate


def _bare(retrieval: RetrievalOptions = _NOTHING) -> Row:
    return Row(personas=("bare",), retrieval=retrieval, one_seed=True)


_ENCODER = Row(one_seed=True)  # the title that lies nearer to the history, without any LLM
_WHICH = Row("best", ("--query-prefix", ""), ("own", "none"), one_seed=True)
_REJECTED = ("--rejected", "rejected")
_LABELS: dict[str, Any] = {
    "generate": ("--beams", "1", "--max-new-tokens", "8"),
    "evaluate": ("--metric", "label", *_REJECTED),
    "against": "best/none",
}
_TUNING = ("--empty-history", "1", "--alignment", "0")
# 1e-4, the paper's rate, is meant for 22 epochs, so it has that of `best`; the prefix is BGE's.
_PAPER = (*_rate("1e-2"), "--query-prefix", "")
# With which some rows were measured: the recipe before it had a gain.
_NO_GAIN = ("--persona-gain", "1")
_BEFORE = (*_NO_GAIN, "--alignment", "0.3")
_LATEST = _texts(2, "recency", 64)
_OWN_AND_OTHER = ("own", "other")
_ATTENTION = ("--weights", "attention", "--temperature", "30", "--learn-temperature")
EXPERIMENTS = {
    "next_title": Experiment(
        tables="next_title",
        rows={
            "tuning": Row("best", _TUNING, ("none",)),
            "bare": _bare(),
            "bare-recency": _bare(_texts(4, "recency", 128)),
            "bare-bm25": _bare(_texts(4, "bm25", 128)),
            "bare-dense": _bare(_texts(4, "dense", 128)),
            "best": Row("best"),
            "no-gain": Row("best", _BEFORE),
            "no-gain-tuning": Row("best", (*_NO_GAIN, *_TUNING), ("none",)),
            "paper": Row("paper", _PAPER),
            # Its own control: one token, too, and all else alike. Without a history nothing is weighed.
            "paper-tuning": Row("paper", (*_PAPER, *_TUNING, "--weights", "mean"), ("none",)),
            "attention": Row("best", (*_BEFORE, *_ATTENTION), ("own", "none", "other", "mean")),
            # A plug that starts with the vectors of its targets does not learn to read the texts as well (dev).
            "retrieval": Row("best", (*_NO_GAIN, "--alignment", "0"), retrieval=_LATEST),
            "retrieval-tuning": Row("best", (*_NO_GAIN, *_TUNING), ("none",), retrieval=_LATEST),
        },
        generate=("--beams", "1", "--max-new-tokens", "32"),
        evaluate=("--metric", "text", *_REJECTED),
        against="tuning/none",
    ),
    # What each addition to the paper's plug is worth: the recipe, and the recipe with one thing changed.
    "additions": Experiment(
        tables="next_title",
        rows={
            "best": Row("best", personas=_OWN_AND_OTHER),
            "recency": Row("best", ("--recency",), _OWN_AND_OTHER),
            **{f"tokens-{n}": Row("best", _tokens(n), _OWN_AND_OTHER) for n in (1, 4, 8, 32)},
            **{f"rate-{rate}": Row("best", _rate(rate), _OWN_AND_OTHER) for rate in ("5e-3", "2e-2")},
            "random-start": Row("best", ("--warm-start", "none"), _OWN_AND_OTHER),
            "no-gain": Row("best", _NO_GAIN, _OWN_AND_OTHER),
            "no-alignment": Row("best", ("--alignment", "0"), _OWN_AND_OTHER),
            "more-alignment": Row("best", ("--alignment", "0.3"), _OWN_AND_OTHER),
            "attention": Row("best", _ATTENTION, _OWN_AND_OTHER),
            "contrast": Row("best", ("--contrast", "0.5"), _OWN_AND_OTHER),
            # More tokens and a higher rate help a plug without persona, too: what do they help one that has it?
            **{f"tuning-tokens-{n}": Row("best", (*_TUNING, *_tokens(n)), ("none",)) for n in (4, 8, 16, 32)},
            "tuning-rate-5e-3": Row("best", (*_TUNING, *_rate("5e-3")), ("none",)),
        },
        against="best/own",
    ),
    "which": Experiment(
        tables="which",
        rows={
            "encoder": _ENCODER,
            "best": _WHICH,
            "bare": _bare(),
            "bare-dense": _bare(_texts(4, "dense", 64)),
        },
        **_LABELS,
    ),
    # Can the LLM tell which title its soft tokens are about, when they are about nothing else?
    "which_oracle": Experiment(
        tables="which",
        rows={"best": _WHICH, "bare": _bare(), "bare-text": _bare(_texts(1, "recency", 64))},
        **_LABELS,
        oracle=True,
    ),
}


def main() -> None:
    """Prints each command and what it says at its end; the table of `jobs.compare` comes last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--acl", type=Path, required=True, help="folder of histories.parquet and the requests")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--question", choices=EXPERIMENTS, default="next_title")
    parser.add_argument("--split", choices=("dev", "test"), default="test", help="dev to choose, test once at the end")
    parser.add_argument("--train-rows", type=int, default=4_960, help="requests of training, 16 a step")
    parser.add_argument("--every", type=int, default=3, help="judge on every so many-th request of the split")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--only", nargs="+", metavar="ROW", help="names of rows; default all")
    arguments = parser.parse_args()
    run = Run(arguments)
    unknown = set(arguments.only or ()) - set(run.rows)
    if unknown:
        parser.error(f"--only {' '.join(sorted(unknown))}: must be of {', '.join(run.rows)}")
    run.write_requests()
    run.embed()
    for seed in arguments.seeds:
        for name in arguments.only or run.rows:
            if seed == arguments.seeds[0] or not run.rows[name].one_seed:
                run.judge(name, seed)
    run.compare()


class Run:
    """One experiment in its folder."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.acl, self.split = arguments.acl, arguments.split
        self.train_rows, self.every = arguments.train_rows, arguments.every
        self.experiment = EXPERIMENTS[arguments.question]
        self.rows = self.experiment.rows
        self.folder = arguments.out / arguments.question
        self.judged = self.folder / self.split
        oracle = self.experiment.oracle
        self.histories = (self.folder if oracle else self.acl) / "histories.parquet"
        self.store = (self.folder if oracle else arguments.out) / "store"

    def write_requests(self) -> None:
        """The requests of each split, with the text that was not the right answer; of an oracle its histories, too."""
        self.folder.mkdir(parents=True, exist_ok=True)
        titles = []
        for split in ("train", "dev", "test"):
            requests, which, next_title = (
                pq.read_table(self.acl / f"{name}_{split}.parquet")
                for name in (self.experiment.tables, "which", "next_title")
            )
            if not requests["request_id"] == which["request_id"] == next_title["request_id"]:
                raise SystemExit(f"the tables of {split} in {self.acl} do not ask the same requests in the same order")
            requests = _with_rejected(requests, which, label=self.experiment.tables == "which")
            rows = self._rows(split, requests.num_rows)
            if self.experiment.oracle:
                requests = requests.drop_columns(["user_id", "as_of"]).append_column("user_id", requests["request_id"])
                titles.append(_titles(next_title.take(rows)))
            pq.write_table(requests.take(rows), self._requests(split))
        if self.experiment.oracle:
            pq.write_table(pa.concat_tables(titles), self.histories)

    def embed(self) -> None:
        """The vectors of all histories, as far as they are not there."""
        self._job(
            "embed",
            *("--histories", self.histories, "--store", self.store, "--encoder", packaged.minilm()),
            *("--max-tokens", 256, "--buckets", 16),
        )

    def judge(self, name: str, seed: int) -> None:
        """Answers, if the experiment has any, scores and losses of one row and seed, unless they are there."""
        row, out = self.rows[name], self.judged / f"{name}-{seed}"
        if row is _ENCODER:
            self.ask_the_encoder()
            return
        if (out / "metrics.json").exists():
            return
        # Without a plug, any plug names the LLM and the encoder; nothing else of it is used.
        trained = name if row.recipe else next(other for other, its in self.rows.items() if its.recipe)
        plug = self._train(trained, seed)
        asked = ("--requests", self._requests(self.split), "--store", self.store, "--plug", plug)
        asked = (*asked, *self._retrieved(row))
        judged = ("--personas", *row.personas, "--batch-size", 8, *self.experiment.evaluate)
        if self.experiment.generate is None:
            judged = (*judged, "--losses-only")
        else:
            self._job("generate", *asked, "--persona", *row.personas, *self.experiment.generate, "--batch-size", 8)
        self._job("evaluate", *asked, *judged, "--out", out)

    def ask_the_encoder(self) -> None:
        """Prints how often the right title of a `which` question lies nearer to the history, without any LLM."""
        store = Store.open(str(self.store))
        requests = pq.read_table(self._requests(self.split))
        buckets = bucket_of(requests["user_id"].combine_chunks(), store.n_buckets)
        folder = models.resolve(str(packaged.minilm()), revision="main", flag="--encoder")
        encoder = TextEncoder(folder, pooling="mean", max_tokens=256)
        right: defaultdict[str, list[bool]] = defaultdict(list)
        users: list[str] = []
        for bucket in np.unique(buckets).tolist():
            asked = requests.filter(buckets == bucket)
            histories = seen_rows(asked, store, bucket, max_behaviors=512, with_vectors=True)  # as the recipes
            pairs = [_candidates(row["input"], row["target"]) for row in asked.to_pylist()]
            titles_R2d = encoder.encode([title for pair in pairs for title in pair]).vectors.reshape(len(pairs), 2, -1)
            for pair_2d, history in zip(titles_R2d.astype(np.float32), histories, strict=True):
                seen_Nd = np.array([np.frombuffer(one, "<f2") for one in history["vector"].to_pylist()], np.float32)
                cosines_N2 = seen_Nd @ pair_2d.T
                recency_N = 1 / np.arange(len(seen_Nd), 0, -1)
                ways = {
                    "mean": cosines_N2.mean(0),
                    "mean by recency": np.average(cosines_N2, axis=0, weights=recency_N),
                    "nearest": cosines_N2.max(0),
                }
                for way, found_2 in ways.items():
                    right[way].append(bool(found_2[0] > found_2[1]))
            users += asked["user_id"].to_pylist()
        for name, values in right.items():
            found = bootstrap(values, users)
            print(f"encoder alone, {name}: {found.mean:.3f} [{found.low:.3f}, {found.high:.3f}] of {len(users)} right")

    def _train(self, name: str, seed: int) -> Path:
        """The folder of one plug, trained if it is not there."""
        row, plug = self.rows[name], self.folder / "plugs" / f"{name}-{seed}"
        if not (plug / "plug.json").exists():
            self._job(
                "train",
                *("--config", f"jobs/recipes/acl_{self.experiment.tables}/{row.recipe}.yaml"),
                *("--requests", self._requests("train"), "--epochs", 1, "--global-batch", 16, "--micro-batch", 16),
                *("--validation", self._requests("dev"), "--validation-rows", 128, "--validate-every", 155),
                *("--store", self.store, "--runs", self.folder / "runs", "--run", f"{name}-{seed}", "--plug", plug),
                *("--llm", packaged.smollm2(), "--seed", seed, *row.train, *self._retrieved(row)),
            )
        return plug

    def compare(self) -> None:
        """All that is judged, in one table."""
        found = sorted(path.parent for path in self.judged.glob("*/metrics.json"))
        if not found:
            return
        names = [re.sub(r"-\d+$", "", path.name) for path in found]
        where = ("--evaluations", *found, "--names", *names, "--out", self.judged)
        known = self.experiment.against.split("/")[0] in names
        self._job("compare", *where, *(("--against", self.experiment.against) if known else ()))

    def _rows(self, split: str, n: int) -> np.ndarray:
        """Some of train, drawn at random, and every so many-th of the others."""
        if split != "train":
            return np.arange(0, n, self.every)
        return np.sort(np.random.default_rng(0).choice(n, min(n, self.train_rows), replace=False))

    def _requests(self, split: str) -> Path:
        return self.folder / f"{split}.parquet"

    def _retrieved(self, row: Row) -> Sequence[object]:
        asked = row.retrieval
        if not asked.retrieve:
            return ()
        how = ("--retriever", asked.retriever, "--retrieve-tokens", asked.retrieve_tokens)
        return ("--retrieve", asked.retrieve, *how, "--texts", self.histories)

    def _job(self, job: str, *flags: object) -> None:
        words = ["-m", f"jobs.{job}", *map(str, flags)]
        print("$ python", *words, flush=True)
        started = time.perf_counter()
        if code := subprocess.run([sys.executable, *words], check=False).returncode:
            raise SystemExit(f"jobs.{job} ended with {code}")
        print(f"── {time.perf_counter() - started:.0f} s\n", flush=True)


def _titles(next_title: pa.Table) -> pa.Table:
    """The target of each request as the one behavior of a user of its own."""
    ids = next_title["request_id"]
    return pa.table({"user_id": ids, "behavior_id": ids, "text": next_title["target"]})


def _with_rejected(requests: pa.Table, which: pa.Table, *, label: bool) -> pa.Table:
    """Adds `rejected`: of the two candidates of a `which` question the other one, or its label."""
    questions = zip(which["input"].to_pylist(), which["target"].to_pylist(), strict=True)
    labels = {"[1]": "[2]", "[2]": "[1]"}
    rejected = [labels[target] if label else _candidates(question, target)[1] for question, target in questions]
    return requests.append_column("rejected", pa.array(rejected))


def _candidates(question: str, target: str) -> tuple[str, str]:
    """The author's title and the other one of a `which` question."""
    found = _TITLES.search(question)
    if found is None:
        raise SystemExit(f"no two titles in {question!r}")
    return (found[1], found[2]) if target == "[1]" else (found[2], found[1])


if __name__ == "__main__":
    main()
