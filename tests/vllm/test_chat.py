"""The chat model `vllm`: its greedy replies equal those of `local` in float32, and a sampled one has its own seed."""

from pathlib import Path

import pytest

from persona.chat.base import ChatPrompt, Message, check_chat, open_chat
from persona.chat.options import ChatOptions
from tests.chats import CHATML
from tests.vllm.models import tiny

TEXTS = ("the movie is a comedy", "a", "it is of the title and it is a movie", "the the the")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tiny("Qwen2.5-Instruct", tmp_path_factory.mktemp("chat"))
    if not any((Path(path) / name).exists() for name in ("chat_template.jinja",)):
        (Path(path) / "chat_template.jinja").write_text(CHATML)
    return str(path)


def prompts(**settings: float) -> list[ChatPrompt]:
    return [ChatPrompt((Message("user", text),), max_tokens=12, seed=i, **settings) for i, text in enumerate(TEXTS)]


def test_replies_equal_those_of_local_and_each_is_handed_on(folder: str) -> None:
    options = ChatOptions(chat="vllm", chat_model=folder, chat_precision="fp32", chat_max_model_len=128)
    check_chat(options)
    chat = open_chat(options)
    try:
        taken: list[int] = []
        found = chat.complete(prompts(), lambda number, _: taken.append(number))
        long, sampled, again = (
            chat.complete(some)
            for some in (
                [ChatPrompt((Message("user", "the " * 500),))],
                prompts(temperature=1.0),
                prompts(temperature=1.0),
            )
        )
    finally:
        chat._engine.client.close()
    local = open_chat(ChatOptions(chat="local", chat_model=folder, chat_precision="fp32"))
    assert [reply.text for reply in found] == [reply.text for reply in local.complete(prompts())]
    assert [reply.n_prompt_tokens for reply in found] == [reply.n_prompt_tokens for reply in local.complete(prompts())]
    assert sorted(taken) == [0, 1, 2, 3]
    assert "positions" in long[0].problem
    assert [reply.text for reply in sampled] == [reply.text for reply in again]
    assert chat.identity.startswith("vllm/")
