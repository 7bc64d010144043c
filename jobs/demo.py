"""Run every job on this machine, in a few minutes and offline, over made-up people whose notes show what they love.

Writes everything into `--out`: histories, requests, the store with its tables, the plug, metrics.json. The models are
real and come as packages: MiniLM encodes, SmolLM2-135M-Instruct answers, frozen. Test people were never seen in
training.
"""

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import embed, evaluate, generate, import_lamp, train
from jobs.runtime import cli
from jobs.runtime.cli import Summary
from jobs.runtime.job_options import InputRows, PastTexts, check_limit
from persona.errors import UsageError
from persona.options import Decoding, PersonaKind, PlugOptions, TrainingOptions

_MARK = ".persona-plug-demo"
_KINDS = (PersonaKind.OWN, PersonaKind.NONE, PersonaKind.OTHER)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What `jobs.demo` can be told."""

    out: str = "demo-run"
    """Local folder for all that the demo makes; one of an earlier demo is replaced."""
    seed: int = 7
    """Of the made-up people and of the training."""
    limit: int | None = None
    """Train on only this many requests (the demo then shows the way, not the effect)."""
    dry_run: bool = False
    """Say what would be done, and start nothing."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        check_limit(self.limit)


def main(config: Config) -> Summary:
    """Runs the demo."""
    out = Path(config.out).expanduser().resolve()
    if out.exists() and any(out.iterdir()) and not (out / _MARK).exists():
        raise UsageError(f"--out {out}: has files that are not of a demo; give an empty or a new folder")
    if config.dry_run:
        would = f"make people, embed, train, generate and evaluate in {out}"
        return Summary(table=[("would", would)], result={"dry_run": True, "would": would})
    started = time.perf_counter()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / _MARK).touch()
    _say("the models (unpacked once)")
    from persona.models import packaged

    encoder, llm = str(packaged.minilm()), str(packaged.smollm2())
    _say("people who write notes, and what they ask")
    _make_people(out, config.seed)
    store, plug = str(out / "store"), str(out / "plug")
    asked = str(out / "requests-test.parquet")

    _run("import_lamp: a LaMP file becomes histories and requests", import_lamp.main, _lamp(out))
    _run(
        "embed: each note becomes a vector in the store",
        embed.main,
        embed.Config(
            histories=str(out / "histories.parquet"),
            store=store,
            encoder=encoder,
            max_tokens=64,
            buckets=4,
            block_rows=1024,
        ),
    )
    _run("train: the plug learns to tell the frozen LLM who asks", train.main, _training(config, out, store, plug, llm))
    _run(
        "generate: answers with the own persona, none, and another's",
        generate.main,
        generate.Config(
            requests=asked,
            store=store,
            plug=plug,
            persona=_KINDS,
            decoding=Decoding(beams=1, max_new_tokens=8),
            batch_size=48,
        ),
    )
    judged = _run(
        "evaluate: what the persona is worth",
        evaluate.main,
        evaluate.Config(
            requests=asked,
            store=store,
            plug=plug,
            out=str(out),
            past_texts=PastTexts(texts=str(out / "histories.parquet")),
            metric="label",
            batch_size=32,
        ),
    )
    seconds = round(time.perf_counter() - started, 1)
    _show(json.loads((out / "metrics.json").read_bytes())["examples"])
    result = {
        "scores": {kind: round(judged["scores"][kind]["accuracy"], 4) for kind in _KINDS},
        "loss": {kind: judged["loss"][kind]["mean"] for kind in _KINDS},
        "seconds": seconds,
        "store": store,
        "plug": plug,
        "generations": str(out / "store" / "generations"),
        "report": str(out / "report.html"),
    }
    return Summary(table=_table(judged, seconds), result=result)


def _make_people(out: Path, seed: int) -> None:
    import pyarrow.parquet as pq

    from persona.demo import people as demo

    pq.write_table(demo.histories(seed=seed), out / "histories.parquet")
    for part in ("train", "validation", "test"):
        pq.write_table(demo.requests(part, seed=seed), out / f"requests-{part}.parquet")


def _lamp(out: Path) -> import_lamp.Config:
    """A few questions in LaMP's own form, one of them broken, to be imported."""
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


def _training(config: Config, out: Path, store: str, plug: str, llm: str) -> train.Config:
    return train.Config(
        requests=str(out / "requests-train.parquet"),
        validation=str(out / "requests-validation.parquet"),
        store=store,
        plug=plug,
        run="demo",
        runs=str(out / "runs"),
        llm=llm,
        validate_every=60,
        plug_options=PlugOptions(persona_tokens=4, temperature=30.0, learn_temperature=True),
        training=TrainingOptions(
            epochs=2,
            global_batch=16,
            micro_batch=16,
            learning_rate=4e-3,
            query_learning_rate=3e-4,
            warmup=0.1,
            history_dropout=0.25,
            warm_start="vocabulary",
            seed=config.seed,
        ),
        rows=InputRows(limit=config.limit),
    )


def _run(what: str, main_of_job: Any, config: Any) -> dict[str, Any]:
    """One job, called as its command would be, and its summary."""
    _say(what)
    summary = main_of_job(config)
    for name, value in summary.table:
        print(f"    {name:<18} {value}")
    if summary.exit_code:
        raise UsageError(f"the demo's step {what.split(':', maxsplit=1)[0]} ended with exit code {summary.exit_code}")
    return dict(summary.result)


def _say(what: str) -> None:
    print(f"\n── {what}", flush=True)


def _show(examples: Sequence[Mapping[str, Any]]) -> None:
    """A few requests, each answered three times."""
    from textwrap import shorten

    _say("the same question, asked by different people")
    heads = ("request", "own", "none", "other", "target")
    rows = [[shorten(example["input" if head == "request" else head], 44) for head in heads] for example in examples]
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    for row in [heads, *rows]:
        print("    " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _table(judged: Mapping[str, Any], seconds: float) -> list[tuple[str, str]]:
    from persona.demo.people import guessed_right

    said = {"own": "their own persona", "none": "no persona", "other": "someone else's persona"}
    print()
    rows = []
    for kind in _KINDS:
        score, loss = judged["scores"][kind]["accuracy"], judged["loss"][kind]["mean"]
        rows.append((said[kind], f"{score:6.1%} right   {loss:.3f} nats a token"))
    rows.append(("by guessing", f"{guessed_right():6.1%} right"))
    rows.append(("asked", f"{judged['requests']} requests of {judged['users']} people never seen in training"))
    rows.append(("took", f"{seconds:.0f} s"))
    return rows


if __name__ == "__main__":
    sys.exit(cli.run(Config, main))
