"""The engine that generates a job's answers: what it refuses, its actors, and how they load it behind the plug."""

from typing import TYPE_CHECKING

from jobs.runtime import plugs
from jobs.runtime.job_options import LLMPool
from jobs.runtime.plugs import PlugRef
from jobs.runtime.pools import ModelPool
from jobs.runtime.session import Machines
from persona.engines.options import EngineOptions

if TYPE_CHECKING:
    from persona.engines.base import EngineSettings
    from persona.options import Decoding, Precision
    from persona.plug.answerer import Answerer


def settings_of(
    plug: PlugRef, options: EngineOptions, *, precision: "Precision", device: str | None, batch_size: int
) -> "EngineSettings":
    """How an engine loads the plug's LLM and reads requests; the arguments are as in `EngineSettings`."""
    from persona.engines.base import EngineSettings

    return EngineSettings(
        max_input_tokens=plug.record.max_input_tokens,
        prompt=plug.record.prompt,
        precision=precision,
        quantization=plug.record.llm_quantization,
        device=device,
        batch_size=batch_size,
        options=options,
    )


def check(plug: PlugRef, settings: "EngineSettings", decoding: "Decoding") -> None:
    """Raises UsageError or InputError when the engine cannot answer with the plug's LLM, or not in this way."""
    from persona.engines.base import engine_module

    engine_module(settings.options.engine).check(plugs.models_of(plug)[1], settings, decoding)


def identity(options: EngineOptions, decoding: "Decoding") -> str:
    """What the text of an answer depends on besides LLM, prompt and decoding; see `EngineModule.identity`."""
    from persona.engines.base import engine_module

    return engine_module(options.engine).identity(decoding)


def load_answerer(plug: PlugRef, settings: "EngineSettings", *, retrieved_tokens: int) -> "Answerer":
    """The plug in front of an engine with its LLM, to generate answers.

    Raises PlugMismatch if the plug or a model is not the one that the job started with.
    """
    from persona.engines.base import engine_module
    from persona.plug import folder as plug_folder

    encoder, llm = plugs.models_of(plug)
    engine = engine_module(settings.options.engine).load(llm, settings)
    with plug.folder() as folder:
        return plug_folder.load_answerer(
            folder, encoder=encoder, engine=engine, batch_size=settings.batch_size, retrieved_tokens=retrieved_tokens
        )


def plan_pool(machines: Machines, options: LLMPool, engine: EngineOptions) -> ModelPool:
    """The actors that hold the engine. Raises UsageError as `ModelPool.plan` does."""
    from persona.engines.base import engine_module

    n_calls = engine_module(engine.engine).N_CALLS
    return ModelPool.plan(machines, options, n_processes=engine.n_devices, n_calls=n_calls)
