"""Persona embeddings of users without a request, as rows of the `personas` table.

Without a request, behaviors are weighted equally, or by recency when the plug has learned it.

Shapes: N behaviors of all users, M of those that are used, B users with a history, d encoder width, K persona tokens, D
LLM width, F = K·D.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file

from persona.errors import InputError
from persona.plug import aggregation, record as plug_record
from persona.plug.module import Plug
from persona.store import vectors


class UserPersonas:
    """A plug without query encoder and LLM, which turns whole histories into persona embeddings."""

    def __init__(self, plug: Plug, fingerprint: str, max_behaviors: int) -> None:
        self.plug = plug
        self.fingerprint = fingerprint
        self.max_behaviors = max_behaviors

    @classmethod
    def load(cls, folder: Path) -> "UserPersonas":
        """Loads a plug folder. Raises InputError when it holds no complete plug."""
        record = plug_record.read(folder)
        plug = Plug(
            aggregation.without_query(record.options),
            query_encoder=None,
            width=record.encoder_width,
            llm_width=record.llm_width,
            token_norm=record.token_norm,
            scale=record.scale,
        )
        unused = ("query_encoder.", "query_head.", "query_projector.", *aggregation.NEEDS_QUERY)
        try:
            weights = load_file(folder / plug_record.WEIGHTS)
            plug.load_state_dict({name: value for name, value in weights.items() if not name.startswith(unused)})
        except (RuntimeError, SafetensorError) as error:
            raise InputError(
                f"{folder}: {plug_record.WEIGHTS} does not fit {plug_record.RECORD} "
                f"({str(error).splitlines()[-1].strip()}); copy the whole folder again, or train a new plug"
            ) from error
        return cls(plug.eval(), plug_record.fingerprint(folder), record.max_behaviors)

    @torch.inference_mode()
    def make(self, users: pa.Table, histories: pa.Table) -> pa.Table:
        """Rows of the personas table, without `updated_at`.

        Args:
            users: rows with `user_id`, `bucket` and `change`; users without behaviors get a null persona.
            histories: the users' behaviors with vectors, sorted as by `Store.read_histories`.
        """
        names, counts = np.unique(histories["user_id"].to_numpy(), return_counts=True)
        number = {name: i for i, name in enumerate(names)}
        numbers = [number.get(user) for user in users["user_id"].to_pylist()]
        n_behaviors = [0 if i is None else int(counts[i]) for i in numbers]
        ends = np.cumsum(counts)
        vectors_Nd = vectors.from_column(histories["vector"], self.plug.width)
        latest = [
            vectors_Nd[max(ends[i] - counts[i], ends[i] - self.max_behaviors) : ends[i]]
            for i in numbers
            if i is not None
        ]
        personas = iter(self._personas(latest))
        column = [None if i is None else next(personas) for i in numbers]
        return (
            users.select(["bucket", "user_id", "change"])
            .append_column("plug", pa.repeat(self.fingerprint, users.num_rows))
            .append_column("n_behaviors", pa.array(n_behaviors, pa.int32()))
            .append_column("persona", pa.array(column, pa.list_(pa.float32())))
        )

    def _personas(self, histories: list[NDArray[np.float16]]) -> NDArray[np.float32]:
        """The personas (B, F) of histories (n, d) that are not empty."""
        if not histories:
            return np.zeros((0, self.plug.options.persona_tokens * self.plug.llm_width), np.float32)
        history_Md = torch.from_numpy(np.concatenate(histories).astype(np.float32))
        lengths_B = torch.tensor([len(history) for history in histories])
        weights_M = self.plug.weigh(history_Md, lengths_B, None)
        personas_BF: NDArray[np.float32] = self.plug.persona(history_Md, lengths_B, weights_M).flatten(1).numpy()
        return personas_BF
