"""Retrieve past texts of the user for each request, in the task where a request is joined with its history."""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from jobs.runtime import session, texts
from jobs.runtime.inputs import Histories, find_histories
from jobs.runtime.plugs import PlugRef
from jobs.runtime.tally import Counts, Tally
from persona.options import RetrievalOptions

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from jobs.runtime.job_options import InputFormat, PastTexts
    from persona.models.encoder import TextEncoder
    from persona.store.identity import Identity
    from persona.store.store import Store


@dataclass(frozen=True, kw_only=True)
class RetrievalSpec:
    """What to retrieve, and from where.

    Attributes:
        options: how many texts, and how they are chosen.
        histories: the files with the texts; None if nothing is to be retrieved.
        encoder: hub id or folder of the store's encoder, which also encodes queries.
        query_prompt: in front of each query; max_query_tokens: a query is cut to this length.
        max_behaviors: a request sees at most this many behaviors, the latest ones.
    """

    options: RetrievalOptions
    histories: Histories | None
    encoder: str
    query_prompt: str
    max_query_tokens: int
    max_behaviors: int

    @classmethod
    def of_plug(cls, plug: PlugRef, options: RetrievalOptions, histories: Histories | None) -> "RetrievalSpec":
        """Retrieval for a trained plug."""
        return cls(
            options=options,
            histories=histories,
            encoder=plug.encoder,
            query_prompt=plug.record.query_prompt,
            max_query_tokens=plug.record.max_query_tokens,
            max_behaviors=plug.record.max_behaviors,
        )


def plan(past: "PastTexts", form: "InputFormat") -> Histories | None:
    """The histories of --texts, checked; None if the flag is not given."""
    return None if past.texts is None else find_histories(past.texts, past.columns, form, flag="--texts")


def best_of(spec: RetrievalSpec, tally: Tally, *, stage: str = "texts") -> texts.Texts | None:
    """For `joining.JoinPlan`: adds the column `retrieved`, a list of texts; None if nothing is to be retrieved."""
    if spec.histories is None or not spec.options.retrieve:
        return None
    return texts.Texts(histories=spec.histories, use=_AddRetrieved(spec, tally, stage))


def summary_rows(counts: Counts) -> list[tuple[str, str]]:
    """The row of a summary that shows how many of the texts were found; none if nothing was retrieved."""
    found = counts.get("texts")
    if found is None:
        return []
    return [("past texts", f"{int(found['known']):,} of {int(found['seen']):,} visible behaviors found in --texts")]


class _AddRetrieved:
    """Adds the column `retrieved`: texts for each request, best first."""

    def __init__(self, spec: RetrievalSpec, tally: Tally, stage: str) -> None:
        self.spec = spec
        self.tally = tally
        self.stage = stage

    def __call__(self, requests: "pa.Table", found: "pa.Table", store: "Store", bucket: int) -> "pa.Table":
        """`found` has the texts of the users."""
        import numpy as np
        import pyarrow as pa

        from persona.retrieval.lookup import TextLookup
        from persona.retrieval.ranking import best_texts, needs_vectors
        from persona.store import vectors
        from persona.store.join import seen_rows

        options = self.spec.options
        dense = needs_vectors(options.retriever)
        visible = seen_rows(requests, store, bucket, max_behaviors=self.spec.max_behaviors, with_vectors=dense)
        lookup = TextLookup(found)
        queries = requests["query"].to_pylist()
        vectors_Rd = self._encode(queries, store.identity) if dense else [None] * len(queries)
        counts = {"seen": 0, "known": 0}
        retrieved = []
        for query, query_d, behaviors in zip(queries, vectors_Rd, visible, strict=True):
            known = lookup.texts(behaviors)
            counts["seen"] += len(known)
            counts["known"] += len(known) - known.count(None)
            vectors_Nd = None
            if dense:
                vectors_Nd = vectors.from_column(behaviors["vector"], store.identity.width).astype(np.float32)
            retrieved.append(
                best_texts(
                    known, options.retrieve, options.retriever, query=query, query_d=query_d, vectors_Nd=vectors_Nd
                )
            )
        self.tally.note(self.stage, f"{bucket}/{requests['user_id'][0]}", counts)
        return requests.append_column("retrieved", pa.array(retrieved, pa.list_(pa.large_string())))

    def _encode(self, queries: list[str], identity: "Identity") -> "NDArray[np.float32]":
        """Vectors (R, d) of the queries, by the store's frozen encoder and not by the plug's trained one."""
        import numpy as np

        encoder = _load_encoder(
            self.spec.encoder,
            identity.revision,
            pooling=identity.pooling,
            max_tokens=self.spec.max_query_tokens,
            prompt=self.spec.query_prompt,
            width=identity.width,
        )
        return encoder.encode(queries).vectors.astype(np.float32)


@lru_cache(maxsize=1)
def _load_encoder(name: str, revision: str, *, pooling: str, max_tokens: int, prompt: str, width: int) -> "TextEncoder":
    """Loads once per process, on a CPU: the GPU is for the LLM, and queries are few and short."""
    from persona.models import resolve as models
    from persona.models.encoder import TextEncoder

    session.quiet_models(1)
    folder = models.resolve(name, revision=revision, flag="--encoder")
    return TextEncoder(folder, pooling=pooling, max_tokens=max_tokens, prompt=prompt, width=width, device="cpu")
