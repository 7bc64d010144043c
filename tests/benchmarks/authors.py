"""Run the experiments on ACL authors: baselines, controls, the paper's plug and ours, compared in one table.

    python -m tests.benchmarks.authors --acl FOLDER --out run
    python -m tests.benchmarks.authors --acl FOLDER --out run --question which --split dev
    python -m tests.benchmarks.authors --acl FOLDER --out run --question additions --split dev --seeds 0
    python -m tests.benchmarks.authors --acl FOLDER --out run --question rendering --split dev --train-rows 2480
    python -m tests.benchmarks.authors --acl FOLDER --out run --question texts --split dev --train-rows 12411

Trains one plug per row and seed, generates answers, and evaluates every third request of the split (`--every`). Then
`jobs.compare` compares all rows with prompt tuning. Each job is a separate process, one after the other. Results that
`--out` already has are kept, so the same command resumes; `--only` runs some of the rows.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from persona.models import packaged
from persona.models.encoder import TextEncoder
from persona.models.resolve import resolve
from persona.store.store import Store
from tests.benchmarks.author_experiments import EXPERIMENTS, Row
from tests.benchmarks.encoder_ranking import candidates, rank
from tests.benchmarks.job import run_job

_MAX_BEHAVIORS = 512  # as in the recipes


def main() -> None:
    """Print each command with its output, and the table of `jobs.compare` at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--acl", type=Path, required=True, help="folder with histories.parquet and the requests")
    parser.add_argument("--out", type=Path, required=True, help="folder for the store, plugs and results")
    parser.add_argument("--question", choices=EXPERIMENTS, default="next_title", help="the experiment to run")
    parser.add_argument(
        "--split", choices=("dev", "test"), default="test", help="dev to choose settings, test once at the end"
    )
    parser.add_argument("--train-rows", type=int, default=4_960, help="number of training requests, 16 per step")
    parser.add_argument("--every", type=int, default=3, help="evaluate every N-th request of the split")
    parser.add_argument("--llm", type=Path, help="folder of the frozen LLM; default the packaged SmolLM2-135M-Instruct")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2), help="training seeds")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="names of the rows to run; default all")
    arguments = parser.parse_args()
    run = Run(arguments)
    unknown = set(arguments.only or ()) - set(run.rows)
    if unknown:
        parser.error(f"--only {' '.join(sorted(unknown))}: no such row; the rows are {', '.join(run.rows)}")
    run.write_requests()
    run.embed()
    for seed in arguments.seeds:
        for name in arguments.only or run.rows:
            if seed == arguments.seeds[0] or not run.rows[name].one_seed:
                run.evaluate(name, seed)
    run.compare()


class Run:
    """One experiment in its folder."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.acl, self.split = arguments.acl, arguments.split
        self.train_rows, self.every = arguments.train_rows, arguments.every
        self.llm = arguments.llm or packaged.smollm2()
        self.experiment = EXPERIMENTS[arguments.question]
        self.rows = self.experiment.rows
        self.folder = arguments.out / arguments.question
        self.results = self.folder / self.split
        oracle = self.experiment.oracle
        self.histories = (self.folder if oracle else self.acl) / "histories.parquet"
        self.store = (self.folder if oracle else arguments.out) / "store"

    def write_requests(self) -> None:
        """Write the requests of each split with a column `rejected`, and the histories of an oracle experiment."""
        self.folder.mkdir(parents=True, exist_ok=True)
        histories = []
        for split in ("train", "dev", "test"):
            requests, which, next_title = (
                pq.read_table(self.acl / f"{name}_{split}.parquet")
                for name in (self.experiment.tables, "which", "next_title")
            )
            if not requests["request_id"] == which["request_id"] == next_title["request_id"]:
                raise SystemExit(f"the {split} tables in {self.acl} do not have the same requests in the same order")
            requests = with_rejected(requests, which, label=self.experiment.tables == "which")
            sample = self._sample(split, requests.num_rows)
            if self.experiment.oracle:
                requests = requests.drop_columns(["user_id", "as_of"]).append_column("user_id", requests["request_id"])
                histories.append(_oracle_histories(next_title.take(sample)))
            pq.write_table(requests.take(sample), self._requests(split))
        if self.experiment.oracle:
            pq.write_table(pa.concat_tables(histories), self.histories)

    def embed(self) -> None:
        """Encode the behaviors that the store does not have yet."""
        run_job(
            "embed",
            *("--histories", self.histories, "--store", self.store, "--encoder", packaged.minilm()),
            *("--max-tokens", 256, "--buckets", 16),
        )

    def evaluate(self, name: str, seed: int) -> None:
        """Measure one row with one seed: answers (if the experiment has any), scores and losses."""
        row, out = self.rows[name], self.results / f"{name}-{seed}"
        if row.encoder_alone:
            self.rank_by_encoder()
            return
        if (out / "metrics.json").exists():
            return
        # A row without a plug takes the LLM and the encoder from any plug, and nothing else.
        trained = name if row.recipe else next(other for other, its in self.rows.items() if its.recipe)
        plug = self._train(trained, seed)
        inputs = ("--requests", self._requests(self.split), "--store", self.store, "--plug", plug)
        inputs = (*inputs, *self._retrieval_flags(row))
        flags = ("--persona", *row.personas, "--batch-size", 8, *self.experiment.evaluate)
        if self.experiment.generate is None:
            flags = (*flags, "--losses-only")
        else:
            run_job("generate", *inputs, "--persona", *row.personas, *self.experiment.generate, "--batch-size", 8)
        run_job("evaluate", *inputs, *flags, "--out", out)

    def rank_by_encoder(self) -> None:
        """Print how often the right title of a `which` question is more similar to the history than the other one."""
        requests = pq.read_table(self._requests(self.split))
        pairs = zip(requests["input"].to_pylist(), requests["target"].to_pylist(), strict=True)
        encoder = TextEncoder(resolve(str(packaged.minilm()), flag="--encoder"), pooling="mean", max_tokens=256)
        titles = [candidates(question, target) for question, target in pairs]
        store = Store.open(str(self.store))
        for method, share in rank(requests, titles, store, encoder, max_behaviors=_MAX_BEHAVIORS).items():
            print(
                f"encoder alone, {method}: {share.mean:.3f} [{share.low:.3f}, {share.high:.3f}] of "
                f"{requests.num_rows} right"
            )

    def compare(self) -> None:
        """Compare everything that has been evaluated in one table."""
        found = sorted(path.parent for path in self.results.glob("*/metrics.json"))
        if not found:
            return
        names = [re.sub(r"-\d+$", "", path.name) for path in found]
        if self.experiment.against.split("/")[0] not in names:
            print(f"not compared: {self.experiment.against}, the reference, has not been measured (--only)")
            return
        flags = ("--evaluations", *found, "--names", *names, "--out", self.results)
        run_job("compare", *flags, "--against", self.experiment.against)

    def _train(self, name: str, seed: int) -> Path:
        """The folder of one plug, trained if it does not exist yet."""
        row, plug = self.rows[name], self.folder / "plugs" / f"{name}-{seed}"
        if not (plug / "plug.json").exists():
            run_job(
                "train",
                *("--config", f"jobs/recipes/acl_{self.experiment.tables}/{row.recipe}.yaml"),
                *("--requests", self._requests("train"), "--epochs", 1, "--global-batch", 16, "--micro-batch", 16),
                *("--validation", self._requests("dev"), "--validation-rows", 128, "--validate-every", 155),
                *("--store", self.store, "--runs", self.folder / "runs", "--run", f"{name}-{seed}", "--plug", plug),
                *("--llm", self.llm, "--seed", seed, *row.train, *self._retrieval_flags(row)),
            )
        return plug

    def _sample(self, split: str, n: int) -> np.ndarray:
        """Row numbers: a random sample of train, every N-th row of the other splits."""
        if split != "train":
            return np.arange(0, n, self.every)
        return np.sort(np.random.default_rng(0).choice(n, min(n, self.train_rows), replace=False))

    def _requests(self, split: str) -> Path:
        return self.folder / f"{split}.parquet"

    def _retrieval_flags(self, row: Row) -> Sequence[object]:
        options = row.retrieval
        if not options.retrieve:
            return ()
        how = ("--retriever", options.retriever, "--retrieve-tokens", options.retrieve_tokens)
        return ("--retrieve", options.retrieve, *how, "--texts", self.histories)


def _oracle_histories(next_title: pa.Table) -> pa.Table:
    """The target of each request as the only behavior of a user named after the request."""
    ids = next_title["request_id"]
    return pa.table({"user_id": ids, "behavior_id": ids, "text": next_title["target"]})


def with_rejected(requests: pa.Table, which: pa.Table, *, label: bool) -> pa.Table:
    """Add the column `rejected`: the wrong title of the `which` question, or with `label` its label."""
    questions = zip(which["input"].to_pylist(), which["target"].to_pylist(), strict=True)
    labels = {"[1]": "[2]", "[2]": "[1]"}
    rejected = [labels[target] if label else candidates(question, target)[1] for question, target in questions]
    return requests.append_column("rejected", pa.array(rejected))


if __name__ == "__main__":
    main()
