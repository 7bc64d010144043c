"""Checks that a reply is the JSON that its prompt asked for, whatever the server promised."""

import json
from dataclasses import replace
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError

from persona.chat.base import ChatPrompt, ChatReply
from persona.errors import UsageError

_SHOWN = 200  # characters of a message


def checked(prompt: ChatPrompt, reply: ChatReply) -> ChatReply:
    """The reply with its `value`, or with the `problem` why it cannot be used.

    The JSON may stand in a code fence or between other words: models without structured output write it so.
    """
    if reply.problem:
        return reply
    if reply.finish_reason == "length":
        return replace(reply, problem=f"cut after {reply.n_answer_tokens} tokens")
    if not prompt.schema:
        return reply if reply.text.strip() else replace(reply, problem="empty")
    try:
        value = _object_in(reply.text)
    except ValueError as error:
        return replace(reply, problem=_one_line(f"not JSON: {error}"))
    for wrong in validator(prompt.schema).iter_errors(value):
        return replace(reply, problem=_one_line(f"not as the schema says: {wrong.json_path}: {wrong.message}"))
    return replace(reply, value=value)


@lru_cache(maxsize=64)
def validator(schema: str) -> Draft202012Validator:
    """The validator of a schema. Raises UsageError for a text that is no JSON schema."""
    try:
        parsed = json.loads(schema)
        Draft202012Validator.check_schema(parsed)
    except (ValueError, SchemaError) as error:
        raise UsageError(f"not a JSON schema: {_one_line(str(error))}") from error
    return Draft202012Validator(parsed)


def _object_in(text: str) -> Any:
    """The JSON of a reply: all of it, or from its first brace to its last."""
    try:
        return json.loads(text)
    except ValueError:
        first, last = text.find("{"), text.rfind("}")
        if not 0 <= first < last:
            raise
        return json.loads(text[first : last + 1])


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_SHOWN]
