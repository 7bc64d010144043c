"""A trained plug as a folder: weights as safetensors, what it belongs to as JSON, and a card for people.

`plug.json` is written last, so that a folder with it is complete: a reader never sees a plug without its card.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

from persona.encoder import check_positions
from persona.errors import InputError, PlugMismatch, UsageError
from persona.llm import FrozenLLM
from persona.models import ModelFolder
from persona.options import PlugOptions, Pooling
from persona.personalized import PersonalizedLLM, QueryText
from persona.plug import Plug

WEIGHTS, RECORD, CARD = "plug.safetensors", "plug.json", "README.md"
_FORMAT = 1
# Options that came after plugs had answered: while they are off, these answers are still up to date.
_LATER_OPTIONS = ("recency",)


@dataclass(frozen=True, kw_only=True)
class PlugRecord:
    """Everything about a plug but its weights; the content of `plug.json`.

    `encoder` and `llm` are `ModelFolder.card()`s; `encoder_max_tokens` is the cut of the stored behaviors,
    `max_query_tokens` and `query_prefix` those of the query encoder, `max_input_tokens` that of the LLM.
    """

    options: PlugOptions
    encoder: dict[str, str]
    encoder_width: int
    pooling: Pooling
    encoder_max_tokens: int
    llm: dict[str, str]
    llm_width: int
    token_norm: float
    scale: float
    query_prefix: str
    max_query_tokens: int
    max_input_tokens: int
    max_behaviors: int
    training: dict[str, Any]

    def to_json(self) -> str:
        """The text of `plug.json`."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str) -> "PlugRecord":
        """Reads `plug.json`. Raises InputError when it is not one, or of another format."""
        try:
            fields = json.loads(text)
            found = fields.pop("format")
            if found != _FORMAT:
                raise InputError(f"{source}: the plug has format {found}, this version reads format {_FORMAT}")
            record = cls(**{**fields, "options": PlugOptions(**fields["options"])})
            record.options.check()
        except (ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
            raise InputError(f"{source}: not a plug's {RECORD} ({error})") from error
        return record


def new_query_encoder(folder: ModelFolder, options: PlugOptions, *, pretrained: bool) -> nn.Module | None:
    """Enc_input of eq. 2 in float32, starting as the frozen encoder, or with empty weights to be loaded.

    BERT's own pooler is left out: no gradient ever reaches it.
    """
    if options.weights == "mean":
        return None
    config = AutoConfig.from_pretrained(folder.path)
    # Dropout in the query encoder would make the loss of a step depend on how its batch is split over workers.
    for name in [name for name, value in vars(config).items() if "dropout" in name and isinstance(value, float)]:
        setattr(config, name, 0.0)
    encoder: Any
    if pretrained:
        encoder = AutoModel.from_pretrained(folder.path, config=config, dtype=torch.float32, use_safetensors=True)
    else:
        encoder = AutoModel.from_config(config, dtype=torch.float32)
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    without_pooler: nn.Module = encoder
    return without_pooler


def save(folder: Path, weights: Mapping[str, torch.Tensor], record: PlugRecord, card: str) -> None:
    """Writes a complete plug folder; `weights` are those of `Plug.state_dict()`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).unlink(missing_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)
    (folder / CARD).write_text(card)
    partial = folder / f".{RECORD}"
    partial.write_text(record.to_json())
    partial.replace(folder / RECORD)


def read_record(folder: Path) -> PlugRecord:
    """The record of a plug folder. Raises InputError when the folder holds no complete plug."""
    if not (folder / RECORD).is_file() or not (folder / WEIGHTS).is_file():
        raise InputError(
            f"{folder}: no complete plug here ({RECORD} and {WEIGHTS} are needed); train one with jobs.train"
        )
    return PlugRecord.from_json((folder / RECORD).read_text(), source=str(folder))


def fingerprint(folder: Path) -> str:
    """Hash of all that a plug's answers depend on, so not of its training: part of the fingerprint of every answer."""
    record = asdict(read_record(folder))
    del record["training"]
    for name in _LATER_OPTIONS:
        if not record["options"][name]:
            del record["options"][name]
    with (folder / WEIGHTS).open("rb") as weights:
        digest = hashlib.file_digest(weights, lambda: hashlib.blake2b(digest_size=16))
    digest.update(json.dumps(record, sort_keys=True).encode())
    return digest.hexdigest()


def check_models(record: PlugRecord, *, encoder: ModelFolder, llm: ModelFolder) -> None:
    """Raises PlugMismatch when the plug was trained for another encoder or LLM than those at hand."""
    for kind, trained, given in (("encoder", record.encoder, encoder), ("LLM", record.llm, llm)):
        if trained["fingerprint"] != given.fingerprint:
            raise PlugMismatch(
                f"the plug was trained for the {kind} {trained['name']!r} (fingerprint {trained['fingerprint'][:12]}), "
                f"but {given.name!r} has fingerprint {given.fingerprint[:12]}; give the {kind} it was trained for, "
                "or train another plug"
            )


def load(folder: Path, *, encoder: ModelFolder, llm: FrozenLLM, front_tokens: int = 0) -> PersonalizedLLM:
    """The plug of a folder in front of `llm`, ready to answer; `front_tokens` is that of `PersonalizedLLM`.

    Raises:
        InputError: the folder holds no complete plug.
        PlugMismatch: its soft tokens or weights do not fit this LLM or encoder.
    """
    record = read_record(folder)
    if llm.width != record.llm_width:
        raise PlugMismatch(
            f"the plug makes soft tokens of width {record.llm_width}, the LLM's tokens have width {llm.width}"
        )
    query_text = new_query_text(encoder, record.query_prefix, record.max_query_tokens)
    plug = load_plug(folder, encoder=encoder).to(llm.device)
    return PersonalizedLLM(plug, llm, query_text, front_tokens=front_tokens).only_answering()


def load_plug(folder: Path, *, encoder: ModelFolder) -> Plug:
    """The plug of a folder without its LLM. Raises as `load` does."""
    record = read_record(folder)
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
            f"{folder}: {WEIGHTS} does not hold the weights that {RECORD} and the encoder {encoder.name!r} ask for "
            f"({str(error).splitlines()[-1].strip()}); copy the whole folder anew, or train another plug"
        ) from error
    return plug.eval()


def new_query_text(encoder: ModelFolder, prefix: str, max_tokens: int) -> QueryText:
    """How queries are tokenized for the query encoder of this folder. Raises UsageError when it cannot read so many."""
    check_positions(AutoConfig.from_pretrained(encoder.path), max_tokens)
    return QueryText(tokenizer=AutoTokenizer.from_pretrained(encoder.path), prefix=prefix, max_tokens=max_tokens)


def card(record: PlugRecord) -> str:
    """The README of a plug folder: what it is for, how it was trained, what came out."""
    training = record.training
    curve = "\n".join(f"| {step:,} | {loss:.4f} |" for step, loss in training["validation_curve"])
    settings = "\n".join(
        f"| {name} | {value} |" for name, value in sorted(training.items()) if not name.endswith("_curve")
    )
    return f"""# A persona plug for {record.llm["name"]}

Turns a user's history into {record.options.n_soft} soft tokens of width {record.llm_width} in front of the frozen LLM.

| | model | revision | fingerprint |
|---|---|---|---|
| encoder | {record.encoder["name"]} | {record.encoder["revision"]} | {record.encoder["fingerprint"]} |
| LLM | {record.llm["name"]} | {record.llm["revision"]} | {record.llm["fingerprint"]} |

Options: {record.options}. It works with these two models only. Weights: `{WEIGHTS}`; everything else: `{RECORD}`.

## Held-out loss (nats a token)

| step | loss |
|---|---|
{curve}

## Training

| setting | value |
|---|---|
{settings}
"""
