"""The record of a plug (`plug.json`): its options, the models that it belongs to, and how it was trained.

Imports no torch, because jobs read the record before they load a model and send it to every task.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from persona.errors import InputError, PlugMismatch, UsageError
from persona.field_types import check_field_types
from persona.models import contents
from persona.models.resolve import ModelFolder
from persona.options import PlugOptions, PromptOptions, Quantization, Select, pooling_modes
from persona.plug import hub
from persona.store.identity import Identity

WEIGHTS, RECORD, CARD = "plug.safetensors", "plug.json", "README.md"
_SELECTED: dict[Select, str] = {"best": "the one with the lowest held-out loss", "last": "the last"}
_FORMAT = 3
_NO_QUERY_TOKEN = ("query_token", False)


@dataclass(frozen=True, kw_only=True)
class PlugRecord:
    """Everything about a plug except its weights; the content of `plug.json`.

    Attributes:
        encoder, llm: `ModelFolder.card()` of the two models.
        encoder_width: d; llm_width: D.
        pooling: of behaviors and queries, modes joined by `+`.
        encoder_max_tokens: stored behaviors were cut to this length.
        document_prompt: in front of each behavior.
        scale, token_norm: as in `Plug`.
        llm_quantization: of the LLM's weights, in training and for answers.
        query_prompt, max_query_tokens: how queries are read by the query encoder.
        max_input_tokens, max_target_tokens: inputs and targets of the LLM are cut to these lengths.
        prompt: how requests are written; its format is `chat` or `plain`.
        training: settings, curves and results of the training run, for people and reports.
        weights_digest: hash of the weights file; empty in plugs older than this field.
    """

    options: PlugOptions
    encoder: dict[str, str]
    encoder_width: int
    pooling: str
    encoder_max_tokens: int
    document_prompt: str
    llm: dict[str, str]
    llm_width: int
    token_norm: float
    scale: float
    llm_quantization: Quantization
    query_prompt: str
    max_query_tokens: int
    max_input_tokens: int
    max_target_tokens: int
    prompt: PromptOptions
    max_behaviors: int
    training: dict[str, Any]
    weights_digest: str = ""

    def __post_init__(self) -> None:
        """Raises TypeError, ValueError or UsageError for values that no training run writes."""
        check_field_types(self)
        pooling_modes(self.pooling)
        for kind, model in (("encoder", self.encoder), ("llm", self.llm)):
            if absent := {"name", "revision", "fingerprint"} - model.keys():
                raise ValueError(f"{kind} lacks {', '.join(sorted(absent))}")
        for name in [name for name in vars(self) if name.endswith("_width") or name.startswith("max_")]:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more")

    def to_json(self) -> str:
        """The text of `plug.json`."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, *, source: str) -> "PlugRecord":
        """Parses `plug.json`. Raises InputError when the text is no plug record or has another format."""
        try:
            values = json.loads(text)
            found = values.pop("format")
            if found != _FORMAT:
                raise InputError(
                    f"{source}: the plug has format {found}, this version reads format {_FORMAT}; train a new plug"
                )
            values["options"] = _options(values["options"])
            if "prompt" in values:
                values["prompt"] = _prompt(values["prompt"])
            record = cls(**values)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UsageError) as error:
            raise InputError(f"{source}: not a valid {RECORD} ({error})") from error
        return record


def _options(written: dict[str, Any]) -> PlugOptions:
    """Raises ValueError when options are missing: a default may have changed since the plug was trained."""
    known = {one.name for one in fields(PlugOptions)} - {_NO_QUERY_TOKEN[0]}
    if absent := known - written.keys():
        raise ValueError(f"options lacks {', '.join(sorted(absent))}")
    return PlugOptions(**written)


def _prompt(written: dict[str, Any]) -> PromptOptions:
    return PromptOptions(**{**written, "template_argument": tuple(written["template_argument"])})


def read(folder: Path) -> PlugRecord:
    """The record of a plug folder. Raises InputError when the folder holds no complete plug, or a broken one."""
    if not (folder / RECORD).is_file() or not (folder / WEIGHTS).is_file():
        raise InputError(
            f"{folder}: no complete plug here ({RECORD} and {WEIGHTS} are required); train one with jobs.train"
        )
    try:
        text = (folder / RECORD).read_bytes()
        contents.check_safetensors(folder / WEIGHTS)
    except (InputError, OSError) as error:
        raise InputError(f"{folder}: {error}") from error
    return PlugRecord.from_json(text, source=str(folder))


def fingerprint(folder: Path) -> str:
    """Hash of everything in a plug that answers depend on: weights and record, without the training history.

    Raises InputError when the folder holds no complete plug, or a record and weights of two different plugs.
    """
    record = read(folder)
    digest = _digest(folder)
    if record.weights_digest not in ("", digest.hexdigest()):
        raise InputError(
            f"{folder}: {RECORD} and {WEIGHTS} belong to different plugs; a copy is under way or was interrupted: try "
            "again in a minute, then copy the whole folder again or repeat the training"
        )
    facts = {name: value for name, value in asdict(record).items() if name not in ("training", "weights_digest")}
    # A plug without a query token keeps the fingerprint that it had before there were any.
    facts["options"] = {name: value for name, value in facts["options"].items() if (name, value) != _NO_QUERY_TOKEN}
    digest.update(json.dumps(facts, sort_keys=True).encode())
    return str(digest.hexdigest())


def with_digest(record: PlugRecord, folder: Path) -> PlugRecord:
    """The record, with the digest of the weights in the folder."""
    return replace(record, weights_digest=_digest(folder).hexdigest())


@contextmanager
def local_plug(uri: str, expected: str) -> Iterator[Path]:
    """A local folder with the plug at `uri`, which must still have the fingerprint `expected`.

    Raises PlugMismatch when the plug was replaced since the job started.
    """
    with hub.local_plug_folder(uri) as folder:
        found = fingerprint(folder)
        if found != expected:
            raise PlugMismatch(
                f"--plug {uri} was replaced while the job ran: its fingerprint was {expected[:12]} and is now "
                f"{found[:12]}; results of the old plug stay, run the same command again for the new one"
            )
        yield folder


def _digest(folder: Path) -> Any:  # a hash object, for which hashlib has no public type
    with (folder / WEIGHTS).open("rb") as weights:
        return hashlib.file_digest(weights, lambda: hashlib.blake2b(digest_size=16))


def check_models(record: PlugRecord, *, encoder: ModelFolder, llm: ModelFolder) -> None:
    """Raises PlugMismatch when the plug was trained for another encoder or LLM than the given ones."""
    for kind, trained, given in (("encoder", record.encoder, encoder), ("LLM", record.llm, llm)):
        if trained["fingerprint"] != given.fingerprint:
            raise PlugMismatch(
                f"the plug was trained for the {kind} {trained['name']!r} (fingerprint {trained['fingerprint'][:12]}), "
                f"but {given.name!r} has fingerprint {given.fingerprint[:12]}; give the {kind} it was trained for, "
                "or train a new plug"
            )


def check_vectors(record: PlugRecord, identity: Identity, *, name: str) -> None:
    """Raises PlugMismatch when the plug was trained on vectors that the same encoder made in another way.

    `identity` is that of the store, `name` that of the plug.
    """
    pairs = (
        ("width", record.encoder_width, identity.width),
        ("pooling", record.pooling, identity.pooling),
        ("document prompt", record.document_prompt, identity.document_prompt),
    )
    different = [f"{what} {trained!r} instead of {given!r}" for what, trained, given in pairs if trained != given]
    if different:
        raise PlugMismatch(
            f"{name} was trained on other vectors of the same encoder ({'; '.join(different)}); give the store it was "
            "trained on, or train a plug on this one"
        )


def card(record: PlugRecord, *, example: str) -> str:
    """The README of a plug folder: its models, an example of its prompts, settings and losses."""
    training = record.training
    curve = "\n".join(f"| {step:,} | {loss:.4f} |" for step, loss in training["validation_curve"])
    settings = "\n".join(
        f"| {name} | {value} |"
        for name, value in sorted(training.items())
        if name != "held_out" and not name.endswith("_curve")
    )
    kind = record.llm_quantization
    quantized = "" if kind == "none" else f", whose weights are quantized to {kind}"
    return f"""# A persona plug for {record.llm["name"]}

Turns a user's history into {record.options.n_soft} soft tokens of width {record.llm_width} in front of the frozen LLM\
{quantized}.

| | model | revision | fingerprint |
|---|---|---|---|
| encoder | {record.encoder["name"]} | {record.encoder["revision"]} | {record.encoder["fingerprint"]} |
| LLM | {record.llm["name"]} | {record.llm["revision"]} | {record.llm["fingerprint"]} |

Options: {record.options}. {record.prompt}.
The plug works with these two models only. Weights: `{WEIGHTS}`; all else: `{RECORD}`.

What the LLM reads:

```text
{example}
```

## Held-out loss (nats a token)

The weights are those of step {training["selected_step"]:,}, {_SELECTED[training["select"]]}.{_early(training)}
{_personas(training.get("held_out"))}
| step | loss |
|---|---|
{curve}

## Training

| setting | value |
|---|---|
{settings}
"""


def _early(training: Mapping[str, Any]) -> str:
    """A sentence for a run that --patience ended; empty for any other."""
    steps, planned = (training.get(name) for name in ("steps", "planned_steps"))
    if steps == planned:
        return ""
    return f" Training stopped early at step {steps:,} of {planned:,} (`patience` {training['patience']})."


def _personas(found: Mapping[str, Any] | None) -> str:
    """The table of the losses by kind of persona, and the warning; empty for a plug without histories."""
    if found is None:
        return ""
    lines = []
    for persona, loss in found["loss"].items():
        saved = found["loss_saved_by_own"].get(persona)
        lines.append(f"| {persona} | {_interval(loss, '.4f')} | {_interval(saved, '+.4f') if saved else ''} |")
    rows = "\n".join(lines)
    warning = f"\n**Warning:** {found['warning']}.\n" if found["warning"] else ""
    return f"""
On {found["requests"]:,} held-out requests of {found["users"]:,} users, which also chose the step, with 95 % intervals:

| persona | loss | own saves |
|---|---|---|
{rows}
{warning}"""


def _interval(found: Mapping[str, float | None], form: str) -> str:
    bounds = [found["low"], found["high"]]
    known = "" if None in bounds else f" [{', '.join(format(bound, form) for bound in bounds)}]"
    return f"{found['mean']:{form}}{known}"
