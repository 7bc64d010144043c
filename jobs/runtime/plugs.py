"""The trained plug that a job uses: found and checked on the driver, loaded by the workers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.runtime.inputs import Requests
from jobs.runtime.job_options import PlugModels
from persona.errors import PlugMismatch

if TYPE_CHECKING:
    from persona.models.prompts import PromptTokenizer
    from persona.models.resolve import ModelFolder
    from persona.options import Precision, PromptOptions
    from persona.plug.inspection import PlugAlone
    from persona.plug.personalized import PersonalizedLLM
    from persona.plug.record import PlugRecord
    from persona.store.identity import Identity
    from persona.store.store import Store


@dataclass(frozen=True, kw_only=True)
class PlugRef:
    """A plug as it was when the job started; small, so that it can be sent to every worker.

    Attributes:
        uri: of the plug's folder.
        fingerprint: of the plug.
        record: the content of its `plug.json`.
        llm, encoder: hub ids or folders where its models are now.
    """

    uri: str
    fingerprint: str
    record: "PlugRecord"
    llm: str
    encoder: str

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """The plug's folder on this node. Raises PlugMismatch if another plug has replaced it."""
        from persona.plug import record as plug_record

        with plug_record.local_plug(self.uri, self.fingerprint) as folder:
            yield folder


def read_plug(given: str, models: PlugModels | None = None, *, store: "Store | None" = None) -> PlugRef:
    """The plug of `--plug`: a folder, hf://…, or `live` for the live plug of `store`; does not look for its models.

    Raises:
        UsageError, InputError: there is none.
        PlugMismatch: the folder of the live plug has another plug than the one that was promoted.
    """
    from persona.plug import hub, record as plug_record
    from persona.store import registry

    live = registry.find(given, store)
    uri = hub.check_plug_uri(live.uri if live else given, flag="--plug")
    with hub.local_plug_folder(uri) as folder:
        record = plug_record.read(folder)
        fingerprint = plug_record.fingerprint(folder)
    if live:
        registry.check_unchanged(live, fingerprint)
    models = models or PlugModels()
    return PlugRef(
        uri=uri,
        fingerprint=fingerprint,
        record=record,
        llm=models.llm or record.llm["name"],
        encoder=models.encoder or record.encoder["name"],
    )


def find_plug(
    store: "Store",
    given: str,
    models: PlugModels,
    requests: Requests,
    *,
    retrieved_tokens: int = 0,
    max_new_tokens: int | None = None,
) -> PlugRef:
    """The plug of `--plug`, which fits the store, and whose models are whole and those of its training.

    Args:
        store: with the vectors.
        given: the value of `--plug`.
        models: where the plug's models are, if not where it says.
        requests: to be answered or measured.
        retrieved_tokens: tokens of a request's retrieved texts.
        max_new_tokens: of an answer; None if targets are read instead.

    Raises:
        PlugMismatch, InputError: it does not.
        UsageError: requests and answers would be longer than the LLM allows, or requests have system texts that the
            plug's prompts have no place for.
    """
    from persona.models.encoder_model import check_encoder

    plug = read_plug(given, models, store=store)
    check_store(plug, store.identity)
    encoder, llm = models_of(plug)
    check_encoder(encoder)
    tokenizer = check_llm(
        llm,
        max_input_tokens=plug.record.max_input_tokens,
        max_target_tokens=plug.record.max_target_tokens,
        prompt=plug.record.prompt,
        n_soft=plug.record.options.n_soft,
        retrieved_tokens=retrieved_tokens,
        max_new_tokens=max_new_tokens,
    )
    if requests.have_system:
        tokenizer.check_system_column()
    return plug


def check_store(plug: PlugRef, identity: "Identity") -> None:
    """Raises PlugMismatch when the plug was trained on other vectors than those of a store with this identity."""
    if plug.record.encoder["fingerprint"] != identity.fingerprint:
        raise PlugMismatch(
            f"--plug {plug.uri} was trained on vectors of {plug.record.encoder['name']!r}, but the store has those of "
            f"{identity.encoder!r}; give the store it was trained on, or train a plug on this one"
        )
    check_vectors(plug, identity)


def check_vectors(plug: PlugRef, identity: "Identity") -> None:
    """Raises PlugMismatch when the plug was trained on vectors that the same encoder made in another way."""
    from persona.plug import record as plug_record

    plug_record.check_vectors(plug.record, identity, name=f"--plug {plug.uri}")


def check_llm(
    llm: "ModelFolder",
    *,
    max_input_tokens: int,
    max_target_tokens: int,
    prompt: "PromptOptions",
    n_soft: int,
    retrieved_tokens: int,
    max_new_tokens: int | None = None,
) -> "PromptTokenizer":
    """The tokenizer of an LLM that gives what plain transformers gives, as far as its folder shows.

    Raises InputError when it does not, and UsageError when requests would be longer than it allows or cannot be written
    as `prompt` says. The other arguments are as in `find_plug`.
    """
    from persona.engines import rules
    from persona.models import limits, llm_kinds, loading
    from persona.models.prompts import PromptTokenizer

    config = loading.load_config(llm)
    llm_kinds.check_kind(llm.name, config)
    loading.check_weights(llm, loading.llm_class(config), config=config)
    rules.check_folder(llm)
    tokenizer = PromptTokenizer.load(
        llm, max_input_tokens=max_input_tokens, max_target_tokens=max_target_tokens, prompt=prompt
    )
    limits.check_vocabulary(llm.name, config, tokenizer)
    limits.check_positions(
        llm.name,
        config,
        tokenizer,
        n_soft=n_soft,
        retrieved_tokens=retrieved_tokens,
        answer_tokens=max_new_tokens or max_target_tokens,
        answer_flag="--max-new-tokens" if max_new_tokens else "--max-target-tokens",
    )
    return tokenizer


def prompt_example(plug: PlugRef, *, retrieved: bool) -> str:
    """What the LLM reads for a request."""
    from persona.models.prompts import PromptTokenizer

    record = plug.record
    tokenizer = PromptTokenizer.load(models_of(plug)[1], max_input_tokens=record.max_input_tokens, prompt=record.prompt)
    return tokenizer.example(n_soft=record.options.n_soft, retrieved=retrieved)


def load_personalized(
    plug: PlugRef, *, precision: "Precision", device: str | None, retrieved_tokens: int
) -> "PersonalizedLLM":
    """The plug in front of its LLM, to measure losses. Raises as `load_answerer` does."""
    from persona.engines import probe
    from persona.models.frozen_llm import FrozenLLM
    from persona.plug import folder as plug_folder

    encoder, llm_folder = models_of(plug)
    llm = FrozenLLM.load(
        llm_folder,
        max_input_tokens=plug.record.max_input_tokens,
        max_target_tokens=plug.record.max_target_tokens,
        prompt=plug.record.prompt,
        precision=precision,
        quantization=plug.record.llm_quantization,
        device=device,
    )
    probe.check_llm(llm)
    with plug.folder() as folder:
        return plug_folder.load(folder, encoder=encoder, llm=llm, retrieved_tokens=retrieved_tokens)


def load_without_llm(plug: PlugRef) -> "PlugAlone":
    """The plug alone, to inspect it. Raises PlugMismatch if the plug is not the one that the job started with."""
    from persona.plug.inspection import PlugAlone

    encoder = _encoder(plug)
    with plug.folder() as folder:
        return PlugAlone.load(folder, encoder)


def models_of(plug: PlugRef) -> "tuple[ModelFolder, ModelFolder]":
    """Encoder and LLM on this node. Raises PlugMismatch if they are not those that the plug was trained with."""
    from persona.models import resolve as models
    from persona.plug import record as plug_record

    llm = models.resolve(plug.llm, revision=plug.record.llm["revision"], flag="--llm")
    encoder = _encoder(plug)
    plug_record.check_models(plug.record, encoder=encoder, llm=llm)
    return encoder, llm


def _encoder(plug: PlugRef) -> "ModelFolder":
    from persona.models import resolve as models

    return models.resolve(plug.encoder, revision=plug.record.encoder["revision"], flag="--encoder")
