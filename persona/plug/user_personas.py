"""Personas as rows: what a plug makes of a user's whole history, for tables that people query.

There is no request that could weigh the behaviors: all count alike, or by the plug's recency if it has one. Shapes: M
behaviors of all users together, B users, d encoder width, K persona tokens, D LLM width, F = K·D.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from persona.errors import InputError
from persona.plug import record as plug_record
from persona.plug.module import Plug
from persona.store import vectors


class UserPersonas:
    """A plug without query encoder and LLM: what it makes of whole histories without a request."""

    def __init__(self, plug: Plug, fingerprint: str, max_behaviors: int) -> None:
        self.plug = plug
        self.fingerprint = fingerprint
        self.max_behaviors = max_behaviors

    @classmethod
    def load(cls, folder: Path) -> "UserPersonas":
        """Raises InputError when the folder holds no complete plug."""
        record = plug_record.read(folder)
        plug = Plug(
            replace(record.options, weights="mean", learn_temperature=False),
            query_encoder=None,
            pooling=record.pooling,
            width=record.encoder_width,
            llm_width=record.llm_width,
            token_norm=record.token_norm,
            scale=record.scale,
        )
        unused = ("query_encoder.", "log_temperature")
        try:
            weights = load_file(folder / plug_record.WEIGHTS)
            plug.load_state_dict({name: value for name, value in weights.items() if not name.startswith(unused)})
        except (RuntimeError, SafetensorError) as error:
            raise InputError(
                f"{folder}: {plug_record.WEIGHTS} does not hold the weights that {plug_record.RECORD} asks for "
                f"({str(error).splitlines()[-1].strip()}); copy the whole folder anew, or train another plug"
            ) from error
        return cls(plug.eval(), plug_record.fingerprint(folder), record.max_behaviors)

    @torch.inference_mode()
    def make(self, users: pa.Table, histories: pa.Table) -> pa.Table:
        """Rows of the personas table but for their time stamp.

        Args:
            users: rows with `user_id`, `bucket` and `change`; who is `gone` gets no persona.
            histories: their behaviors with vectors, as `Store.read_histories` sorts them.
        """
        names, counts = np.unique(histories["user_id"].to_numpy(), return_counts=True)
        vectors_Nd = vectors.from_column(histories["vector"], self.plug.width)
        ends = np.cumsum(counts)
        latest = [slice(max(end - n, end - self.max_behaviors), end) for n, end in zip(counts, ends, strict=True)]
        place = {name: i for i, name in enumerate(names)}
        wanted = [place.get(user) for user in users["user_id"].to_pylist()]
        parts = [vectors_Nd[latest[i]] for i in wanted if i is not None]
        lengths_B = torch.tensor([len(part) for part in parts], dtype=torch.long)
        personas_BF = np.zeros((0, self.plug.options.persona_tokens * self.plug.llm_width), np.float32)
        if parts:
            history_Md = torch.from_numpy(np.concatenate(parts).astype(np.float32))
            weights_M = self.plug.weigh(history_Md, lengths_B, None)
            personas_BF = self.plug.persona(history_Md, lengths_B, weights_M).flatten(1).numpy()
        made = iter(personas_BF)
        return (
            users.select(["bucket", "user_id", "change"])
            .append_column("plug", pa.repeat(self.fingerprint, users.num_rows))
            .append_column("n_behaviors", pa.array([0 if i is None else int(counts[i]) for i in wanted], pa.int32()))
            .append_column(
                "persona", pa.array([None if i is None else next(made) for i in wanted], pa.list_(pa.float32()))
            )
        )
