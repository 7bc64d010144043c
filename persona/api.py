"""The Python API: read a user's history from the store, load a plug with its LLM, answer requests, measure losses.

It is for notebooks and small experiments, and gives what the jobs give for the same requests without retrieved texts.
`persona/__init__.py` exports it. Shapes: n behaviors of a user, d encoder width, S soft tokens, D LLM width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from persona import storage
from persona.engines import probe
from persona.engines.base import Answer
from persona.engines.local import LocalEngine
from persona.errors import PlugMismatch, UsageError
from persona.inputs.cells import TIME
from persona.inputs.histories import bucket_of
from persona.models import resolve as models
from persona.models.encoder import TextEncoder
from persona.models.frozen_llm import FrozenLLM
from persona.models.resolve import ModelFolder
from persona.options import Decoding, PersonaKind, Precision
from persona.plug import folder as plug_folder, hub, record as plug_record
from persona.plug.answerer import Answerer
from persona.plug.personalized import PersonalizedLLM, plug_inputs, soft_tokens
from persona.plug.record import PlugRecord
from persona.store import registry, vectors
from persona.store.join import join_histories, seen_rows
from persona.store.store import Store

_ALL = 2**31 - 1


def open_store(uri: str | Path) -> Store:
    """Opens a store that jobs.embed made, local or on s3://. Raises InputError when there is none."""
    return Store.open(storage.check_uri(str(uri), flag="uri"))


@dataclass(frozen=True, kw_only=True, eq=False)
class History:
    """Stored behaviors of one user, oldest first.

    Attributes:
        table: columns `behavior_id`, `timestamp` and `text_hash`; the store does not hold the texts.
        vectors: unit vectors (n, d) in float16, row by row those of `table`.
    """

    user_id: str
    table: pa.Table
    vectors: NDArray[np.float16]

    def __len__(self) -> int:
        return len(self.vectors)


def read_history(
    store: Store, user_id: str, *, as_of: datetime | None = None, max_behaviors: int | None = None
) -> History:
    """Reads a user's stored behaviors; those of an unknown user are empty.

    Args:
        store: from `open_store`.
        user_id: as in the histories.
        as_of: read only behaviors that are strictly older. Those without a timestamp are then left out.
        max_behaviors: read only so many of the latest.
    """
    (bucket,) = bucket_of([user_id], store.n_buckets)
    request = _request_table(user_id, as_of)
    (rows,) = seen_rows(
        request, store, int(bucket), max_behaviors=_ALL if max_behaviors is None else max_behaviors, with_vectors=True
    )
    return History(
        user_id=user_id,
        table=rows.select(["behavior_id", "timestamp", "text_hash"]),
        vectors=vectors.from_column(rows["vector"], store.identity.width),
    )


def load_plug(
    uri: str | Path,
    *,
    store: Store | None = None,
    llm: str | None = None,
    encoder: str | None = None,
    precision: Precision = "auto",
    device: str | None = None,
) -> "LoadedPlug":
    """Loads a plug that jobs.train made, with its LLM and its query encoder.

    Args:
        uri: the plug's folder, local or on s3://; hf://OWNER/NAME; or `live`, the live plug of `store`.
        store: where histories are read; without one, personas are made from texts only.
        llm: hub id or folder of the plug's LLM, when it is not where the plug was trained.
        encoder: the same for the encoder.
        precision: of the LLM; auto is bf16 where the hardware multiplies it natively, else fp32.
        device: a torch device; default a GPU when there is one. `auto` spreads the LLM over all GPUs.

    Raises:
        InputError: there is no complete plug, or a model is not found.
        PlugMismatch: the store, the LLM or the encoder is not the one that the plug was trained with.
    """
    live = registry.find(str(uri), store)
    with hub.local_plug_folder(hub.check_plug_uri(live.uri if live else str(uri), flag="uri")) as folder:
        record = plug_record.read(folder)
        if live:
            registry.check_unchanged(live, plug_record.fingerprint(folder))
        if store is not None and store.identity.fingerprint != record.encoder["fingerprint"]:
            raise PlugMismatch(
                f"{uri}: the plug was trained on vectors of {record.encoder['name']!r}, but the store has those of "
                f"{store.identity.encoder!r}; give the store that it was trained on"
            )
        if store is not None:
            plug_record.check_vectors(record, store.identity, name=str(uri))
        encoder_folder = models.resolve(
            encoder or record.encoder["name"], revision=record.encoder["revision"], flag="encoder"
        )
        llm_folder = models.resolve(llm or record.llm["name"], revision=record.llm["revision"], flag="llm")
        plug_record.check_models(record, encoder=encoder_folder, llm=llm_folder)
        frozen = FrozenLLM.load(
            llm_folder,
            max_input_tokens=record.max_input_tokens,
            max_target_tokens=record.max_target_tokens,
            prompt=record.prompt,
            precision=precision,
            quantization=record.llm_quantization,
            device=device,
        )
        probe.check_llm(frozen)
        model = plug_folder.load(folder, encoder=encoder_folder, llm=frozen)
    return LoadedPlug(model, record, store, encoder_folder)


class LoadedPlug:
    """A plug in front of its LLM, in memory; made by `load_plug`.

    Attributes:
        record: the content of `plug.json`: options, models, training.
    """

    def __init__(
        self, model: PersonalizedLLM, record: PlugRecord, store: Store | None, encoder_folder: ModelFolder
    ) -> None:
        self.model = model
        self.record = record
        self._store = store
        self._encoder_folder = encoder_folder

    def persona(
        self, user_id: str, *, kind: PersonaKind | str = PersonaKind.OWN, as_of: datetime | None = None
    ) -> "Persona":
        """The persona of a user in the store.

        Args:
            user_id: as in the histories; an unknown user has an empty history.
            kind: `own` history, `none`, that of an `other` user, the own one with equal weights (`mean`), or the LLM
                without the plug (`bare`).
            as_of: use only behaviors that are strictly older.

        Raises:
            UsageError: the plug was loaded without a store, or the kind is unknown.
        """
        if self._store is None:
            raise UsageError("this plug was loaded without a store; give load_plug a store, or use persona_from_texts")
        (bucket,) = bucket_of([user_id], self._store.n_buckets)
        joined = join_histories(
            _request_table(user_id, as_of),
            self._store,
            int(bucket),
            persona=_kind(kind),
            max_behaviors=self.record.max_behaviors,
        )
        return Persona(self.model, joined["history"][0].as_py(), _kind(kind))

    def persona_from_texts(self, texts: Sequence[str], *, kind: PersonaKind | str = PersonaKind.OWN) -> "Persona":
        """The persona of someone who wrote these texts, oldest first, which are encoded as jobs.embed does.

        Raises:
            UsageError: the kind is unknown, or `other`, since there is no other user.
        """
        kind = _kind(kind)
        if kind is PersonaKind.OTHER:
            raise UsageError("persona_from_texts knows no other user; call it with the other user's texts")
        used = [] if kind.sees_no_history else [*texts][-self.record.max_behaviors :]
        return Persona(self.model, vectors.to_bytes(self._encoder.encode(used).vectors) if used else b"", kind)

    @cached_property
    def _encoder(self) -> TextEncoder:
        return TextEncoder(
            self._encoder_folder,
            pooling=self.record.pooling,
            max_tokens=self.record.encoder_max_tokens,
            prompt=self.record.document_prompt,
            width=self.record.encoder_width,
            device=str(self.model.llm.device),
        )


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Teacher-forced loss of a target: `nats` summed over its `tokens`, the end-of-sequence token included."""

    nats: float
    tokens: int

    @property
    def per_token(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens


class Persona:
    """A history in front of the LLM, weighted anew for each request; made by `LoadedPlug`.

    Attributes:
        kind: whose history it is.
        vectors: the behaviors' unit vectors (n, d) in float16, oldest first.
    """

    def __init__(self, model: PersonalizedLLM, history: bytes, kind: PersonaKind) -> None:
        self._model = model
        self._history = history
        self.kind = kind
        self.vectors = vectors.from_bytes(history, model.plug.width)

    def __repr__(self) -> str:
        return f"Persona({self.kind.value}, {len(self.vectors)} behaviors)"

    @torch.inference_mode()
    def soft_tokens(self, text: str, *, query: str | None = None) -> NDArray[np.float32]:
        """The soft tokens (S, D) in front of a request; S is 0 for the `bare` LLM. `query` is as in `answer`."""
        model = self._model
        inputs = plug_inputs(model.plug, model.query_text, [self._row(text, query)], self.kind, model.llm.device)
        soft_SD: NDArray[np.float32] = soft_tokens(model.plug, inputs)[0].float().cpu().numpy()
        return soft_SD

    def answer(
        self, text: str, *, query: str | None = None, system: str | None = None, decoding: Decoding | None = None
    ) -> Answer:
        """Answers a request.

        Args:
            text: what the LLM reads.
            query: what weights the history; default `text`.
            system: system text, for a chat model; default that of the plug.
            decoding: default that of jobs.generate.
        """
        model = self._model
        answerer = Answerer(model.plug, LocalEngine(model.llm, batch_size=1), model.query_text, batch_size=1)
        return answerer.answer([self._row(text, query, system)], decoding or Decoding(), persona=self.kind)[0]

    @torch.inference_mode()
    def loss(self, text: str, target: str, *, query: str | None = None, system: str | None = None) -> Loss:
        """How unlikely the LLM finds `target` as the answer; other arguments are as in `answer`."""
        row = self._row(text, query, system) | {"target": target}
        batch = self._model.collate([row], persona=self.kind)
        return Loss(nats=float(self._model(batch)), tokens=batch.n_target_tokens)

    def _row(self, text: str, query: str | None, system: str | None = None) -> dict[str, Any]:
        row = {"request_id": "", "input": text, "query": text if query is None else query, "system": system}
        return {**row, "history": self._history}


def _request_table(user_id: str, as_of: datetime | None) -> pa.Table:
    return pa.table({"user_id": [user_id], "as_of": pa.array([as_of], TIME)})


def _kind(kind: PersonaKind | str) -> PersonaKind:
    try:
        return PersonaKind(kind)
    except ValueError as error:
        raise UsageError(f"kind {kind!r}: must be {', '.join(PersonaKind)}") from error
