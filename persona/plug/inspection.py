"""What a plug makes of single requests: which behaviors it listens to, and where the persona lies; without an LLM.

Shapes: M behaviors of all requests, B requests, K persona tokens, D LLM width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from persona.models.resolve import ModelFolder
from persona.plug import folder as plug_folder, record as plug_record
from persona.plug.module import Plug
from persona.plug.personalized import QueryText, Row, packed


@dataclass(frozen=True, kw_only=True)
class Look:
    """The weight (n,) of each visible behavior, oldest first, and the persona (K·D,) without the request."""

    weights: list[float]
    persona: np.ndarray


class PlugAlone:
    """A plug without its LLM, so that a small machine can look at it."""

    def __init__(self, plug: Plug, query_text: QueryText) -> None:
        self.plug = plug
        self.query_text = query_text

    @classmethod
    def load(cls, folder: Path, encoder: ModelFolder) -> "PlugAlone":
        """Raises InputError or PlugMismatch as `plug_folder.load` does."""
        record = plug_record.read(folder)
        query_text = plug_folder.new_query_text(encoder, record.query_prefix, record.max_query_tokens)
        return cls(plug_folder.load_plug(folder, encoder=encoder), query_text)

    @torch.inference_mode()
    def look(self, rows: Sequence[Row]) -> list[Look]:
        """Rows with `history` and `query`, as `persona.store.join` makes them, in their order."""
        device = torch.device("cpu")
        history_Md, lengths_B = packed([row["history"] for row in rows], self.plug.width, device)
        query_Bd = None
        if self.plug.query_encoder is not None:
            query_Bd = self.plug.encode_query(*self.query_text.tokens([row["query"] for row in rows], device))
        weights_M = self.plug.weigh(history_Md, lengths_B, query_Bd)
        unasked_M = self.plug.weigh(history_Md, lengths_B, None)
        personas_BF = self.plug.persona(history_Md, lengths_B, unasked_M).flatten(1).numpy()
        parts = torch.split(weights_M, lengths_B.tolist())
        return [Look(weights=part.tolist(), persona=persona) for part, persona in zip(parts, personas_BF, strict=True)]
