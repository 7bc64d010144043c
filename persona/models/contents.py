"""The files of a model folder that change its results: which they are, whether they can be read, their fingerprint."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from persona.errors import InputError

# What is downloaded: configuration, tokenizer and weights; never code, and never a pickled checkpoint. The patterns
# also match in subfolders.
DOWNLOADED = (
    "*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.spm", "*.codes", "*.tiktoken", "*.tokenizer",
)  # fmt: skip
# Copies of the weights for other libraries.
NOT_DOWNLOADED = ("onnx/*", "openvino/*", "original/*", "consolidated*")

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_MODULES, _ADAPTER = "modules.json", "adapter_config.json"
_CONFIGURATION = (
    "config.json", "generation_config.json", _MODULES, "config_sentence_transformers.json",
    "sentence_*_config.json", "router_config.json",
    "chat_template*.json", "*.jinja", "additional_chat_templates/*.jinja",
)  # fmt: skip
# The files of all tokenizers of transformers.
_TOKENIZER = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "*vocab*.json", "vocab*.txt", "merges.txt",
    "*.model", "*.spm", "*.codes", "*.tiktoken", "*.tokenizer", "dict.txt", "emoji.json", "normalizer.json",
    "word_*.json", "byte_maps.json", "tekken.json",
)  # fmt: skip
# Which of them are JSON objects; those of the tokenizer are large and left to it.
_OBJECTS = ("*config*.json", "special_tokens_map.json", "added_tokens.json")

_SAMPLES_PER_FILE = 64
_SAMPLE_BYTES = 64 * 1024


def check(folder: Path) -> None:
    """Raises InputError when the folder holds no whole model, or one that is saved in a form that is not supported."""
    if not (folder / "config.json").is_file():
        adapter = ": it is an adapter, which must be merged into its model" if (folder / _ADAPTER).is_file() else ""
        raise InputError(f"it has no config.json, so it is not a saved transformers model{adapter}")
    if (folder / _ADAPTER).is_file():
        raise InputError(f"it has an adapter ({_ADAPTER}) beside the model; merge the two and save the result")
    if read_object(folder, "config.json").get("transformers_weights"):
        raise InputError(f"config.json names its weights by transformers_weights; save them as {_WEIGHTS}")
    for file in _small_files(folder):
        if any(file.match(pattern) for pattern in _OBJECTS):
            read_object(folder, file.relative_to(folder).as_posix())


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads the weights from. Raises InputError when one is missing."""
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if not (folder / _INDEX).is_file():
        others = sorted(file.name for file in folder.glob("*.safetensors"))
        if others:
            raise InputError(f"it has {_listed(others)}, but neither {_WEIGHTS} nor {_INDEX}; copy the whole folder")
        raise InputError("it has no *.safetensors weights; pickled weights are never loaded, so convert them first")
    shard_of = read_object(folder, _INDEX).get("weight_map")
    names = list(shard_of.values()) if isinstance(shard_of, dict) else []
    if not names or not all(isinstance(name, str) and PurePosixPath(name).name == name for name in names):
        raise InputError(f"{_INDEX} does not say which files hold the weights; copy the whole folder again")
    shards = [folder / name for name in sorted({*names})]
    absent = [shard.name for shard in shards if not shard.is_file()]
    if absent:
        raise InputError(
            f"{len(absent)} of the {len(shards)} files that {_INDEX} names are missing: {_listed(absent)}; "
            "copy them, too"
        )
    return shards


def fingerprint(folder: Path) -> str:
    """Hash of configuration, tokenizer, tensor names and shapes, and evenly spaced samples of the weights.

    Hashing all of a 40 GB folder would take a minute at the start of each job. Training changes every weight, so
    samples are enough to notice it. Raises InputError for files that cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted({*weight_files(folder), *_small_files(folder), *_module_weights(folder)}):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()}:{size}:".encode())
        with file.open("rb") as stream:
            if file.suffix != ".safetensors":
                digest.update(stream.read())
                continue
            start = 8 + check_safetensors(file)
            digest.update(stream.read(start))
            step = max((size - start) // _SAMPLES_PER_FILE, _SAMPLE_BYTES)
            for at in range(start, size, step):
                stream.seek(at)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def read_object(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of the folder. Raises InputError when the file holds anything else."""
    found = _parsed(folder, name)
    if not isinstance(found, dict):
        raise InputError(f"{name} must be a JSON object, not a {type(found).__name__}; copy the file again")
    return found


def _parsed(folder: Path, name: str) -> Any:
    try:
        return json.loads((folder / name).read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is not valid JSON ({error}); copy the file again") from error


def check_safetensors(file: Path) -> int:
    """The length of a safetensors file's header in bytes. Raises InputError when the file is truncated or broken."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"), file.open("rb") as stream:
            return int.from_bytes(stream.read(8), "little")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file.name} is not a whole safetensors file ({error}); copy the file again") from error


def _small_files(folder: Path) -> Iterator[Path]:
    """Configuration and tokenizer of the model and of its sentence-transformers modules."""
    for pattern in (*_CONFIGURATION, *_TOKENIZER):
        yield from (file for file in folder.glob(pattern) if file.is_file())
    for module in _module_folders(folder):
        yield from (file for pattern in DOWNLOADED[1:] for file in module.rglob(pattern) if file.is_file())


def _module_weights(folder: Path) -> Iterator[Path]:
    for module in _module_folders(folder):
        yield from module.rglob(DOWNLOADED[0])


def _module_folders(folder: Path) -> Iterator[Path]:
    """The subfolders that `modules.json` of sentence-transformers names, such as `1_Pooling`."""
    modules = _parsed(folder, _MODULES) if (folder / _MODULES).is_file() else []
    if not isinstance(modules, list):
        modules = [None]
    names = [module.get("path") if isinstance(module, dict) else None for module in modules]
    paths = [PurePosixPath(name) for name in names if isinstance(name, str)]
    if len(paths) < len(names) or any(path.is_absolute() or ".." in path.parts for path in paths):
        raise InputError(f"{_MODULES} must be a list of modules in subfolders; copy the whole folder again")
    yield from (folder / path for path in paths if path.parts)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
