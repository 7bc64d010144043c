"""Shows what a plug does with single requests, without an LLM: the weights of behaviors, and the persona.

Shapes: M behaviors of all requests together, B requests, n behaviors of one request, K persona tokens, D LLM width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from persona.models.resolve import ModelFolder
from persona.plug import folder as plug_folder, record as plug_record
from persona.plug.module import Plug
from persona.plug.personalized import QueryText, Row, pack_histories


@dataclass(frozen=True, kw_only=True, eq=False)
class Look:
    """The weight (n,) of each visible behavior, oldest first, and the persona (K·D,) for no particular request."""

    weights: list[float]
    persona: np.ndarray


class PlugAlone:
    """A plug without its LLM, so a small machine can run it."""

    def __init__(self, plug: Plug, query_text: QueryText) -> None:
        self.plug = plug
        self.query_text = query_text

    @classmethod
    def load(cls, folder: Path, encoder: ModelFolder) -> "PlugAlone":
        """Raises InputError or PlugMismatch, as `persona.plug.folder.load` does."""
        record = plug_record.read(folder)
        query_text = plug_folder.new_query_text(encoder, record.query_prompt, record.max_query_tokens)
        return cls(plug_folder.load_plug(folder, encoder=encoder), query_text)

    @torch.inference_mode()
    def look(self, rows: Sequence[Row]) -> list[Look]:
        """One Look per row, which needs `history` and `query` as `persona.store.join` makes them."""
        device = torch.device("cpu")
        history_Md, lengths_B = pack_histories([row["history"] for row in rows], self.plug.width, device)
        query_Bd = None
        if self.plug.query_encoder is not None:
            query_Bd = self.plug.encode_query(*self.query_text.tokens([row["query"] for row in rows], device))
        weights_M = self.plug.weigh(history_Md, lengths_B, query_Bd)
        without_query_M = self.plug.weigh(history_Md, lengths_B, None)
        personas_BF = self.plug.persona(history_Md, lengths_B, without_query_M).flatten(1).numpy()
        parts = torch.split(weights_M, lengths_B.tolist())
        return [Look(weights=part.tolist(), persona=persona) for part, persona in zip(parts, personas_BF, strict=True)]
