"""The chat model `vllm`: an LLM in vLLM, in processes of this actor, on GPUs. Needs the extra `vllm`."""

from persona.chat.engine_chat import check, identity, load

__all__ = ["check", "identity", "load"]
