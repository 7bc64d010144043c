"""The interface of an engine: prompts of soft tokens and text in, answers out.

To add an engine, write `persona/engines/NAME.py` (or a package of that name) with what `EngineModule` lists, and add
NAME to `persona.engines.options.Engine`. The driver imports it too, to check a job before it starts, so `load` imports
whatever is slow to import.

Shapes: S soft tokens of a prompt, D LLM width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from persona.engines.options import EngineOptions
from persona.extensions import find
from persona.models.prompts import PromptIds, PromptTokenizer
from persona.models.resolve import ModelFolder
from persona.options import Decoding, Precision, PromptOptions, Quantization


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """What the LLM reads for one request: `ids.before`, then the soft tokens, then `ids.after`."""

    ids: PromptIds
    """Token ids, as `PromptTokenizer.prompts` makes them."""
    soft_SD: Tensor
    """Soft tokens on any device and of any floating-point type; S is 0 without a plug."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Generated text; `finish_reason` is `stop` (the LLM ended it) or `length` (cut at `max_new_tokens`)."""

    text: str
    n_tokens: int
    finish_reason: Literal["stop", "length"]

    @classmethod
    def of(cls, generated: Sequence[int], tokenizer: PromptTokenizer, eos_ids: Sequence[int]) -> "Answer":
        """The answer in generated tokens, which the first end-of-sequence token ends."""
        end = next((i for i, token in enumerate(generated) if token in eos_ids), None)
        tokens = generated[:end]
        return cls(
            text=tokenizer.decode(tokens), n_tokens=len(tokens), finish_reason="length" if end is None else "stop"
        )


class Engine(Protocol):
    """A loaded LLM that answers prompts."""

    @property
    def tokenizer(self) -> PromptTokenizer:
        """Makes the token ids of prompts."""

    @property
    def width(self) -> int:
        """The LLM's embedding width D, which soft tokens must have."""

    @property
    def device(self) -> torch.device:
        """Where the plug should run."""

    @property
    def dtype(self) -> torch.dtype:
        """The LLM's precision, in which the plug's query encoder runs as well."""

    def answer(self, prompts: Sequence[Prompt], decoding: Decoding, seeds: Sequence[int]) -> list[Answer]:
        """Answers to any number of prompts, in their order; the engine forms its own batches.

        Prompts sorted by length need the least padding. `seeds` are one per prompt; they make a sampled answer
        independent of the other prompts. Engines whose module says `N_CALLS` above 1 may be called by as many threads.
        """


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How an engine loads its LLM and reads requests.

    Attributes:
        max_input_tokens: requests are cut to this length.
        prompt: how requests are written.
        precision: of the LLM; see `persona.models.device.choose_precision`.
        quantization: of the LLM's weights, as the plug was trained; see `persona.models.quantized`.
        device: of the LLM; by default a GPU if there is one, and `auto` spreads it over all GPUs.
        batch_size: prompts per forward pass; engines that schedule requests themselves may ignore it.
        options: which engine, and how much of the GPUs it takes.
    """

    max_input_tokens: int
    prompt: PromptOptions
    precision: Precision
    quantization: Quantization = "none"
    device: str | None = None
    batch_size: int
    options: EngineOptions = field(default_factory=EngineOptions)


class EngineModule(Protocol):
    """What `persona/engines/NAME.py` defines."""

    N_CALLS: int
    """Calls of `Engine.answer` that should run at the same time, so that the engine never waits for requests."""

    def check(self, folder: ModelFolder, settings: EngineSettings, decoding: Decoding) -> None:
        """Raises UsageError or InputError, before any work begins, for what this engine cannot do."""

    def load(self, folder: ModelFolder, settings: EngineSettings) -> Engine:
        """The LLM of a folder in the engine. Raises InputError if it would not answer rightly."""

    def identity(self, decoding: Decoding) -> str:
        """What the text of an answer depends on besides LLM, prompt and decoding; empty if nothing.

        Rounding does not count: answers are not generated again on another kind of GPU either.
        """


def engine_module(name: str) -> EngineModule:
    """The module of the engine of that name (`persona.engines.options.Engine`). Raises UsageError if there is none."""
    return cast(EngineModule, find("persona.engines", name, required="load"))
