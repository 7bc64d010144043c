"""Searches of many users in step: the prompts that all of them are waiting for go to the chat model together.

A search is a generator that yields prompts and is sent their replies, in the same order; what it returns is its result.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TypeVar

from persona.chat.base import ChatPrompt, ChatReply

ResultT = TypeVar("ResultT")
Rounds = Generator[Sequence[ChatPrompt], Sequence[ChatReply], ResultT]
Ask = Callable[[Sequence[ChatPrompt], Sequence[str]], Sequence[ChatReply]]
"""Replies to prompts, given with the user whom each is about."""


def together(searches: Mapping[str, Rounds[ResultT]], ask: Ask) -> dict[str, ResultT]:
    """The result of each user's search. A search whose prompts are answered waits for the others' prompts."""
    results: dict[str, ResultT] = {}
    waiting: dict[str, Sequence[ChatPrompt]] = {}
    replies: dict[str, Sequence[ChatReply] | None] = dict.fromkeys(searches)
    while replies:
        for user, of_user in replies.items():
            search = searches[user]
            try:
                waiting[user] = next(search) if of_user is None else search.send(of_user)
            except StopIteration as end:
                results[user] = end.value
        prompts = [prompt for of_user in waiting.values() for prompt in of_user]
        users = [user for user, of_user in waiting.items() for _ in of_user]
        answered = iter(ask(prompts, users)) if prompts else iter(())
        replies = {user: [next(answered) for _ in of_user] for user, of_user in waiting.items()}
        waiting = {}
    return results
