"""What a plug is, without its weights: the content of its `plug.json`, and what it belongs to.

Imports no torch: a job reads it before it starts a model, and it travels to every task of a job.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from persona import storage
from persona.errors import InputError, PlugMismatch, UsageError
from persona.models.resolve import ModelFolder
from persona.options import PlugOptions, Pooling

WEIGHTS, RECORD = "plug.safetensors", "plug.json"
_FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class PlugRecord:
    """Everything about a plug but its weights; the content of `plug.json`.

    `encoder` and `llm` are `ModelFolder.card()`s; `encoder_max_tokens` is the cut of the stored behaviors,
    `max_query_tokens` and `query_prefix` those of the query encoder, `max_input_tokens` that of the LLM;
    `weights_digest` is of the file of weights that belongs to it (empty in plugs that were made before it was kept).
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
    weights_digest: str = ""

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
                raise InputError(
                    f"{source}: the plug has format {found}, this version reads format {_FORMAT}; train another"
                )
            record = cls(**{**fields, "options": PlugOptions(**fields["options"])})
        except (ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
            raise InputError(f"{source}: not a plug's {RECORD} ({error})") from error
        return record


def read(folder: Path) -> PlugRecord:
    """The record of a plug folder. Raises InputError when the folder holds no complete plug."""
    if not (folder / RECORD).is_file() or not (folder / WEIGHTS).is_file():
        raise InputError(
            f"{folder}: no complete plug here ({RECORD} and {WEIGHTS} are needed); train one with jobs.train"
        )
    return PlugRecord.from_json((folder / RECORD).read_text(), source=str(folder))


def fingerprint(folder: Path) -> str:
    """Hash of all that a plug's answers depend on, so not of its training: part of the fingerprint of every answer.

    Raises InputError when the folder holds no complete plug, or parts of two.
    """
    record = read(folder)
    digest = _digest(folder)
    if record.weights_digest not in ("", digest.hexdigest()):
        raise InputError(
            f"{folder}: {RECORD} and {WEIGHTS} are of two plugs, as when one is being copied over the other, or this "
            "was cut off; try again in a minute, else copy the whole folder anew or run its training once more"
        )
    facts = {name: value for name, value in asdict(record).items() if name not in ("training", "weights_digest")}
    digest.update(json.dumps(facts, sort_keys=True).encode())
    return str(digest.hexdigest())


def with_digest(record: PlugRecord, folder: Path) -> PlugRecord:
    """The record of the weights that lie in the folder."""
    return replace(record, weights_digest=_digest(folder).hexdigest())


@contextmanager
def local_plug(uri: str, expected: str) -> Iterator[Path]:
    """The plug that a job was started with, as `storage.local_folder`; `expected` is its fingerprint.

    Raises PlugMismatch when it has been replaced since.
    """
    with storage.local_folder(uri) as folder:
        found = fingerprint(folder)
        if found != expected:
            raise PlugMismatch(
                f"--plug {uri} is another plug now (fingerprint {found[:12]}) than when the job was started "
                f"({expected[:12]}); what was made by that one stays, run the same command again for this one"
            )
        yield folder


def _digest(folder: Path) -> Any:  # a hash object, for which hashlib has no public type
    with (folder / WEIGHTS).open("rb") as weights:
        return hashlib.file_digest(weights, lambda: hashlib.blake2b(digest_size=16))


def check_models(record: PlugRecord, *, encoder: ModelFolder, llm: ModelFolder) -> None:
    """Raises PlugMismatch when the plug was trained for another encoder or LLM than those at hand."""
    for kind, trained, given in (("encoder", record.encoder, encoder), ("LLM", record.llm, llm)):
        if trained["fingerprint"] != given.fingerprint:
            raise PlugMismatch(
                f"the plug was trained for the {kind} {trained['name']!r} (fingerprint {trained['fingerprint'][:12]}), "
                f"but {given.name!r} has fingerprint {given.fingerprint[:12]}; give the {kind} it was trained for, "
                "or train another plug"
            )


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
