"""The chat model `local`: an LLM in transformers, in this process, on a GPU or CPU."""

from persona.chat.engine_chat import check, identity, load

__all__ = ["check", "identity", "load"]
