"""What is asked of a chat model and what it replies; each model is a module of this package, behind one Protocol.

To add one, write `persona/chat/NAME.py` with what `ChatModule` lists, and add NAME to `persona.chat.options.Chat`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

from persona.chat.options import ChatOptions
from persona.extensions import find

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation that the model is to continue, and how.

    Attributes:
        messages: the turns so far; the last one is usually the user's.
        temperature: 0 is greedy.
        seed: of the sampling. Give each try of the same prompt its own; at temperature 0 it may still matter to the
            cache, where another seed is another prompt.
        max_tokens: the reply is cut after this many tokens.
        schema: a JSON schema, as JSON text, that the reply must hold to; empty for free text.
    """

    messages: tuple[Message, ...]
    temperature: float = 0.0
    seed: int = 0
    max_tokens: int = 512
    schema: str = ""


@dataclass(frozen=True)
class ChatReply:
    """What the model replied to one prompt.

    Attributes:
        text: the reply as it came.
        finish_reason: `stop`, `length` (cut at `max_tokens`), `refused` (this prompt cannot be read, and nothing was
            paid), or what else the server says.
        n_prompt_tokens, n_answer_tokens: as the server counted them; they are what is paid for.
        model: the model that the server says it used.
        value: the parsed JSON, where the prompt has a schema and the reply holds to it.
        problem: why the reply cannot be used, as one line; empty if it can.
    """

    text: str
    finish_reason: str
    n_prompt_tokens: int
    n_answer_tokens: int
    model: str
    value: Any = None
    problem: str = ""


Take = Callable[[int, ChatReply], None]
"""Takes the reply to the prompt of that number as soon as it has come; called from one thread at a time."""


class ChatModel(Protocol):
    """A model that is ready to reply. Several threads may call it at the same time."""

    @property
    def identity(self) -> str:
        """The model and all settings that its replies depend on besides the prompt; part of the cache's key."""

    def complete(self, prompts: Sequence[ChatPrompt], take: Take | None = None) -> list[ChatReply]:
        """Replies to any number of prompts, in their order; `take` is given each one when it comes.

        A reply that cannot be used has a `problem`; it is never dropped. Raises PersonaError when the model as a whole
        cannot be reached.
        """


class ChatModule(Protocol):
    """What `persona/chat/NAME.py` defines."""

    def check(self, options: ChatOptions) -> None:
        """Raises UsageError or InputError, before any work begins, for what cannot work."""

    def identity(self, options: ChatOptions) -> str:
        """The identity of the model that `load` gives; known without loading it."""

    def load(self, options: ChatOptions) -> ChatModel:
        """The model, loaded in this process."""


def chat_module(name: str) -> ChatModule:
    """The module of a chat model (`persona.chat.options.Chat`). Raises UsageError if there is none."""
    return cast(ChatModule, find("persona.chat", name, required="load"))


def check_chat(options: ChatOptions) -> None:
    """Raises UsageError or InputError, before any work begins, when the model cannot be asked."""
    chat_module(options.chat).check(options)


def open_chat(options: ChatOptions) -> ChatModel:
    """The model, ready in this process."""
    return chat_module(options.chat).load(options)
