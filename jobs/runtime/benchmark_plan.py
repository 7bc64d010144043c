"""The plugs that a benchmark compares, and what is known of the work before it is done."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from jobs.runtime import cost
from jobs.runtime.cli import Summary
from jobs.runtime.inputs import Requests
from jobs.runtime.job_options import InputRows
from persona.errors import UsageError
from persona.options import CostOptions, PlugOptions, RetrievalOptions, TrainingOptions

if TYPE_CHECKING:
    from persona.models.resolve import ModelFolder


@dataclass(frozen=True, kw_only=True)
class Row:
    """A plug of the comparison: whether it is trained with histories, and with recent texts in front of the prompt."""

    name: str
    histories: bool
    texts: bool
    personas: tuple[str, ...]
    describes: str

    def training(self, recipe: TrainingOptions) -> TrainingOptions:
        """The recipe's settings. With alignment a plug does not learn to read texts; the control has no history."""
        if not self.histories:
            return replace(recipe, empty_history=1.0, alignment=0.0, contrast=0.0)
        return replace(recipe, alignment=0.0) if self.texts else recipe

    def plug(self, recipe: PlugOptions) -> PlugOptions:
        """The recipe's plug; the control has nothing to weigh."""
        return recipe if self.histories else replace(recipe, weights="mean", learn_temperature=False)


# The names are those that `persona.evaluation.benchmark_verdict` looks for.
ROWS = (
    Row(name="plug", histories=True, texts=False, personas=("own", "none", "other", "bare"), describes="the plug"),
    Row(
        name="tuning",
        histories=False,
        texts=False,
        personas=("none",),
        describes="prompt tuning: the plug without any history",
    ),
    Row(
        name="plug-texts",
        histories=True,
        texts=True,
        personas=("own", "none", "other", "bare"),
        describes="the plug with recent texts in front",
    ),
    Row(
        name="tuning-texts",
        histories=False,
        texts=True,
        personas=("none",),
        describes="prompt tuning with recent texts in front",
    ),
)


class _Training(Protocol):
    """What an estimate needs of the configuration of jobs.train."""

    @property
    def llm(self) -> str: ...
    @property
    def llm_revision(self) -> str: ...
    @property
    def max_input_tokens(self) -> int: ...
    @property
    def max_target_tokens(self) -> int: ...
    @property
    def validation_fraction(self) -> float: ...
    @property
    def plug_options(self) -> PlugOptions: ...
    @property
    def training(self) -> TrainingOptions: ...
    @property
    def retrieval(self) -> RetrievalOptions: ...
    @property
    def rows(self) -> InputRows: ...


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The work of one training.

    Attributes:
        steps: about as many, as users that are held out for validation have more or fewer requests.
        tokens: that the LLM reads at most.
        seconds: at the rate of a training that is done; None before the first.
        tflop: operations of the LLM, at most; 0 if they are not known.
    """

    steps: int
    tokens: int
    seconds: float | None
    tflop: float


def estimate(
    training: _Training, n_requests: int | None, *, known: Mapping[str, Any] | None, rates: Sequence[float]
) -> Estimate | None:
    """What a training will take; None as long as the number of requests is not known.

    Args:
        training: its configuration.
        n_requests: before some users are held out for validation.
        known: the result of the training, if it is done.
        rates: requests a second of trainings that are done.
    """
    from persona import cost as flops
    from persona.models import resolve as models

    if known is not None:
        n_trained = known["requests"]
    elif n_requests is not None:
        limit = training.rows.limit
        n_taken = n_requests if limit is None else min(n_requests, limit)
        n_trained = round(n_taken * (1 - training.validation_fraction))
    else:
        return None
    options = training.training
    n_read = n_trained * options.epochs
    inputs = training.plug_options.n_soft + training.retrieval.front_tokens + training.max_input_tokens
    llm: ModelFolder = models.resolve(training.llm, revision=training.llm_revision, flag="--llm")
    work = cost.known(
        # Forward, and backward to the soft tokens in front.
        lambda: 2 * flops.llm_flops(llm.config, n_requests=n_read, inputs=inputs, outputs=training.max_target_tokens)
    )
    return Estimate(
        steps=max(n_trained // options.global_batch, 1) * options.epochs,
        tokens=n_read * (inputs + training.max_target_tokens),
        seconds=round(n_read / min(rates), 1) if rates and min(rates) > 0 else None,
        tflop=round(work / flops.TERA, 3),
    )


def plan(
    out: str,
    steps: Mapping[str, tuple[str, Mapping[str, Any] | None]],
    trainings: Mapping[str, _Training],
    options: CostOptions,
) -> Summary:
    """The summary of a dry run.

    Args:
        out: the folder of the benchmark.
        steps: what each step does, and its result if it is done.
        trainings: the configuration of each training, by the name of its step without `train-`.
        options: price and speed.
    """
    done = {name: result for name, (_, result) in steps.items() if result is not None}
    n_requests = done.get("make_requests", {}).get("train_requests")
    rates = [one["requests_per_s"] for name, one in done.items() if name.startswith("train-")]
    estimates = {
        f"train-{name}": estimate(training, n_requests, known=done.get(f"train-{name}"), rates=rates)
        for name, training in trainings.items()
    }
    table = [("would", f"compare {len(trainings)} plugs in {out}")]
    for name, (what, result) in steps.items():
        state = f"done: {what}" if result is not None else f"to do: {what}{_in_words(estimates.get(name))}"
        table.append((name, state))
    found = {
        "job": "benchmark",
        "dry_run": True,
        "out": out,
        "done": [*done],
        "train_requests": n_requests,
        "trainings": {name: one and asdict(one) for name, one in estimates.items()},
    }
    left = [one.tflop for name, one in estimates.items() if one is not None and name not in done]
    return cost.planned(
        Summary(table=table, result=found), options, flops=1e12 * sum(left), if_all="for the trainings that are left"
    )


def _in_words(one: Estimate | None) -> str:
    if one is None:
        return ""
    seconds = "" if one.seconds is None else f", about {one.seconds / 60:,.0f} min at the rate of the trainings so far"
    return f"; about {one.steps:,} steps, at most {one.tokens:,} tokens{seconds}"


def checked_requests(made: Summary) -> Summary:
    """The summary of jobs.make_requests. Raises `UsageError` if there is nothing to train on or to measure."""
    n_train, n_held_out = (made.result.get(f"{part}_requests", 0) for part in ("train", "held_out"))
    if not n_train or not n_held_out:
        raise UsageError(
            f"--histories: give {n_train:,} requests to train on and {n_held_out:,} to measure, but both are needed; "
            "take more users, a lower --min-history, or another --held-out (in a new --out)"
        )
    return made


def check_users(train: Requests, test: Requests) -> Summary:
    """Raises `UsageError` if a measured user is trained on; holds the users of `test`."""
    if n_shared := _n_shared_users(train, test):
        raise UsageError(
            f"--test-requests: {n_shared:,} of its users are in --requests, too; measure on users of their own"
        )
    return Summary(table=[("shared users", "none")], result={"shared_users": 0})


def _n_shared_users(train: Requests, test: Requests) -> int:
    from persona.inputs import cells
    from persona.inputs.reader import read_split
    from persona.inputs.records import column

    found: list[set[str]] = []
    for requests in (test, train):
        users: set[str] = set()
        name = requests.columns.user_id
        for split in requests.splits:
            for records in read_split(split, columns=[name], max_row_mb=requests.columns.max_row_mb):
                ids = {*cells.ids(column(records.table, name), name)[0].to_pylist()} - {None}
                users |= ids & found[0] if found else ids
        found.append(users)
    return len(found[1])
