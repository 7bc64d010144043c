"""The interface of an engine: prompts of soft tokens and text in, answers out.

To add an engine, write `persona/engines/NAME.py` with a function `load` as in `EngineModule`, and add NAME to
`persona.options.Engine`. It may import its libraries at the top: the module is loaded only when it is chosen.

Shapes: S soft tokens of a prompt, D LLM width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

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
        independent of the other prompts.
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
    """

    max_input_tokens: int
    prompt: PromptOptions
    precision: Precision
    quantization: Quantization = "none"
    device: str | None = None
    batch_size: int


class EngineModule(Protocol):
    """What `persona/engines/NAME.py` defines."""

    def load(self, folder: ModelFolder, settings: EngineSettings) -> Engine:
        """See `new_engine`."""


def new_engine(name: str, folder: ModelFolder, settings: EngineSettings) -> Engine:
    """Loads the LLM of a folder into the engine of that name (`persona.options.Engine`).

    Raises:
        UsageError: there is no such engine, or it cannot run this LLM.
    """
    return cast(EngineModule, find("persona.engines", name, required="load")).load(folder, settings)
