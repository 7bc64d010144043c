"""A trained plug as a folder: weights as safetensors, the record as JSON, and a card for people.

`plug.json` is written last, so a folder that has it is complete.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel

from persona.engines.base import Engine
from persona.errors import PlugMismatch
from persona.models import loading
from persona.models.encoder import check_positions
from persona.models.frozen_llm import FrozenLLM
from persona.models.resolve import ModelFolder
from persona.options import PlugOptions
from persona.plug import aggregation, record as plug_record
from persona.plug.answerer import Answerer
from persona.plug.module import Plug
from persona.plug.personalized import PersonalizedLLM, QueryText, prepare_for_inference
from persona.plug.record import RECORD, WEIGHTS, PlugRecord

CARD = "README.md"


def new_query_encoder(folder: ModelFolder, options: PlugOptions, *, pretrained: bool) -> nn.Module | None:
    """Enc_input of PPlug eq. 2 in float32: a copy of the frozen encoder, or with random weights for loading into.

    None when the weights do not depend on the request. BERT's pooler is removed, since no gradient reaches it.
    """
    if not aggregation.uses_query(options):
        return None
    config = loading.load_config(folder)
    # With dropout, the loss of a step would depend on how its batch is split over workers.
    for name in [name for name, value in vars(config).items() if "dropout" in name and isinstance(value, float)]:
        setattr(config, name, 0.0)
    encoder: Any
    if pretrained:
        encoder = loading.load_model(AutoModel, folder, config=config, dtype=torch.float32)
    else:
        encoder = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    without_pooler: nn.Module = encoder
    return without_pooler


def save(folder: Path, weights: Mapping[str, torch.Tensor], record: PlugRecord, card: str) -> None:
    """Writes a complete plug folder; `weights` is a `Plug.state_dict()`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).unlink(missing_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)
    (folder / CARD).write_text(card)
    partial = folder / f".{RECORD}"
    partial.write_text(plug_record.with_digest(record, folder).to_json())
    partial.replace(folder / RECORD)


def load(folder: Path, *, encoder: ModelFolder, llm: FrozenLLM, retrieved_tokens: int = 0) -> PersonalizedLLM:
    """Loads a plug in front of `llm`, ready to compute losses; `retrieved_tokens` as in `PersonalizedLLM`.

    Raises:
        InputError: the folder holds no complete plug.
        PlugMismatch: its soft tokens or weights do not fit the LLM or the encoder.
        UsageError: the plug reads longer queries than the encoder can.
    """
    plug, query_text = _load_for(llm, folder, encoder)
    return PersonalizedLLM(plug, llm, query_text, retrieved_tokens=retrieved_tokens).eval()


def load_answerer(
    folder: Path, *, encoder: ModelFolder, engine: Engine, batch_size: int, retrieved_tokens: int = 0
) -> Answerer:
    """Loads a plug in front of `engine`; the other arguments are those of `Answerer`. Raises as `load` does."""
    plug, query_text = _load_for(engine, folder, encoder)
    return Answerer(plug, engine, query_text, batch_size=batch_size, retrieved_tokens=retrieved_tokens)


def _load_for(llm: FrozenLLM | Engine, folder: Path, encoder: ModelFolder) -> tuple[Plug, QueryText]:
    record = plug_record.read(folder)
    if llm.width != record.llm_width:
        raise PlugMismatch(
            f"the plug makes soft tokens of width {record.llm_width}, the LLM's tokens have width {llm.width}"
        )
    plug = prepare_for_inference(load_plug(folder, encoder=encoder), dtype=llm.dtype, device=llm.device)
    return plug, new_query_text(encoder, record.query_prefix, record.max_query_tokens)


def load_plug(folder: Path, *, encoder: ModelFolder) -> Plug:
    """Loads a plug without its LLM. Raises InputError and PlugMismatch as `load` does."""
    record = plug_record.read(folder)
    plug = Plug(
        record.options,
        query_encoder=new_query_encoder(encoder, record.options, pretrained=False),
        pooling=record.pooling,
        width=record.encoder_width,
        llm_width=record.llm_width,
        token_norm=record.token_norm,
        scale=record.scale,
    )
    try:
        plug.load_state_dict(load_file(folder / WEIGHTS))
    except (RuntimeError, SafetensorError) as error:
        raise PlugMismatch(
            f"{folder}: {WEIGHTS} does not fit {RECORD} and the encoder {encoder.name!r} "
            f"({str(error).splitlines()[-1].strip()}); copy the whole folder again, or train a new plug"
        ) from error
    return plug.eval()


def new_query_text(encoder: ModelFolder, prefix: str, max_tokens: int) -> QueryText:
    """How queries become tokens for this encoder. Raises UsageError when it has fewer positions than `max_tokens`."""
    check_positions(loading.load_config(encoder), max_tokens)
    return QueryText(tokenizer=loading.load_tokenizer(encoder), prefix=prefix, max_tokens=max_tokens)
