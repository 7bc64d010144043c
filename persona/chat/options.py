"""Which chat model is asked, how often at a time and at what price; `--help` needs it, so it imports nothing heavy."""

from dataclasses import dataclass
from typing import Literal

from persona.errors import UsageError
from persona.option_checks import check_above_zero, check_at_least, check_default, given
from persona.options import Precision

Chat = Literal["http", "local", "vllm"]


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """The LLM that is asked by messages, and what its tokens cost."""

    chat: Chat = "http"
    """http asks the endpoint at $OPENAI_BASE_URL with the key $OPENAI_API_KEY; local and vllm load the model."""
    chat_model: str | None = None
    """Name of the model at the endpoint; for local and vllm a folder, an s3:// folder or a hub id."""
    chat_concurrency: int = 16
    """With http: requests that wait for a reply at the same time, over all actors."""
    chat_timeout_s: float = 120.0
    """With http: a reply that takes longer than this many seconds is given up and asked for again."""
    chat_retry_s: float = 600.0
    """With http: end the job when one request has failed for this many seconds, retries included."""
    chat_precision: Precision = "auto"
    """With local and vllm: precision of the model; auto is bf16 where the hardware supports it."""
    chat_batch_size: int = 8
    """With local: prompts per forward pass; lower it when memory runs out."""
    chat_gpus: int = 1
    """With vllm: GPUs of one node that share a copy of the model."""
    chat_max_model_len: int | None = None
    """With vllm: tokens of the longest prompt with its reply; default as many as the model and the memory allow."""
    chat_price_in: float | None = None
    """Price of a million prompt tokens in your currency; give both prices to see the cost in the summary."""
    chat_price_out: float | None = None
    """Price of a million reply tokens."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        if self.chat != "http":
            check_default(self, "chat_concurrency", "chat_timeout_s", "chat_retry_s", needs="--chat http")
        else:
            check_default(self, "chat_precision", needs="--chat local or vllm")
        if self.chat != "local":
            check_default(self, "chat_batch_size", needs="--chat local")
        if self.chat != "vllm":
            check_default(self, "chat_gpus", "chat_max_model_len", needs="--chat vllm")
        check_at_least(self, 1, "chat_concurrency", "chat_batch_size", "chat_gpus", "chat_max_model_len")
        check_above_zero(self, "chat_timeout_s")
        check_at_least(self, 0, "chat_retry_s")
        if (self.chat_price_in is None) != (self.chat_price_out is None):
            raise UsageError("--chat-price-in and --chat-price-out go together; give both or neither")
        for name in ("chat_price_in", "chat_price_out"):
            price = getattr(self, name)
            if price is not None and not 0 <= price < float("inf"):
                raise UsageError(f"{given(self, name)}: must be 0 or more")

    @property
    def model(self) -> str:
        """The model's name. Raises UsageError when it is not given."""
        if not self.chat_model:
            raise UsageError(f"--chat {self.chat} needs --chat-model, the name or folder of the model to ask")
        return self.chat_model

    def cost(self, n_prompt_tokens: int, n_answer_tokens: int) -> float | None:
        """What so many tokens cost; None without prices."""
        if self.chat_price_in is None or self.chat_price_out is None:
            return None
        return (self.chat_price_in * n_prompt_tokens + self.chat_price_out * n_answer_tokens) / 1e6
