"""Stored answers: which requests still need one, which ones must have one, and what the answers are."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.runtime.plugs import PlugRef
from persona.errors import InputError
from persona.front_texts import FrontTexts
from persona.options import Decoding

if TYPE_CHECKING:
    import pyarrow as pa

    from persona.store.store import Store

_BUCKETS_TOGETHER = 16
# What an answer depends on besides plug, LLM and decoding.
_OF_REQUEST = ("input", "query", "system", "history_hash", "persona")


@dataclass(frozen=True, kw_only=True)
class AnswerSpec:
    """What answers depend on besides their request and its history, and their name in the table."""

    plug: PlugRef
    decoding: Decoding
    front: FrontTexts
    variant: str | None = None
    engine: str = ""
    """What the engine adds to that; see `persona.engines.base.EngineModule.identity`."""

    def variant_of(self, persona: str) -> str:
        """The name of a persona's answers in the table; sampled answers do not replace greedy ones."""
        default = self.front.answers_of(persona)
        return self.variant or (f"{default}-sampled" if self.decoding.sample else default)

    def fingerprint(self, row: Mapping[str, Any]) -> str:
        """Hash of everything the answer to a joined request depends on: an answer with another hash is out of date.

        Precision and engine are left out, so that answers need not be generated again on another kind of machine. An
        engine that draws other random numbers is named.
        """
        content = {
            **{name: row[name] for name in _OF_REQUEST},
            "plug": self.plug.fingerprint,
            "llm": self.plug.record.llm["fingerprint"],
            "decoding": self.decoding.facts(),
        }
        if self.engine:
            content["engine"] = self.engine
        if self.front.front_tokens:
            content |= {"retrieved": row["retrieved"], "retrieve_tokens": self.front.front_tokens}
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


class Unanswered:
    """Selects the requests that have no answer, or one that is out of date unless `keep_stale`."""

    adds = ("fingerprint", "variant", "change")

    def __init__(self, spec: AnswerSpec, *, keep_stale: bool) -> None:
        self.spec = spec
        self.keep_stale = keep_stale

    def __call__(self, joined: "pa.Table", store: "Store", bucket: int, counts: dict[str, float]) -> "pa.Table":
        """Some rows of one persona with the columns of `adds`; counts the answers that are `stale`."""
        import pyarrow as pa

        columns = [*_OF_REQUEST]
        if self.spec.front.front_tokens:
            columns.append("retrieved")
        fingerprints = [self.spec.fingerprint(row) for row in joined.select(columns).to_pylist()]
        variant = self.spec.variant_of(joined["persona"][0].as_py())
        answered = store.answers(variant, bucket)
        # By request alone, as in the table's key: a new answer replaces one of another user.
        stored = {
            request: (user, then)
            for (request, user), then in zip(_requests(answered), answered["fingerprint"].to_pylist(), strict=True)
        }
        changes = [
            _change(stored.get(request), (user, now))
            for (request, user), now in zip(_requests(joined), fingerprints, strict=True)
        ]
        counts["stale"] = counts.get("stale", 0) + changes.count("edited")
        if self.keep_stale:
            changes = [None if change == "edited" else change for change in changes]
        joined = joined.append_column("fingerprint", pa.array(fingerprints, pa.string()))
        joined = joined.append_column("variant", pa.repeat(variant, joined.num_rows))
        joined = joined.append_column("change", pa.array(changes, pa.string()))
        return joined.filter(joined["change"].is_valid())


def _change(stored: tuple[str, str] | None, now: tuple[str, str]) -> str | None:
    """How the table changes with a new answer, given users and fingerprints: `new`, `edited`, or None if up to date."""
    if stored is None:
        return "new"
    return None if stored == now else "edited"


class AllAnswered:
    """Selects all requests, and refuses one without an answer or with an answer by another plug than the losses are of.

    Requests are checked when their bucket is joined, long before all losses are measured.
    """

    adds = ()

    def __init__(self, variants: Sequence[str], plug: PlugRef) -> None:
        self.variants = variants
        self.plug = plug.fingerprint

    def __call__(self, joined: "pa.Table", store: "Store", bucket: int, counts: dict[str, float]) -> "pa.Table":
        """The rows as given. Raises InputError for a request without a valid answer."""
        del counts
        requests = _requests(joined)
        for variant in self.variants:
            answered = store.answers(variant, bucket)
            plug_of = dict(zip(_requests(answered), answered["plug"].to_pylist(), strict=True))
            wrong = min((request for request in requests if plug_of.get(request) != self.plug), default=None)
            if wrong is not None:
                problem = self._problem(wrong[0], plug_of.get(wrong))
                raise InputError(
                    f"the variant {variant!r} has {problem}, and perhaps for others; "
                    "answer all requests with jobs.generate and this plug, choose the variants to score with "
                    "--variant, or score none with --losses-only"
                )
        return joined

    def _problem(self, request: str, plug: str | None) -> str:
        if plug is None:
            return f"no answer to {request!r}"
        return f"an answer to {request!r} of another plug ({plug}, and --plug is {self.plug})"


def _requests(rows: "pa.Table") -> list[tuple[str, str]]:
    """Id and user of each row: another user's answer is not that of a request, even if their ids are equal."""
    return list(zip(rows["request_id"].to_pylist(), rows["user_id"].to_pylist(), strict=True))


def read_outputs(
    store: "Store", variants: Sequence[str], request_ids: Sequence[str], users: Sequence[str]
) -> dict[str, dict[str, str]]:
    """The answers to some requests, given with their users, by variant and request id.

    Reads a few buckets at a time, because the table may have a million times as many answers.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    from persona.inputs.histories import bucket_of

    wanted = {*zip(request_ids, users, strict=True)}
    ids = pa.array(sorted({request for request, _ in wanted}), pa.string())
    buckets = np.unique(bucket_of(pa.array(users, pa.string()), store.n_buckets)).tolist()
    found: dict[str, dict[str, str]] = {variant: {} for variant in variants}
    for variant, outputs in found.items():
        for first in range(0, len(buckets), _BUCKETS_TOGETHER):
            some = buckets[first : first + _BUCKETS_TOGETHER]
            table = store.read_generations([variant], ["request_id", "user_id", "output"], buckets=some)
            chosen = table.filter(pc.is_in(table["request_id"], value_set=ids))
            pairs = zip(_requests(chosen), chosen["output"].to_pylist(), strict=True)
            outputs.update((request[0], output) for request, output in pairs if request in wanted)
    return found
