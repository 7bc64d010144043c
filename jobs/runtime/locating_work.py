"""The work of jobs.locate as folders: hidden states by what they depend on, and below them the results of an analysis.

    <out>/states/<digest of inputs, models and plug>/       parts (`persona.locating.state_files`)
    <out>/states/<…>/analysis/<digest of the settings>/     samples and results (`jobs.runtime.locating_analysis`)

Another input or another setting is another folder, so nothing is taken for the result of something else.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.runtime.locating_analysis import Analysis
from jobs.runtime.locating_inputs import RequestInput, StatementInput
from persona.errors import InputError

if TYPE_CHECKING:
    from persona.locating.comparison import Comparison
    from persona.locating.runs import ScanOptions

_FOLDER = "states"
_FEWEST = 4  # rows of a side: two for the background of a scan, and two to be scanned
_FORMAT = 1  # of the folders; raised when what the same inputs give changes


@dataclass(frozen=True, kw_only=True)
class Work:
    """The folders of a run, and the digest of all that its results depend on."""

    out: str
    states: str
    results: str
    fingerprint: str

    def has_parts(self) -> bool:
        """Whether an earlier run has left states."""
        from persona import storage

        return bool(storage.list_files(storage.join(self.states, "index")))


@dataclass(frozen=True, kw_only=True)
class Options:
    """How an analysis is done; the fields are those of `Analysis`."""

    most: int
    n_components: int
    n_runs: int
    scan: "ScanOptions"
    seed: int


@dataclass(frozen=True, kw_only=True)
class Complete:
    """States that are all there: the analysis of them, their width, and facts for the report."""

    analysis: Analysis
    width: int
    facts: dict[str, Any]


def plan(
    out: str, source: StatementInput | RequestInput, of_states: Mapping[str, Any], of_analysis: Mapping[str, Any]
) -> Work:
    """The folders for states and settings that these facts describe."""
    from persona import storage

    kind = type(source).__name__
    states_id = _digest({"format": _FORMAT, "kind": kind, **of_states})
    analysis_id = _digest(of_analysis)
    states = storage.join(out, _FOLDER, states_id)
    return Work(
        out=out,
        states=states,
        results=storage.join(states, "analysis", analysis_id),
        fingerprint=f"{states_id}-{analysis_id}",
    )


def complete(todo: Work, source: StatementInput | RequestInput, options: Options) -> Complete:
    """The analysis of all parts. Raises InputError if there is nothing to compare."""
    from persona.locating import state_files

    names, n_rows, shape = [], Counter[tuple[str, int | None]](), (0, 0)
    for part, rows in state_files.parts(todo.states):
        names.append(part.name)
        shape = (part.n_states, part.width)
        n_rows.update(zip(rows["group"].to_pylist(), rows["label"].to_pylist(), strict=True))
    chosen, warnings = _comparisons(source, n_rows)
    if not chosen:
        raise InputError(f"there is nothing to compare: {'; '.join(warnings) or 'no row was read'}")
    analysis = Analysis(
        states=todo.states,
        results=todo.results,
        parts=names,
        comparisons=chosen,
        n_states=shape[0],
        most=options.most,
        n_components=options.n_components,
        n_runs=options.n_runs,
        scan=options.scan,
        seed=options.seed,
    )
    # A block that was written twice, in other company, has two parts; its rows count once.
    return Complete(analysis=analysis, width=shape[1], facts={"states": shape[0], "warnings": warnings})


def clean(todo: Work, *, keep_states: bool) -> None:
    """Delete what the results no longer need: all states, or with `keep_states` those of other inputs."""
    from persona import storage

    folder = storage.join(todo.out, _FOLDER)
    if not keep_states:
        _delete(folder)
        return
    found = {entry.uri.removeprefix(folder).lstrip("/").partition("/")[0] for entry in storage.list_files(folder)}
    for name in sorted(found - {todo.states.rpartition("/")[2]}):
        _delete(storage.join(folder, name))
    _delete(storage.join(todo.states, "analysis"))


def _delete(folder: str) -> None:
    from persona import storage
    from persona.exchange import leftovers

    leftovers.delete_folder(folder)
    if not storage.is_s3(folder):
        shutil.rmtree(folder, ignore_errors=True)


def _comparisons(
    source: StatementInput | RequestInput, n_rows: Mapping[tuple[str, int | None], int]
) -> "tuple[list[Comparison], list[str]]":
    """What is compared, and which groups are left out and why."""
    from persona.locating.comparison import Comparison

    if isinstance(source, RequestInput):
        first, *others = (kind.value for kind in source.personas)
        found = [Comparison.of_personas(first, other) for other in others]
    else:
        found = [Comparison.of_statements(group) for group in sorted({group for group, _ in n_rows})]
    chosen, warnings = [], []
    for one in found:
        fewest = min(n_rows.get((side.group, side.label), 0) for side in one.sides)
        if fewest >= _FEWEST:
            chosen.append(one)
        else:
            warnings.append(f"{one.name} is left out: it has {fewest} rows of one side, and {_FEWEST} are needed")
    return chosen, warnings


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()
