"""A trained plug as a folder: weights as safetensors, the record as JSON, and a card for people.

`plug.json` is written last, so a folder that has it is complete.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from persona.engines.base import Engine
from persona.errors import PlugMismatch
from persona.models import encoder_model, loading, sentence_transformer
from persona.models.frozen_llm import FrozenLLM
from persona.models.resolve import ModelFolder
from persona.models.sentence_head import SentenceHead
from persona.options import PlugOptions
from persona.plug import aggregation, record as plug_record
from persona.plug.answerer import Answerer
from persona.plug.module import Plug
from persona.plug.personalized import PersonalizedLLM, QueryText, prepare_for_inference
from persona.plug.record import CARD, RECORD, WEIGHTS, PlugRecord


def new_query_encoder(
    folder: ModelFolder, options: PlugOptions, *, pooling: str, width: int, pretrained: bool
) -> tuple[nn.Module, SentenceHead] | tuple[None, None]:
    """Enc_input of PPlug eq. 2 in float32 and its head: copies of the frozen encoder's, or random ones to load into.

    None when the weights do not depend on the request. There is no pooler, since no gradient would reach it.
    """
    if not aggregation.uses_query(options):
        return None, None
    config = loading.load_config(folder)
    # With dropout, the loss of a step would depend on how its batch is split over workers.
    for name in [name for name, value in vars(config).items() if "drop" in name and isinstance(value, float)]:
        setattr(config, name, 0.0)
    head = SentenceHead(pooling, sentence_transformer.read(folder).layers, width)
    if pretrained:
        transformer = encoder_model.load_transformer(folder, config=config, dtype=torch.float32)
        return transformer, head.load_weights()
    return encoder_model.new_transformer(config), head


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
    return plug, new_query_text(encoder, record.query_prompt, record.max_query_tokens)


def load_plug(folder: Path, *, encoder: ModelFolder) -> Plug:
    """Loads a plug without its LLM. Raises InputError and PlugMismatch as `load` does."""
    record = plug_record.read(folder)
    query_encoder, query_head = new_query_encoder(
        encoder, record.options, pooling=record.pooling, width=record.encoder_width, pretrained=False
    )
    plug = Plug(
        record.options,
        query_encoder=query_encoder,
        query_head=query_head,
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


def new_query_text(encoder: ModelFolder, prompt: str, max_tokens: int) -> QueryText:
    """How queries become tokens for this encoder. Raises UsageError when it has fewer positions than `max_tokens`."""
    encoder_model.architecture(encoder).check_length(max_tokens)
    tokenizer = encoder_model.load_tokenizer(encoder, sentence_transformer.read(encoder))
    return QueryText(tokenizer=tokenizer, prompt=prompt, max_tokens=max_tokens)
