"""Shared by tests: a plug in front of a tiny LLM, and requests for it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from persona.engines.local import LocalEngine
from persona.models.encoder_model import architecture
from persona.models.frozen_llm import FrozenLLM
from persona.models.resolve import ModelFolder
from persona.options import PersonaKind, PlugOptions
from persona.plug import folder as plug_folder, record as plug_record
from persona.plug.answerer import Answerer
from persona.plug.module import Plug
from persona.plug.personalized import PersonalizedLLM
from persona.plug.record import PlugRecord
from tests.models import ENCODER_WIDTH


def random_history(draw: np.random.Generator, n_behaviors: int, width: int) -> bytes:
    """Random unit vectors as a row holds them."""
    vectors = draw.normal(size=(n_behaviors, width))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype("<f2").tobytes()


def random_soft_tokens(llm: FrozenLLM, n: int, seed: int = 0) -> torch.Tensor:
    """Three random soft tokens (n, 3, D) per request, with the norm of the LLM's token embeddings."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randn(n, 3, llm.width, generator=draw)
    return torch.nn.functional.normalize(tokens, dim=-1) * llm.token_norm()


def row(number: int, n_behaviors: int) -> dict[str, Any]:
    """A request with a random history."""
    history = random_history(np.random.default_rng(number), n_behaviors, ENCODER_WIDTH)
    text = f"the title of paper {number} " * (1 + number % 3)
    made = {
        "request_id": f"r{number}",
        "user_id": f"u{number}",
        "input": text,
        "query": f"query {number}",
        "target": "good " * (1 + number % 4),
    }
    return {**made, "history": history}


ROWS = [row(number, n) for number, n in enumerate([3, 0, 1, 40, 0, 7])]


def new_model(
    encoder: ModelFolder,
    llm: FrozenLLM,
    prompt: str = "",
    *,
    pooling: str = "cls",
    width: int | None = None,
    max_query_tokens: int = 64,
    seed: int = 0,
    **options: Any,
) -> PersonalizedLLM:
    """A fresh plug, the same for the same arguments, in front of `llm`."""
    # At a temperature of 1 the weights would be too uniform to tell from the mean.
    basic = {"weights": "attention", "persona_tokens": 2, "persona_gain": 1.0, "temperature": 30.0}
    chosen = PlugOptions(**{**basic, **options})
    torch.manual_seed(seed)
    width = architecture(encoder).width if width is None else width
    query_encoder, query_head = plug_folder.new_query_encoder(
        encoder, chosen, pooling=pooling, width=width, pretrained=True
    )
    plug = Plug(
        chosen,
        query_encoder=query_encoder,
        query_head=query_head,
        width=width,
        llm_width=llm.width,
        token_norm=llm.token_norm(),
    )
    draw = torch.Generator().manual_seed(seed)
    plug.set_typical_behavior(torch.nn.functional.normalize(torch.randn(5, plug.width, generator=draw), dim=-1))
    if chosen.recency:
        plug.recency_slope.data.fill_(0.7)  # it starts at 0, which has no effect
    return PersonalizedLLM(plug, llm, plug_folder.new_query_text(encoder, prompt, max_query_tokens))


def new_answerer(model: PersonalizedLLM, *, batch_size: int = 32) -> Answerer:
    """The same plug and LLM, answering with the local engine."""
    engine = LocalEngine(model.llm, batch_size=batch_size)
    return Answerer(
        model.plug, engine, model.query_text, batch_size=batch_size, retrieved_tokens=model.retrieved_tokens
    )


def record_of(model: PersonalizedLLM, encoder: ModelFolder, llm: ModelFolder) -> PlugRecord:
    """The content of `plug.json` for this model."""
    return PlugRecord(
        options=model.plug.options,
        encoder=encoder.card(),
        encoder_width=ENCODER_WIDTH,
        pooling="cls",
        encoder_max_tokens=128,
        document_prompt="",
        llm=llm.card(),
        llm_width=model.llm.width,
        token_norm=model.plug.token_norm,
        scale=model.plug.scale,
        llm_quantization="none",
        query_prompt="Represent: ",
        max_query_tokens=64,
        max_input_tokens=256,
        max_target_tokens=256,
        prompt=model.llm.tokenizer.options,
        max_behaviors=512,
        training={
            "run": "a run",
            "seed": 3,
            "select": "best",
            "selected_step": 1200,
            "validation_curve": [[10, 4.25], [1200, 3.5]],
            "training_curve": [[1, 5.0]],
        },
    )


def save(folder: Path, model: PersonalizedLLM, encoder: ModelFolder, llm: ModelFolder) -> Path:
    """Writes this model's plug into a folder, and returns the folder."""
    record = record_of(model, encoder, llm)
    plug_folder.save(
        folder, model.plug.state_dict(), record, plug_record.card(record, example=model.llm.tokenizer.example(n_soft=3))
    )
    return folder


def losses(
    model: PersonalizedLLM, rows: Sequence[Mapping[str, Any]], *, persona: PersonaKind = PersonaKind.OWN
) -> torch.Tensor:
    """The summed negative log-likelihood (B,) of each row's target."""
    with torch.no_grad():
        return model(model.collate(rows, persona=persona))
