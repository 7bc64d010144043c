"""Find the evaluations below folders, and remove users from them."""

import json
import posixpath
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from persona.errors import InputError

ParsedT = TypeVar("ParsedT")

_PAGE, _CHARTS = "report.html", ("gain.png", "curves.png", "map.png")
# Of jobs.compare and jobs.judge; they have no part about a single user.
_TOTALS = ("comparison.json", "comparison.html", "judged.json", "judged.html")
_LAMP = "lamp"


@dataclass(kw_only=True)
class Evaluation:
    """The files of one evaluation, by name relative to its folder."""

    folder: str
    files: set[str] = field(default_factory=set)

    @property
    def lamp_files(self) -> list[str]:
        """LaMP's golds and outputs."""
        return sorted(name for name in self.files if name.startswith(f"{_LAMP}/"))


@dataclass(frozen=True, kw_only=True)
class Found:
    """What folders contain.

    Attributes:
        evaluations: what `jobs.evaluate` wrote.
        run_files: requests and vectors between the tasks of an evaluation that was killed.
        unknown: files of others, which are not searched.
    """

    evaluations: Sequence[Evaluation]
    run_files: Sequence[str]
    unknown: Sequence[str]


def find(folders: Sequence[str]) -> Found:
    """The evaluations in these folders and below them. Raises InputError, naming the folder, where there is none."""
    from persona import storage
    from persona.evaluation.saved_run import LOSSES, METRICS
    from persona.exchange import leftovers

    known = {LOSSES, METRICS, _PAGE, *_CHARTS, *_TOTALS}
    evaluations: dict[str, Evaluation] = {}
    run_files: list[str] = []
    unknown: list[str] = []
    for folder in dict.fromkeys(folders):
        listed = [file.uri for file in storage.list_files(folder, hidden=True)]
        left_behind = [uri for uri in listed if f"/{leftovers.FOLDER}/" in uri.removeprefix(folder)]
        uris = sorted({*listed} - {*left_behind})
        run_files += left_behind
        roots = {posixpath.dirname(uri) for uri in uris if posixpath.basename(uri) in (LOSSES, METRICS)}
        if not roots and not left_behind:
            raise InputError(f"--reports {folder}: has no {LOSSES} or {METRICS} of jobs.evaluate in it or below it")
        for uri in uris:
            root, name = posixpath.split(uri)
            if posixpath.basename(root) == _LAMP and posixpath.dirname(root) in roots and name.endswith(".json"):
                root, name = posixpath.dirname(root), f"{_LAMP}/{name}"
            elif name not in known:
                unknown.append(uri)
                continue
            evaluations.setdefault(root, Evaluation(folder=root)).files.add(name)
    return Found(evaluations=list(evaluations.values()), run_files=sorted({*run_files}), unknown=sorted({*unknown}))


def existing(folders: Sequence[str]) -> list[str]:
    """Those of the folders that have an evaluation, each once."""
    from persona import storage
    from persona.evaluation.saved_run import LOSSES, METRICS

    def has_one(folder: str) -> bool:
        return any(storage.exists(storage.join(folder, name)) for name in (LOSSES, METRICS))

    return [folder for folder in dict.fromkeys(folders) if has_one(folder)]


def remove_users(one: Evaluation, users: Collection[str], *, dry_run: bool = False) -> int:
    """Remove these users from an evaluation; returns how many rows and parts of them its files had.

    Its page and charts are drawn anew from the numbers that are left. They are deleted if that fails, as for an
    evaluation of an older version, and so is an evaluation of which nothing is left. The file that tells which requests
    are theirs is written last, so a run that is killed can be repeated. Raises InputError for a file that cannot be
    read.
    """
    from persona import storage
    from persona.evaluation import forgetting
    from persona.evaluation.saved_run import LOSSES, METRICS

    losses = _parsed(one, LOSSES, lambda data: forgetting.split_losses(data, users))
    metrics = _parsed(one, METRICS, lambda data: forgetting.split_metrics(json.loads(data), users))
    theirs = [*(losses[0].to_pylist() if losses else ()), *(metrics[0] if metrics else ())]
    request_ids = {row["request_id"] for row in theirs if "request_id" in row}
    parsed = {
        name: _parsed(one, name, lambda data: forgetting.split_outputs(data, request_ids)) for name in one.lamp_files
    }
    outputs = {name: found for name, found in parsed.items() if found is not None}
    n_theirs = len(theirs) + sum(n for n, _ in outputs.values())
    if dry_run or not n_theirs:
        return n_theirs
    rest: dict[str, bytes] = {}
    if losses is None or losses[1].num_rows:
        rest = {name: data for name, (_, data) in outputs.items()}
        if metrics:
            rest = {**_drawn(one, metrics[1]), **rest, METRICS: (json.dumps(metrics[1], indent=2) + "\n").encode()}
        if losses:
            rest[LOSSES] = forgetting.losses_file(losses[1])
    for name in sorted(one.files - rest.keys() - set(_TOTALS), key=lambda name: name == LOSSES):
        storage.delete(storage.join(one.folder, name))
    for name, data in rest.items():
        storage.write_bytes(storage.join(one.folder, name), data)
    return n_theirs


def _parsed(one: Evaluation, name: str, parse: Callable[[bytes], ParsedT]) -> ParsedT | None:
    """What `parse` makes of a file's bytes; None if the evaluation has no such file."""
    import pyarrow as pa

    from persona import storage

    if name not in one.files:
        return None
    try:
        return parse(storage.read_bytes(storage.join(one.folder, name)))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, pa.ArrowInvalid) as error:
        raise InputError(
            f"--reports {one.folder}: {name} is not a file of jobs.evaluate ({error}); no user has been forgotten in "
            "it, delete it yourself"
        ) from error


def _drawn(one: Evaluation, metrics: dict[str, Any]) -> dict[str, bytes]:
    """Page and charts of the metrics, of those that the evaluation has; none if they are of an older version."""
    from jinja2 import TemplateError

    from persona.report.pages import chart_files, evaluation_page

    try:
        drawn = {_PAGE: evaluation_page(metrics), **chart_files(metrics)}
    except (TemplateError, KeyError, TypeError, ValueError):
        return {}
    return {name: data for name, data in drawn.items() if name in one.files}
