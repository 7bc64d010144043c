"""Replies that are known are not asked for again."""

from persona.chat.base import ChatPrompt, ChatReply, Message
from persona.chat.cache import CachedChat
from persona.chat.keys import key_of


class Counted:
    """A model that counts what it is asked."""

    identity = "counted"

    def __init__(self):
        self.asked = []

    def complete(self, prompts, take=None):
        replies = []
        for number, prompt in enumerate(prompts):
            text = prompt.messages[0].content
            self.asked.append(text)
            refused = text == "refused"
            replies.append(
                ChatReply(
                    "" if refused else f"re: {text}",
                    "refused" if refused else "stop",
                    0 if refused else 3,
                    0 if refused else 2,
                    "m",
                    problem="no" if refused else "",
                )
            )
            take(number, replies[-1])
        return replies


def ask(chat, *texts, users=None, **settings):
    prompts = [ChatPrompt((Message("user", text),), **settings) for text in texts]
    return [reply.text for reply in chat.complete(prompts, users or ["ann"] * len(texts))]


def cached():
    model, kept = Counted(), {}
    known = lambda keys, _: {key: kept[key] for key in keys if key in kept}  # noqa: E731
    return model, kept, lambda: CachedChat(model, known, lambda one: kept.__setitem__(one.key, one))


def test_a_known_reply_is_not_asked_for_again_by_any_later_run():
    model, kept, opened = cached()
    chat = opened()
    assert ask(chat, "a", "b", "a") == ["re: a", "re: b", "re: a"]
    again = opened()
    assert ask(again, "b", "c") == ["re: b", "re: c"]
    assert model.asked == ["a", "b", "c"]
    assert (again.usage.calls, again.usage.reused, again.usage.prompt_tokens, again.usage.answer_tokens) == (1, 1, 3, 2)
    assert {one.user_id for one in kept.values()} == {"ann"}
    assert "re: a" in {one.text for one in kept.values()}


def test_other_settings_and_other_users_are_other_prompts():
    model, _, opened = cached()
    chat = opened()
    ask(chat, "a")
    ask(chat, "a", temperature=0.5)
    ask(chat, "a", seed=1)
    ask(chat, "a", schema='{"type": "object"}')
    ask(chat, "a", users=["bob"])
    assert model.asked == ["a"] * 5


def test_a_refused_prompt_is_counted_and_not_kept():
    model, kept, opened = cached()
    chat = opened()
    assert ask(chat, "refused", "a") == ["", "re: a"]
    assert (chat.usage.calls, chat.usage.failed) == (2, 1)
    assert len(kept) == 1
    ask(chat, "refused")
    assert model.asked.count("refused") == 2


def test_a_key_depends_on_the_model_and_holds_no_text():
    prompt = ChatPrompt((Message("user", "where does Ann live?"),))
    assert key_of("one", prompt, "ann") != key_of("two", prompt, "ann")
    assert len(key_of("one", prompt, "ann")) == 32
