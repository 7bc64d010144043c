"""The chat models `local` and `vllm`: an engine with an LLM of our own, which reads conversations by its chat template.

It cannot be told to write JSON; a reply to a prompt with a schema is only checked.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import torch

from persona.chat.base import ChatPrompt, ChatReply, Take
from persona.chat.options import ChatOptions
from persona.chat.schemas import checked
from persona.engines.base import Answer, EngineSettings, Prompt, engine_module
from persona.engines.options import EngineOptions
from persona.models import loading
from persona.models.prompts import PromptTokenizer
from persona.models.resolve import ModelFolder, resolve
from persona.options import Decoding, PromptOptions

_FLAG = "--chat-model"
_DATE = "2026-01-01"  # for templates that write today's, which would change the replies from day to day
_NO_PLUG = PromptOptions(prompt_format="chat", soft_position="start")


def check(options: ChatOptions) -> None:
    """Raises UsageError or InputError when there is no such model, or it has no chat template that can be used."""
    folder = _folder(options)
    settings = _settings(options, folder)
    PromptTokenizer.load(folder, prompt=settings.prompt)
    engine_module(options.chat).check(folder, settings, Decoding(beams=1))


def identity(options: ChatOptions) -> str:
    """Engine, name and content of the model."""
    folder = _folder(options)
    return f"{options.chat}/{options.model.rstrip('/').rsplit('/', 1)[-1]}@{folder.fingerprint[:12]}"


def load(options: ChatOptions) -> "EngineChat":
    """The model in its engine, on a GPU if there is one."""
    return EngineChat(options, _folder(options))


def _folder(options: ChatOptions) -> ModelFolder:
    return resolve(options.model, flag=_FLAG)


def _settings(options: ChatOptions, folder: ModelFolder) -> EngineSettings:
    template = loading.load_tokenizer(folder).chat_template
    dated = isinstance(template, str) and "strftime_now" in template
    engine = EngineOptions(engine=options.chat if options.chat != "http" else "local")
    if options.chat == "vllm":
        engine = replace(engine, tensor_parallel=options.chat_gpus, max_model_len=options.chat_max_model_len)
    return EngineSettings(
        max_input_tokens=_positions(folder) or options.chat_max_model_len or 2048,
        prompt=replace(_NO_PLUG, template_date=_DATE if dated else ""),
        precision=options.chat_precision,
        batch_size=options.chat_batch_size,
        options=engine,
    )


def _positions(folder: ModelFolder) -> int | None:
    """Tokens that the model can read and write together, if its configuration says so."""
    found = getattr(loading.load_config(folder).get_text_config(), "max_position_embeddings", None)
    return int(found) if found else None


class EngineChat:
    """An LLM in an engine. Greedy at temperature 0; else each prompt is sampled with its own seed."""

    def __init__(self, options: ChatOptions, folder: ModelFolder) -> None:
        module = engine_module(options.chat)
        self.identity = identity(options)
        self._name = options.model
        self._engine = module.load(folder, _settings(options, folder))
        self._limit = options.chat_max_model_len or _positions(folder)
        # So many prompts at a time; replies are handed on between them.
        self._together = options.chat_batch_size * 64 if options.chat == "vllm" else options.chat_batch_size
        self._soft_0D = torch.empty(0, self._engine.width, device=self._engine.device, dtype=self._engine.dtype)

    def complete(self, prompts: Sequence[ChatPrompt], take: Take | None = None) -> list[ChatReply]:
        """Replies in the order of the prompts."""
        conversations = [[(message.role, message.content) for message in prompt.messages] for prompt in prompts]
        ids = self._engine.tokenizer.conversations(conversations)
        inputs = [Prompt(ids=one, soft_SD=self._soft_0D) for one in ids]
        replies: dict[int, ChatReply] = {}

        def keep(number: int, reply: ChatReply) -> None:
            replies[number] = reply
            if take is not None:
                take(number, reply)

        fitting = []
        for number, one in enumerate(ids):
            if self._limit is None or len(one) + prompts[number].max_tokens <= self._limit:
                fitting.append(number)
            else:
                keep(number, self._too_long(len(one), prompts[number]))
        for some in self._batches(fitting, prompts, ids):
            decoding = _decoding(prompts[some[0]])
            answers = self._engine.answer([inputs[i] for i in some], decoding, [prompts[i].seed for i in some])
            for number, answer in zip(some, answers, strict=True):
                keep(number, self._reply(prompts[number], len(ids[number]), answer))
        return [replies[number] for number in range(len(prompts))]

    def _batches(
        self, numbers: Sequence[int], prompts: Sequence[ChatPrompt], ids: Sequence[object]
    ) -> Iterator[list[int]]:
        """Numbers of prompts with the same decoding, of similar lengths."""

        def decoding(number: int) -> tuple[float, int]:
            return prompts[number].temperature, prompts[number].max_tokens

        by_length = sorted(numbers, key=lambda number: (decoding(number), len(ids[number])))  # type: ignore[arg-type]
        for _, group in groupby(by_length, key=decoding):
            some = list(group)
            yield from (some[start : start + self._together] for start in range(0, len(some), self._together))

    def _reply(self, prompt: ChatPrompt, n_prompt_tokens: int, answer: Answer) -> ChatReply:
        found = ChatReply(answer.text, answer.finish_reason, n_prompt_tokens, answer.n_tokens, self._name)
        return checked(prompt, found)

    def _too_long(self, n_tokens: int, prompt: ChatPrompt) -> ChatReply:
        problem = f"{n_tokens} tokens and {prompt.max_tokens} of a reply, but the model has {self._limit} positions"
        return ChatReply("", "refused", 0, 0, self._name, problem=problem)


def _decoding(prompt: ChatPrompt) -> Decoding:
    if not prompt.temperature:
        return Decoding(max_new_tokens=prompt.max_tokens, beams=1)
    return Decoding(max_new_tokens=prompt.max_tokens, beams=1, sample=True, sampling_temperature=prompt.temperature)
