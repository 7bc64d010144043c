"""The chat model `http`: an OpenAI-compatible endpoint, such as vLLM, SGLang or a vendor.

`OPENAI_BASE_URL` (like http://host:8000/v1) and `OPENAI_API_KEY` come from the environment only. The key is sent to
that address and appears nowhere else: no log, table, plan or error has it.
"""

import json
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import httpx2

from persona.chat.base import ChatPrompt, ChatReply, Take
from persona.chat.options import ChatOptions
from persona.chat.schemas import checked, validator
from persona.errors import ChatError, UsageError
from persona.storage.retry import retry_transient

BASE_URL, API_KEY = "OPENAI_BASE_URL", "OPENAI_API_KEY"
_TRANSIENT_STATUS = {408, 409, 429, 500, 502, 503, 504}
_REFUSED_STATUS = {400, 413, 422}  # this prompt, rather than all of them
_PAUSES_S = (0.5, 30.0)
_CONNECT_S = 10.0
_KNOCK_S = 5.0
_MAX_REPLY_BYTES = 16 * 2**20
_MAX_PAUSE_S = 120.0  # of a Retry-After
_SHOWN = 300  # characters of what a server says
# What reasoning models do not take, and its name with them; None where they decide it themselves.
_REASONING = {"max_tokens": "max_completion_tokens", "temperature": None}


class _Answered(Exception):
    """An HTTP answer other than 200.

    `pause_s` is what its Retry-After asks for; `parameter` is the one that it objects to, where it says so.
    """

    def __init__(self, status: int, text: str, pause_s: float, parameter: str = "") -> None:
        super().__init__(f"HTTP {status}: {text}")
        self.status = status
        self.pause_s = pause_s
        self.parameter = parameter


class _Broken(Exception):
    """A reply that is no chat completion, as when a proxy cuts it off."""


def check(options: ChatOptions) -> None:
    """Raises UsageError without a model's name or an address, or if nothing answers there. Asks no model."""
    _ = options.model
    base_url, _ = _base_url(), _api_key()

    def knock() -> None:
        # Whatever is answered, also that there is no such page: something is there.
        httpx2.get(f"{base_url}/models", timeout=_CONNECT_S)

    retry_transient(
        knock,
        f"nothing answers at the address in {BASE_URL}; start the endpoint, or correct the address",
        is_transient=_is_transient,
        give_up_s=_KNOCK_S,
        pauses_s=(0.5, 2.0),
        error_class=UsageError,
    )


def identity(options: ChatOptions) -> str:
    """The model's name. The address is left out: what was paid for stays known when a server moves."""
    return f"http/{options.model}"


def load(options: ChatOptions) -> "HttpChat":
    """The endpoint of this process's environment."""
    return HttpChat(options, base_url=_base_url(), api_key=_api_key())


def _base_url() -> str:
    given = os.environ.get(BASE_URL, "").strip()
    if not given:
        raise UsageError(
            f"--chat http needs the address of an OpenAI-compatible endpoint: set {BASE_URL}, like "
            f"http://host:8000/v1, and {API_KEY} if it wants a key, or take --chat local with --chat-model FOLDER"
        )
    try:
        url = httpx2.URL(given)
    except httpx2.InvalidURL:
        url = httpx2.URL("")
    if url.scheme not in ("http", "https") or not url.host or url.userinfo or url.query:
        # The address itself is not shown: it may hold a password.
        raise UsageError(f"{BASE_URL}: must be like http://host:8000/v1, without user, password or query")
    return given.rstrip("/")


def _api_key() -> str:
    key = os.environ.get(API_KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UsageError(f"{API_KEY}: has characters that an HTTP header cannot have")
    return key


class HttpChat:
    """Asks an endpoint, at most `options.chat_concurrency` prompts at a time over all callers."""

    def __init__(self, options: ChatOptions, *, base_url: str, api_key: str) -> None:
        self.options = options
        self.identity = identity(options)
        self._url = f"{base_url}/chat/completions"
        self._key = api_key
        self._pool = ThreadPoolExecutor(options.chat_concurrency, thread_name_prefix="chat")
        self._taking = threading.Lock()
        self._not_taken: frozenset[str] = frozenset()  # parameters that the model has refused so far
        n = options.chat_concurrency
        self._client = httpx2.Client(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx2.Timeout(options.chat_timeout_s, connect=min(_CONNECT_S, options.chat_timeout_s)),
            limits=httpx2.Limits(max_connections=n, max_keepalive_connections=n),
        )

    def __repr__(self) -> str:
        return f"HttpChat({self.identity!r})"

    def complete(self, prompts: Sequence[ChatPrompt], take: Take | None = None) -> list[ChatReply]:
        """Replies in the order of the prompts. Raises ChatError when the endpoint fails for too long."""
        futures = {self._pool.submit(self._reply, prompt): number for number, prompt in enumerate(prompts)}
        replies: dict[int, ChatReply] = {}
        error: BaseException | None = None
        for future in as_completed(futures):
            if future.cancelled():
                continue
            if (failed := future.exception()) is not None:
                # What is already on its way is paid for, so it is still taken.
                error = error or failed
                for other in futures:
                    other.cancel()
                continue
            number = futures[future]
            replies[number] = future.result()
            if take is not None:
                with self._taking:
                    take(number, replies[number])
        if error is not None:
            raise error
        return [replies[number] for number in range(len(prompts))]

    def _reply(self, prompt: ChatPrompt) -> ChatReply:
        sent = self._not_taken
        try:
            found = retry_transient(
                lambda: self._post(_body(self.options.model, prompt, sent)),
                f"the chat endpoint ({BASE_URL}) does not reply",
                is_transient=_is_transient,
                give_up_s=self.options.chat_retry_s,
                pauses_s=_PAUSES_S,
                asked_pause_s=lambda error: error.pause_s if isinstance(error, _Answered) else 0.0,
                error_class=ChatError,
            )
        except _Answered as answered:
            if answered.status == 400 and answered.parameter in _REASONING.keys() - sent:
                self._not_taken |= {answered.parameter}
                return self._reply(prompt)
            return self._refused(answered)
        return checked(prompt, found)

    def _refused(self, answered: _Answered) -> ChatReply:
        if answered.status in _REFUSED_STATUS:
            return ChatReply("", "refused", 0, 0, self.options.model, problem=str(answered))
        if answered.status in (401, 403):
            raise UsageError(f"the chat endpoint denies access ({answered}); check {API_KEY}")
        raise UsageError(f"the chat endpoint answers {answered}; check {BASE_URL} and --chat-model")

    def _post(self, body: dict[str, Any]) -> ChatReply:
        """One call. The limit is for all of it: a server that sends a byte now and then does not hold it."""
        until = time.monotonic() + self.options.chat_timeout_s
        data = bytearray()
        with self._client.stream("POST", self._url, json=body) as response:
            for part in response.iter_bytes():
                data += part
                if time.monotonic() > until:
                    raise TimeoutError(f"no whole reply within {self.options.chat_timeout_s:g} s")
                if len(data) > _MAX_REPLY_BYTES:
                    raise _Broken(f"more than {_MAX_REPLY_BYTES // 2**20} MiB")
        if response.status_code != 200:
            pause_s, parameter = _retry_after_s(response.headers), _parameter(bytes(data))
            raise _Answered(response.status_code, self._shown(bytes(data)), pause_s, parameter)
        return _parsed(bytes(data), body["model"])

    def _shown(self, data: bytes) -> str:
        """What the server said, in one line and without the key, which some servers repeat."""
        text = " ".join(data.decode(errors="replace").split())
        return (text.replace(self._key, "***") if self._key else text)[:_SHOWN]


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, _Answered):
        return error.status in _TRANSIENT_STATUS
    return isinstance(error, httpx2.TransportError | TimeoutError | _Broken)


def _retry_after_s(headers: httpx2.Headers) -> float:
    """Seconds that the server asks to wait; 0 where it says nothing or a date."""
    try:
        return min(max(float(headers.get("retry-after", 0)), 0.0), _MAX_PAUSE_S)
    except ValueError:
        return 0.0


def _parameter(data: bytes) -> str:
    """The parameter that an error in the form of OpenAI's names; empty in any other form."""
    try:
        return str(json.loads(data)["error"]["param"] or "")
    except (ValueError, KeyError, TypeError):
        return ""


def _body(model: str, prompt: ChatPrompt, not_taken: frozenset[str]) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": message.role, "content": message.content} for message in prompt.messages],
        "temperature": prompt.temperature,
        "seed": prompt.seed,
        "max_tokens": prompt.max_tokens,
    }
    for name in not_taken:
        value, other = body.pop(name), _REASONING[name]
        if other:
            body[other] = value
    if prompt.schema:
        schema = validator(prompt.schema).schema
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "reply", "schema": schema, "strict": True},
        }
    return body


def _parsed(data: bytes, model: str) -> ChatReply:
    """The reply in a chat completion. Raises _Broken for anything else."""
    try:
        found = json.loads(data)
        choice, usage = found["choices"][0], found.get("usage") or {}
        return ChatReply(
            text=choice["message"].get("content") or "",
            finish_reason=str(choice.get("finish_reason") or "stop"),
            n_prompt_tokens=int(usage.get("prompt_tokens", 0)),
            n_answer_tokens=int(usage.get("completion_tokens", 0)),
            model=str(found.get("model") or model),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise _Broken(f"the reply is no chat completion ({type(error).__name__})") from error
