"""Loads pretrained parts from a model folder: whole and without code from the folder, or not at all.

transformers gives tensors that a folder lacks random values, and ignores tensors that it does not know. Here both end
in an InputError that names them.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from logging import CRITICAL
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from persona.errors import InputError
from persona.models import contents
from persona.models.resolve import ModelFolder

_LOCAL = {"trust_remote_code": False, "local_files_only": True}
# BERT's pooler, which is never used here, and buffers that transformers computes.
_MAY_BE_MISSING = re.compile(r"(^|\.)(pooler\..+|position_ids|token_type_ids|inv_freq)$")
_SHOWN = 3


def load_config(folder: ModelFolder) -> PreTrainedConfig:
    """The configuration of a model. Raises InputError when transformers does not implement it, or it is invalid."""
    found = folder.config
    kind = found.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        reason = f"transformers {transformers.__version__} does not implement it; upgrade it, or choose another model"
        if "auto_map" in found:
            reason = "it needs Python code from its folder, which is never run; choose one that transformers implements"
        raise InputError(f"the model {folder.name!r} has the model_type {kind!r}: {reason}")
    with _refusing(folder, "its config.json is invalid"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder.path, **_LOCAL)
        return config


def load_tokenizer(folder: ModelFolder) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. Raises InputError when its files are missing or broken."""
    with _refusing(folder, "its tokenizer cannot be loaded"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder.path, **_LOCAL)
    # Without its vocabulary, a tokenizer of transformers knows its special tokens only. Byte-level ones need no file.
    names = {*tokenizer.vocab_files_names.values()}
    if names and not any((folder.path / name).is_file() for name in {*names, "tokenizer.json", "tekken.json"}):
        raise InputError(
            f"the model {folder.name!r} has no vocabulary for its tokenizer ({' or '.join(sorted(names))}); "
            "copy the whole folder"
        )
    return tokenizer


def llm_class(config: PreTrainedConfig) -> Any:
    """The auto class that loads an LLM with its head."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def load_model(auto_class: Any, folder: ModelFolder, *, dtype: torch.dtype, **options: Any) -> Any:
    """The model of a folder, a `PreTrainedModel`, with all of its weights.

    Args:
        auto_class: of transformers, such as `AutoModel`.
        folder: the model.
        dtype: of the weights.
        options: more arguments of `from_pretrained`.

    Raises:
        InputError: weights are missing, have another shape than the configuration says, or would not be used.
    """
    options = {"config": load_config(folder), **options}
    if not is_deepspeed_zero3_enabled():  # each of its workers holds a part of each tensor
        check_weights(folder, auto_class, config=options["config"])
    model, info = auto_class.from_pretrained(
        folder.path, dtype=dtype, use_safetensors=True, output_loading_info=True, **options, **_LOCAL
    )
    _refuse_differences(folder, model, info)
    return model


def check_weights(folder: ModelFolder, auto_class: Any, *, config: PreTrainedConfig | None = None) -> None:
    """Raises InputError as `load_model` does, but reads only the headers of the weights and needs no memory for them.

    Weights that are quantized in the folder are only checked by `load_model`, since that depends on the hardware.
    """
    config = config or load_config(folder)
    if getattr(config, "quantization_config", None) is not None:
        return
    names_and_shapes = _tensors(folder)
    with _quiet(), _refusing(folder, "it cannot be loaded"):
        with torch.device("meta"):
            empty = auto_class.from_config(config, trust_remote_code=False)
        model, info = type(empty).from_pretrained(
            None,
            config=empty.config,
            state_dict={name: torch.empty(shape, device="meta") for name, shape in names_and_shapes},
            device_map="meta",
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    _refuse_differences(folder, model, info)


def _refuse_differences(folder: ModelFolder, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Raises InputError when the weights in the folder are not those of the model."""
    missing = sorted(name for name in info["missing_keys"] if not _MAY_BE_MISSING.search(name))
    other_shape = [f"{name} ({_shape(found)} instead of {_shape(own)})" for name, found, own in info["mismatched_keys"]]
    unknown = sorted(name for name in info["unexpected_keys"] if missing or _is_inside(model, name))
    if getattr(model.config, "quantization_config", None) is not None:
        unknown = []  # scales that other libraries read, such as those of the key-value cache
    wrong = [
        f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''})"
        for what, names in (("missing", missing), ("of another shape", sorted(other_shape)), ("unknown", unknown))
        if names
    ]
    if wrong:
        raise InputError(
            f"the weights of {folder.name!r} are not those of a {type(model).__name__} as config.json describes it: "
            f"{'; '.join(wrong)}; copy the whole folder again, or save the model with transformers' save_pretrained"
        )


def _is_inside(model: PreTrainedModel, name: str) -> bool:
    """Whether a tensor belongs to a part that the model has, and is not computed by it.

    Otherwise it belongs to a head that is not needed, or is a causal mask, which old checkpoints contain.
    """
    prefix = f"{model.base_model_prefix}."
    computed = {name.removeprefix(prefix) for name, _ in model.named_buffers()}
    parts = {name for module in (model, model.base_model) for name, _ in module.named_children()}
    own = name.removeprefix(prefix)
    return own.split(".")[0] in parts and own not in computed and not own.endswith(".masked_bias")


def _tensors(folder: ModelFolder) -> Iterator[tuple[str, list[int]]]:
    """Names and shapes in the headers of the weights."""
    for file in contents.weight_files(folder.path):
        # Not "pt", which maps the file for writing: that fails for files larger than the memory.
        with safe_open(file, framework="np") as stream:
            for name in stream.keys():  # noqa: SIM118 - it is no mapping
                yield name, stream.get_slice(name).get_shape()


@contextmanager
def _refusing(folder: ModelFolder, problem: str) -> Iterator[None]:
    """Turns whatever a library raises for a broken folder into an InputError."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"the model {folder.name!r}: {problem} ({reason}); copy the whole folder again") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers from printing a report and a progress bar."""
    logging = transformers.utils.logging
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _shape(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape))
