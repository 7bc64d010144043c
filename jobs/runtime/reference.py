"""The reference of the preference loss: what `jobs.evaluate` measured of each request's texts without the plug.

Its rows go to the task that joins the requests of their bucket, as texts do.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from jobs.runtime.exchange import Source
from jobs.runtime.reading import SplitFound
from jobs.runtime.texts import WithAllColumns
from persona.errors import InputError, PlugMismatch
from persona.options import PersonaKind

if TYPE_CHECKING:
    import pyarrow as pa

    from persona.inputs.splits import Split
    from persona.models.prompts import PromptTokenizer
    from persona.models.resolve import ModelFolder

_FLAG = "--reference"
_AGAIN = "measure it with jobs.evaluate --persona bare --rejected COLUMN"
# The columns of `losses.parquet`, in the order of `requests.REFERENCE`.
_MEASURED = ("nats", "tokens", "rejected_nats", "rejected_tokens")
_PROMPT_WITHOUT_SOFT_TOKENS = ("prompt_format", "system", "template_argument", "template_date")


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The files with the losses, found and checked before Ray starts."""

    splits: "Sequence[Split]"

    def source(self, n_buckets: int) -> Source:
        """The losses as a source of the exchange of requests (`texts.union_schema`).

        A row with a `request_id` and no `input` is one of them.
        """
        return Source(splits=self.splits, read=WithAllColumns(_BareLosses(n_buckets=n_buckets)))

    def joined(self, rows: "pa.Table") -> "pa.Table":
        """The rows of some users that are no losses; the requests among them have their losses.

        Raises InputError when a request has none, or several.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        from persona.inputs.requests import REFERENCE

        is_loss = pc.and_(rows["request_id"].is_valid(), rows["input"].is_null())
        losses, others = rows.filter(is_loss), rows.filter(pc.invert(is_loss))
        ids = losses["request_id"].combine_chunks()
        if len(twice := _repeated(ids)):
            raise InputError(
                f"{_FLAG}: has {len(twice):,} requests more than once, such as {twice[0].as_py()!r}; give each "
                "evaluation once, and evaluations of different requests"
            )
        found = pc.index_in(others["request_id"], value_set=ids, skip_nulls=True)
        missing = others["request_id"].filter(pc.and_(others["request_id"].is_valid(), found.is_null()))
        if len(missing):
            raise InputError(
                f"{_FLAG}: has no loss of {len(missing):,} requests or more, such as {missing[0].as_py()!r}; measure "
                "all requests, those of --validation included"
            )
        for field in REFERENCE:
            index = others.column_names.index(field.name)
            others = others.set_column(
                index, field, pa.chunked_array([losses[field.name].combine_chunks().take(found)])
            )
        return others


def find_reference(
    folders: Sequence[str], llm: "ModelFolder", tokenizer: "PromptTokenizer", settings: Mapping[str, Any]
) -> Reference:
    """The losses in folders of `jobs.evaluate`.

    Args:
        folders: the values of --reference.
        llm: of the run.
        tokenizer: of its prompts.
        settings: what else the losses depend on, as `metrics.json` has it: lengths, retrieval and quantization.

    Raises:
        UsageError: there is no such folder.
        InputError: it has no losses of rejected texts without the plug.
        PlugMismatch: they were measured with another LLM or other settings than those of the run.
    """
    from persona import storage
    from persona.inputs.reader import schema_of
    from persona.inputs.splits import plan_splits

    splits: list[Split] = []
    for given in folders:
        folder = storage.check_uri(given, flag=_FLAG)
        for file in ("metrics.json", "losses.parquet"):
            storage.check_reachable(storage.join(folder, file), flag=_FLAG)
        _check_settings(folder, llm, tokenizer, settings)
        found = plan_splits(storage.join(folder, "losses.parquet"), flag=_FLAG)
        if absent := {"request_id", "user_id", "persona", *_MEASURED} - set(schema_of(found).names):
            raise InputError(f"{_FLAG} {folder}: losses.parquet has no {', '.join(sorted(absent))}; {_AGAIN}")
        splits += found
    return Reference(splits=splits)


def _check_settings(folder: str, llm: "ModelFolder", tokenizer: "PromptTokenizer", settings: Mapping[str, Any]) -> None:
    from persona import storage

    try:
        measured = json.loads(storage.read_bytes(storage.join(folder, "metrics.json")))["settings"]
        fingerprint, personas = measured["llm"]["fingerprint"], measured["personas"]
        then = {**measured, **measured["prompt"]}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{_FLAG} {folder}: metrics.json is not from jobs.evaluate; {_AGAIN}") from error
    if PersonaKind.BARE not in personas:
        raise InputError(f"{_FLAG} {folder}: has the losses of {', '.join(personas)}, not of bare; {_AGAIN}")
    if fingerprint != llm.fingerprint:
        raise PlugMismatch(
            f"{_FLAG} {folder}: was measured with the LLM {measured['llm']['name']!r}, and --llm is {llm.name!r}; "
            "measure it with a plug of this LLM"
        )
    now = {**settings, **{name: asdict(tokenizer.options)[name] for name in _PROMPT_WITHOUT_SOFT_TOKENS}}
    now = json.loads(json.dumps(now))  # tuples become lists
    different = [
        f"{name} was {then.get(name)!r} and is {value!r}" for name, value in now.items() if then.get(name) != value
    ]
    if different:
        raise PlugMismatch(
            f"{_FLAG} {folder}: was measured with other settings ({'; '.join(different)}); train with the same, or "
            "measure it with a plug that has these"
        )


@dataclass(frozen=True, kw_only=True)
class _BareLosses:
    """Reads the losses without the plug, in the columns of `requests.REFERENCE`."""

    n_buckets: int

    def __call__(self, split: "Split", found: SplitFound, limit: int | None) -> "Iterator[pa.Table]":
        """All of them: a limit is one of requests."""
        import pyarrow as pa
        import pyarrow.compute as pc

        from persona.inputs.histories import bucket_of
        from persona.inputs.reader import read_split
        from persona.inputs.requests import REFERENCE

        del limit
        for records in read_split(split, columns=["request_id", "user_id", "persona", *_MEASURED]):
            if records.rejects.num_rows:
                raise InputError(f"{_FLAG}: {split.uri} is broken ({records.rejects['reason'][0]}); {_AGAIN}")
            rows = records.table.filter(pc.equal(records.table["persona"], PersonaKind.BARE.value))
            found.rows += rows.num_rows
            buckets = pa.array(bucket_of(rows["user_id"].combine_chunks(), self.n_buckets))
            measured = dict(zip(REFERENCE.names, (rows[name] for name in _MEASURED), strict=True))
            yield pa.table(
                {"request_id": rows["request_id"], "user_id": rows["user_id"], "bucket": buckets, **measured}
            )


def _repeated(ids: "pa.Array") -> "pa.Array":
    """The ids that are there more than once."""
    import pyarrow.compute as pc

    counts = pc.value_counts(ids)
    return counts.field("values").filter(pc.greater(counts.field("counts"), 1))
