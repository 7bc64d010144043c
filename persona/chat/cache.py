"""A chat model that is not asked again for what it has replied before.

Replies are kept as rows of the table `completions`: `known` has those of earlier runs, `record` takes the new ones.
The text of a prompt is not kept, only its key; the text of a reply is, so `user_id` says whom it is about.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from persona.chat.base import ChatModel, ChatPrompt, ChatReply
from persona.chat.keys import key_of
from persona.chat.schemas import checked


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A reply as it is kept. Attributes: `key` of model and prompt; `user_id` whom the reply is about."""

    key: str
    user_id: str
    text: str
    finish_reason: str
    n_prompt_tokens: int
    n_answer_tokens: int
    served_model: str

    @classmethod
    def of(cls, key: str, user_id: str, reply: ChatReply) -> "Completion":
        """The row of a reply."""
        return cls(
            key=key,
            user_id=user_id,
            text=reply.text,
            finish_reason=reply.finish_reason,
            n_prompt_tokens=reply.n_prompt_tokens,
            n_answer_tokens=reply.n_answer_tokens,
            served_model=reply.model,
        )

    def reply(self, prompt: ChatPrompt) -> ChatReply:
        """The reply to the prompt that it was kept for, checked again."""
        found = ChatReply(self.text, self.finish_reason, self.n_prompt_tokens, self.n_answer_tokens, self.served_model)
        return checked(prompt, found)


Known = Callable[[Sequence[str], Sequence[str]], Mapping[str, Completion]]
"""The kept replies of some keys, by key; given with the users that they are about."""
Record = Callable[[Completion], None]
"""Takes a new reply at once, so that a run that is killed does not lose it."""


@dataclass(kw_only=True)
class Usage:
    """What a model was asked: `calls` that were made and their tokens, and `reused` replies that cost nothing."""

    calls: int = 0
    reused: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0

    def add(self, reply: ChatReply) -> None:
        """Count a call that was made."""
        self.calls += 1
        self.prompt_tokens += reply.n_prompt_tokens
        self.answer_tokens += reply.n_answer_tokens


class CachedChat:
    """A model behind the replies that are known.

    Args:
        model: what is asked.
        known: looks up kept replies.
        record: takes each new one. A prompt that the model refused is not kept: nothing was paid for it.

    Several threads may call it at the same time.
    """

    def __init__(self, model: ChatModel, known: Known, record: Record) -> None:
        self.model = model
        self.usage = Usage()
        self._known = known
        self._record = record
        self._counting = threading.Lock()

    @property
    def identity(self) -> str:
        """The model's."""
        return self.model.identity

    def complete(self, prompts: Sequence[ChatPrompt], user_ids: Sequence[str]) -> list[ChatReply]:
        """Replies to prompts about these users, in their order; the same prompt is asked once."""
        asked = list(zip(prompts, user_ids, strict=True))
        keys = [key_of(self.identity, prompt, user_id) for prompt, user_id in asked]
        of_key = dict(zip(keys, asked, strict=True))
        kept = self._known(list(of_key), list(dict.fromkeys(user_ids)))
        replies = {key: kept[key].reply(prompt) for key, (prompt, _) in of_key.items() if key in kept}
        n_reused = len(replies)
        missing = [key for key in of_key if key not in replies]
        replies |= self._asked([(key, *of_key[key]) for key in missing])
        with self._counting:
            self.usage.reused += n_reused
            self.usage.failed += sum(bool(replies[key].problem) for key in missing)
        return [replies[key] for key in keys]

    def _asked(self, missing: Sequence[tuple[str, ChatPrompt, str]]) -> dict[str, ChatReply]:
        def take(number: int, reply: ChatReply) -> None:
            key, _, user_id = missing[number]
            with self._counting:
                self.usage.add(reply)
            if reply.finish_reason != "refused":
                self._record(Completion.of(key, user_id, reply))

        replies = self.model.complete([prompt for _, prompt, _ in missing], take) if missing else []
        return {key: reply for (key, _, _), reply in zip(missing, replies, strict=True)}
