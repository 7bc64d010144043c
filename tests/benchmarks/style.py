"""Does a preference loss keep the author in a title that must also obey a style? On ACL authors, with SmolLM2-135M.

    python -m tests.benchmarks.style --acl FOLDER --out run/style
    python -m tests.benchmarks.style --acl FOLDER --out run/style --train-requests 160 --dev-requests 24 --seeds 0
    python -m tests.benchmarks.style --acl FOLDER --out run/style --table

Each request asks for the author's next title in one of four styles that a rule can check. Plugs are trained with three
losses (nll, preference, both), each with a control of the first seed that sees no history. Jobs make the requests, the
rejected texts, their reference losses and the plugs, as docs/style.md says; `style_judge` judges the plugs.

Results that `--out` already has are kept, so the same command resumes: a judged plug is a JSON file in `--out`/results.
At the end, and with `--table` at once, the table of those that exist is printed and written to `--out`/table.json,
and `--out`/figure.png is drawn of it.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from persona.inputs.styles import read_styles, with_styles
from persona.models import packaged
from tests.benchmarks import style_figure, style_table
from tests.benchmarks.authors import with_rejected
from tests.benchmarks.job import run_job
from tests.benchmarks.style_judge import STYLES, Judge

_LOSSES = {
    "nll": ("--preference", 0, "--nll-weight", 1),
    "preference": ("--preference", 0.1, "--nll-weight", 0),
    "both": ("--preference", 0.1, "--nll-weight", 0.1),
}
_CONTROL = ("--weights", "mean", "--empty-history", 1, "--alignment", 0)
_RECIPE = "jobs/recipes/acl_style/preference.yaml"


def main() -> None:
    """Prints each command with its output, and the table at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--acl", type=Path, required=True, help="folder with histories.parquet and the requests")
    parser.add_argument("--out", type=Path, required=True, help="folder for the store, plugs and results")
    parser.add_argument("--train-requests", type=int, default=560, help="training requests, each in one style")
    parser.add_argument("--dev-requests", type=int, default=64, help="requests to judge with")
    parser.add_argument("--batch", type=int, default=8, help="requests per optimizer step")
    parser.add_argument("--persona-tokens", type=int, default=4, help="soft tokens of the persona")
    parser.add_argument("--strengths", type=float, nargs="+", default=(0, 0.5, 1, 2), help="α; 0 and 1 are needed")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2), help="training seeds")
    parser.add_argument("--control-seeds", type=int, nargs="+", help="those of the controls; default the first")
    parser.add_argument("--losses", nargs="+", choices=_LOSSES, default=list(_LOSSES), help="losses to train with")
    parser.add_argument("--table", action="store_true", help="only print the table of what has been judged")
    arguments = parser.parse_args()
    if not {0, 1} <= set(arguments.strengths):
        parser.error("--strengths must have 0 and 1")
    run = Run(arguments)
    if not arguments.table:
        run.all()
    print(style_table.write(run.results, run.folder / "table.json"))
    style_figure.draw(run.folder / "table.json", run.folder / "figure.png")


class Run:
    """One measurement in its folder."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.acl, self.folder = arguments.acl.resolve(), arguments.out
        self.results = self.folder / "results"
        self.store, self.llm = self.folder / "store", packaged.smollm2()
        self.styled, self.paired = self.folder / "styled.parquet", self.folder / "paired"
        self.reference = self.folder / "reference"

    def all(self) -> None:
        """Every step that has not been done."""
        self.results.mkdir(parents=True, exist_ok=True)
        self._keep_settings()
        self._once("requests", self._write_requests)
        self._once("embed", self._embed)
        start = self._train("start", _LOSSES["nll"], ("--limit", 64, "--validation-fraction", 0.3), seed=0)
        self._once("rejected", lambda: self._reject(start))
        judge = Judge(self.folder, self.store, self.llm, self.arguments.strengths)
        self._judged(judge, "bare", start, seed=0, personas=("bare",))
        first = self.arguments.seeds[0]
        for seed in self.arguments.seeds:
            for name in self.arguments.losses:
                self._judged(judge, name, self._train(name, _LOSSES[name], seed=seed), seed, ("own", "none", "other"))
                if seed in (self.arguments.control_seeds or [first]):
                    control = f"{name}-control"
                    plug = self._train(control, _LOSSES[name], _CONTROL, seed=seed)
                    self._judged(judge, control, plug, seed, ("none",))

    def _keep_settings(self) -> None:
        """Refuses to resume with another size: the results could not be compared."""
        names = ("train_requests", "dev_requests", "batch", "persona_tokens", "strengths")
        settings = {name: getattr(self.arguments, name) for name in names} | {"acl": str(self.acl)}
        settings = json.loads(json.dumps(settings))
        file = self.folder / "settings.json"
        if file.exists() and json.loads(file.read_text()) != settings:
            raise SystemExit(f"{self.folder} was started with {file.read_text()}, not {settings}; take another --out")
        file.write_text(json.dumps(settings))

    def _write_requests(self) -> None:
        """The training requests in one style each, and the dev requests plain and in one style each."""
        train = pq.read_table(self.acl / "next_title_train.parquet")
        n = min(self.arguments.train_requests, train.num_rows)
        plain = train.take(np.sort(np.random.default_rng(0).choice(train.num_rows, n, replace=False)))
        pq.write_table(plain, self.folder / "plain.parquet")
        styles = self.folder / "styles.jsonl"
        rows = [{"id": name, "instruction": style.instruction} for name, style in STYLES.items()]
        styles.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        crossed = self.folder / "crossed"
        recipe = ("--config", _RECIPE)
        run_job("style", *recipe, "--requests", self.folder / "plain.parquet", "--styles", styles, "--out", crossed)
        pq.write_table(_one_style_each(pq.read_table(crossed)), self.styled)

        which, dev = (pq.read_table(self.acl / f"{name}_dev.parquet") for name in ("which", "next_title"))
        dev = with_rejected(dev, which, label=False)
        chosen = np.linspace(0, dev.num_rows - 1, min(self.arguments.dev_requests, dev.num_rows)).astype(int)
        dev = dev.take(np.unique(chosen))
        texts = {name: dev[name].cast(pa.large_string()) for name in ("input", "target", "rejected")}
        plain = pa.table({**{name: dev[name] for name in ("request_id", "user_id", "as_of")}, **texts})
        plain = plain.append_column("query", texts["input"]).append_column(
            "system", pa.nulls(plain.num_rows, pa.large_string())
        )
        pq.write_table(plain, self.folder / "dev-plain.parquet")
        styled = _one_style_each(with_styles(plain, read_styles(str(styles), flag="--styles"), place="after"))
        rejected = dict(zip(plain["request_id"].to_pylist(), plain["rejected"].to_pylist(), strict=True))
        of_styled = [rejected[one.rpartition("/")[0]] for one in styled["request_id"].to_pylist()]
        styled = styled.append_column("rejected", pa.array(of_styled, pa.large_string()))
        pq.write_table(styled, self.folder / "dev-styled.parquet")

    def _embed(self) -> None:
        run_job(
            "embed",
            *("--histories", self.acl / "histories.parquet", "--store", self.store, "--encoder", packaged.minilm()),
            *("--max-tokens", 256, "--buckets", 16),
        )

    def _reject(self, plug: Path) -> None:
        """Writes what the LLM answers without a plug, and measures its losses."""
        inputs = ("--config", _RECIPE, "--store", self.store)
        of_plug = (*inputs, "--plug", plug)
        run_job("generate", *of_plug, "--requests", self.styled, "--persona", "bare", "--batch-size", 32)
        run_job("pair", *inputs, "--requests", self.styled, "--out", self.paired)
        flags = ("--persona", "bare", "--losses-only", "--batch-size", 16, "--out", self.reference)
        run_job("evaluate", *of_plug, "--requests", self.paired, *flags)

    def _train(self, name: str, loss: tuple[object, ...], more: tuple[object, ...] = (), *, seed: int) -> Path:
        """The folder of one plug, trained if it does not exist yet."""
        plug = self.folder / "plugs" / f"{name}-{seed}"
        if (plug / "plug.json").exists():
            return plug
        batch = self.arguments.batch
        prefers = loss[1] != 0
        inputs = ("--rejected", "rejected", "--reference", self.reference) if prefers else ()
        steps = self.arguments.train_requests // batch
        run_job(
            "train",
            *("--config", "jobs/recipes/acl_style/nll.yaml", "--persona-tokens", self.arguments.persona_tokens),
            *("--requests", self.styled if name == "start" else self.paired, *inputs, *loss, *more),
            *("--epochs", 1, "--global-batch", batch, "--micro-batch", batch, "--seed", seed),
            *("--validate-every", steps, "--validation-rows", 32, "--select", "last"),
            *("--store", self.store, "--runs", self.folder / "runs", "--run", f"{name}-{seed}", "--plug", plug),
            *("--llm", self.llm),
        )
        return plug

    def _judged(self, judge: Judge, name: str, plug: Path, seed: int, personas: tuple[str, ...]) -> None:
        """Judges a plug unless it has been."""
        file = self.results / f"{name}-{seed}.json"
        if file.exists():
            return
        started = time.perf_counter()
        found = judge.judge(plug, personas)
        seconds = round(time.perf_counter() - started)
        draft = file.with_suffix(".draft")
        draft.write_text(json.dumps({"name": name, "seed": seed, "seconds": seconds, **found}))
        draft.replace(file)
        print(f"── judged {name}, seed {seed}, in {seconds} s\n", flush=True)

    def _once(self, name: str, work) -> None:
        """Does some work unless a marker says that it has been done."""
        marker = self.folder / f".{name}.done"
        if not marker.exists():
            work()
            marker.touch()


def _one_style_each(requests: pa.Table) -> pa.Table:
    """Of requests in all styles, one style of each, in turn by the order of the plain ids."""
    ordered = requests.sort_by([("request_id", "ascending")])
    plain = [one.rpartition("/")[0] for one in ordered["request_id"].to_pylist()]
    number = {one: i for i, one in enumerate(dict.fromkeys(plain))}
    wanted = pa.array([list(STYLES)[number[one] % len(STYLES)] for one in plain])
    return ordered.filter(pc.equal(ordered["style"], wanted))


if __name__ == "__main__":
    main()
