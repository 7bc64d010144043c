"""The one place where the matrix calls this project's encoder code."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from persona.models.encoder import TextEncoder
from persona.models.encoder_settings import settle, settle_query
from persona.models.resolve import resolve
from persona.options import PlugOptions, Precision
from persona.plug import folder as plug_folder
from persona.plug.module import Plug


class OurEncoder:
    """An encoder of a folder, for the behaviors of a store and for the queries of a new plug.

    Raises PersonaError when it is refused.
    """

    def __init__(self, folder: Path, *, max_tokens: int) -> None:
        self.folder, self.max_tokens = resolve(str(folder), flag="--encoder"), max_tokens
        self.settings = settle(self.folder, max_tokens=max_tokens)
        self.query_settings = settle_query(self.folder, max_tokens=max_tokens)

    def documents(
        self, texts: Sequence[str], *, token_budget: int | None = None, precision: Precision = "fp32"
    ) -> NDArray[np.floating]:
        """The vectors of behaviors, in batches of at most `token_budget` padded tokens."""
        settings = settle(self.folder, max_tokens=self.max_tokens, precision=precision)
        encoder = TextEncoder(
            self.folder,
            pooling=settings.pooling,
            max_tokens=settings.max_tokens,
            prompt=settings.prompt,
            width=settings.width,
            token_budget=token_budget,
            precision=precision,
            device="cpu",
        )
        return encoder.encode(texts).vectors

    @torch.no_grad()
    def queries(self, texts: Sequence[str]) -> NDArray[np.floating]:
        """The vectors of queries under a plug before its training."""
        options = PlugOptions(weights="attention")
        query_encoder, query_head = plug_folder.new_query_encoder(
            self.folder, options, pooling=self.settings.pooling, width=self.settings.width, pretrained=True
        )
        plug = Plug(
            options,
            query_encoder=query_encoder,
            query_head=query_head,
            width=self.settings.width,
            llm_width=8,
            token_norm=1.0,
        )
        query_text = plug_folder.new_query_text(self.folder, self.query_settings.prompt, self.query_settings.max_tokens)
        return plug.encode_query(*query_text.tokens(texts, torch.device("cpu"))).numpy()
