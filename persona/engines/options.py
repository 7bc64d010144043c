"""Which engine generates answers, and how much of the GPUs it takes; `--help` needs it, so it imports nothing heavy."""

from dataclasses import dataclass
from typing import Literal

from persona.errors import UsageError
from persona.option_checks import check_at_least, check_default, given

Engine = Literal["local", "vllm"]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What generates the answers, and how much of the GPUs it takes."""

    engine: Engine = "local"
    """Engine: local is transformers; vllm is faster on GPUs, for decoder-only LLMs and without beams (--beams 1)."""
    tensor_parallel: int = 1
    """GPUs of one node that share each layer of an LLM in vllm; raise it for an LLM that does not fit one GPU."""
    pipeline_parallel: int = 1
    """Groups of such GPUs, each with a part of the layers."""
    max_model_len: int | None = None
    """Tokens of the longest prompt with its answer in vllm; default as many as the LLM and the memory allow."""
    gpu_memory_utilization: float = 0.85
    """Share of each GPU that vllm takes; the plug needs some of the rest."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        if self.engine == "local":
            of_vllm = ("tensor_parallel", "pipeline_parallel", "max_model_len", "gpu_memory_utilization")
            check_default(self, *of_vllm, needs="--engine vllm")
        check_at_least(self, 1, "tensor_parallel", "pipeline_parallel", "max_model_len")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise UsageError(f"{given(self, 'gpu_memory_utilization')}: must be above 0 and at most 1")

    @property
    def n_devices(self) -> int:
        """GPUs that hold one copy of the LLM."""
        return self.tensor_parallel * self.pipeline_parallel
