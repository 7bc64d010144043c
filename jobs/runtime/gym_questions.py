"""Have a chat model write questions for personas; its replies are kept in the table `completions` of a store."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jobs.runtime import chat, session
from jobs.runtime.chat import ChatRef
from jobs.runtime.tally import Tally
from persona.chat.options import ChatOptions

if TYPE_CHECKING:
    from persona.judging.gym import GymPersona
    from persona.store.store import Store


def written(
    personas: "Sequence[GymPersona]", n_each: int, store: "Store", options: ChatOptions
) -> "tuple[list[GymPersona], dict[str, Any]]":
    """The personas with `n_each` questions of each task, if they had none, and what the model was asked.

    The driver asks: an import is small, and its questions are asked for once.
    """
    from persona.judging.questions import questions_prompt, written_questions
    from persona.judging.rubrics import TASKS

    session.connect()
    tally = Tally.start()
    without = [one for one in personas if not one.questions]
    asked = [(one, task) for one in without for task in TASKS]
    with chat.replies(store, tally, job="jobs.import_gym") as replies:
        model = replies.open_chat(ChatRef(options=options))
        prompts = [questions_prompt(one, task, n_each) for one, task in asked]
        found = model.complete(prompts, [one.persona_id for one, _ in asked])
        chat.note_usage(tally, model, "driver")
    of_persona: dict[str, list[Any]] = {one.persona_id: [] for one in without}
    for (one, task), reply in zip(asked, found, strict=True):
        of_persona[one.persona_id] += written_questions(task, reply)
    done = [replace(one, questions=of_persona.get(one.persona_id) or one.questions) for one in personas]
    return done, chat.usage_facts(tally.totals(), options)


def planned(personas: "Sequence[GymPersona]", n_each: int, options: ChatOptions) -> dict[str, Any]:
    """What writing them asks at most."""
    from persona.judging.questions import questions_prompt
    from persona.judging.rubrics import TASKS

    prompts = [questions_prompt(one, task, n_each) for one in personas if not one.questions for task in TASKS]
    n_bytes = sum(len(prompt.messages[0].content.encode()) for prompt in prompts)
    longest = max((prompt.max_tokens for prompt in prompts), default=0)
    return chat.planned_facts(options, calls=len(prompts), prompt_bytes=n_bytes, max_tokens=longest)
