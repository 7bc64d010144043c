"""The best of the users' own texts for each request, found where the request meets its history."""

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jobs.runtime import session, texts
from jobs.runtime.tally import Counts, Tally

if TYPE_CHECKING:
    import pyarrow as pa

    from jobs.runtime.job_options import PastTexts
    from persona.inputs.histories import Columns
    from persona.inputs.splits import Split
    from persona.models.encoder import TextEncoder
    from persona.options import RetrievalOptions
    from persona.store.identity import Identity
    from persona.store.store import Store


Histories = tuple["list[Split]", "Columns"]


def plan(past: "PastTexts") -> Histories | None:
    """The histories of --texts, checked; None when there are none."""
    return None if past.texts is None else texts.plan(past.texts, past.columns, flag="--texts")


def best_of(
    histories: Histories | None,
    options: "RetrievalOptions",
    where: Mapping[str, Any],
    tally: Tally,
    *,
    stage: str = "texts",
) -> texts.Texts | None:
    """What `joining.requests_with_histories` needs to add the column `retrieved`; None when nothing is to be retrieved.

    `where` has the name of the `encoder`, and `record`, which knows how queries and histories are cut: that of a plug,
    or the settings with which one is trained.
    """
    if histories is None or not options.retrieve:
        return None
    splits, columns = histories
    return texts.Texts(splits=splits, columns=columns, use=_Retrieve(options, where, tally, stage))


def summary_rows(counts: Counts) -> list[tuple[str, str]]:
    """The line of a summary that tells how much of the histories `--texts` had, nothing where nobody asked."""
    found = counts.get("texts")
    if found is None:
        return []
    return [
        ("past texts", f"{int(found['known']):,} of {int(found['seen']):,} seen behaviors are in --texts unchanged")
    ]


class _Retrieve:
    """Adds `retrieved`: the texts for each request, the best first."""

    def __init__(self, options: "RetrievalOptions", where: Mapping[str, Any], tally: Tally, stage: str) -> None:
        self.n = options.retrieve
        self.retriever = options.retriever
        self.encoder = where["encoder"]
        self.record = where["record"]
        self.tally = tally
        self.stage = stage

    def __call__(self, requests: "pa.Table", found: "pa.Table", store: "Store", bucket: int) -> "pa.Table":
        """`found` are the texts of the bucket's users."""
        import numpy as np
        import pyarrow as pa

        from persona.retrieval.lookup import TextLookup
        from persona.retrieval.ranking import best_texts, needs_vectors
        from persona.store import vectors
        from persona.store.join import seen_rows

        dense = needs_vectors(self.retriever)
        seen = seen_rows(requests, store, bucket, max_behaviors=self.record.max_behaviors, with_vectors=dense)
        lookup = TextLookup(found)
        queries = requests["query"].to_pylist()
        vectors_Rd = self._encode(queries, store.identity) if dense else [None] * len(queries)
        counts = {"seen": 0, "known": 0}
        rows = []
        for query, query_d, behaviors in zip(queries, vectors_Rd, seen, strict=True):
            known = lookup.texts(behaviors)
            counts["seen"] += len(known)
            counts["known"] += len(known) - known.count(None)
            vectors_Nd = None
            if dense:
                vectors_Nd = vectors.from_column(behaviors["vector"], store.identity.width).astype(np.float32)
            rows.append(best_texts(known, self.n, self.retriever, query=query, query_d=query_d, vectors_Nd=vectors_Nd))
        self.tally.note(self.stage, str(bucket), counts)
        return requests.append_column("retrieved", pa.array(rows, pa.list_(pa.large_string())))

    def _encode(self, queries: list[str], identity: "Identity") -> Any:
        """Vectors of queries by the store's own encoder, which nobody has trained: retrieval as without a plug."""
        import numpy as np

        encoder = _encoder(self.encoder, identity.revision, identity.pooling, self.record.max_query_tokens)
        return encoder.encode([self.record.query_prefix + query for query in queries]).vectors.astype(np.float32)


@lru_cache(maxsize=1)
def _encoder(name: str, revision: str, pooling: Any, max_tokens: int) -> "TextEncoder":
    """Once a process. On a CPU: the GPU belongs to the LLM, and queries are few and short."""
    from persona.models import resolve as models
    from persona.models.encoder import TextEncoder

    session.quiet_models(1)
    folder = models.resolve(name, revision=revision, flag="--encoder")
    return TextEncoder(folder, pooling=pooling, max_tokens=max_tokens, device="cpu")
