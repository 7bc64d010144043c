"""Find the layers of an LLM in which a persona can be read, and in which the plug acts: hidden states by layer.

Reads either `--statements`, texts that match a group (a persona, a trait, a field) or do not, and `--llm`; or
`--requests`, `--store` and `--plug`, and reads each request under its own persona, none and another user's. Takes the
hidden states of each prompt's last token in every layer. Writes `<out>/layers.parquet` (separation, a held-out linear
probe, movement), `<out>/scan.parquet` (deep subset scan for units), `<out>/overlaps.parquet` (units that groups share),
`<out>/locate.json`, and `<out>/locate.html` for people. The states themselves are in `<out>/states` while it runs.
"""

import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from jobs.runtime import (
    cli,
    cost,
    exchange,
    inputs as job_inputs,
    locating,
    locating_results as results,
    locating_work as work,
    plugs,
    reading,
    session,
)
from jobs.runtime.cli import Summary
from jobs.runtime.job_options import FLAT, InputRows, LLMPool, PlugModels, RequestFormat, flat_settings
from jobs.runtime.locating_analysis import analyze
from jobs.runtime.locating_inputs import RequestInput, StatementInput, TextLLM
from jobs.runtime.pools import ModelPool
from jobs.runtime.progress import Stage, progress
from jobs.runtime.tally import Counts, Tally
from persona.errors import UsageError
from persona.option_checks import check_at_least, given
from persona.options import CostOptions, PersonaKind, PromptOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jobs.runtime.locating_work import Work


@dataclass(frozen=True, kw_only=True)
class Config:
    """Configuration of jobs.locate."""

    out: str
    """Folder for the tables and the page, local or s3://."""
    statements: str | None = None
    """Statements with `group`, `text` and `label` (1 or 0, yes or no), Parquet or JSONL, local or s3://."""
    statement_columns: str = ""
    """Names of the columns of --statements where they differ: text=statement,group=persona."""
    requests: str | None = None
    """Requests, Parquet or JSONL, local or s3://; needs --store and --plug."""
    store: str | None = None
    """With --requests: folder of the tables made by jobs.embed."""
    plug: str | None = None
    """With --requests: folder of the plug made by jobs.train, hf://OWNER/NAME, or `live` (see jobs.plugs)."""
    persona: tuple[PersonaKind, ...] = (PersonaKind.OWN, PersonaKind.NONE, PersonaKind.OTHER)
    """With --requests: the first kind of persona is compared with each of the others."""
    prompt: Annotated[PromptOptions, FLAT] = field(default_factory=PromptOptions)
    max_input_tokens: int = 256
    """With --statements: cut texts to this many tokens."""
    max_rows: int = 500
    """Analyze at most this many rows of each side in each layer, the same ones in all layers."""
    components: int = 3
    """Principal components on which the cluster metrics are computed."""
    runs: int = 20
    """Runs of the deep subset scan, each with its own background and scanned rows; 0 for none."""
    restarts: int = 5
    """Ascents of a scan from random rows, besides the one from all rows."""
    scan_score: Literal["berk-jones", "higher-criticism"] = "berk-jones"
    """What the scan maximizes."""
    tails: Literal["both", "upper", "lower"] = "both"
    """Which values of a unit are unusual: very high and very low ones, or only one of the two."""
    seed: int = 0
    """Seed of folds, shufflings and scans."""
    models: Annotated[PlugModels, FLAT] = field(default_factory=PlugModels)
    batch_size: int = 16
    """Texts per forward pass; lower it when a GPU runs out of memory."""
    block_rows: int = 1024
    """Rows whose states an actor holds and writes together; a killed run loses at most two such blocks per actor."""
    keep_states: bool = False
    """Keep the hidden states in <out>/states, for other programs and for other settings of the analysis."""
    pool: Annotated[LLMPool, FLAT] = field(default_factory=LLMPool)
    rows: Annotated[InputRows, FLAT] = field(default_factory=InputRows)
    form: Annotated[RequestFormat, FLAT] = field(default_factory=RequestFormat)
    cost: Annotated[CostOptions, FLAT] = field(default_factory=CostOptions)
    dry_run: bool = False
    """Show what would be done and change nothing."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        check_at_least(self, 1, "batch_size", "block_rows", "components", "max_input_tokens")
        check_at_least(self, 0, "runs", "restarts", "seed")
        check_at_least(self, 4, "max_rows")
        if (self.statements is None) == (self.requests is None):
            raise UsageError("give either --statements, or --requests with --store and --plug")
        if self.statements is not None:
            self._check_statements()
        else:
            self._check_requests()

    def _check_statements(self) -> None:
        for name in ("store", "plug"):
            if getattr(self, name) is not None:
                raise UsageError(f"{given(self, name)} goes with --requests, not with --statements")
        if self.models.llm is None:
            raise UsageError("--statements needs --llm, the folder or hub id of the LLM that reads them")

    def _check_requests(self) -> None:
        missing = [f"--{name}" for name in ("store", "plug") if getattr(self, name) is None]
        if missing:
            raise UsageError(f"--requests needs {' and '.join(missing)}")
        if self.prompt != PromptOptions():
            raise UsageError("prompt options go with --statements; requests are written as the plug was trained")
        if len(self.persona) < 2 or len(set(self.persona)) < len(self.persona):
            given_kinds = " ".join(self.persona)
            raise UsageError(f"--persona {given_kinds}: give two or more of own, none, other, mean, bare, each once")


def main(config: Config) -> Summary:
    """Runs the job."""
    from persona import storage
    from persona.locating import separation

    started = time.perf_counter()
    separation.check_installed()
    out = storage.check_uri(config.out, flag="--out")
    storage.check_reachable(out, flag="--out", write=True)
    source = _source(config)
    todo = work.plan(out, source, _state_facts(config, source), _analysis_facts(config))
    if config.dry_run:
        return _plan(config, source, todo)
    if (found := results.finished(out, todo.fingerprint)) is not None:
        return _summary(config, found, out, already=True)
    machines = session.connect()
    pool = ModelPool.plan(machines, config.pool)
    tally = Tally.start()
    with progress(tally, "locate", _stage_of):
        with exchange.run_files(out, "locate") as folder:
            read = locating.write_states(
                source,
                _settings(config, source, todo),
                pool,
                tally,
                block_rows=config.block_rows,
                limit=config.rows.limit,
                run_files=folder,
            )
        complete = work.complete(todo, source, _analysis_options(config))
        analyze(complete.analysis, tally)
    about = {"job": "locate", "fingerprint": todo.fingerprint, **_about(config, source), **complete.facts}
    counts = tally.totals()
    about |= {"computed": int(counts.get("states", {}).get("rows", 0)), "rejects": read.total.rejects}
    about |= {"repeated_ids": int(counts.get("join", {}).get("repeated", 0))}
    about["rows_read"] = read.total.rows
    about["seconds"] = round(time.perf_counter() - started, 1)
    found = results.write(out, complete.analysis, about, width=complete.width)
    work.clean(todo, keep_states=config.keep_states)
    summary = _summary(config, found, out, rejects=read.reject_rows())
    return cost.spent(summary, config.cost, machines, n_gpus=pool.all_gpus, seconds=about["seconds"])


def _source(config: Config) -> StatementInput | RequestInput:
    """What is read, found and checked before Ray starts."""
    from persona import storage
    from persona.store.store import Store

    if config.statements is not None:
        return _statements(config, config.statements)
    target = storage.check_uri(str(config.store), flag="--store")
    storage.check_reachable(target, flag="--store")
    requests = job_inputs.find_requests(str(config.requests), config.form, flag="--requests", needs_target=False)
    store = Store.open(target)
    plug = plugs.find_plug(store, str(config.plug), config.models, requests)
    return RequestInput(requests=requests, store=store.snapshot("behaviors"), plug=plug, personas=config.persona)


def _statements(config: Config, uri: str) -> StatementInput:
    from persona.inputs.splits import cut
    from persona.locating import statements
    from persona.models import resolve as models

    form = config.form
    columns = statements.Columns.parse(
        config.statement_columns, "--statement-columns", form.timestamp_unit, form.max_row_mb
    )
    files = job_inputs.find_files(uri, form, flag="--statements")
    splits = cut(files, files.formats)
    statements.check_columns(splits, columns, flag="--statement-columns")
    llm = models.resolve(str(config.models.llm), flag="--llm")
    tokenizer = plugs.check_llm(
        llm,
        max_input_tokens=config.max_input_tokens,
        max_target_tokens=1,
        prompt=config.prompt,
        n_soft=0,
        retrieved_tokens=0,
    )
    read_by = TextLLM(
        name=llm.name,
        fingerprint=llm.fingerprint,
        prompt=tokenizer.options,
        max_input_tokens=config.max_input_tokens,
    )
    return StatementInput(splits=splits, columns=columns, llm=read_by)


def _state_facts(config: Config, source: StatementInput | RequestInput) -> dict[str, Any]:
    """Everything that the hidden states depend on."""
    uri = config.requests or str(config.statements)
    flag = "--requests" if config.requests else "--statements"
    files = job_inputs.find_files(uri, config.form, flag=flag)
    read = {file.uri: (file.size_bytes, file.tag) for file in files.formats}
    return {
        "files": read,
        "columns": [config.statement_columns, config.form.request_columns, config.form.timestamp_unit],
        "limit": config.rows.limit,
        "precision": config.models.precision,
        **source.facts(),
    }


def _analysis_facts(config: Config) -> dict[str, Any]:
    names = ("max_rows", "components", "runs", "restarts", "scan_score", "tails", "seed")
    return {name: getattr(config, name) for name in names}


def _analysis_options(config: Config) -> work.Options:
    from persona.locating.runs import ScanOptions

    return work.Options(
        most=config.max_rows,
        n_components=config.components,
        n_runs=config.runs,
        scan=ScanOptions(score=config.scan_score, tails=config.tails, restarts=config.restarts, seed=config.seed),
        seed=config.seed,
    )


def _settings(config: Config, source: StatementInput | RequestInput, todo: "Work") -> locating.StateSettings:
    return locating.StateSettings(
        model=source.llm if isinstance(source, StatementInput) else source.plug,
        precision=config.models.precision,
        device=config.pool.device,
        batch_size=config.batch_size,
        folder=todo.states,
    )


def _about(config: Config, source: StatementInput | RequestInput) -> dict[str, Any]:
    """What the page says about the origin of the numbers."""
    from persona.versions import installed_versions

    return {
        "llm": source.llm_card(),
        "reads": source.in_words(),
        "settings": flat_settings(config),
        "versions": installed_versions(),
    }


def _plan(config: Config, source: StatementInput | RequestInput, todo: "Work") -> Summary:
    """The summary of a dry run."""
    kept = "; finished parts are kept" if todo.has_parts() else ""
    would = f"{source.would()}{kept}; then measure each layer and scan it {config.runs} times"
    if results.finished(todo.out, todo.fingerprint) is not None:
        would = f"nothing: {config.out} has the results of this very command"
    plan = Summary(table=[("would", would)], result={"dry_run": True, "would": would})
    return cost.planned(plan, config.cost, flops=source.flops(), if_all="for the states of all rows, at full length")


def _stage_of(counts: Counts) -> Stage | None:
    for name, unit in (("scan", "tasks"), ("layers", "layers")):
        if (found := counts.get(name)) and found.get("of"):
            return Stage(name=name, done=int(found.get("done", 0)), total=int(found["of"]), unit=unit)
    if not (joined := counts.get("join")):
        return None
    n_done = int(counts.get("states", {}).get("rows", 0))
    return Stage(name="states", done=n_done, total=int(joined["kept"]), unit="rows")


def _summary(
    config: Config,
    found: dict[str, Any],
    out: str,
    *,
    already: bool = False,
    rejects: "Sequence[tuple[str, str]]" = (),
) -> Summary:
    rows = [*results.table(found, out), *rejects]
    if already:
        rows = [("done before", "the inputs and settings are those of the results"), *rows]
    result = {**results.printed(found), "already_done": already}
    fraction = reading.reject_fraction(rejects=found["rejects"], rows=found["rows_read"])
    exit_code = reading.exit_code_of(fraction, config.rows.max_reject_fraction)
    return Summary(table=rows, result=result, exit_code=exit_code)


if __name__ == "__main__":
    sys.exit(cli.run(Config, main))
