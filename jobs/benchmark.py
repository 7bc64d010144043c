"""Measure what personas are worth on your own data: own, other and none, prompt tuning, and recent texts in the prompt.

Reads `--histories` with timestamps. Encodes them, makes requests from them (or takes yours), and trains plugs of equal
steps: the plug, prompt tuning, and both with recent texts in front of each prompt. Evaluates all of them on users that
no training has seen. Writes `<out>/comparison.html` and `comparison.json`: the table with intervals, and a verdict in
words. The same command again goes on where it stopped.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import Annotated, Literal

from jobs import compare, embed, evaluate, make_requests, train
from jobs.runtime import benchmark_plan, cli, configuration, inputs
from jobs.runtime.benchmark_plan import ROWS, Row
from jobs.runtime.cli import Summary
from jobs.runtime.job_options import FLAT, InputFormat, InputRows, PastTexts, RequestFormat, flat_settings
from jobs.runtime.steps import StepFailed, Steps
from persona.errors import UsageError
from persona.front_texts import FrontTexts
from persona.option_checks import check_at_least
from persona.options import CostOptions, PersonaKind, RetrievalOptions, Retriever

_NO_PART_OF_THE_RESULT = ("seeds", "max_reject_fraction", "gpu_hour_price", "tflops", "dry_run")
_BUCKET_BYTES = 32 * 2**20  # of input for each file of requests; other users' texts are found within a file


@dataclass(frozen=True, kw_only=True)
class Config:
    """Configuration of jobs.benchmark."""

    histories: str
    """The histories, as jobs.embed reads them; they need timestamps."""
    out: str
    """Folder for everything that is made, local or s3://; on a cluster one that every node can reach."""
    requests: str | None = None
    """Your own requests with targets and as_of to train on; without them, they are made from the histories."""
    test_requests: str | None = None
    """The same for the measurement, of other users than --requests."""
    store: str | None = None
    """A store that has the histories already; without it, they are encoded into <out>/store."""
    columns: str = ""
    """Names of the columns of --histories where they differ: text=body,user_id=author."""
    form: Annotated[RequestFormat, FLAT] = field(default_factory=RequestFormat)
    recipe: str = "acl_next_title/best"
    """Recipe, or a file like one, whose sections embed and train have the settings; the models are there, too."""
    encoder: str | None = None
    """Hub id or folder of the encoder, instead of the recipe's."""
    llm: str | None = None
    """Hub id or folder of the LLM, instead of the recipe's."""
    task: Literal["next_text", "opening", "titled", "which"] = "next_text"
    """What requests made from the histories ask for; see jobs.make_requests."""
    ask: str | None = None
    """The instruction to the LLM; name the kind of text, like 'Write a movie review.'; the default fits the task."""
    opening_words: int = 0
    """First words of a text; see jobs.make_requests."""
    title: str | None = None
    """Column with the title of a text, for --task titled."""
    min_history: int = 3
    """Make a request only from texts with at least this many older texts of the user."""
    max_a_user: int = 16
    """Make at most this many requests per user, from the latest texts."""
    held_out: float = 0.2
    """Share of the users who are measured and never trained on."""
    epochs: int | None = None
    """Passes over the requests, instead of the recipe's; the same for every plug."""
    train_rows: int | None = None
    """Train on only this many requests."""
    test_rows: int | None = None
    """Measure only this many requests; the page then says so."""
    retrieve: int = 4
    """Texts of the user in front of each prompt, in the rows with texts; 0 leaves these rows out."""
    retriever: Retriever = "recency"
    """Choose the latest texts, those that share the query's words (BM25), or those nearest by the store's encoder."""
    retrieve_tokens: int = 256
    """Tokens of all these texts together."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the trainings; more can be added later, by the same command with more of them."""
    max_reject_fraction: float = 0.01
    """End with code 3 when a step rejects a larger share of its rows."""
    cost: Annotated[CostOptions, FLAT] = field(default_factory=CostOptions)
    dry_run: bool = False
    """Show the steps, what is done already, and what the rest will take; change nothing."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        check_at_least(self, 1, "epochs", "train_rows", "test_rows")
        check_at_least(self, 0, "retrieve")
        if not 0 < self.held_out < 1:
            raise UsageError(
                f"--held-out {self.held_out}: must be above 0 and below 1; the result rests on these users"
            )
        if (self.requests is None) != (self.test_requests is None):
            raise UsageError("--requests and --test-requests go together: give both, or none to make them")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UsageError("--seeds: give at least one, each once")

    @property
    def retrieval(self) -> RetrievalOptions:
        """Of the rows with texts."""
        return RetrievalOptions(retrieve=self.retrieve, retriever=self.retriever, retrieve_tokens=self.retrieve_tokens)

    @property
    def input_format(self) -> InputFormat:
        """Of the histories."""
        return InputFormat(**{one.name: getattr(self.form, one.name) for one in fields(InputFormat)})

    @property
    def request_form(self) -> RequestFormat:
        """Of the requests; those that are made have the standard columns."""
        return self.form if self.requests is not None else replace(self.form, request_columns="")

    @property
    def plugs(self) -> Sequence[Row]:
        """The plugs that are compared."""
        return [row for row in ROWS if self.retrieve or not row.texts]


def main(config: Config) -> Summary:
    """Runs the benchmark."""
    parts = _Parts.of(config)
    settings = {name: value for name, value in flat_settings(config).items() if name not in _NO_PART_OF_THE_RESULT}
    parts.steps.check_settings(settings)
    if config.dry_run:
        steps = {name: (what, parts.steps.result(name)) for name, what, _ in parts.jobs()}
        return benchmark_plan.plan(parts.out, steps, parts.trainings, config.cost)
    started = time.perf_counter()
    parts.steps.begin(settings)
    try:
        for name, _, work in parts.jobs():
            _, summary = parts.steps.run(name, partial(_said, name, work))
            if summary is None:
                print(f"── {name}: done before", flush=True)
    except StepFailed as failed:
        result = {"job": "benchmark", "out": parts.out, "failed": failed.name, "step": failed.summary.result}
        return Summary(table=[("failed", str(failed))], result=result, exit_code=failed.summary.exit_code)
    return _compared(config, parts, time.perf_counter() - started)


def _said(name: str, work: Callable[[], Summary]) -> Summary:
    print(f"── {name}", flush=True)
    summary = work()
    for row in summary.table:
        print(f"    {'  '.join(row)}")
    sys.stdout.flush()
    return summary


def _made(making: make_requests.Config) -> Summary:
    return benchmark_plan.checked_requests(make_requests.main(making))


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """The jobs of a benchmark, with their configurations; those of training are by name and seed."""

    config: Config
    out: str
    steps: Steps
    embedding: embed.Config | None
    making: make_requests.Config | None
    trainings: Mapping[str, train.Config]

    @classmethod
    def of(cls, config: Config) -> "_Parts":
        """Finds and checks what can be checked before any work."""
        from persona import storage
        from persona.models import resolve as models

        out = storage.check_uri(config.out, flag="--out")
        storage.check_reachable(out, flag="--out", write=True)
        histories = inputs.find_histories(config.histories, config.columns, config.form, flag="--histories")
        histories.check_timed(config.histories)
        n_bytes = sum(split.end - split.start for split in histories.splits)
        parts = cls(
            config=config,
            out=out,
            steps=Steps(uri=storage.join(out, "steps")),
            embedding=None if config.store is not None else _embedding(config, out),
            making=None if config.requests is not None else _making(config, out, n_bytes),
            trainings={
                f"{row.name}-{seed}": _training(config, out, row, seed) for seed in config.seeds for row in config.plugs
            },
        )
        first = next(iter(parts.trainings.values()))
        models.resolve(first.llm, revision=first.llm_revision, flag="--llm")
        return parts

    def jobs(self) -> Iterator[tuple[str, str, Callable[[], Summary]]]:
        """Each step in order: its name, what it does, and the work."""
        if self.embedding is not None:
            yield "embed", "encode the histories", partial(embed.main, self.embedding)
        if self.making is not None:
            yield "make_requests", "make requests", partial(_made, self.making)
        else:
            yield (
                "check_users",
                "check that no measured user is trained on",
                lambda: benchmark_plan.check_users(*self._requests()),
            )
        for row in self.config.plugs:
            for seed in self.config.seeds:
                name = f"{row.name}-{seed}"
                training = self.trainings[name]
                yield f"train-{name}", row.describes, partial(train.main, training)
                yield f"evaluate-{name}", f"measure {', '.join(row.personas)}", partial(self._evaluate, row, training)

    def evaluations(self) -> dict[str, str]:
        """The folder of each evaluation, by row and seed."""
        from persona import storage

        return {name: storage.join(self.out, "evaluations", name) for name in self.trainings}

    def _evaluate(self, row: Row, training: train.Config) -> Summary:
        config = self.config
        found = evaluate.Config(
            requests=config.test_requests or f"{self.out}/requests/held_out",
            store=training.store,
            plug=training.plug,
            out=self.evaluations()[training.run],
            persona=tuple(PersonaKind(persona) for persona in row.personas),
            losses_only=True,
            rejected="rejected" if self._is_paired() else None,
            front=FrontTexts(**asdict(training.retrieval)),
            past_texts=training.past_texts,
            rows=InputRows(limit=config.test_rows, max_reject_fraction=config.max_reject_fraction),
            form=config.request_form,
        )
        return evaluate.main(found)

    def _requests(self) -> list[inputs.Requests]:
        """Those that were given, to train on and to measure."""
        both = {"--requests": self.config.requests, "--test-requests": self.config.test_requests}
        return [
            inputs.find_requests(str(uri), self.config.form, flag=flag, needs_target=True) for flag, uri in both.items()
        ]

    def _is_paired(self) -> bool:
        """Whether each measured request has another user's text to be ranked against."""
        made = self.steps.result("make_requests") if self.making is not None else None
        return bool(made and made.get("held_out_requests") and not made.get("held_out_unpaired"))


def _flags(config: Config, **flags: object) -> list[str]:
    given = {name: str(value) for name, value in flags.items() if value not in (None, "")}
    return ["--config", config.recipe, *(f"--{name.replace('_', '-')}={value}" for name, value in given.items())]


def _embedding(config: Config, out: str) -> embed.Config:
    flags = _flags(
        config, histories=config.histories, store=f"{out}/store", columns=config.columns, encoder=config.encoder
    )
    found = configuration.read_config(embed.Config, flags)
    assert found is not None
    return replace(found, form=config.input_format, rows=InputRows(max_reject_fraction=config.max_reject_fraction))


def _making(config: Config, out: str, n_bytes: int) -> make_requests.Config:
    return make_requests.Config(
        histories=config.histories,
        out=f"{out}/requests",
        columns=config.columns,
        form=config.input_format,
        task=config.task,
        ask=config.ask,
        opening_words=config.opening_words,
        title=config.title,
        min_history=config.min_history,
        max_a_user=config.max_a_user,
        held_out=config.held_out,
        buckets=min(64, 1 + n_bytes // _BUCKET_BYTES),
        max_reject_fraction=config.max_reject_fraction,
    )


def _training(config: Config, out: str, row: Row, seed: int) -> train.Config:
    name = f"{row.name}-{seed}"
    flags = _flags(
        config,
        requests=config.requests or f"{out}/requests/train",
        store=config.store or f"{out}/store",
        plug=f"{out}/plugs/{name}",
        run=name,
        runs=f"{out}/runs",
        llm=config.llm,
        encoder=config.encoder if config.store is None else None,
        epochs=config.epochs,
        seed=seed,
    )
    found = configuration.read_config(train.Config, flags)
    assert found is not None
    return replace(
        found,
        patience=0,  # plugs are compared after equal steps
        training=row.training(found.training),
        plug_options=row.plug(found.plug_options),
        retrieval=config.retrieval if row.texts else RetrievalOptions(),
        past_texts=PastTexts(texts=config.histories, columns=config.columns) if row.texts else PastTexts(),
        rows=InputRows(limit=config.train_rows, max_reject_fraction=config.max_reject_fraction),
        form=config.request_form,
    )


def _compared(config: Config, parts: _Parts, seconds: float) -> Summary:
    """The table and the verdict, written and shown."""
    from persona import storage
    from persona.evaluation.benchmark_verdict import PLUG, TUNING, TUNING_TEXTS, verdict
    from persona.evaluation.many_runs import compare as compared
    from persona.report.pages import comparison_page

    folders = parts.evaluations()
    evaluations = compare.read_evaluations([*folders.values()], [name.rpartition("-")[0] for name in folders])
    found = compared(evaluations, against=f"{TUNING}/none", seed=0)
    of_texts = compared(evaluations, against=f"{TUNING_TEXTS}/none", seed=0) if config.retrieve else None
    plug = parts.trainings[f"{PLUG}-{config.seeds[0]}"].plug_options
    trained = parts.steps.result(f"train-{PLUG}-{config.seeds[0]}") or {}
    found["verdict"] = verdict(
        found,
        of_texts,
        steps=trained["steps"],
        soft_tokens=plug.n_soft,
        text_tokens=config.retrieve_tokens,
    )
    files = {
        "comparison.json": (json.dumps(cli.plain(found), indent=2, allow_nan=False) + "\n").encode(),
        "comparison.html": comparison_page(found),
    }
    for name, data in files.items():
        storage.write_bytes(storage.join(parts.out, name), data)
    print("── verdict")
    for check in found["verdict"]["checks"]:
        print(f"    {check['question']}\n        {check['sentence']} {check['advice']}".rstrip())
    for text in (found["verdict"]["conclusion"], *found["verdict"]["notes"], *found["warnings"]):
        print(f"    {text}", flush=True)
    table = [*compare.table(found), ("page", storage.join(parts.out, "comparison.html"))]
    result = {"job": "benchmark", "out": parts.out, "seconds": round(seconds, 1), **found}
    return Summary(table=table, result=result)


if __name__ == "__main__":
    sys.exit(cli.run(Config, main))
